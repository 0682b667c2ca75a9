"""The single writer of a serving process: gathers small operations into one durable transaction (group commit).

Greenlets hand over an operation and wait. A writer greenlet runs what has gathered and commits it; on SQLite in a
native thread with ``synchronous=FULL``, on PostgreSQL by waiting for the network. An operation that fails takes no
neighbour with it: if it had written anything, the group is undone and run again without it. A group that meets trouble
is tried again half as large, so that a slow server gets through it in the end. A greenlet learns the outcome only after
the commit: whoever was told of a write still has it after a power cut. Another process's turn is
waited for without blocking. Where the connection is lost during a commit, what came of it is found out first: nobody
is told of a failure that may have been none, and nothing is written twice.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from time import monotonic
from typing import Any, TypeVar

import gevent
from gevent.event import Event
from gevent.threadpool import ThreadPool

from abhiapi.db import Busy, Database, OutcomeUnknown, Session, Tx, marked
from abhiapi.errors import DatabaseUnavailable

T = TypeVar("T")
log = logging.getLogger("abhiapi")

GROUP_MAX = 256  # operations in one transaction; keeps a commit short whatever has queued up
RETRY_FIRST_S, RETRY_MAX_S = 0.001, 0.05
CLOSE_PATIENCE_S = 1  # how long a writer that ends goes on trying while the database is in trouble
TURN_S = 1  # how long one wait for a turn lasts, where waiting stops nobody else
ANSWER_S = 20  # a database that has not answered within this time is not there


class _Ticket:
    """One operation on its way: what to run, until when to try, and what came of it."""

    __slots__ = ("deadline", "done", "error", "op", "result")

    def __init__(self, op: Callable[[Tx], Any], deadline: float) -> None:
        self.op = op
        self.deadline = deadline
        self.done = Event()
        self.result: Any = None
        self.error: BaseException | None = None


class _SumsRefused(Exception):
    """What a group's operations added up together breaks a constraint; the group is undone."""


