"""What pollers share: answers that are on their way or a moment old, and a limit against floods.

fal's Python client polls ten times a second; a thousand pollers of one job are one request to fal. In memory only:
nothing here is lost that matters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from time import monotonic
from typing import Any, Generic, TypeVar, cast

import gevent
from gevent.event import AsyncResult

from abhiapi.errors import RateLimited, TooManyConcurrent

T = TypeVar("T")

FRESH_S = 0.3  # how old a status may be
FETCH_AGAIN_S, RETRY_S = 0.1, 0.25  # first pauses, where the way to fal's queue is in trouble and where a result is
LOOK_AGAIN_S = 0.1  # between looks at a call that another process works on
POLLS_PER_SECOND = 1_000  # per key; ten polls a second for each of a hundred jobs
POLLS_AT_ONCE = 2_000
OPEN_MAX = 500  # status streams and large results of one account on their way at once
BUCKETS_MAX = 4_096


class Shared(Generic[T]):
    """Answers by key: asked for once while somebody waits, and kept for a moment after."""

    def __init__(self, fresh_s: float, now: Callable[[], float] = monotonic) -> None:
        self._fresh_s = fresh_s
        self._now = now
        self._entries: dict[Hashable, tuple[AsyncResult[Any], list[float]]] = {}

    def get(self, key: Hashable, fetch: Callable[[], T]) -> T:
        """The answer under ``key``: the one that is fresh or on its way, else what ``fetch`` gives or raises."""
        entry = self._entries.get(key)
        if entry is not None and (not entry[1] or self._now() - entry[1][0] < self._fresh_s):
            return cast(T, entry[0].get())
        self._forget_old()
        answer: AsyncResult[Any] = AsyncResult()
        done: list[float] = []
        self._entries[key] = (answer, done)

        def work() -> None:
            # In a greenlet of its own: a caller who goes away takes nothing from the others who wait.
            try:
                value = fetch()
            except BaseException as error:
                self.forget(key)
                answer.set_exception(error)
            else:
                done.append(self._now())
                answer.set(value)

        gevent.spawn(work)
        return cast(T, answer.get())

    def forget(self, key: Hashable) -> None:
        self._entries.pop(key, None)

    def _forget_old(self) -> None:
        """Drop what is old, from the oldest on, a few at a time so that nobody pays for everybody's."""
        since = self._now() - self._fresh_s
        for _ in range(min(4, len(self._entries))):
            key = next(iter(self._entries))
            answer, done = self._entries[key]
            if done and done[0] > since:
                return
            del self._entries[key]
            if not done:
                self._entries[key] = (answer, done)  # still on its way: looked at again later


class Polls:
    """The polls of a serving process."""

    def __init__(self) -> None:
        self.statuses: Shared[Any] = Shared(FRESH_S)
        self.settling: Shared[Any] = Shared(0)
        self._buckets: dict[int, tuple[float, float]] = {}
        self._open: Counter[int] = Counter()

    def allow(self, key_id: int) -> None:
        """Count a poll. Raises `RateLimited`, far above what any client does."""
        now = monotonic()
        left, at = self._buckets.get(key_id, (float(POLLS_AT_ONCE), now))
        left = min(float(POLLS_AT_ONCE), left + (now - at) * POLLS_PER_SECOND)
        if left < 1:
            raise RateLimited(f"more than {POLLS_PER_SECOND} polls in a second", retry_after_s=1)
        if len(self._buckets) >= BUCKETS_MAX:
            self._buckets.clear()
        self._buckets[key_id] = (left - 1, now)

    def check_open(self, account_id: int) -> None:
        """Raises `TooManyConcurrent` where an account has more answers open than any program reads."""
        if self._open[account_id] >= OPEN_MAX:
            raise TooManyConcurrent(f"{OPEN_MAX} streams of this account are open already", retry_after_s=1)

    def opened(self, account_id: int) -> Callable[[], None]:
        """Count an answer that leaves in pieces; call what comes back when it has ended."""
        self._open[account_id] += 1

        def close() -> None:
            self._open[account_id] -= 1
            if self._open[account_id] <= 0:
                del self._open[account_id]

        return close
