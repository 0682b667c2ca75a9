"""Background work that one process does for all: a turn is taken before it, and nobody else has one until it ends.

The turn is a lease in `timers`, renewed while the work runs: it moves to another process when its own dies, and when
it hangs. What runs in turns must bear to run twice at once all the same, since a process may stand still for longer
than its lease. Each process asks from one loop of its own, whose pace is its own: only between processes is there
waiting.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TypeVar

import gevent
from gevent.event import Event

from abhiapi import timers
from abhiapi.db import Tx
from abhiapi.errors import DatabaseUnavailable
from abhiapi.runtime import Runtime

T = TypeVar("T")
log = logging.getLogger("abhiapi")

LEASE_MS = 10_000
RENEW_S = 3
KEPT_MAX_S = 900  # work that takes longer hangs: another process may try
PATIENCE_S = 5
SKEW_MS = 60_000  # who is further ahead has a clock that was wrong: no work stands still for it for longer


@dataclass(slots=True)
class Turn:
    """A lease that this process has. ``until`` tells it from every other one."""

    name: str
    until: int
    lease_ms: int

    def keep(self, rt: Runtime, ended: Event) -> None:
        """Renew until the work has ended, or the turn is lost."""
        started = monotonic()
        renew_s = min(RENEW_S, self.lease_ms / 3000)
        while not ended.wait(renew_s) and monotonic() - started < KEPT_MAX_S:
            until = rt.now_ms() + self.lease_ms
            try:
                if not rt.write(
                    partial(timers.renew, name=self.name, was=self.until, until=until), patience_s=PATIENCE_S
                ):
                    return
            except DatabaseUnavailable as error:
                log.info("the turn of %s could not be renewed: %s", self.name, error.message)
                continue
            self.until = until


def take(
    rt: Runtime,
    name: str,
    work: Callable[[], T],
    *,
    interval_ms: int,
    lease_ms: int = LEASE_MS,
    skew_ms: int = SKEW_MS,
) -> T | None:
    """Do the work if it is due and nobody is at it; None where it is not this process's turn. Raises what it raises.

    For other processes it is due again ``interval_ms`` after this beginning.
    """
    now = rt.now_ms()
    turn = Turn(name, now + lease_ms, lease_ms)
    claimed = rt.write(
        lambda tx: timers.claim(
            tx,
            name,
            process_id=rt.process_id,
            now_ms=now,
            lease_ms=lease_ms,
            interval_ms=interval_ms,
            skew_ms=skew_ms,
            in_turns=True,
        ),
        patience_s=PATIENCE_S,
    )
    if not claimed:
        return None
    ended = Event()
    keeper = gevent.spawn(turn.keep, rt, ended)
    try:
        result = work()
    except Exception:
        _end(rt, turn, keeper, ended, due=now + interval_ms, done=None)
        raise
    finally:
        ended.set()  # a process that is being killed writes no more: its turn runs out
    _end(rt, turn, keeper, ended, due=now + interval_ms, done=rt.now_ms())
    return result


def _end(
    rt: Runtime, turn: Turn, keeper: gevent.Greenlet[..., None], ended: Event, *, due: int, done: int | None
) -> None:
    """Give the turn back. Where that fails it runs out by itself."""
    ended.set()
    keeper.join()  # it may be renewing just now

    def release(tx: Tx) -> None:
        if not timers.release(tx, turn.name, was=turn.until, due_at=due, done_at=done) and done is not None:
            timers.came_through(tx, turn.name, now_ms=done)

    try:
        rt.write(release, patience_s=PATIENCE_S)
    except DatabaseUnavailable as error:
        log.info("the turn of %s runs out by itself: %s", turn.name, error.message)
