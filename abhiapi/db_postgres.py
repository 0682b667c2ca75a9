"""PostgreSQL: databases, sessions and troubles, and the locks that say which processes live.

Everything here waits for the network, which under gevent lets other greenlets go on. Writes take turns as they do on
SQLite: each write transaction of any process begins with one and the same advisory lock, so what was written for a
single writer holds here as it stands, and every statement sees all that was committed before (docs/decisions/0018).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from time import monotonic, sleep
from typing import Any, LiteralString, TypeVar

import gevent
import gevent.lock
import gevent.monkey
import gevent.socket
import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import URL

from abhiapi.db_base import (
    CLI_PATIENCE_S,
    Busy,
    Database,
    OutcomeUnknown,
    Place,
    Reads,
    Session,
    Tx,
    marked,
)
from abhiapi.db_postgres_tx import AdapterContext, Connection, PostgresTx
from abhiapi.errors import DatabaseUnavailable, SchemaError
from abhiapi.liveness import ProcessLock

T = TypeVar("T")
CONNECT_S = 5  # for one address of the server
REACH_S = 15  # for its name and all its addresses
READERS_MAX = 8
SNAPSHOTS_MAX = 5  # of those at most so many for longer reads: no report keeps a call waiting
LOOK_PATIENCE_S = 3  # a look-up waits this long for a free connection
FREE_FOR_S = 20  # a process is dead once its lock was seen free for so long: a restarted server frees all locks
LOCK_S = 5  # a look at one's own lock, or taking it anew
_LIVES = 0x41424850  # "ABHP": the locks of processes; the second number is the process's
_OPTIONS = {
    "timezone": "UTC",
    "synchronous_commit": "on",
    "default_transaction_isolation": r"read\ committed",
    "statement_timeout": "0",  # a role's own limit must not cut writes; look-ups have theirs
    "idle_in_transaction_session_timeout": "15s",  # a host that vanished in its turn must not keep it
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "2",
    "tcp_user_timeout": "20s",
    "jit": "off",
}
# A connection keeps the plans of its statements: one made while a table was small would read all of it for each row
# that is looked up, until autovacuum counts anew: after a minute, or never. Reports are planned as the server likes.
_LOOK_UPS = {"enable_seqscan": "off"}
# "ABHI": the turn to write. Its isolation is named: a role may have another default, under which what the last writer
# has committed would not be seen.
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SELECT pg_advisory_xact_lock(1094862921)"
_SNAPSHOT = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL enable_seqscan = on"
_UNHURRIED = "; SET LOCAL idle_in_transaction_session_timeout = 0; SET LOCAL statement_timeout = 0"
_MARK_AND_COMMIT = (  # the COMMIT is not reached where the mark cannot be made
    "INSERT INTO commit_marks (writer, number, made_at) VALUES (%s, %s, extract(epoch FROM now())::bigint)"
    " ON CONFLICT (writer) DO UPDATE SET number = excluded.number, made_at = excluded.made_at; COMMIT"
)
_MARKED = "SELECT number FROM commit_marks WHERE writer = %s"
# A mark is kept for longer than a parked charge is tried.
_FORGET_MARKS = "DELETE FROM commit_marks WHERE made_at < extract(epoch FROM now())::bigint - 14 * 86400"
_TAKE = "SELECT pg_try_advisory_lock(%s::int, %s::int)"
_LIVING = (
    "SELECT objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2"
    " AND classid = %s::oid AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
_IS_STANDBY = "SELECT pg_is_in_recovery()"
# Trouble by its SQLSTATE that psycopg does not call operational: a standby (which refuses READ WRITE, and writes), a
# session ended for idling.
_TROUBLES = {"0A000", "25006", "25P03"}
_OURS = {"22", "23", "54"}  # classes: data, constraints, sizes: the next try would meet the same
_BUSY = {"55P03", "57014", "40001", "40P01"}


class PostgresSession(Session):
    def __init__(self, database: PostgresDatabase, patience_s: float, answer_s: float | None = None) -> None:
        # Without a limit of its own the server would go on with a statement that nobody waits for, and keep the turn.
        options = dict(_LOOK_UPS)
        if answer_s is not None:
            options["statement_timeout"] = _milliseconds(answer_s)
        self._database = database
        self.patience_s = patience_s
        self._connection = database.connect(in_full=False, lock_timeout=_milliseconds(patience_s), **options)
        self.tx: PostgresTx = PostgresTx(self._connection)
        self._both = psycopg.ClientCursor(self._connection)  # which may send two statements with values at once
        self._writer = secrets.randbits(62)
        self._number = 0
        with database.translating():
            self._connection.execute(_FORGET_MARKS)

    def begin(self) -> None:
        self.tx.forget_sums()
        with self._database.translating():
            self._connection.execute(BEGIN, prepare=False)

    def changes(self) -> int:
        return self.tx.changes + self.tx.added

    def is_spoilt(self) -> bool:
        return self._connection.info.transaction_status == TransactionStatus.INERROR

    def is_idle(self) -> bool:
        """Whether it may be used again."""
        return self._connection.info.transaction_status == TransactionStatus.IDLE

    def commit(self) -> None:
        """The mark is committed with the rest: whoever finds it knows that all of it is there.

        `pg_xact_status` would not do: after a crash of the server a number may be given to another transaction.
        """
        if self.is_spoilt():
            raise AssertionError("an operation went on after a statement of its had failed")
        self.tx.check_sums()
        self._number += 1
        try:
            self._both.execute(_MARK_AND_COMMIT, (self._writer, self._number))
        except Exception as error:
            if isinstance(error, psycopg.Error) and error.sqlstate and not self._connection.closed:
                raise self._database.translated(error) from error  # the server said that it did not
            self.close()
            raise OutcomeUnknown((self._writer, self._number)) from error

    def roll_back(self) -> None:
        if self._connection.closed or self.is_idle():
            return
        try:
            self._connection.execute("ROLLBACK", prepare=False)
        except psycopg.Error:
            self.close()  # which undoes it as well

    def close(self) -> None:
        self._connection.close()


class PostgresReads(Reads):
    """A few connections in autocommit, each used by one greenlet at a time."""

    def __init__(self, database: PostgresDatabase) -> None:
        self._database = database

    def read(self, op: Callable[[Tx], T]) -> T:
        return self._database.pooled(lambda tx, _: op(tx))

    def close(self) -> None:
        self._database.close_idle()


class ServerPlace(Place):
    """A server is told from another by nothing: its address is its place."""

    def check(self) -> None:
        pass


class PostgresDatabase(Database):
    """A database of a server's. Keeps a few connections to read with."""

    engine = "postgresql"
    waits_cooperatively = True

    def __init__(self, url: URL) -> None:
        if not url.database:
            raise SchemaError("the database has no name: use postgresql://user@host/name")
        self.name = url.set(drivername="postgresql", query={}).set(password=None).render_as_string()
        self._parameters = _parameters(url)
        self._idle: list[Connection] = []
        self._turns = gevent.lock.BoundedSemaphore(READERS_MAX)
        self._snapshot_turns = gevent.lock.BoundedSemaphore(SNAPSHOTS_MAX)
        self._writers: list[PostgresSession] = []
        self._free_since: dict[int, float] = {}
        self._looked_at = monotonic()

    def connect(self, *, in_full: bool = False, **options: str) -> Connection:
        """A configured connection of its own, in autocommit. Raises `DatabaseUnavailable`; ``in_full``: with what the
        server said, which is for operators only."""
        given = self._parameters["options"] + "".join(f" -c {name}={value}" for name, value in options.items())
        try:
            with _at_most(REACH_S):  # psycopg has its name looked up by a thread, and knows no limit for that
                connection = Connection.connect(
                    **self._parameters | {"options": given}, autocommit=True, prepare_threshold=0,
                    context=AdapterContext(),
                )  # fmt: skip
        except psycopg.Error as error:
            said = f"{self.name}: {_told(error)}" if in_full else "it cannot be reached"
            raise DatabaseUnavailable(f"the database cannot be used: {said}", retry_after_s=5) from error
        connection.prepared_max = 1000
        return connection

    def session(self, *, patience_s: float, answer_s: float | None = None) -> PostgresSession:
        return PostgresSession(self, patience_s, answer_s)

    def reads(self) -> PostgresReads:
        return PostgresReads(self)

    def place(self) -> ServerPlace:
        return ServerPlace()

    def read(self, op: Callable[[Tx], T]) -> T:
        return self._on_snapshot(op, _SNAPSHOT)

    def read_at_leisure(self, op: Callable[[Tx], T]) -> T:
        """The same for an ``op`` that does much besides, such as writing a backup: no limit of the server's ends it."""
        return self._on_snapshot(op, _SNAPSHOT + _UNHURRIED)

    def _on_snapshot(self, op: Callable[[Tx], T], begin: LiteralString) -> T:
        def snapshot(tx: Tx, connection: Connection) -> T:
            connection.execute(begin, prepare=False)
            try:
                with marked():
                    return op(tx)
            finally:
                try:
                    if not connection.closed:
                        connection.execute("ROLLBACK", prepare=False)
                except psycopg.Error:
                    connection.close()  # everything was read, or another error is on its way

        with self._snapshot_turns:
            return self.pooled(snapshot)

    def pooled(self, op: Callable[[Tx, Connection], T]) -> T:
        """Run a read on a connection of the pool; once more where an idle one turns out to have died meanwhile."""
        if not self._turns.acquire(timeout=LOOK_PATIENCE_S):
            raise Busy("the database is busy", retry_after_s=2)
        try:
            while True:
                is_old = bool(self._idle)
                connection = (
                    self._idle.pop() if is_old else self.connect(in_full=False, statement_timeout="60s", **_LOOK_UPS)
                )
                is_sound = False
                try:
                    with self.translating():
                        result = op(PostgresTx(connection), connection)
                    is_sound = True
                    return result
                except DatabaseUnavailable:
                    if not (is_old and connection.closed):
                        raise
                    self.close_idle()
                except Exception:
                    is_sound = True  # a refusal or a bug of the operation's
                    raise
                finally:
                    if is_sound and connection.info.transaction_status == TransactionStatus.IDLE:
                        self._idle.append(connection)
                    else:
                        connection.close()
        finally:
            self._turns.release()

    def close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def write(self, op: Callable[[Tx], T], *, patience_s: float = CLI_PATIENCE_S) -> T:
        """As everywhere, on a connection that is kept for the next time."""
        session = self._writer(patience_s)
        try:
            return self._written(session, op)
        finally:
            if session.is_idle():
                self._writers.append(session)
            else:
                session.close()

    def _writer(self, patience_s: float) -> PostgresSession:
        """A session that has begun; a new one where the one that was kept has died meanwhile."""
        while self._writers:
            session = self._writers.pop()
            if session.patience_s == patience_s:
                try:
                    session.begin()
                    return session
                except Busy:
                    session.close()
                    raise
                except DatabaseUnavailable:
                    pass
            session.close()
        session = self.session(patience_s=patience_s)
        try:
            session.begin()
        except BaseException:
            session.close()
            raise
        return session

    def has_committed(self, mark: tuple[int, int]) -> bool:
        """Waits for the turn to write: whoever held it then has it no more, so what it wrote is there or never will."""
        connection = self.connect(lock_timeout=f"{CLI_PATIENCE_S}s")
        try:
            with self.translating():
                _refuse_standby(connection)
                connection.execute(BEGIN, prepare=False)
                row = connection.execute(_MARKED, mark[:1]).fetchone()
                return row is not None and row[0] >= mark[1]
        finally:
            connection.close()

    def is_trouble(self, error: BaseException) -> bool:
        if not isinstance(error, psycopg.Error) or (error.sqlstate or "")[:2] in _OURS:
            return False
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) or error.sqlstate in _TROUBLES

    def translated(self, error: BaseException) -> DatabaseUnavailable:
        if isinstance(error, psycopg.Error) and error.sqlstate in _BUSY:
            return Busy("the database is locked by another process", retry_after_s=2)
        said = error.diag.message_primary if isinstance(error, psycopg.Error) else None
        return DatabaseUnavailable(f"the database cannot be used: {said or 'the connection was lost'}", retry_after_s=5)

    def process_lock(self) -> ProcessLock:
        return ServerLock(self)

    def dead(self, pids: Mapping[int, int]) -> set[int]:
        """Those whose lock was found free at every look of some time.

        Not while nobody could look: the server may have been away, and they had no chance to take their locks again.
        """
        if not pids:
            return set()
        try:
            living, now = self.pooled(lambda _, connection: _living(connection)), monotonic()
        except DatabaseUnavailable:
            self._free_since = {}
            raise
        if now - self._looked_at > FREE_FOR_S:
            self._free_since = {}
        self._looked_at = now
        self._free_since = {
            process_id: self._free_since.get(process_id, now) for process_id in pids if process_id not in living
        }
        return {process_id for process_id in self._free_since if self.is_dead(process_id, 0)}

    def living(self, pids: Mapping[int, int]) -> set[int]:
        return self.pooled(lambda _, connection: _living(connection)) & pids.keys()

    def is_dead(self, process_id: int, pid: int) -> bool:
        free_since = self._free_since.get(process_id)
        return free_since is not None and monotonic() - free_since >= FREE_FOR_S

    def watch(self, process_id: int, pid: int, when_waiting: Callable[[int], object]) -> None:
        is_told = False
        while not self.dead({process_id: pid}) and self._free_since:
            if not is_told:
                when_waiting(FREE_FOR_S)
                is_told = True
            sleep(1)


