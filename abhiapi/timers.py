"""Work that is done now and then by one process at a time: who is at it, when it was done, when it is due again.

A claim is one conditional UPDATE. It runs out by itself, so that a process that hangs does not stop the work for ever,
and ends with its process, as soon as anybody sees that dead. A time that lies too far ahead is a clock that was wrong,
and counts as past.
"""

from __future__ import annotations

from sqlalchemy import and_, bindparam, func, insert, null, or_, select, update

from abhiapi import tables
from abhiapi.db import Tx

SKEW_MS = 3_600_000  # clocks of honest machines are closer to each other than this, unless the caller says better

_t = tables.timers.c
_FIRST = insert(tables.timers).values(
    name=bindparam("of_name"),
    due_at=bindparam("due"),
    claimed_until=bindparam("until"),
    claimed_by=bindparam("process"),
)
_FIND = select(_t.done_at).where(_t.name == bindparam("of_name"))
_THIS = _t.name == bindparam("of_name")
_IS_DUE = or_(_t.due_at <= bindparam("now"), _t.due_at > bindparam("farthest"))
_IS_FREE = or_(_t.claimed_until <= bindparam("now"), _t.claimed_until > bindparam("latest"))
_GIVE = update(tables.timers).values(claimed_until=bindparam("until"), claimed_by=bindparam("process"))
_CLAIM = _GIVE.where(_THIS, _IS_DUE, _IS_FREE)
_IS_OURS = or_(_t.claimed_by == bindparam("process"), _t.claimed_by.is_(None))
_TAKE_TURN = _GIVE.where(_THIS, or_(_IS_OURS, and_(_IS_DUE, _IS_FREE)))
_DONE = (
    update(tables.timers)
    .where(_t.name == bindparam("of_name"))
    .values(due_at=bindparam("due"), claimed_until=0, done_at=bindparam("now"))
)
_OWN = (_t.name == bindparam("of_name"), _t.claimed_until == bindparam("was"))
_RENEW = update(tables.timers).where(*_OWN).values(claimed_until=bindparam("until"))
_RELEASE = (
    update(tables.timers)
    .where(*_OWN)
    .values(due_at=bindparam("due"), claimed_until=0, done_at=func.coalesce(bindparam("done"), _t.done_at))
)
_CAME_THROUGH = update(tables.timers).where(_THIS).values(done_at=bindparam("now"))
_FREE = update(tables.timers).where(_t.claimed_by == bindparam("process")).values(claimed_until=0, claimed_by=null())
_FAILED = update(tables.timers).where(_t.name == bindparam("of_name")).values(due_at=bindparam("due"), claimed_until=0)


def claim(
    tx: Tx,
    name: str,
    *,
    process_id: int,
    now_ms: int,
    lease_ms: int,
    interval_ms: int,
    skew_ms: int = SKEW_MS,
    in_turns: bool = False,
) -> bool:
    """Whether the work is due and nobody else is at it; then it is the process's for ``lease_ms``.

    ``in_turns``: each process does it in a loop of its own. Then whoever had the last turn may have the next whenever
    it comes, and so may anybody once that process has ended: only others have to wait.
    """
    until = now_ms + lease_ms
    if tx.one(_FIND, of_name=name) is None:
        tx.run(_FIRST, of_name=name, due=now_ms, until=until, process=process_id)
        return True
    farthest, latest = now_ms + interval_ms + skew_ms, until + skew_ms
    values = {"now": now_ms, "farthest": farthest, "until": until, "latest": latest, "process": process_id}
    return tx.run(_TAKE_TURN if in_turns else _CLAIM, of_name=name, **values) == 1


def done(tx: Tx, name: str, *, now_ms: int, due_in_ms: int) -> None:
    """The work succeeded, by a claim or by hand."""
    due = now_ms + due_in_ms
    if tx.run(_DONE, of_name=name, now=now_ms, due=due) == 0:
        tx.run(_FIRST, of_name=name, due=due, until=0, process=None)
        tx.run(_DONE, of_name=name, now=now_ms, due=due)


def failed(tx: Tx, name: str, *, now_ms: int, due_in_ms: int) -> None:
    """The work failed and is tried again by then."""
    tx.run(_FAILED, of_name=name, due=now_ms + due_in_ms)


def renew(tx: Tx, name: str, *, was: int, until: int) -> bool:
    """Keep a claim that ended at ``was``, which no other claim does; False where it is somebody else's by now."""
    return tx.run(_RENEW, of_name=name, was=was, until=until) == 1


def release(tx: Tx, name: str, *, was: int, due_at: int, done_at: int | None) -> bool:
    """Give a claim back, with the work done or not; False where it is somebody else's by now."""
    return tx.run(_RELEASE, of_name=name, was=was, due=due_at, done=done_at) == 1


def came_through(tx: Tx, name: str, *, now_ms: int) -> None:
    """The work succeeded, though its claim had run out meanwhile."""
    tx.run(_CAME_THROUGH, of_name=name, now=now_ms)


def free_of(tx: Tx, process_id: int) -> None:
    """End the claims of a process that has ended."""
    tx.run(_FREE, process=process_id)


def done_at(tx: Tx, name: str) -> int | None:
    """When the work last succeeded."""
    row = tx.one(_FIND, of_name=name)
    return None if row is None else row[0]