class GroupCommitter:
    """Runs writes for many greenlets. `write` is the same call that `Database.write` offers to the command line."""

    def __init__(self, database: Database, *, on_group: Callable[[int], None] | None = None) -> None:
        self._database = database
        self._on_group = on_group or (lambda size: None)
        self._waiting: deque[_Ticket] = deque()
        self._wake = Event()
        self._place = database.place()
        self._thread = ThreadPool(1)
        self._session: Session | None = None
        self._closes_by: float | None = None
        self._greenlet = gevent.spawn(self._run)

    def write(self, op: Callable[[Tx], T], *, patience_s: float) -> T:
        """Run ``op`` in a transaction shared with others; returns once it is on disk.

        ``op`` may be run again if the database was busy, so it does nothing but use its `Tx`. Raises what ``op``
        raises (its writes are undone, its neighbours' are not), and `DatabaseUnavailable` when the database could
        not take the write within ``patience_s``, or the writer has been closed.
        """
        if self._closes_by is not None:
            raise DatabaseUnavailable("this process is ending", retry_after_s=2)
        ticket = _Ticket(op, monotonic() + patience_s)
        self._waiting.append(ticket)
        self._wake.set()
        ticket.done.wait()
        if ticket.error is not None:
            raise ticket.error
        result: T = ticket.result
        return result

    def close(self) -> None:
        """Write what is waiting, then stop; whoever comes later is refused.

        The writer ends by itself: killed in the middle of a commit it would not know what came of it.
        """
        self._closes_by = monotonic() + CLOSE_PATIENCE_S
        self._wake.set()
        self._greenlet.join(CLOSE_PATIENCE_S + ANSWER_S)
        self._greenlet.kill(block=False)  # it waits for a database that says nothing
        self._disconnect()
        self._thread.kill()

    def _run(self) -> None:
        while self._closes_by is None or self._waiting:
            self._wake.wait()
            self._wake.clear()
            pending: deque[_Ticket] = deque()
            pause_s = RETRY_FIRST_S
            most = GROUP_MAX
            while pending or self._waiting:
                pending.extend(self._waiting)
                self._waiting.clear()
                group = [pending.popleft() for _ in range(min(len(pending), most))]
                try:
                    self._commit(group)
                except DatabaseUnavailable as error:
                    if len(group) == 1 and not isinstance(error, Busy):
                        pending.extend(group)  # it may be the trouble itself: the others come first
                    else:
                        pending.extendleft(reversed(group))
                    if not isinstance(error, Busy):
                        most = max(1, len(group) // 2)
                    pending = self._without_expired(pending, error)
                    gevent.sleep(pause_s)
                    pause_s = min(pause_s * 2, RETRY_MAX_S)
                except Exception as error:  # a bug: whoever waits is told, and the writer goes on for the others
                    log.exception("a group of %d writes failed", len(group))
                    self._disconnect()
                    for ticket in group:
                        if not ticket.done.is_set():  # else it is written, or was told of an error of its own
                            ticket.error = ticket.error or error
                            ticket.done.set()
                else:
                    self._on_group(len(group))
                    pause_s = RETRY_FIRST_S
                    most = min(most * 2, GROUP_MAX)
                    if len(group) > 1:
                        gevent.sleep(0)  # those who were just told may have more to write: larger groups, fewer commits

    def _without_expired(self, pending: deque[_Ticket], trouble: DatabaseUnavailable) -> deque[_Ticket]:
        """Tell those whose patience has ended what the trouble is; the others go on waiting."""
        if not isinstance(trouble, Busy):
            self._disconnect()  # whatever it was, a fresh connection sees the database as it is then
        now = monotonic()
        is_over = self._closes_by is not None and self._closes_by <= now
        for ticket in pending:
            if (is_over or ticket.deadline <= now) and not ticket.done.is_set():
                ticket.error = trouble
                ticket.done.set()
        return deque(ticket for ticket in pending if not ticket.done.is_set())

    def _commit(self, group: list[_Ticket]) -> None:
        """Run and commit a group. Raises the database's trouble; an operation's own error goes to its ticket."""
        try:
            while not self._run_group(self._connected(), group):
                for ticket in group:
                    if ticket.error is not None:
                        ticket.done.set()
                group = [ticket for ticket in group if ticket.error is None]
        except _SumsRefused:
            for ticket in group:  # whose sum it is shows when each is alone
                self._commit([ticket])
        for ticket in group:
            ticket.done.set()

    def _run_group(self, session: Session, group: list[_Ticket]) -> bool:
        """Run a group in one transaction; False if it was undone because an operation failed after writing."""
        try:
            with self._bounded():
                session.begin()
                with marked():
                    for ticket in group:
                        before = session.changes()
                        ticket.result = ticket.error = None
                        try:
                            with self._database.translating():
                                ticket.result = ticket.op(session.tx)
                        except DatabaseUnavailable:
                            raise
                        except Exception as error:
                            if session.tx.is_writing_sums and len(group) > 1:
                                raise _SumsRefused from error  # its own sums, or those of others before it
                            ticket.error = error
                            if session.is_spoilt() or session.changes() != before:
                                return False
                    try:
                        with self._database.translating():
                            session.tx.write_sums()
                    except DatabaseUnavailable:
                        raise
                    except Exception as error:
                        if len(group) > 1:
                            raise _SumsRefused from error
                        group[0].error = error
                        return False
                self._aside(session.commit)
            return True
        except OutcomeUnknown as lost:
            return self._found_out(lost, session)
        finally:
            session.roll_back()

    def _found_out(self, lost: OutcomeUnknown, session: Session) -> bool:
        """Wait until it is known what came of a commit: True if it happened, else the trouble that kept it from it.

        The group is told nothing until then, however long that takes: what was written must not be called a failure.
        Those who came meanwhile wait no longer than they would have.
        """
        log.warning("%s: asking what came of it", lost.message)
        session.close()
        self._session = None
        pause_s = RETRY_FIRST_S
        while True:
            try:
                if self._database.has_committed(lost.mark):
                    return True
                break
            except DatabaseUnavailable as error:
                self._waiting = self._without_expired(self._waiting, error)
                gevent.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_MAX_S)
        raise DatabaseUnavailable(lost.message, retry_after_s=5) from lost

    def _connected(self) -> Session:
        """The writer's connection, to the ledger that it knew from the start."""
        self._place.check()
        if self._session is None:
            patience_s = TURN_S if self._database.waits_cooperatively else 0
            self._session = self._aside(lambda: self._database.session(patience_s=patience_s, answer_s=ANSWER_S))
        return self._session

    def _disconnect(self) -> None:
        if self._session is not None:
            self._aside(self._session.close)
        self._session = None

    def _aside(self, task: Callable[[], T]) -> T:
        """Do what waits for the database while other greenlets go on."""
        return task() if self._database.waits_cooperatively else in_thread(self._thread, task)

    def _bounded(self) -> gevent.Timeout | nullcontext[None]:
        """A limit to waiting for a server that takes what it is sent and says nothing."""
        if not self._database.waits_cooperatively:
            return nullcontext()
        return gevent.Timeout(ANSWER_S, DatabaseUnavailable("the database does not answer", retry_after_s=5))


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
