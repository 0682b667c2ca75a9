"""Storage: one SQLite file, its connections and transactions, and every difference between engines.

Owns the engine, the pragmas and the translation of the database's troubles into `DatabaseUnavailable`. Knows no
table. Statements are SQLAlchemy Core, compiled once for the engine and then run on its own connection: executing
them through Core costs ten times as much as SQLite itself does (docs/decisions/0002). A write is a function of an
open `Tx`; `Database.write` runs it in a short transaction of its own, `committer.GroupCommitter` in a shared one.
No network may be used while one is open: `assert_no_transaction` is called by the module that talks to fal.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import create_engine
from sqlalchemy.engine import Dialect, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool
from sqlalchemy.sql import Executable

from abhiapi.errors import DatabaseUnavailable, SchemaError

T = TypeVar("T")
Row = tuple[Any, ...]

APPLICATION_ID = 0x41424849  # "ABHI": how we know one of our files
CLI_PATIENCE_S = 15  # a command waits this long for its turn to write
_PRAGMAS = (
    "synchronous = FULL",
    "foreign_keys = ON",
    "cache_size = -65536",  # KiB
    "wal_autocheckpoint = 8000",  # 32 MB: fewer pages are written twice
    "journal_size_limit = 67108864",
)

_in_transaction: ContextVar[bool] = ContextVar("abhiapi_in_transaction", default=False)

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


class Busy(DatabaseUnavailable):
    """Somebody else is writing just now; trying again may help."""


def assert_no_transaction() -> None:
    """The other half of the mark that transactions set: nothing may talk to the network inside one."""
    if _in_transaction.get():
        raise AssertionError("the network was used inside a database transaction")


class Tx:
    """An open transaction: runs Core statements with named parameters. Hands out plain tuples."""

    __slots__ = ("_compiled", "_connection", "_dialect")

    def __init__(self, connection: sqlite3.Connection, dialect: Dialect, compiled: dict[int, _Compiled]) -> None:
        self._connection = connection
        self._dialect = dialect
        self._compiled = compiled

    def run(self, statement: Executable, **params: Any) -> int:
        """Run a statement; how many rows it changed."""
        return self._execute(statement, params).rowcount

    def one(self, statement: Executable, **params: Any) -> Row | None:
        row: Row | None = self._execute(statement, params).fetchone()
        return row

    def all(self, statement: Executable, **params: Any) -> list[Row]:
        return self._execute(statement, params).fetchall()

    def each(self, statement: Executable, **params: Any) -> Iterator[Row]:
        """The rows one after the other, in bounded memory."""
        return iter(self._execute(statement, params))

    def insert(self, statement: Executable, **params: Any) -> int:
        """Run an INSERT into a table with an integer key; the new key."""
        return self._execute(statement, params).lastrowid or 0

    def _execute(self, statement: Executable, params: Mapping[str, Any]) -> sqlite3.Cursor:
        compiled = self._compiled.get(id(statement))
        if compiled is None:
            compiled = self._compiled[id(statement)] = _Compiled(statement, self._dialect)
        return self._connection.execute(compiled.sql, compiled.arguments(params))


class _Compiled:
    """A statement's SQL and how its parameters are lined up. Keeps the statement, whose id is its cache key."""

    __slots__ = ("_constants", "_names", "sql", "statement")

    def __init__(self, statement: Executable, dialect: Dialect) -> None:
        self.statement = statement
        compiled = statement.compile(dialect=dialect)  # type: ignore[attr-defined]
        self.sql = str(compiled)
        self._names: list[str] = list(compiled.positiontup or ())
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}

    def arguments(self, params: Mapping[str, Any]) -> list[Any]:
        constants = self._constants
        return [params[name] if name in params else constants[name] for name in self._names]


class Database:
    """The database by URL. Cheap to make; opens a connection for each transaction (see `committer` for servers)."""

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise SchemaError(f"{url!r} is not a database URL") from error
        if parsed.get_backend_name() != "sqlite":
            raise SchemaError(f"{parsed.get_backend_name()} is not supported yet; use sqlite:////absolute/path.db")
        if not parsed.database or parsed.database == ":memory:":
            raise SchemaError("the ledger must be a file: use sqlite:////absolute/path.db")
        self.path = Path(parsed.database).resolve()
        self._engine = create_engine(f"sqlite:///{self.path}", poolclass=NullPool)
        self._compiled: dict[int, _Compiled] = {}

    def exists(self) -> bool:
        return _has_content(self.path)

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
        return Tx(connection, self._engine.dialect, self._compiled)

    def write(self, op: Callable[[Tx], T], *, patience_s: float = CLI_PATIENCE_S) -> T:
        """Run ``op`` in a transaction of its own and make it durable. For the command line: waits in C for its turn."""
        connection = self.connect(busy_timeout_s=patience_s)
        try:
            with _translating():
                connection.execute("BEGIN IMMEDIATE")
            try:
                with marked(), _translating():
                    result = op(self.tx(connection))
                with _translating():
                    connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            return result
        finally:
            connection.close()

    def read(self, op: Callable[[Tx], T]) -> T:
        """Run ``op`` on one unchanging snapshot of the database."""
        connection = self.connect(busy_timeout_s=CLI_PATIENCE_S)
        try:
            with marked(), _translating():
                connection.execute("BEGIN")
                return op(self.tx(connection))
        finally:
            connection.close()


@contextmanager
def marked() -> Iterator[None]:
    token = _in_transaction.set(True)
    try:
        yield
    finally:
        _in_transaction.reset(token)


@contextmanager
def _translating() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if not is_trouble(error):
            raise  # a broken constraint or a wrong statement is a bug, and keeps its traceback
        raise translated(error) from error


def translated(error: sqlite3.Error) -> DatabaseUnavailable:
    """What the database's own trouble (locked, full, read-only, gone, damaged) is to the rest of the program."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in _BUSY:
        return Busy("the database is locked by another process", retry_after_s=2)
    return DatabaseUnavailable(f"the database cannot be used: {error}", retry_after_s=5)


def is_trouble(error: BaseException) -> bool:
    """Whether an error is the database's trouble rather than a bug or a broken constraint.

    A statement that SQLite cannot make sense of (no such table or column, bad syntax) comes as an OperationalError,
    too, with the code SQLITE_ERROR, which no trouble of the disk has. Waiting mends no statement.
    """
    if isinstance(error, sqlite3.OperationalError):
        return getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_ERROR
    return type(error) is sqlite3.DatabaseError


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def file_identity(path: Path) -> tuple[int, int] | None:
    """Which file stands at ``path`` just now: writes to one that was deleted or replaced would be lost."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
