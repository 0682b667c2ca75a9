"""SQLite: one file, its pragmas, connections, transactions and troubles, and the locks beside it.

Statements are compiled once and then run on SQLite's own connection: executing them through SQLAlchemy costs ten
times as much as SQLite itself does (docs/decisions/0002).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Table, text
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.engine import Dialect
from sqlalchemy.sql import Executable

from abhiapi.db_base import CLI_PATIENCE_S, HAS_NUL, Busy, Database, Place, Reads, Row, Session, Tx, Written, marked
from abhiapi.errors import BadRequest, DatabaseUnavailable, SchemaError
from abhiapi.liveness import FileLock, is_alive, reap

T = TypeVar("T")

APPLICATION_ID = 0x41424849  # "ABHI": how we know one of our files
MOVED_ID = 0x41424D56  # "ABMV": one whose ledger is elsewhere now
REPLACED = "another file stands where the database was: put the old one back, or restart the server"
_PRAGMAS = (
    "synchronous = FULL",
    "foreign_keys = ON",
    "cache_size = -65536",  # KiB
    "wal_autocheckpoint = 8000",  # 32 MB: fewer pages are written twice
    "journal_size_limit = 67108864",
)
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_DANGLING = text('SELECT "table", parent, COUNT(*) FROM pragma_foreign_key_check GROUP BY "table", parent')
_DIALECT: Dialect = sqlite_dialect()


class SqliteTx(Tx):
    __slots__ = ("_connection",)

    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__()
        self._connection = connection

    def run(self, statement: Executable, **params: Any) -> int:
        return self._execute(statement, params).rowcount

    def run_both(self, first: Written, second: Written) -> None:
        self._execute(*first)
        self._execute(*second)

    def one_and(self, first: Written, look: Written) -> Row | None:
        row: Row | None = self._execute(*first).fetchone()
        return None if row is None else row + self._execute(*look).fetchone()

    def one_then(self, first: Written, then: Written) -> Row | None:
        row: Row | None = self._execute(*first).fetchone()
        if row is not None:
            self._execute(*then)
        return row

    def one(self, statement: Executable, **params: Any) -> Row | None:
        row: Row | None = self._execute(statement, params).fetchone()
        return row

    def all(self, statement: Executable, **params: Any) -> list[Row]:
        return self._execute(statement, params).fetchall()

    def each(self, statement: Executable, **params: Any) -> Iterator[Row]:
        return iter(self._execute(statement, params))

    def insert(self, statement: Executable, **params: Any) -> int:
        return self._execute(statement, params).lastrowid or 0

    def load(self, table: Table, rows: Iterator[Row]) -> None:
        names = [column.name for column in table.columns]
        statement = str(table.insert().compile(dialect=_DIALECT, column_keys=names))
        self._connection.executemany(statement, rows)

    def dangling(self) -> list[tuple[str, str, int]]:
        return [(row[0], row[1], row[2]) for row in self.all(_DANGLING)]

    def _execute(self, statement: Executable, params: Mapping[str, Any]) -> sqlite3.Cursor:
        compiled = compile_once(statement)
        arguments = compiled.arguments(params)
        for value in arguments:
            if type(value) is str and "\0" in value:
                raise BadRequest(HAS_NUL)
        return self._connection.execute(compiled.sql, arguments)


class _Compiled:
    """A statement's SQL and how its parameters are lined up. Keeps the statement, whose id is its cache key."""

    __slots__ = ("_constants", "_names", "sql", "statement")

    def __init__(self, statement: Executable) -> None:
        self.statement = statement
        compiled = statement.compile(dialect=_DIALECT)  # type: ignore[attr-defined]
        self.sql = str(compiled)
        self._names: list[str] = list(compiled.positiontup or ())
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}

    def arguments(self, params: Mapping[str, Any]) -> list[Any]:
        constants = self._constants
        return [params[name] if name in params else constants[name] for name in self._names]


_COMPILED: dict[int, _Compiled] = {}  # for all databases of a process, and for ever


def compile_once(statement: Executable) -> _Compiled:
    known = _COMPILED.get(id(statement))
    if known is None:
        known = _COMPILED.setdefault(id(statement), _Compiled(statement))
    return known


class SqliteSession(Session):
    def __init__(self, database: SqliteDatabase, busy_timeout_s: float) -> None:
        self._connection = database.connect(busy_timeout_s=busy_timeout_s)
        self.tx = database.tx(self._connection)

    def begin(self) -> None:
        self.tx.forget_sums()
        self._execute("BEGIN IMMEDIATE")

    def changes(self) -> int:
        return self._connection.total_changes + self.tx.added

    def is_spoilt(self) -> bool:
        return False  # a statement that fails is undone alone

    def commit(self) -> None:
        self.tx.check_sums()
        self._execute("COMMIT")

    def roll_back(self) -> None:
        if self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except sqlite3.Error as error:
                if not is_trouble(error):
                    raise
                # The disk is in trouble: the connection is dropped by the caller, which undoes the transaction as well.

    def close(self) -> None:
        self._connection.close()

    def _execute(self, statement: str) -> None:
        try:
            self._connection.execute(statement)
        except sqlite3.Error as error:
            raise translated(error) from error


class SqliteReads(Reads):
    """One connection. Never waits for a lock."""

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database
        self._place = database.place()
        self._connection: sqlite3.Connection | None = None

    def read(self, op: Callable[[Tx], T]) -> T:
        self._place.check()
        try:
            if self._connection is None:
                self._connection = self._database.connect()
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


