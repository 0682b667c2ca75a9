"""Whose turn it is at fal, of all who wait at any process, and the places of those whose turn has come, in Redis.

The order is that of `fairness`. Each process tells who waits at it whenever it asks, so that what it has told is young
while it lives and soon forgotten when it dies, and so that a Redis that has lost everything knows it again.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from itertools import count

from abhiapi.fairness import NOBODY
from abhiapi.redis_line import RedisAway
from abhiapi.shared_counts import SharedCounts, places_of
from abhiapi.shared_scripts import NEXT, TAKEN

WAITS_S = 1.0  # after which a killed process's waiters hold nobody up
KEPT_S = 600  # the longest time that a call may wait: a last turn before that says nothing
EVERYBODY = 0  # no key has this number: the places of all calls together
WAITING, LAST_TURNS = f"abhiapi:{{{EVERYBODY}}}:waiting", f"abhiapi:{{{EVERYBODY}}}:turns"
_MICROS = 1_000_000


class SharedTurns:
    """The turns of all processes. None for an answer means that Redis is away."""

    def __init__(self, counts: SharedCounts, *, waits_s: float = WAITS_S) -> None:
        self._counts = counts
        self._waits = int(waits_s * _MICROS)
        self._process = secrets.token_hex(8)
        self._numbers = count(1)
        self._is_told = False  # that calls wait here

    def also_running(self, members: Callable[[], Iterable[str]]) -> None:
        """Renew these places."""
        self._counts.also_running(lambda: [(EVERYBODY, member) for member in members()])

    def new_place(self) -> str:
        return f"{self._process}-fal-{next(self._numbers)}"

    def member(self, place: str, account_id: int) -> str:
        """A place as Redis knows it: whose it is stands in its name."""
        return f"{place}:{account_id}"

    def next(self, place: str, at_once: int, accounts: Sequence[tuple[int, float]], *, calls: int) -> int | None:
        """The account of a call of this process whose turn it is, and has the place now, or `NOBODY`.

        ``accounts`` that wait at this process, with how long the oldest call of each has; ``calls`` of theirs.
        """
        told = " ".join(f"{account_id}:{int(waited_s * 1000)}" for account_id, waited_s in accounts)
        is_heard = self._is_told = self._counts.is_up
        names = (places_of(EVERYBODY), WAITING, LAST_TURNS)
        kept = KEPT_S * _MICROS
        answer: list[int] | None = self._counts.ask(
            NEXT, names, self._process, place, at_once, self._counts.lease, self._waits, kept, calls, told
        )
        if answer is None:
            if is_heard:  # by Redis, perhaps, which has given the place to one of them
                self.give_back(*(self.member(place, account_id) for account_id, _ in accounts))
            return None
        self._is_told = answer[0] == NOBODY or calls > 1
        return answer[0]

    def nobody_waits(self) -> None:
        """At this process any more."""
        if self._is_told:
            self._is_told = False
            try:
                self._counts.tell("HDEL", WAITING, self._process)
            except RedisAway:
                pass  # what was told is forgotten soon

    def give_back(self, *members: str) -> None:
        self._counts.give_back(EVERYBODY, *members)

    def at_fal(self) -> int | None:
        """How many places are taken."""
        answer: int | None = self._counts.ask(TAKEN, (places_of(EVERYBODY),))
        return answer
