"""Whose turn it is at fal, whose concurrency belongs to the operator's account and so to all customers together. Pure.

    a turn:    waiting -> running -> over
               waiting -> gone               (the caller hung up, or waited too long)
    the limit: the setting -- fal refuses for concurrency --> what fal was working on
               -- a while without a refusal --> one more, up to the setting

Of the accounts that wait, the one that has the fewest calls running goes first; among equals the one whose last turn is
longest ago; within an account the oldest call. So nobody's burst keeps another waiting for longer than one call takes,
and one account alone may use everything.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from itertools import islice

RAISE_S = 30  # without a refusal of fal's, until one call more is tried
RETRY_AFTER_MAX_S = 60
NOBODY = 0  # no account has this number


@dataclass(eq=False, slots=True)
class Turn:
    """One call's turn. ``member``, unique over all processes, is its place while it is running."""

    account_id: int
    arrived_s: float
    began_s: float | None = None
    member: str = ""

    @property
    def waited_s(self) -> float:
        return 0 if self.began_s is None else self.began_s - self.arrived_s


class Turns:
    """The turns of one process. Every time is handed in."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = most
        self._lowered_s = 0.0  # or raised: when the limit last moved
        self._waiting: dict[int, deque[Turn]] = {}  # accounts in the order of their last turns
        self._of_account: Counter[int] = Counter()
        self._call_s = 1.0  # how long calls have taken lately
        self.running: set[Turn] = set()

    @property
    def waiting(self) -> int:
        return sum(len(turns) for turns in self._waiting.values())

    def limit(self, now_s: float) -> int:
        """How many calls may run at once as things stand."""
        while self._limit < self._most and now_s - self._lowered_s >= RAISE_S:
            self._limit += 1
            self._lowered_s += RAISE_S
        return self._limit

    def has_room(self, now_s: float) -> bool:
        return len(self.running) < self.limit(now_s)

    def arrive(self, turn: Turn) -> None:
        self._waiting.setdefault(turn.account_id, deque()).append(turn)

    def accounts(self, now_s: float, most: int) -> list[tuple[int, float]]:
        """The accounts that wait, and for how long the oldest call of each has.

        Of more than ``most`` those whose last turn is longest ago: while fewer calls than that run, some have none.
        """
        waiting = islice(self._waiting.items(), most)
        return [(account_id, max(0.0, now_s - turns[0].arrived_s)) for account_id, turns in waiting]

    def next(self, now_s: float, account_id: int | None = None) -> Turn | None:
        """Begin the turn of whoever goes first, or of an account; None where nobody waits."""
        if account_id is None:
            account_id = min(self._waiting, key=lambda account_id: self._of_account[account_id], default=None)
        if account_id is None or account_id not in self._waiting:
            return None
        turns = self._waiting.pop(account_id)
        turn = turns.popleft()
        if turns:
            self._waiting[account_id] = turns  # last in the order from now on
        turn.began_s = now_s
        self.running.add(turn)
        self._of_account[account_id] += 1
        return turn

    def leave(self, turn: Turn) -> bool:
        """Whether the turn had not begun: then it never will."""
        turns = self._waiting.get(turn.account_id)
        if turns is None or turn not in turns:
            return False
        turns.remove(turn)
        if not turns:
            del self._waiting[turn.account_id]
        return True

    def end(self, turn: Turn, now_s: float) -> bool:
        """End a turn that is running; a second time does nothing and is False."""
        if turn not in self.running:
            return False
        self.running.discard(turn)
        self._of_account[turn.account_id] -= 1
        if not self._of_account[turn.account_id]:
            del self._of_account[turn.account_id]
        took_s = max(0.0, now_s - (turn.began_s or now_s))
        self._call_s += (took_s - self._call_s) / 8
        return True

    def lower(self, at_fal: int, now_s: float) -> None:
        """fal has refused a call while it was working on so many others: no more than those from now on."""
        self._limit = max(1, min(self.limit(now_s), at_fal))
        self._lowered_s = now_s

    def retry_after_s(self) -> int:
        """When those who wait now will have had their turn, by how long calls have taken lately."""
        return max(1, min(RETRY_AFTER_MAX_S, int(self._call_s * (self.waiting + 1) / self._limit) + 1))
