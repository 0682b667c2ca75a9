"""What `doctor` looks at where the ledger is: a file of SQLite's, or a server of PostgreSQL's."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from abhiapi.db import CLI_PATIENCE_S, Database
from abhiapi.db_sqlite import APPLICATION_ID, MOVED_ID, SqliteDatabase
from abhiapi.errors import AbhiError, DatabaseUnavailable, SchemaError
from abhiapi.migrations import VERSION

if TYPE_CHECKING:
    from abhiapi.db_postgres import PostgresDatabase

Status = Literal["ok", "warn", "fail"]

DISK_FREE_LOW_BYTES = 1024**3
DISK_FREE_LEAST_BYTES = 100 * 1024**2
CLOCK_APART_MAX_MS = 2_000


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: Status
    message: str


def tried(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except AbhiError as error:
        return Check(name, "fail", error.message)


def absent(database: Database) -> Check | None:
    """What is to be said of a database that is not there yet; None where it is."""
    try:
        if not isinstance(database, SqliteDatabase) or database.exists():
            return None
    except SchemaError as error:
        return Check("database", "fail", error.message)
    path = database.path
    folder = next(parent for parent in path.parents if parent.exists())
    if os.access(folder, os.W_OK):
        return Check("database", "warn", f"{path} does not exist yet: the first command that uses it creates it")
    return Check("database", "fail", f"{path} does not exist and cannot be created in {folder}: give it the right")


def room(database: Database) -> Iterator[Check]:
    """How much room a file has; what a server has, it tells nobody."""
    if isinstance(database, SqliteDatabase):
        yield _disk(database.path)


def standing(database: Database, now_ms: int) -> Check:
    """Whether it is ours, of this version, and kept as it should be."""
    if isinstance(database, SqliteDatabase):
        return _file(database)
    from abhiapi.db_postgres import PostgresDatabase

    assert isinstance(database, PostgresDatabase)
    return _server(database, now_ms)


def writable(database: Database) -> Check:
    database.write(lambda tx: None)
    if isinstance(database, SqliteDatabase) and not os.access(database.path, os.W_OK):
        return Check("writing", "fail", f"{database.path} may not be written: give this user the right")
    return Check("writing", "ok", "the database takes writes")


def _disk(path: Path) -> Check:
    folder = next(parent for parent in path.parents if parent.exists())
    free_bytes = shutil.disk_usage(folder).free
    message = f"{free_bytes // 1024**2} MiB free in {folder}"
    if free_bytes < DISK_FREE_LEAST_BYTES:
        return Check("disk", "fail", f"{message}: make room, or calls will soon be refused with 503")
    if free_bytes < DISK_FREE_LOW_BYTES:
        return Check("disk", "warn", f"{message}: make room before it runs out")
    return Check("disk", "ok", message)


def _file(database: SqliteDatabase) -> Check:
    database.check_ours()
    try:
        connection = database.connect(busy_timeout_s=CLI_PATIENCE_S)
        try:
            application_id, version, journal = (
                connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("application_id", "user_version", "journal_mode")
            )
        finally:
            connection.close()
    except (sqlite3.DatabaseError, DatabaseUnavailable) as error:
        return Check(
            "database", "fail", f"{database.path} cannot be read ({error}): if it is damaged, restore a backup"
        )
    problem = None
    if application_id == MOVED_ID:
        problem = "was moved to PostgreSQL: set ABHIAPI_DATABASE_URL to that (any other command names it)"
    elif application_id != APPLICATION_ID:
        problem = "is not AbhiAPI's: check ABHIAPI_DATABASE_URL"
    elif version != VERSION:
        problem = _of_another_version(version)
    elif journal != "wal":
        problem = (
            f"is in journal mode {journal}, so reading blocks writing: stop the server and put it back in order with "
            "`abhiapi backup` and `abhiapi restore`"
        )
    if problem:
        return Check("database", "fail", f"{database.path} {problem}")
    return Check("database", "ok", f"{database.path}, version {version}, write-ahead log")


def _server(database: PostgresDatabase, now_ms: int) -> Check:
    from abhiapi import migrations_postgres

    connection = database.connect(in_full=True)
    try:
        migrations_postgres.check_server(connection, database.name)
        version = migrations_postgres.version_of(connection, database.name)
        row = connection.execute("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint").fetchone()
        server = connection.info.server_version // 10_000
    finally:
        connection.close()
    if version == 0:
        return Check("database", "warn", f"{database.name} is empty: the first command that uses it makes its tables")
    if version != VERSION:
        return Check("database", "fail", f"{database.name} {_of_another_version(version)}")
    apart_ms = abs(now_ms - int(row[0])) if row else 0
    if apart_ms > CLOCK_APART_MAX_MS:
        said = f"its clock and this machine's are {apart_ms // 1000} s apart: set both by NTP"
        return Check("database", "warn", f"{database.name}: {said}")
    return Check("database", "ok", f"{database.name}, version {version}, PostgreSQL {server}")


def _of_another_version(version: int) -> str:
    if version > VERSION:
        return f"is of version {version}, newer than this program's {VERSION}: upgrade AbhiAPI"
    return f"is of version {version}: run any other command to upgrade it to {VERSION}"
