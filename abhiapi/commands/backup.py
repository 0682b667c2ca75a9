"""`backup` and `restore`: a consistent copy while serving, and its way back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from abhiapi.commands import library, progress, session
from abhiapi.commands.options import json_option
from abhiapi.commands.output import print_one, say
from abhiapi.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from abhiapi.audit import Finding
    from abhiapi.db import Database

NOTE_PATIENCE_S = 1  # a backup waits for no writer


@click.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@json_option
def backup(path: Path, as_json: bool) -> None:
    """Copy the database to a new file, also while serving.

    PATH is the file to write; an existing one is never overwritten. The copy is one consistent moment of the
    database; it is opened and its ledger recounted before the command says so. It holds no keys and no credential,
    but everything else about your customers. A backup of PostgreSQL is such a file, too.

    \b
    Examples:
      abhiapi backup /var/backups/abhiapi-$(date +%F).db
    """
    from abhiapi.commands import copies
    from abhiapi.db_sqlite import SqliteDatabase

    database = library.db.database_at(session.settings().database_url)
    if isinstance(database, SqliteDatabase):
        finding = copies.back_up(database, path)
    else:
        from abhiapi.commands import transfer
        from abhiapi.db_postgres import PostgresDatabase

        assert isinstance(database, PostgresDatabase)
        session.open_database()  # one that is not there is an error, and no empty backup
        with progress.shown() as told:
            finding = transfer.back_up(database, path, told)
    try:
        now = session.now_ms()
        database.write(
            lambda tx: library.timers.done(tx, library.vitals.BACKUP, now_ms=now, due_in_ms=0),
            patience_s=NOTE_PATIENCE_S,
        )
    except DatabaseUnavailable as error:  # the copy is made, and good
        say(f"that there is a backup could not be noted for `abhiapi doctor`: {error.message}")
    shape = {
        "path": str(path.absolute()),
        "size_bytes": path.stat().st_size,
        "accounts": finding.accounts,
        "entries": finding.entries,
    }
    print_one(shape, as_json=as_json)


@click.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@json_option
def restore(path: Path, as_json: bool) -> None:
    """Put a backup in the place of the database.

    PATH is a file that `abhiapi backup` wrote. Its ledger is recounted first; if it does not add up, nothing is
    replaced. Stop the server before: while one runs on the database, restoring is refused. The database that was
    there is kept beside the new one, as *.replaced-1, -2 and so on. A PostgreSQL database has to be without content:
    make a new one, and let ABHIAPI_DATABASE_URL name it.

    \b
    Examples:
      abhiapi restore /var/backups/abhiapi-2026-11-22.db
    """
    from abhiapi.commands import copies
    from abhiapi.db_sqlite import SqliteDatabase

    database = library.db.database_at(session.settings().database_url)
    if isinstance(database, SqliteDatabase):
        done = copies.restore(database, path)
    else:
        done = copies.Restored(_restore_to_server(database, path), None)
    if done.replaced is not None:
        say(f"what was written after that backup is in {done.replaced} only")
    shape = {
        "database": database.name,
        "restored_from": str(path.absolute()),
        "accounts": done.finding.accounts,
        "entries": done.finding.entries,
        "replaced": None if done.replaced is None else str(done.replaced),
    }
    print_one(shape, as_json=as_json)


def _restore_to_server(database: Database, path: Path) -> Finding:
    from abhiapi.commands import transfer
    from abhiapi.db_postgres import PostgresDatabase

    assert isinstance(database, PostgresDatabase)
    with progress.shown() as told:
        return transfer.restore(database, path, told)
