"""PostgreSQL inside a transaction: how a connection waits, how values come and go, Core statements for its driver."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, TypeVar

import gevent
import gevent.monkey
import gevent.socket
import psycopg
from psycopg import sql
from psycopg.abc import PQGen
from psycopg.adapt import AdaptersMap, Loader
from psycopg.types.numeric import Int8Dumper
from psycopg.waiting import Ready, Wait
from sqlalchemy import Table
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.sql import Executable

from abhiapi.db_base import HAS_NUL, Row, Tx, Written
from abhiapi.errors import BadRequest

T = TypeVar("T")
SUMS_AT_ONCE = 4  # what one call adds to
STEP_ROWS = 2000  # read from a server's cursor at once
_REFERENCES = (
    "SELECT c.conrelid::regclass::text, c.confrelid::regclass::text, c.conname FROM pg_constraint c"
    " WHERE c.contype = 'f' AND c.connamespace = current_schema()::regnamespace ORDER BY 1, 2, 3"
)
_KEYS_OF = (
    "SELECT a.attname, b.attname FROM pg_constraint c"
    " JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = c.conkey[1]"
    " JOIN pg_attribute b ON b.attrelid = c.confrelid AND b.attnum = c.confkey[1]"
    " WHERE c.contype = 'f' AND c.connamespace = current_schema()::regnamespace AND c.conname = %s"
    " AND c.conrelid = %s::regclass"
)
# Two statements as one: see `Tx.run_both`, `one_and`, `one_then`.
_BOTH = b"WITH a AS (%b) %b"
_AND = b"WITH a AS (%b) SELECT * FROM a, (%b) b"
_THEN = b"WITH a AS (%b), b AS (%b FROM a) SELECT * FROM a"  # an INSERT, with SELECT for VALUES
_SEQUENCE = "SELECT pg_get_serial_sequence(%s, %s)"


class _Whole(Loader):
    """A sum of integers is numeric in PostgreSQL; the schema has no decimals, so one with a fraction is a bug."""

    def load(self, data: Any) -> int:
        return int(bytes(data))


class _Bit(Loader):
    """A condition as a number, as SQLite has it."""

    def load(self, data: Any) -> int:
        return int(bytes(data) == b"t")


class Connection(psycopg.Connection[Row]):
    """One that waits in gevent's loop itself: through its imitation of poll() each wait takes twice as long.

    It is closed without a word when it is forgotten: idle ones end with the process.
    """

    _watcher: Any = None

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        if timeout is not None or not gevent.monkey.is_module_patched("select"):
            return super().wait(gen, interval, timeout)
        try:
            next(gen)
            asked = gen.send(Ready.W)  # what is sent is short, and the socket nearly always takes it at once
            while True:
                if asked == Wait.R:
                    if self._watcher is None:
                        self._watcher = gevent.get_hub().loop.io(self.pgconn.socket, 1)
                    gevent.get_hub().wait(self._watcher)
                    asked = gen.send(Ready.R)
                else:
                    gevent.socket.wait_readwrite(self.pgconn.socket)
                    asked = gen.send(Ready.RW)
        except StopIteration as done:
            value: T = done.value
            return value

    def __del__(self, *_: object) -> None:
        if hasattr(self, "pgconn") and not self.closed:
            self.pgconn.finish()


_ADAPTERS = AdaptersMap(psycopg.adapters)
_ADAPTERS.register_loader("numeric", _Whole)
_ADAPTERS.register_loader("bool", _Bit)
_ADAPTERS.register_dumper(int, Int8Dumper)  # one type for every number: one prepared statement for every call


class Compiled:
    """A statement's SQL and the values that stand in it. Keeps the statement, whose id is its cache key."""

    __slots__ = ("_constants", "_names", "sql", "statement")

    def __init__(self, statement: Any, dialect: PGDialect_psycopg, *, returning_key: bool = False) -> None:
        self.statement = statement
        if returning_key:
            statement = statement.returning(next(iter(statement.table.primary_key)))
        compiled = statement.compile(dialect=dialect)
        self.sql = str(compiled).encode()
        self._names: list[str] = list(compiled.params)
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}

    def arguments(self, params: Mapping[str, Any]) -> dict[str, Any]:
        constants = self._constants
        return {name: params[name] if name in params else constants[name] for name in self._names}


