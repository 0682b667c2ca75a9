"""The single writer of a serving process: gathers small operations into one durable transaction (group commit).

Greenlets hand over an operation and wait. A writer greenlet runs what has gathered and commits it in a native thread
with ``synchronous=FULL``. An operation that fails takes no neighbour with it: if it had written anything, the group is
undone and run again without it. A greenlet learns the outcome only after the commit: whoever was told of a write
still has it after a power cut. Statements run in the event loop (they touch memory, some 10 microseconds each); the
disk is waited for in the thread, and another process's lock is waited for without blocking, by trying again.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, TypeVar

import gevent
from gevent.event import Event
from gevent.threadpool import ThreadPool

from abhiapi.db import Busy, Database, Tx, file_identity, is_trouble, marked, translated
from abhiapi.errors import DatabaseUnavailable

T = TypeVar("T")
log = logging.getLogger("abhiapi")

REPLACED = "another file stands where the database was: put the old one back, or restart the server"
GROUP_MAX = 256  # operations in one transaction; keeps a commit short whatever has queued up
RETRY_FIRST_S, RETRY_MAX_S = 0.001, 0.05
CLOSE_PATIENCE_S = 1  # what waited has been tried for longer than this, or is written at once


class _Ticket:
    """One operation on its way: what to run, until when to try, and what came of it."""

    __slots__ = ("deadline", "done", "error", "op", "result")

    def __init__(self, op: Callable[[Tx], Any], deadline: float) -> None:
        self.op = op
        self.deadline = deadline
        self.done = Event()
        self.result: Any = None
        self.error: BaseException | None = None


class GroupCommitter:
    """Runs writes for many greenlets. `write` is the same call that `Database.write` offers to the command line."""

    def __init__(self, database: Database, *, on_group: Callable[[int], None] | None = None) -> None:
        self._database = database
        self._on_group = on_group or (lambda size: None)
        self._waiting: deque[_Ticket] = deque()
        self._wake = Event()
        self._thread = ThreadPool(1)
        self._connection: sqlite3.Connection | None = None
        self._tx: Tx | None = None
        self._file: tuple[int, int] | None = None
        self._greenlet = gevent.spawn(self._run)

    def write(self, op: Callable[[Tx], T], *, patience_s: float) -> T:
        """Run ``op`` in a transaction shared with others; returns once it is on disk.

        ``op`` may be run again if the database was busy, so it does nothing but use its `Tx`. Raises what ``op``
        raises (its writes are undone, its neighbours' are not), and `DatabaseUnavailable` when the database could
        not take the write within ``patience_s``.
        """
        ticket = _Ticket(op, monotonic() + patience_s)
        self._waiting.append(ticket)
        self._wake.set()
        ticket.done.wait()
        if ticket.error is not None:
            raise ticket.error
        result: T = ticket.result
        return result

    def close(self) -> None:
        """Write what is waiting, then stop. Called once nothing can hand in more."""
        try:
            self.write(lambda tx: None, patience_s=CLOSE_PATIENCE_S)
        except DatabaseUnavailable as error:  # those who waited were told the same
            log.warning("closed while the database could not be used: %s", error.message)
        finally:
            self._greenlet.kill()
            self._disconnect()
            self._thread.kill()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            pending: deque[_Ticket] = deque()
            pause_s = RETRY_FIRST_S
            while pending or self._waiting:
                pending.extend(self._waiting)
                self._waiting.clear()
                group = [pending.popleft() for _ in range(min(len(pending), GROUP_MAX))]
                try:
                    self._commit(group)
                except (sqlite3.Error, DatabaseUnavailable) as error:
                    pending.extendleft(reversed(group))
                    pending = self._without_expired(pending, error)
                    gevent.sleep(pause_s)
                    pause_s = min(pause_s * 2, RETRY_MAX_S)
                except Exception as error:  # a bug: whoever waits is told, and the writer goes on for the others
                    log.exception("a group of %d writes failed", len(group))
                    self._disconnect()
                    for ticket in group:
                        ticket.error = ticket.error or error
                        ticket.done.set()
                else:
                    self._on_group(len(group))
                    pause_s = RETRY_FIRST_S
                    if len(group) > 1:
                        gevent.sleep(0)  # those who were just told may have more to write: larger groups, fewer commits

    def _without_expired(self, pending: deque[_Ticket], error: sqlite3.Error | DatabaseUnavailable) -> deque[_Ticket]:
        """Tell those whose patience has ended what the trouble is; the others go on waiting."""
        trouble = error if isinstance(error, DatabaseUnavailable) else translated(error)
        if not isinstance(trouble, Busy):
            self._disconnect()  # whatever it was, a fresh connection sees the disk as it is then
        now = monotonic()
        for ticket in pending:
            if ticket.deadline <= now and not ticket.done.is_set():
                ticket.error = trouble
                ticket.done.set()
        return deque(ticket for ticket in pending if not ticket.done.is_set())

    def _commit(self, group: list[_Ticket]) -> None:
        """Run and commit a group. Raises the database's trouble; an operation's own error goes to its ticket."""
        connection, tx = self._connected()
        while not self._run_group(connection, tx, group):
            for ticket in group:
                if ticket.error is not None:
                    ticket.done.set()
            group = [ticket for ticket in group if ticket.error is None]
        for ticket in group:
            ticket.done.set()

    def _run_group(self, connection: sqlite3.Connection, tx: Tx, group: list[_Ticket]) -> bool:
        """Run a group in one transaction; False if it was undone because an operation failed after writing."""
        connection.execute("BEGIN IMMEDIATE")
        try:
            with marked():
                for ticket in group:
                    before = connection.total_changes
                    ticket.result = ticket.error = None
                    try:
                        ticket.result = ticket.op(tx)
                    except Exception as error:
                        if is_trouble(error):
                            raise
                        ticket.error = error
                        if connection.total_changes != before:
                            return False
            in_thread(self._thread, lambda: connection.execute("COMMIT"))
            return True
        finally:
            if connection.in_transaction:
                _roll_back(connection)

    def _connected(self) -> tuple[sqlite3.Connection, Tx]:
        """The writer's connection, to the file that stands at the path now."""
        identity = file_identity(self._database.path)
        if identity is None:
            self._disconnect()
            raise DatabaseUnavailable("the database file is gone", retry_after_s=5)
        if self._file not in (None, identity):
            raise DatabaseUnavailable(REPLACED, retry_after_s=30)
        if self._connection is None or self._tx is None:
            self._connection = in_thread(self._thread, self._database.connect)
            self._tx = self._database.tx(self._connection)
            self._file = identity
        return self._connection, self._tx

    def _disconnect(self) -> None:
        if self._connection is not None:
            in_thread(self._thread, self._connection.close)
        self._connection = None


def in_thread(pool: ThreadPool, task: Callable[[], T]) -> T:
    """Run what may wait for the disk in a native thread, while other greenlets go on.

    Errors come back as values: gevent prints those that a task raises, and where that print fails (stderr on the
    very disk that is full) the result would never arrive.
    """
    result, error = pool.apply(_caught, (task,))
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def _caught(task: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return task(), None
    except BaseException as error:
        return None, error


def _roll_back(connection: sqlite3.Connection) -> None:
    try:
        connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        if not is_trouble(error):
            raise
        # The disk is in trouble: the connection is dropped by the caller, which undoes the transaction as well.


class Reader:
    """One connection for quick look-ups in the event loop, such as a key by its digest. Never waits for a lock."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    def read(self, op: Callable[[Tx], T]) -> T:
        """Run ``op``, whose every statement sees the latest committed state. Raises `DatabaseUnavailable`."""
        identity = file_identity(self._database.path)
        if identity is None:
            raise DatabaseUnavailable("the database file is gone", retry_after_s=5)
        try:
            if self._file not in (None, identity):
                raise DatabaseUnavailable(REPLACED, retry_after_s=30)
            if self._connection is None:
                self._connection = self._database.connect()
                self._file = identity
            return op(self._database.tx(self._connection))
        except sqlite3.Error as error:
            if not is_trouble(error):
                raise
            self.close()
            raise translated(error) from error

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
