"""Making a new database, and bringing an old one up to this version without losing a ledger.

This is SQLite's half; PostgreSQL's is `migrations_postgres`. schema.sql is the end state. `STEPS` are numbered and
only ever appended to: step n turns version n into n + 1. An old database is copied beside itself first, and each step
is one transaction, so an upgrade that fails leaves what was there.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from importlib import resources
from itertools import count
from pathlib import Path
from time import monotonic, sleep

from abhiapi.db import CLI_PATIENCE_S, Busy, Database, database_at
from abhiapi.db_sqlite import APPLICATION_ID, MOVED_ID, SqliteDatabase, translated
from abhiapi.errors import DatabaseUnavailable, SchemaError
from abhiapi.settings import Settings

log = logging.getLogger("abhiapi")
AGAIN_S = 0.02  # after which a file that another process writes to is asked for again

Step = Callable[[sqlite3.Connection], None]


def _run(connection: sqlite3.Connection, script: str) -> None:
    for statement in statements(script):
        connection.execute(statement)


def _of_file(name: str) -> Step:
    """A step that runs the SQL statements of a file in upgrades/, which never changes once it has shipped."""

    def step(connection: sqlite3.Connection) -> None:
        _run(connection, resources.files("abhiapi").joinpath("upgrades", name).read_text("utf-8"))

    return step


# Version 1 is the first schema there was.
STEPS: tuple[Step, ...] = (
    _of_file("0002-idempotency-keys.sql"),
    _of_file("0003-webhooks.sql"),
    _of_file("0004-fal-prices.sql"),
    _of_file("0005-billing-events.sql"),
    _of_file("0006-limits-reports-alerts.sql"),
    _of_file("0007-job-inputs.sql"),
    _of_file("0008-users.sql"),
    _of_file("0009-entries-of-calls.sql"),
    _of_file("0010-playground-keys.sql"),
    _of_file("0011-turns-have-owners.sql"),
)
VERSION = 1 + len(STEPS)


def open_database(settings: Settings) -> Database:
    """The database of the settings, created or upgraded if need be (said in the log). Raises `SchemaError`."""
    database = database_at(settings.database_url)
    done = migrate(database)
    if done:
        log.warning("%s", done)
    return database


def migrate(database: Database, *, steps: Sequence[Step] = STEPS, schema: str | None = None) -> str | None:
    """Create or upgrade the database; what was done, in words, or None when it was up to date.

    Raises `SchemaError` for what is not ours or is of a newer version, `DatabaseUnavailable` for the disk's or the
    server's troubles. Safe when several processes start at once: the first does the work, the others find it done.
    """
    if isinstance(database, SqliteDatabase):
        return _migrate_file(database, steps, schema)
    from abhiapi import migrations_postgres  # here, because SQLite needs none of what it imports

    return migrations_postgres.migrate(database, VERSION)


def _migrate_file(database: SqliteDatabase, steps: Sequence[Step], schema: str | None) -> str | None:
    version_wanted = 1 + len(steps)
    has_log = database.has_log()  # asked before `exists`: whoever creates one just now makes the file first
    is_new = not database.exists()
    if is_new:
        _make_room(database.path, has_log)
        _make_private(database.path)
    database.check_ours()
    try:
        connection = database.connect(busy_timeout_s=CLI_PATIENCE_S, create=is_new)
    except DatabaseUnavailable as error:
        if getattr(error.__cause__, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
            raise SchemaError(f"{database.path} is not a database; choose another ABHIAPI_DATABASE_URL") from error
        raise
    try:
        version = _version(connection, database.path)
        if version == version_wanted:
            return None
        if version > version_wanted:
            raise SchemaError(
                f"{database.path} is of version {version}, newer than this program's {version_wanted}: upgrade AbhiAPI"
            )
        if version == 0:
            return _create(connection, database.path, schema or schema_sql(), version_wanted)
        copy = _upgrade(database, connection, version, steps)
        if copy is None:  # another process was faster
            return None
        return f"upgraded {database.path} from version {version} to {version_wanted}; the old one is kept as {copy}"
    except sqlite3.OperationalError as error:
        raise translated(error) from error
    finally:
        connection.close()


def _make_private(path: Path) -> None:
    """An empty file that only its owner may read; SQLite gives the files beside it the same mode."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise SchemaError(f"cannot create {path}: {error.strerror}") from error