def _living(connection: Connection) -> set[int]:
    """Whose locks are held."""
    _refuse_standby(connection)
    return {row[0] for row in connection.execute(_LIVING, (_LIVES,)).fetchall()}


def _refuse_standby(connection: Connection) -> None:
    """Raises `DatabaseUnavailable` on a server that follows another: locks are local to a server."""
    row = connection.execute(_IS_STANDBY).fetchone()
    if row is None or row[0]:
        raise DatabaseUnavailable("the database cannot be used: its server is a standby", retry_after_s=5)


class ServerLock(ProcessLock):
    """A lock of a session of its own: the server frees it when the connection ends, however the process dies."""

    def __init__(self, database: PostgresDatabase) -> None:
        self._database = database
        self._connection: Connection | None = None
        self._process_id: int | None = None
        self._is_released = False

    def take_place(self, process_id: int) -> None:
        self._process_id = process_id
        self.keep()

    def keep(self) -> None:
        """Look whether the session still lives, and take the lock anew in a fresh one where it does not.

        A server that takes what it is sent and says nothing is waited for a moment only: others may call us dead soon.
        """
        if self._connection is not None:
            try:
                with _at_most(LOCK_S):
                    self._connection.execute("SELECT 1")
                return
            except (psycopg.Error, DatabaseUnavailable):
                self._connection.close()
                self._connection = None
        with _at_most(LOCK_S):
            connection = self._taken()
        if self._is_released and connection is not None:
            connection.close()
        else:
            self._connection = connection

    def _taken(self) -> Connection | None:
        """The lock in a new session; None: the lost session's end has not been noticed yet, and it speaks for us."""
        connection = self._database.connect(application_name=f"abhiapi-process-{self._process_id}")
        try:
            with self._database.translating():
                row = connection.execute(_TAKE, (_LIVES, self._process_id)).fetchone()
        except BaseException:
            connection.close()
            raise
        if row is not None and row[0]:
            return connection
        connection.close()
        return None

    def release(self) -> None:
        self._is_released = True
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _milliseconds(seconds: float) -> str:
    return f"{max(1, int(seconds * 1000))}ms"  # 0 would be for ever


