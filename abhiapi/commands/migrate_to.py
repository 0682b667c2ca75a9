"""`migrate-to`: a ledger leaves its file for a PostgreSQL database."""

from __future__ import annotations

import click

from abhiapi.commands import library, progress, session
from abhiapi.commands.options import json_option
from abhiapi.commands.output import print_one, say
from abhiapi.errors import BadRequest, Refused


@click.command("migrate-to")
@click.argument("url", metavar="POSTGRES_URL")
@json_option
def migrate_to(url: str, as_json: bool) -> None:
    """Move the ledger from its SQLite file to PostgreSQL.

    POSTGRES_URL names a database without content, as in postgresql://user:password@host/name. Stop the server before:
    while one runs on the file, moving is refused. Every row is copied and compared, and the whole ledger is recounted
    there. Then the file says where its ledger is, and no command opens it as one any more; keep it for as long as you
    like. Broken off at any moment, the same command again ends what was begun.

    \b
    Examples:
      abhiapi migrate-to postgresql://abhiapi@db.internal/abhiapi
    """
    from abhiapi.commands import transfer
    from abhiapi.db_postgres import PostgresDatabase
    from abhiapi.db_sqlite import SqliteDatabase
    from abhiapi.setting_forms import database_url

    try:
        there = library.db.database_at(database_url(url))
    except ValueError as error:
        raise BadRequest("POSTGRES_URL must be a URL such as postgresql://user:password@host/name") from error
    here = library.db.database_at(session.settings().database_url)
    if not isinstance(there, PostgresDatabase):
        raise Refused(f"{there.name} is no PostgreSQL database: use postgresql://user:password@host/name")
    if not isinstance(here, SqliteDatabase):
        raise Refused(f"the ledger is in {here.name} already")
    with progress.shown() as told:
        finding = transfer.move(here, there, told)
    say(f"set ABHIAPI_DATABASE_URL to {there.name} (with its password) before you start the server")
    shape = {"from": here.name, "to": there.name, "accounts": finding.accounts, "entries": finding.entries}
    print_one(shape, as_json=as_json)