class Statements:
    """Statements as the driver wants them, each compiled once for all databases of a process."""

    def __init__(self) -> None:
        self._dialect = PGDialect_psycopg()  # type: ignore[no-untyped-call]
        self._compiled: dict[tuple[int, bool], Compiled] = {}
        self._together: dict[tuple[bytes, int, int], bytes] = {}
        self._moves: dict[tuple[int, ...], bytes] = {}

    def of(self, statement: Executable, *, returning_key: bool = False) -> Compiled:
        known = self._compiled.get((id(statement), returning_key))
        if known is None:
            made = Compiled(statement, self._dialect, returning_key=returning_key)
            known = self._compiled.setdefault((id(statement), returning_key), made)  # for ever: its id is a key, too
        return known

    def together(self, form: bytes, first: Compiled, second: Compiled) -> bytes:
        """Two statements as one, made once; the first's values are named ``a_...``."""
        known = self._together.get((form, id(first), id(second)))
        if known is None:
            then = second.sql
            if form is _THEN:
                then = then.replace(b" VALUES (", b" SELECT ", 1).removesuffix(b")")
            known = form % (_renamed(first.sql, b"a_"), then)
            self._together[form, id(first), id(second)] = known
        return known

    def all_of(self, moves: Sequence[Compiled]) -> bytes:
        """UPDATEs as one statement, whose row tells how many rows each of them changed. Values are named ``s0_...``."""
        key = tuple(map(id, moves))
        known = self._moves.get(key)
        if known is None:
            numbers = [b"s%d" % number for number in range(len(moves))]
            steps = [
                name + b" AS (" + _renamed(move.sql, name + b"_") + b" RETURNING 1)"
                for name, move in zip(numbers, moves, strict=True)
            ]
            counts = [b"(SELECT count(*) FROM " + name + b")" for name in numbers]
            known = self._moves[key] = b"WITH " + b", ".join(steps) + b" SELECT " + b", ".join(counts)
        return known


STATEMENTS = Statements()