def _make_room(path: Path, has_log: bool) -> None:
    """See to it that a database can be created at ``path``, and that none is expected to come back there."""
    if has_log:
        raise SchemaError(
            f"{path} is gone, and {path.name}-wal with its latest entries is still there: put the file back beside it"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SchemaError(f"cannot create the folder of {path}: {error.strerror}") from error


def moved_to(database: SqliteDatabase) -> tuple[str, str] | None:
    """Where a file's ledger is now, and the move that brought it there; None: it is here."""
    connection = database.connect(busy_timeout_s=CLI_PATIENCE_S)
    try:
        return moved_mark(connection)
    finally:
        connection.close()


def mark_moved(connection: sqlite3.Connection, name: str, number: str) -> None:
    """In an open transaction: let the file say that its ledger is elsewhere, and take no more writes."""
    _run(connection, resources.files("abhiapi").joinpath("moved.sql").read_text("utf-8"))
    connection.execute("INSERT INTO moved VALUES (?, ?)", (name, number))
    connection.execute(f"PRAGMA application_id = {MOVED_ID}")


def moved_mark(connection: sqlite3.Connection) -> tuple[str, str] | None:
    """What `mark_moved` left in the file: where its ledger is now, and by which move."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != MOVED_ID:
        return None
    name, number = connection.execute("SELECT to_name, move FROM moved").fetchone()
    return str(name), str(number)


def schema_sql() -> str:
    return resources.files("abhiapi").joinpath("schema.sql").read_text("utf-8")


def statements(script: str) -> Iterator[str]:
    """The statements of an SQL script, triggers kept whole."""
    gathered = ""
    for line in script.splitlines(keepends=True):
        gathered += line
        if sqlite3.complete_statement(gathered):
            yield gathered
            gathered = ""


def _version(connection: sqlite3.Connection, path: Path) -> int:
    try:
        # Asked first: whoever makes ours just now makes all of them at once, with the numbers.
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        application_id = connection.execute("PRAGMA application_id").fetchone()[0]
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise
        raise SchemaError(f"{path} is not a database: {error}") from error
    moved = moved_mark(connection)
    if moved is not None:
        raise SchemaError(f"the ledger of {path} was moved to {moved[0]}: set ABHIAPI_DATABASE_URL to that")
    if tables and application_id != APPLICATION_ID:
        raise SchemaError(f"{path} is a database of some other program; choose another ABHIAPI_DATABASE_URL")
    return version


def _create(connection: sqlite3.Connection, path: Path, schema: str, version: int) -> str | None:
    _keep_a_log(connection)
    connection.execute("BEGIN IMMEDIATE")
    try:
        if _version(connection, path):  # another process was faster
            return None
        for statement in statements(schema):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {version}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return f"created the database {path}"


def _keep_a_log(connection: sqlite3.Connection) -> None:
    """Where another process writes at that moment SQLite refuses at once, whatever the timeout: so this waits."""
    until = monotonic() + CLI_PATIENCE_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not isinstance(translated(error), Busy) or monotonic() > until:
                raise
        sleep(AGAIN_S)


def _upgrade(
    database: SqliteDatabase, connection: sqlite3.Connection, version: int, steps: Sequence[Step]
) -> Path | None:
    """Take the steps from ``version`` on; the copy of what was there before, None if there was nothing left to do."""
    connection.execute("PRAGMA foreign_keys = OFF")  # a step may make a table anew; `_apply` looks at the end of each
    copy: Path | None = None
    for number, step in enumerate(steps[version - 1 :], start=version):
        copy = _apply(database, connection, step, number, copy)
    return copy


def _apply(
    database: SqliteDatabase, connection: sqlite3.Connection, step: Step, number: int, copy: Path | None
) -> Path | None:
    """Take one step in one transaction. The copy is made inside the first, when nobody else can write any more."""
    made = None
    connection.execute("BEGIN IMMEDIATE")
    try:
        if int(connection.execute("PRAGMA user_version").fetchone()[0]) != number:
            return copy  # another process was faster
        if copy is None:
            copy = made = _copy(database, number)
        step(connection)
        if connection.execute("PRAGMA foreign_key_check").fetchone():
            raise SchemaError(f"the upgrade of {database.path} to version {number + 1} would lose references: not done")
        connection.execute(f"PRAGMA user_version = {number + 1}")
        connection.execute("COMMIT")
    except BaseException:
        if made is not None:  # what it is a copy of is still there, and a server that restarts would make one more
            made.unlink(missing_ok=True)
        raise
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return copy


def _copy(database: SqliteDatabase, version: int) -> Path:
    """A consistent copy of the database as it was, never over an earlier copy, readable by no more people."""
    path = database.path
    for number in count():
        copy = path.with_name(f"{path.name}.v{version}{f'.{number}' if number else ''}.bak")
        try:
            copy.touch(mode=path.stat().st_mode & 0o777, exist_ok=False)
            break
        except FileExistsError:
            continue
    with closing(database.connect()) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy
