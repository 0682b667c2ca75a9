"""Calls in moving windows as one process counts them by itself, and how a window stands.

Counts may be lost with the process; money is not kept here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import time

from limits.storage import MovingWindowSupport, Storage

STORAGE_URI = "exact-memory://"  # what `memory://` in the settings means here
_KEYS_BETWEEN_SWEEPS = 4096


@dataclass(frozen=True, slots=True)
class Standing:
    """Calls counted in a window, and in how many seconds the oldest of them leaves it."""

    used: int
    resets_s: float


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
