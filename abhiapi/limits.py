"""Limits per key: calls in any minute (the `limits` library's moving window) and calls at once (leases).

A refusal for concurrency does not use up the minute, so the lease comes first. Leases are objects in a set with a
deadline each, never a counter: one that is lost with its greenlet stops counting when its deadline passes.
Counts may be lost with the process; money is not kept here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import time

from limits import RateLimitItemPerMinute
from limits.storage import MovingWindowSupport, Storage
from limits.strategies import MovingWindowRateLimiter

from abhiapi.errors import RateLimited, TooManyConcurrent
from abhiapi.settings import UPLOAD_S, Settings

STORAGE_URI = "exact-memory://"  # what `memory://`, the one storage of this release, means here
UPLOADS_PER_MINUTE = 300  # per key, far above what any client begins
_KEYS_BETWEEN_SWEEPS = 4096


class ExactMemoryStorage(Storage, MovingWindowSupport):
    """Times of recent calls, a deque per key: what `memory://` means here.

    The library's own memory storage sweeps all keys a hundred times a second, which costs 1 to 2 ms a call at 20,000
    keys (docs/decisions/0004). This one forgets as it looks, and sweeps once in a while.
    """

    STORAGE_SCHEME = ["exact-memory"]

    def __init__(
        self,
        uri: str | None = None,
        wrap_exceptions: bool = False,
        *,
        now: Callable[[], float] = time,
        **_: float | str | bool,
    ) -> None:
        super().__init__(uri, wrap_exceptions=wrap_exceptions)
        self._now = now
        self._times: dict[str, deque[float]] = {}
        self._new_keys = 0
        self._longest_s = 0

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        now = self._now()
        self._longest_s = max(self._longest_s, expiry)
        times = self._fresh(key, now - expiry)
        if len(times) + amount > limit:
            return False
        times.extend([now] * amount)
        return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        now = self._now()
        times = self._fresh(key, now - expiry)
        return (times[0] if times else now), len(times)

    def _fresh(self, key: str, since: float) -> deque[float]:
        times = self._times.get(key)
        if times is None:
            self._new_keys += 1
            if self._new_keys >= _KEYS_BETWEEN_SWEEPS:
                self._sweep(self._now() - self._longest_s)  # windows of several lengths share this storage
            times = self._times[key] = deque()
        while times and times[0] <= since:
            times.popleft()
        return times

    def _sweep(self, since: float) -> None:
        self._new_keys = 0
        self._times = {key: times for key, times in self._times.items() if times and times[-1] > since}

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        raise NotImplementedError("only moving windows are counted here")

    def get(self, key: str) -> int:
        return len(self._times.get(key, ()))

    def get_expiry(self, key: str) -> float:
        times = self._times.get(key)
        return times[-1] if times else 0

    def check(self) -> bool:
        return True

    def reset(self) -> int | None:
        count = len(self._times)
        self._times.clear()
        return count

    def clear(self, key: str) -> None:
        self._times.pop(key, None)


@dataclass(frozen=True, slots=True)
class Plan:
    requests_per_minute: int
    concurrent: int


class Lease:
    """A place among a key's calls at once. Release it when the call is over; a second time does nothing."""

    __slots__ = ("_key_id", "_places", "deadline")

    def __init__(self, places: dict[int, set[Lease]], key_id: int, deadline: float) -> None:
        self._places = places
        self._key_id = key_id
        self.deadline = deadline
        places.setdefault(key_id, set()).add(self)

    def release(self) -> None:
        taken = self._places.get(self._key_id)
        if taken is not None:
            taken.discard(self)
            if not taken:  # nothing is kept of keys that make no call just now
                del self._places[self._key_id]


class CallLimits:
    """Decides whether a key may make one more call just now."""

    def __init__(self, settings: Settings, *, now: Callable[[], float] = time) -> None:
        self.plans = {
            "free": Plan(settings.rate_per_minute, settings.concurrency),
            "pro": Plan(settings.pro_rate_per_minute, settings.pro_concurrency),
        }
        self.storage_uri = STORAGE_URI
        self._window = MovingWindowRateLimiter(ExactMemoryStorage(self.storage_uri, now=now))
        self._items = {name: RateLimitItemPerMinute(plan.requests_per_minute) for name, plan in self.plans.items()}
        self._uploads = RateLimitItemPerMinute(UPLOADS_PER_MINUTE, namespace="uploads")
        self._lease_s = UPLOAD_S + settings.longest_call_s
        self._places: dict[int, set[Lease]] = {}
        self._now = now

    def enter(self, key_id: int, plan: str) -> Lease:
        """Take a place and count one call. Raises `TooManyConcurrent` (the minute untouched) or `RateLimited`."""
        allowed = self.plans[plan].concurrent
        if self._running(key_id) >= allowed:
            self._drop_overdue(key_id)
            if self._running(key_id) >= allowed:
                raise TooManyConcurrent(
                    f"{allowed} calls of this key are running already: wait for one to end", retry_after_s=1
                )
        lease = Lease(self._places, key_id, self._now() + self._lease_s)
        item = self._items[plan]
        try:
            admitted = self._window.hit(item, str(key_id))
        except BaseException:
            lease.release()
            raise
        if not admitted:
            lease.release()
            reset = self._window.get_window_stats(item, str(key_id)).reset_time
            wait_s = max(1, int(reset - self._now()) + 1)
            raise RateLimited(
                f"more than {item.amount} calls in a minute: try again in {wait_s} s", retry_after_s=wait_s
            )
        return lease

    def allow_upload(self, key_id: int) -> None:
        """Count the beginning of an upload, apart from calls. Raises `RateLimited`."""
        if not self._window.hit(self._uploads, str(key_id)):
            raise RateLimited(f"more than {UPLOADS_PER_MINUTE} uploads in a minute", retry_after_s=5)

    def headers(self, key_id: int, plan: str) -> list[tuple[str, str]]:
        """`X-RateLimit-*` as they stand: the limit, what remains of it, and when the oldest call leaves the window."""
        item = self._items[plan]
        stats = self._window.get_window_stats(item, str(key_id))
        return [
            ("X-RateLimit-Limit", str(item.amount)),
            ("X-RateLimit-Remaining", str(max(0, stats.remaining))),
            ("X-RateLimit-Reset", str(int(stats.reset_time) + 1)),
        ]

    def in_flight(self) -> int:
        """Calls running just now, over all keys."""
        return sum(len(places) for places in self._places.values())

    def _running(self, key_id: int) -> int:
        return len(self._places.get(key_id, ()))

    def _drop_overdue(self, key_id: int) -> None:
        now = self._now()
        for lease in [lease for lease in self._places.get(key_id, ()) if lease.deadline < now]:
            lease.release()
