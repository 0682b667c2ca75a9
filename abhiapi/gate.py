"""The gate before fal: at most so many sync and stream calls at once, over all processes where there is a Redis.

`fairness` decides whose turn it is, or Redis does for all processes (`shared_turns`); here callers wait, and time
passes. A call waits before its hold, so that there is nothing to give back when its turn does not come. Jobs pass by:
fal queues them itself. Without a setting there is no gate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

import gevent
from gevent.event import Event

from abhiapi.errors import UpstreamBusy
from abhiapi.fairness import NOBODY, Turn, Turns
from abhiapi.metrics import Metrics

if TYPE_CHECKING:
    from abhiapi.shared_turns import SharedTurns

log = logging.getLogger("abhiapi")

MOMENT_S = 0.02  # a turn that comes sooner was not waited for
HANG_UP_S = 0.5  # how soon a waiter who has hung up is noticed
LOOK_AGAIN_S = 0.02  # between looks whether it is the turn of one who waits here, as other processes' calls end
ACCOUNTS_TOLD = 250  # at once: Redis is not kept from others for long
WAITING_MAX = 2_000  # half of what a process serves at once


class Gate:
    """Turns at fal. Who waits here is this process's; places and whose turn it is are shared while Redis is there."""

    def __init__(
        self,
        most: int,
        queue_s: int,
        *,
        shared: SharedTurns | None = None,
        metrics: Metrics | None = None,
        now: Callable[[], float] = monotonic,
    ) -> None:
        """``most`` calls at once, 0 for no gate; none waits longer than ``queue_s``."""
        self._most, self._queue_s = most, queue_s
        self._shared = shared if most else None
        self._metrics = metrics or Metrics()
        self._now = now
        self._turns = Turns(most)
        self._begun: dict[Turn, Event] = {}
        self._wake = Event()
        self._doorman = None
        if self._shared is not None:
            self._shared.also_running(lambda: [turn.member for turn in self._turns.running])
            self._doorman = gevent.spawn(self._share_for_ever, self._shared)

    def close(self) -> None:
        if self._doorman is not None:
            self._doorman.kill()

    def waiting(self) -> int:
        return self._turns.waiting

    def limit(self) -> int:
        """How many calls may run at fal at once as things stand; 0: any number."""
        return self._turns.limit(self._now()) if self._most else 0

    def enter(
        self, account_id: int, *, has_hung_up: Callable[[], bool], before_waiting: Callable[[], None]
    ) -> Turn | None:
        """Wait for a turn. `end` it whatever happens. ``before_waiting`` may raise, and is called only then.

        Raises `UpstreamBusy` where the turn does not come in time, or for a caller who has hung up.
        """
        if not self._most:
            return None
        if self._turns.waiting >= WAITING_MAX:
            raise self._busy()
        turn = Turn(account_id, self._now())
        begun = self._begun[turn] = Event()
        self._turns.arrive(turn)
        self._admit()
        try:
            if not begun.wait(MOMENT_S):
                before_waiting()
                self._wait(turn, begun, has_hung_up)
        except BaseException:
            if not self._turns.leave(turn):
                self.end(turn)  # it came just now
            raise
        finally:
            del self._begun[turn]
            self._metrics.fal_wait_seconds.observe(max(0.0, self._now() - turn.arrived_s))
        return turn

    def end(self, turn: Turn | None) -> None:
        """fal is done with a call. A second time does nothing."""
        if self._give_back(turn):
            self._admit()

    def refused(self, turn: Turn | None) -> None:
        """fal has refused a call while it was working on others: so many are the limit for a while."""
        if turn is None or not self._give_back(turn):
            return
        at_fal = None if self._shared is None else self._shared.at_fal()
        self._turns.lower(len(self._turns.running) if at_fal is None else at_fal, self._now())
        log.warning("fal works on no more calls at once: at most %d from now on", self.limit())
        self._admit()

    def _wait(self, turn: Turn, begun: Event, has_hung_up: Callable[[], bool]) -> None:
        give_up = turn.arrived_s + self._queue_s
        while not begun.wait(min(HANG_UP_S, max(0.0, give_up - self._now()))):
            if self._now() >= give_up or has_hung_up():
                raise self._busy()
            self._admit()  # the limit may have been raised since

    def _busy(self) -> UpstreamBusy:
        wait_s = self._turns.retry_after_s()
        return UpstreamBusy(
            f"too many calls of all customers are running just now: nothing was forwarded or charged, try again in "
            f"{wait_s} s",
            retry_after_s=wait_s,
        )

    def _admit(self) -> None:
        """Begin the turns that there is room for."""
        if self._shared is not None:
            self._wake.set()
            return
        while self._turns.has_room(self._now()) and self._begin_next() is not None:
            pass

    def _begin_next(self, account_id: int | None = None) -> Turn | None:
        turn = self._turns.next(self._now(), account_id)
        if turn is not None:
            self._begun[turn].set()
        return turn

    def _give_back(self, turn: Turn | None) -> bool:
        if turn is None or not self._turns.end(turn, self._now()):
            return False
        if self._shared is not None:
            self._shared.give_back(turn.member)
        return True

    def _share_for_ever(self, shared: SharedTurns) -> None:
        """Ask whether it is the turn of those who wait here."""
        while True:
            self._wake.wait()
            self._wake.clear()
            try:
                while self._turns.waiting:
                    if not self._ask_and_begin(shared):
                        self._wake.wait(LOOK_AGAIN_S)
                        self._wake.clear()
                shared.nobody_waits()
            except Exception:  # a bug: without this line no call would ever get its turn again
                log.exception("the gate before fal stumbled, and goes on")

    def _ask_and_begin(self, shared: SharedTurns) -> bool:
        """Whether it was the turn of one who waits here: then it may be another's too."""
        place = shared.new_place()
        accounts = self._turns.accounts(self._now(), ACCOUNTS_TOLD)
        account_id = shared.next(place, self.limit(), accounts, calls=self._turns.waiting)
        if account_id == NOBODY:
            return False
        if account_id is None:
            if not self._turns.has_room(self._now()):
                return False
            self._metrics.limits_fallback.inc()  # as many as the setting says, in this process alone
            place = shared.new_place()  # Redis may have given the other one to another account
        turn = self._begin_next(account_id)
        if turn is not None:
            turn.member = shared.member(place, turn.account_id)
        elif account_id is not None:
            shared.give_back(shared.member(place, account_id))  # whoever waited has left meanwhile
        return True