class FilePlace(Place):
    """A file, told from another at the same path: writes to one that was deleted or replaced would be lost."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: tuple[int, int] | None = None

    def check(self) -> None:
        try:
            status = os.stat(self._path)
        except OSError:
            raise DatabaseUnavailable("the database file is gone", retry_after_s=5) from None
        identity = status.st_dev, status.st_ino
        if self._known not in (None, identity):
            raise DatabaseUnavailable(REPLACED, retry_after_s=30)
        self._known = identity


class SqliteDatabase(Database):
    """A file. Opens a connection for each transaction."""

    engine = "sqlite"
    waits_cooperatively = False

    def __init__(self, url: URL) -> None:
        if not url.database or url.database == ":memory:":
            raise SchemaError("the ledger must be a file: use sqlite:////absolute/path.db")
        self.path = Path(url.database).resolve()
        self.name = str(self.path)

    @classmethod
    def at(cls, path: Path) -> SqliteDatabase:
        return cls(URL.create("sqlite", database=str(path)))

    def exists(self) -> bool:
        """Raises `SchemaError` where this user may not even look."""
        return _has_content(self.path)

    def check_ours(self) -> None:
        """Raises `SchemaError` for a file of another user's: SQLite says of it only that it cannot open it."""
        if not os.access(self.path, os.R_OK, effective_ids=True):
            raise SchemaError(_not_ours(self.path))

    def has_log(self) -> bool:
        """Whether there is a write-ahead log beside the file: committed rows that are not in the file itself yet."""
        return _has_content(self.path.with_name(f"{self.path.name}-wal"))

    def connect(self, *, busy_timeout_s: float = 0, create: bool = False) -> sqlite3.Connection:
        """A configured connection of its own, in autocommit. Raises `DatabaseUnavailable`.

        ``synchronous=FULL``: a commit is on disk before anybody hears of it, also after a power cut. A server waits
        for no lock (``busy_timeout_s=0``): SQLite's wait sleeps in C and would freeze every greenlet. Only
        `migrations` creates a file: SQLite would put an empty one where ours was moved away, and then remove the
        write-ahead log beside it, with every commit in it.
        """
        connection: sqlite3.Connection | None = None
        try:
            connection = sqlite3.connect(
                f"{self.path.as_uri()}?mode={'rwc' if create else 'rw'}",
                uri=True,
                timeout=busy_timeout_s,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=512,
            )
            for pragma in _PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            raise translated(error) from error
        return connection

    def tx(self, connection: sqlite3.Connection) -> Tx:
        return SqliteTx(connection)

    def session(self, *, patience_s: float, answer_s: float | None = None) -> SqliteSession:
        return SqliteSession(self, patience_s)

    def reads(self) -> SqliteReads:
        return SqliteReads(self)

    def place(self) -> FilePlace:
        return FilePlace(self.path)

    def read(self, op: Callable[[Tx], T]) -> T:
        connection = self.connect(busy_timeout_s=CLI_PATIENCE_S)
        try:
            with marked(), self.translating():
                connection.execute("BEGIN")
                return op(self.tx(connection))
        finally:
            connection.close()

    def has_committed(self, mark: tuple[int, int]) -> bool:
        raise AssertionError("SQLite always says what came of a commit")

    def is_trouble(self, error: BaseException) -> bool:
        return is_trouble(error)

    def translated(self, error: BaseException) -> DatabaseUnavailable:
        return translated(error)

    def process_lock(self) -> FileLock:
        return FileLock(self.path)

    def dead(self, pids: Mapping[int, int]) -> set[int]:
        return {process_id for process_id, pid in pids.items() if reap(self.path, process_id, pid)}

    def living(self, pids: Mapping[int, int]) -> set[int]:
        return {process_id for process_id, pid in pids.items() if is_alive(self.path, process_id, pid)}

    def is_dead(self, process_id: int, pid: int) -> bool:
        return reap(self.path, process_id, pid)

    def watch(self, process_id: int, pid: int, when_waiting: Callable[[int], object]) -> None:
        """A lock of the kernel's tells at once."""


def translated(error: BaseException) -> DatabaseUnavailable:
    """What SQLite's own trouble (locked, full, read-only, gone, damaged) is to the rest of the program."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in _BUSY:
        return Busy("the database is locked by another process", retry_after_s=2)
    return DatabaseUnavailable(f"the database cannot be used: {error}", retry_after_s=5)


def is_trouble(error: BaseException) -> bool:
    """Whether an error is the database's trouble rather than a bug or a broken constraint.

    A statement that SQLite cannot make sense of (no such table or column, bad syntax) comes as an OperationalError,
    too, with the code SQLITE_ERROR, which no trouble of the disk has. Waiting mends no statement.
    """
    if isinstance(error, sqlite3.IntegrityError):
        return str(error) == "this ledger was moved"  # under the hands of whoever had opened it before
    if isinstance(error, sqlite3.OperationalError):
        return getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_ERROR
    return type(error) is sqlite3.DatabaseError


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False
    except PermissionError as error:
        raise SchemaError(_not_ours(path)) from error


def _not_ours(path: Path) -> str:
    return f"this user may not read {path}: run this as the user who serves, or check ABHIAPI_DATABASE_URL"
