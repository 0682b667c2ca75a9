"""Making and upgrading a PostgreSQL database. schema.postgres.sql is the end state; `STEPS` lead to it.

Its version is a row of a table of its own. What is done, is done in one transaction under a lock that only one
process has, so several may start at once, and an upgrade that fails leaves what was there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import LiteralString

import psycopg
from psycopg import sql

from abhiapi.db import CLI_PATIENCE_S, Database, Tx
from abhiapi.db_postgres import BEGIN, PostgresDatabase
from abhiapi.db_postgres_tx import Connection, PostgresTx
from abhiapi.errors import Refused, SchemaError

BORN = 10  # the version that the first PostgreSQL schema had
# What each later step of `migrations.STEPS` is here: files in upgrades/, which never change once they have shipped.
STEPS: tuple[str, ...] = ("0011-turns-have-owners.postgres.sql",)
SERVER_LEAST = 13

_HAS_VERSION = "SELECT to_regclass('abhiapi_schema') IS NOT NULL"
_VERSION = "SELECT version FROM abhiapi_schema"
_ARRIVING = "SELECT arriving, origin FROM abhiapi_schema WHERE arriving IS NOT NULL"
_OURS = "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'"
_TABLES = "SELECT count(*) FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p')"


def migrate(database: Database, version: int) -> str | None:
    """Create or upgrade the database; what was done, in words, or None when it was up to date.

    Raises `SchemaError` for what is not ours, is of a newer version, or is on a server that will not do.
    """
    assert isinstance(database, PostgresDatabase)
    connection = database.connect(in_full=True, lock_timeout=f"{CLI_PATIENCE_S}s")
    try:
        check_server(connection, database.name)
        with database.translating():
            found = version_of(connection, database.name)
            if found == version:
                return None
            connection.execute(BEGIN, prepare=False)
            found = version_of(connection, database.name)  # another process may have been faster
            if found == version:
                return None
            if found > version:
                raise newer(database.name, found, version)
            _bring(connection, found, version)
            connection.execute("COMMIT", prepare=False)
        if not found:
            return f"created the tables in {database.name}"
        return f"upgraded {database.name} from version {found} to {version}"
    except psycopg.errors.InsufficientPrivilege as error:
        raise SchemaError(
            f"{database.name}: {error.diag.message_primary}: give its user the right to create"
        ) from error
    finally:
        connection.close()


def check_server(connection: Connection, name: str) -> None:
    """Raises `SchemaError` for a server or a database that would not keep what is written as it is."""
    server, encoding = connection.info.server_version // 10_000, connection.info.parameter_status("server_encoding")
    if server < SERVER_LEAST:
        raise SchemaError(f"{name} is on PostgreSQL {server}: {SERVER_LEAST} or newer is needed")
    if encoding != "UTF8":
        raise SchemaError(f"{name} is encoded as {encoding}: make a database with ENCODING 'UTF8'")


def version_of(connection: Connection, name: str) -> int:
    """The schema's version; 0: the database is empty. Raises `SchemaError` where it is another program's."""
    tables = _number(connection, _TABLES)  # counted first: whoever makes ours just now makes all of them at once
    if _number(connection, _HAS_VERSION):  # also in another schema of the search path than new tables would go to
        if connection.execute(_ARRIVING).fetchone() is not None:
            raise SchemaError(f"{name} holds a ledger that has not arrived yet: run `abhiapi migrate-to` again")
        return _number(connection, _VERSION)
    if tables:
        raise SchemaError(f"{name} is a database of some other program; choose another ABHIAPI_DATABASE_URL")
    return 0


@contextmanager
def arrival(target: Database, version: int, number: str, origin: str) -> Iterator[Tx]:
    """A transaction on empty tables of ours, made here, that leaves them marked as not to be used yet.

    What an earlier try of the same origin left is removed. Raises `Refused` where there is anything else.
    """
    assert isinstance(target, PostgresDatabase)
    connection = target.connect(
        in_full=True, lock_timeout=f"{CLI_PATIENCE_S}s", idle_in_transaction_session_timeout="0"
    )
    try:
        check_server(connection, target.name)
        with target.translating():
            connection.execute(BEGIN, prepare=False)
            _clear(connection, target.name, origin)
            schema = schema_sql().encode()
            connection.execute(schema, prepare=False)
            connection.execute(
                "INSERT INTO abhiapi_schema (version, arriving, origin) VALUES (%s, %s, %s)", (version, number, origin)
            )
            yield PostgresTx(connection)
            connection.execute("COMMIT", prepare=False)
    finally:
        connection.close()


def finish_arrival(target: Database, number: str) -> bool:
    """What was on its way is here, and may be used; whether it is this one (also when it was here before)."""
    assert isinstance(target, PostgresDatabase)
    connection = target.connect(in_full=True)
    try:
        with target.translating():
            if not _number(connection, _HAS_VERSION):
                return False
            done = connection.execute("UPDATE abhiapi_schema SET arriving = NULL WHERE arriving = %s", (number,))
            return done.rowcount == 1
    finally:
        connection.close()


def _clear(connection: Connection, name: str, origin: str) -> None:
    """Make room for what arrives. Raises `Refused` where something is that did not come from the same place."""
    if not _number(connection, _TABLES):
        return
    found = connection.execute(_ARRIVING).fetchone() if _number(connection, _HAS_VERSION) else None
    if found is None:
        raise Refused(f"{name} is not empty: name a database without content")
    if found[1] != origin:
        raise Refused(f"{name} holds a ledger on its way from {found[1]}: end that first, or name another database")
    names = sql.SQL(", ").join(sql.Identifier(row[0]) for row in connection.execute(_OURS).fetchall())
    query = sql.SQL("DROP TABLE {} CASCADE").format(names)
    connection.execute(query)
    connection.execute("DROP FUNCTION refuse, webhook_follows, job_input_goes")


def newer(name: str, version: int, known: int) -> SchemaError:
    return SchemaError(f"{name} is of version {version}, newer than this program's {known}: upgrade AbhiAPI")


def schema_sql() -> str:
    return resources.files("abhiapi").joinpath("schema.postgres.sql").read_text("utf-8")


def _bring(connection: Connection, found: int, version: int) -> None:
    """In the open transaction: from what is there to this version."""
    scripts: Sequence[bytes] = [schema_sql().encode()]
    if found:
        files = resources.files("abhiapi")
        scripts = [files.joinpath("upgrades", name).read_bytes() for name in STEPS[found - BORN :]]
    for script in scripts:
        connection.execute(script, prepare=False)
    if found:
        connection.execute("UPDATE abhiapi_schema SET version = %s", (version,))
    else:
        connection.execute("INSERT INTO abhiapi_schema (version) VALUES (%s)", (version,))


def _number(connection: Connection, query: LiteralString) -> int:
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])
