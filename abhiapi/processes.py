"""Which processes serve this database, and which of them are dead: whose calls may be swept.

A serving process has a row and holds an operating-system lock on a file of its own beside the database for as long
as it lives; the kernel drops the lock when the process dies, however it dies. That is proof where a heartbeat would
be a guess, and it works the moment a killed server is started again.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path
from typing import IO

from sqlalchemy import bindparam, insert, select, update

from abhiapi import tables
from abhiapi.db import Tx

_p = tables.processes.c
_START = insert(tables.processes).values(pid=bindparam("of_pid"), started_at=bindparam("now"), seen_at=bindparam("now"))
_SEEN = update(tables.processes).where(_p.process_id == bindparam("process")).values(seen_at=bindparam("now"))
_END = (
    update(tables.processes)
    .where(_p.process_id == bindparam("process"), _p.ended_at.is_(None))
    .values(ended_at=bindparam("now"))
)
_RUNNING = select(_p.process_id, _p.pid).where(_p.ended_at.is_(None))


class ProcessLock:
    """The lock that says «this process lives». Kept until `release`, or the end of the process.

    The file is locked under a passing name first and then takes its place, so that nobody ever sees it unlocked
    while its process lives.
    """

    def __init__(self, database_path: Path) -> None:
        self._database_path = database_path
        self._path = database_path.with_name(f"{database_path.name}.starting-{os.getpid()}-{secrets.token_hex(4)}")
        self._file: IO[bytes] = open(self._path, "wb")
        os.set_inheritable(self._file.fileno(), False)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def take_place(self, process_id: int) -> None:
        """Be found under the number that the database gave."""
        self._path = self._path.rename(lock_path(self._database_path, process_id))

    def keep(self) -> None:
        """Lock a new file where somebody has removed ours: without one this process would be taken for dead."""
        try:
            there = os.stat(self._path)
            if os.path.samestat(there, os.fstat(self._file.fileno())):
                return
        except FileNotFoundError:
            pass
        replaced = ProcessLock(self._database_path)
        replaced._path = replaced._path.rename(self._path)
        self._file.close()
        self._file = replaced._file

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        self._file.close()


def lock_path(database_path: Path, process_id: int) -> Path:
    return database_path.with_name(f"{database_path.name}.process-{process_id}")


def start(tx: Tx, *, pid: int, now_ms: int) -> int:
    """Note a process that begins to serve; its number."""
    return tx.insert(_START, of_pid=pid, now=now_ms)


def seen(tx: Tx, process_id: int, *, now_ms: int) -> None:
    """Prove that the database takes writes."""
    tx.run(_SEEN, process=process_id, now=now_ms)


def end(tx: Tx, process_id: int, *, now_ms: int) -> None:
    tx.run(_END, process=process_id, now=now_ms)


def running(tx: Tx) -> list[tuple[int, int]]:
    """Processes that were not seen to end, as (number, pid): they live, or were killed."""
    return [(row[0], row[1]) for row in tx.all(_RUNNING)]


def reap(database_path: Path, process_id: int, pid: int) -> bool:
    """Whether a process is dead: nobody holds its lock. What it left on disk is removed.

    Where its file is missing, which no killed process leaves behind, it counts as dead only if no process has its pid.
    """
    path = lock_path(database_path, process_id)
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return not _has_process(pid)
    except BlockingIOError:
        return False
    return True


def _has_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
