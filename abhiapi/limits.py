"""Limits per key: calls in any minute (a moving window) and calls at once (leases).

A refusal for concurrency does not use up the minute, so the lease comes first. Leases are objects in a set with a
deadline each, never a counter: one that is lost with its greenlet stops counting when its deadline passes.
With Redis all processes count together (`shared_counts`); what this one admits it counts for itself as well, and
while Redis is away it decides by that. Counts may be lost; money is not kept here.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from sys import maxsize
from time import time
from typing import TYPE_CHECKING, Any

from limits import RateLimitItemPerMinute
from limits.strategies import MovingWindowRateLimiter

from abhiapi.errors import RateLimited, TooManyConcurrent
from abhiapi.settings import UPLOAD_S, Settings
from abhiapi.windows import STORAGE_URI, ExactMemoryStorage, Standing

if TYPE_CHECKING:
    from abhiapi.shared_counts import SharedCounts, Verdict

SHARED_URI = "abhiapi-shared://"  # what a Redis in the settings means to the `limits` library
UPLOADS_PER_MINUTE = 300  # per key, far above what any client begins


class SharedStorage(ExactMemoryStorage):
    """The same windows, counted by all processes in Redis; each for itself while Redis is away."""

    STORAGE_SCHEME = ["abhiapi-shared"]

    def __init__(self, uri: str | None = None, wrap_exceptions: bool = False, *, limits: CallLimits, **_: Any) -> None:
        super().__init__(uri, wrap_exceptions=wrap_exceptions)
        self._limits = limits

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        hit = self._limits.shared_window(key, limit, expiry, amount)
        if hit is None:
            return super().acquire_entry(key, limit, expiry, amount)
        if hit[0]:  # here as well, for when Redis is away
            super().acquire_entry(key, limit + amount, expiry, amount)
        return hit[0]

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        hit = self._limits.shared_window(key, limit, expiry, 0)
        if hit is None:
            return super().get_moving_window(key, limit, expiry)
        return self._now() + hit[1].resets_s - expiry, hit[1].used


@dataclass(frozen=True, slots=True)
class Plan:
    requests_per_minute: int
    concurrent: int


class Lease:
    """A place among a key's calls at once. Release it when the call is over; a second time does nothing."""

    __slots__ = ("_limits", "deadline", "key_id", "member", "plan")

    def __init__(self, limits: CallLimits, key_id: int, plan: str, member: str, deadline: float) -> None:
        self._limits = limits
        self.key_id, self.plan, self.member = key_id, plan, member
        self.deadline = deadline

    def release(self) -> Standing:
        """Give the place back. How the key's minute stands at the end of its call."""
        return self._limits.leave(self)