class PostgresTx(Tx):
    __slots__ = ("_connection", "_cursor", "_numbers", "changes")

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._cursor = connection.cursor()
        self._numbers = count(1)
        self.changes = 0

    def run(self, statement: Executable, **params: Any) -> int:
        changed = self._execute(STATEMENTS.of(statement), params).rowcount
        self.changes += changed
        return changed

    def run_both(self, first: Written, second: Written) -> None:
        self.changes += 1 + self._both(_BOTH, first, second).rowcount

    def one_and(self, first: Written, look: Written) -> Row | None:
        return self._one_of_both(_AND, first, look)

    def one_then(self, first: Written, then: Written) -> Row | None:
        return self._one_of_both(_THEN, first, then)

    def _write_sums(self) -> None:
        """As everywhere, a few rows in one statement."""
        while self._sums:
            some = [self._sums.pop(key) for key in list(self._sums)[:SUMS_AT_ONCE]]
            moves = [STATEMENTS.of(roll_up.move) for roll_up, _ in some]
            arguments = {
                f"s{number}_{name}": value
                for number, (move, (_, sums)) in enumerate(zip(moves, some, strict=True))
                for name, value in move.arguments(sums).items()
            }
            moved = self._executed(STATEMENTS.all_of(moves), arguments).fetchone() or ()
            for (roll_up, sums), is_there in zip(some, moved, strict=True):
                if is_there:
                    self.changes += 1
                else:
                    self.run(roll_up.begin, **sums)

    def one(self, statement: Executable, **params: Any) -> Row | None:
        return self._rows(STATEMENTS.of(statement), params).fetchone()

    def all(self, statement: Executable, **params: Any) -> list[Row]:
        return self._rows(STATEMENTS.of(statement), params).fetchall()

    def insert(self, statement: Executable, **params: Any) -> int:
        row = self._rows(STATEMENTS.of(statement, returning_key=True), params).fetchone()
        assert row is not None
        return int(row[0])

    def each(self, statement: Executable, **params: Any) -> Iterator[Row]:
        compiled = STATEMENTS.of(statement)
        with self._connection.cursor(f"abhiapi_{next(self._numbers)}") as cursor:
            cursor.itersize = STEP_ROWS
            cursor.execute(compiled.sql, compiled.arguments(params))
            yield from cursor

    def load(self, table: Table, rows: Iterator[Row]) -> None:
        columns = [sql.Identifier(column.name) for column in table.columns]
        into = sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(table.name), sql.SQL(", ").join(columns))
        try:
            with self._cursor.copy(into) as copy:
                for row in rows:
                    copy.write_row(row)
        except psycopg.DataError as error:
            if _is_about_nul(error):
                raise BadRequest(f"a row of {table.name} has a NUL character in it, which cannot be stored") from error
            raise
        key = next(iter(table.primary_key)).name
        found = self._cursor.execute(_SEQUENCE, (table.name, key)).fetchone()
        if found is not None and found[0] is not None:
            highest = sql.SQL("SELECT setval(%s::regclass, coalesce(max({}), 0) + 1, false) FROM {}")
            query = highest.format(sql.Identifier(key), sql.Identifier(table.name))
            self._cursor.execute(query, found)

    def dangling(self) -> list[tuple[str, str, int]]:
        """References are kept by the server; who may switch that off (a superuser) is found out by counting."""
        found: dict[tuple[str, str], int] = {}
        for child, parent, name in self._cursor.execute(_REFERENCES).fetchall():
            for column, key in self._cursor.execute(_KEYS_OF, (name, child)).fetchall():
                quoted = {
                    "child": sql.Identifier(child),
                    "parent": sql.Identifier(parent),
                    "column": sql.Identifier(column),
                    "key": sql.Identifier(key),
                }
                query = sql.SQL(
                    "SELECT COUNT(*) FROM {child} c LEFT JOIN {parent} p ON p.{key} = c.{column}"
                    " WHERE c.{column} IS NOT NULL AND p.{key} IS NULL"
                ).format(**quoted)
                row = self._cursor.execute(query).fetchone()
                if row is not None and row[0]:
                    found[child, parent] = found.get((child, parent), 0) + row[0]
        return [(child, parent, rows) for (child, parent), rows in found.items()]

    def _rows(self, compiled: Compiled, params: Mapping[str, Any]) -> psycopg.Cursor[Row]:
        cursor = self._execute(compiled, params)
        if not (cursor.statusmessage or "").startswith("SELECT"):
            self.changes += cursor.rowcount
        return cursor

    def _one_of_both(self, form: bytes, first: Written, second: Written) -> Row | None:
        row = self._both(form, first, second).fetchone()
        self.changes += row is not None
        return row

    def _both(self, form: bytes, first: Written, second: Written) -> psycopg.Cursor[Row]:
        one, other = STATEMENTS.of(first[0]), STATEMENTS.of(second[0])
        query = STATEMENTS.together(form, one, other)
        return self._executed(
            query, {f"a_{name}": value for name, value in one.arguments(first[1]).items()} | other.arguments(second[1])
        )

    def _execute(self, compiled: Compiled, params: Mapping[str, Any]) -> psycopg.Cursor[Row]:
        return self._executed(compiled.sql, compiled.arguments(params))

    def _executed(self, query: bytes, arguments: Mapping[str, Any]) -> psycopg.Cursor[Row]:
        try:
            return self._cursor.execute(query, arguments)
        except psycopg.DataError as error:
            if _is_about_nul(error):
                raise BadRequest(HAS_NUL) from error
            raise


class AdapterContext:
    """What new connections take from us."""

    adapters = _ADAPTERS
    connection = None


def _is_about_nul(error: psycopg.DataError) -> bool:
    """Whether psycopg refused a text, before the server heard of it."""
    return error.sqlstate is None and "NUL" in str(error)


def _renamed(query: bytes, prefix: bytes) -> bytes:
    """A statement whose values have other names."""
    return re.sub(rb"%\((\w+)\)s", rb"%(" + prefix + rb"\1)s", query)