def _at_most(wait_s: float) -> gevent.Timeout:
    return gevent.Timeout(wait_s, DatabaseUnavailable("the database does not answer", retry_after_s=5))


def _told(error: psycopg.Error) -> str:
    """What the server or libpq said, in one line; with what to do where their words tell only those who know."""
    said = " ".join(str(error).split())
    takes_none = "session is read-only" in said or "hot standby" in said
    return f"{said} (it takes no writes: name the primary, not a standby)" if takes_none else said


def _parameters(url: URL) -> dict[str, Any]:
    """The URL as libpq takes it: what it says itself comes before what we say."""
    own = {name: value if isinstance(value, str) else value[-1] for name, value in url.query.items()}
    settings = "".join(f" -c {name}={value}" for name, value in _OPTIONS.items())
    given = {
        "host": url.host,
        "port": url.port,
        "user": url.username,
        "password": url.password,
        "dbname": url.database,
        "application_name": "abhiapi",
        "connect_timeout": CONNECT_S,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 2,
        "tcp_user_timeout": 20_000,  # ms
        "client_encoding": "UTF8",
    } | own
    given["target_session_attrs"] = "read-write"  # a standby knows nothing of our locks, and takes no writes
    given["options"] = f"{own.get('options', '')}{settings}".strip()
    return {name: value for name, value in given.items() if value is not None}