class CallLimits:
    """Decides whether a key may make one more call just now: with Redis for all processes, else for this one."""

    def __init__(
        self,
        settings: Settings,
        *,
        now: Callable[[], float] = time,
        on_fallback: Callable[[], object] = lambda: None,
        **of_redis: float,
    ) -> None:
        """``on_fallback`` is called for each decision that was made without the Redis of the settings."""
        self.plans = {
            "free": Plan(settings.rate_per_minute, settings.concurrency),
            "pro": Plan(settings.pro_rate_per_minute, settings.pro_concurrency),
        }
        self._now = now
        self._on_fallback = on_fallback
        self._process = secrets.token_hex(8)
        self._numbers = count(1)
        self._places: dict[int, set[Lease]] = {}
        self._lease_s = UPLOAD_S + settings.longest_call_s
        self._here = ExactMemoryStorage(STORAGE_URI, now=now)
        self._window = MovingWindowRateLimiter(self._here)
        self._items = {name: RateLimitItemPerMinute(plan.requests_per_minute) for name, plan in self.plans.items()}
        self._uploads = RateLimitItemPerMinute(UPLOADS_PER_MINUTE, namespace="uploads")
        self.shared: SharedCounts | None = None
        self.storage_uri = STORAGE_URI
        self.storage_options: dict[str, Any] = {}
        self._upload_window = self._window
        if settings.limits_url.startswith("memory"):
            return
        from abhiapi.shared_counts import SharedCounts  # here, because most serve with memory:// and need no redis

        self.shared = SharedCounts(settings.limits_url, self._running_members, **of_redis)
        self.storage_uri, self.storage_options = SHARED_URI, {"limits": self}
        self._upload_window = MovingWindowRateLimiter(SharedStorage(limits=self))

    def enter(self, key_id: int, plan: str) -> Lease:
        """Take a place and count one call. Raises `TooManyConcurrent` (the minute untouched) or `RateLimited`."""
        allowed, item = self.plans[plan].concurrent, self._items[plan]
        member = f"{self._process}-{next(self._numbers)}"
        entered = None
        if self.shared is not None:
            entered = self.shared.enter(key_id, member, at_once=allowed, per_minute=item.amount)
            if entered is None:
                self._on_fallback()
            elif entered[0] == "admitted":  # counted here as well, for when Redis is away
                self._here.acquire_entry(item.key_for(str(key_id)), maxsize, item.get_expiry())
        verdict, standing = entered or self._enter_here(key_id, plan)
        if verdict == "at_once":
            raise TooManyConcurrent(
                f"{allowed} calls of this key are running already: wait for one to end", retry_after_s=1
            )
        if verdict == "minute":
            wait_s = max(1, int(standing.resets_s) + 1)
            raise RateLimited(
                f"more than {item.amount} calls in a minute: try again in {wait_s} s", retry_after_s=wait_s
            )
        lease = Lease(self, key_id, plan, member, self._now() + self._lease_s)
        self._places.setdefault(key_id, set()).add(lease)
        if self.shared is not None:
            self.shared.admitted(key_id, member)
        return lease

    def leave(self, lease: Lease) -> Standing:
        """Give a place back, once; how its key's minute stands."""
        standing = None
        if self._drop(lease) and self.shared is not None:
            standing = self.shared.leave(lease.key_id, lease.member)
        return standing or self._standing_here(lease.key_id, lease.plan)

    def allow_upload(self, key_id: int) -> None:
        """Count the beginning of an upload, apart from calls. Raises `RateLimited`."""
        if not self._upload_window.hit(self._uploads, str(key_id)):
            raise RateLimited(f"more than {UPLOADS_PER_MINUTE} uploads in a minute", retry_after_s=5)

    def headers(self, key_id: int, plan: str, standing: Standing | None = None) -> list[tuple[str, str]]:
        """`X-RateLimit-*` as they stand: the limit, what remains of it, and when the oldest call leaves the window."""
        if standing is None and self.shared is not None:
            standing = self.shared.standing(key_id)
        standing = standing or self._standing_here(key_id, plan)
        limit = self._items[plan].amount
        return [
            ("X-RateLimit-Limit", str(limit)),
            ("X-RateLimit-Remaining", str(max(0, limit - standing.used))),
            ("X-RateLimit-Reset", str(int(self._now() + standing.resets_s) + 1)),
        ]

    def in_flight(self) -> int:
        """Calls of this process running just now, over all keys."""
        return sum(len(places) for places in self._places.values())

    def is_shared(self) -> bool:
        """Whether limits are counted over all processes just now."""
        return self.shared is not None and self.shared.is_up

    def shared_window(self, key: str, limit: int, expiry_s: int, amount: int) -> tuple[bool, Standing] | None:
        """Count in another window than that of calls (`SharedStorage`). None while Redis is away."""
        assert self.shared is not None
        member = f"{self._process}-{next(self._numbers)}"
        hit = self.shared.hit(key, member, amount=amount, limit=limit, window_s=expiry_s)
        if hit is None:
            self._on_fallback()
        return hit

    def close(self) -> None:
        if self.shared is not None:
            self.shared.close()

    def _enter_here(self, key_id: int, plan: str) -> tuple[Verdict, Standing]:
        """The decision of this process alone."""
        allowed, item = self.plans[plan].concurrent, self._items[plan]
        if self._running(key_id) >= allowed:
            self._drop_overdue(key_id)
            if self._running(key_id) >= allowed:
                return "at_once", self._standing_here(key_id, plan)
        admitted = self._window.hit(item, str(key_id))
        return "admitted" if admitted else "minute", self._standing_here(key_id, plan)

    def _standing_here(self, key_id: int, plan: str) -> Standing:
        item = self._items[plan]
        stats = self._window.get_window_stats(item, str(key_id))
        return Standing(item.amount - stats.remaining, stats.reset_time - self._now())

    def _running(self, key_id: int) -> int:
        return len(self._places.get(key_id, ()))

    def _running_members(self) -> Iterator[tuple[int, str]]:
        """The calls whose places are renewed: one that was lost with its greenlet is not, from its deadline on."""
        now = self._now()
        for key_id, places in self._places.items():
            yield from ((key_id, lease.member) for lease in places if lease.deadline >= now)

    def _drop(self, lease: Lease) -> bool:
        """Whether the lease held a place, which it does no longer."""
        taken = self._places.get(lease.key_id, set())
        if lease not in taken:
            return False
        taken.discard(lease)
        if not taken:  # nothing is kept of keys that make no call just now
            del self._places[lease.key_id]
        return True

    def _drop_overdue(self, key_id: int) -> None:
        now = self._now()
        for lease in [lease for lease in self._places.get(key_id, ()) if lease.deadline < now]:
            self._drop(lease)
