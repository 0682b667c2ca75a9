"""Which processes serve this database: a row each. Whether one still lives is told by its lock (`liveness`)."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import bindparam, insert, select, update

from abhiapi import tables, timers
from abhiapi.db import Tx

_p = tables.processes.c
_START = insert(tables.processes).values(pid=bindparam("of_pid"), started_at=bindparam("now"), seen_at=bindparam("now"))
_SEEN = update(tables.processes).where(_p.process_id == bindparam("process")).values(seen_at=bindparam("now"))
_END = (
    update(tables.processes)
    .where(_p.process_id == bindparam("process"), _p.ended_at.is_(None))
    .values(ended_at=bindparam("now"))
)
_RUNNING = select(_p.process_id, _p.pid, _p.started_at).where(_p.ended_at.is_(None))


@dataclass(frozen=True, slots=True)
class Process:
    process_id: int
    pid: int
    started_at: int


def start(tx: Tx, *, pid: int, now_ms: int) -> int:
    """Note a process that begins to serve; its number."""
    return tx.insert(_START, of_pid=pid, now=now_ms)


def seen(tx: Tx, process_id: int, *, now_ms: int) -> None:
    """Prove that the database takes writes."""
    tx.run(_SEEN, process=process_id, now=now_ms)


def end(tx: Tx, process_id: int, *, now_ms: int) -> None:
    """Note that a process is gone: what it was doing for all is anybody's again."""
    timers.free_of(tx, process_id)
    tx.run(_END, process=process_id, now=now_ms)


def running(tx: Tx) -> list[Process]:
    """Processes that were not seen to end: they live, or were killed."""
    return [Process(*row) for row in tx.all(_RUNNING)]
