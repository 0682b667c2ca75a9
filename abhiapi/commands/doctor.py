"""`doctor`: is everything as it should be, and if not, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import json_option
from abhiapi.commands.output import print_json
from abhiapi.errors import AbhiError, Refused

if TYPE_CHECKING:
    from abhiapi.commands.checks import Check


@click.command()
@click.option("--offline", is_flag=True, help="Ask nobody: neither fal nor ABHIAPI_PUBLIC_URL.")
@json_option
def doctor(offline: bool, as_json: bool) -> None:
    """Check that everything is as it should be.

    Looks at settings, files and their rights, the database and what serves it, prices, margins, open holds, the
    ledger, alerts, backups and the reconciler; asks fal whether it takes the credential and what time it is, and this
    service at its public address. Prints a line for each check: ok, warn, or fail with what to do. Exits with 1 when
    something needs you. Changes nothing, and runs beside a serving proxy.

    \b
    Examples:
      abhiapi doctor
      abhiapi doctor --json | jq '.checks[] | select(.status != "ok")'
    """
    from abhiapi.commands import checks

    done: list[checks.Check] = []
    for check in _all(offline):
        done.append(check)
        if not as_json:
            click.echo(f"{check.status:<5} {check.name:<15} {' '.join(check.message.split())}")
    failed = sum(check.status == "fail" for check in done)
    if as_json:
        shapes = [{"check": check.name, "status": check.status, "message": check.message} for check in done]
        print_json({"ok": not failed, "checks": shapes})
    if failed:
        raise Refused(f"{failed} of {len(done)} checks need you: they are marked fail above")


def _all(offline: bool) -> Iterator[Check]:
    """Every check: first those that the others stand on."""
    from abhiapi.commands import checks, checks_books, checks_network, checks_place

    sound: dict[str, bool] = {}
    for check in checks.examine(session.now_ms()):
        sound[check.name] = check.status == "ok"
        yield check
    if not sound.get("settings"):
        return
    settings = session.settings()
    yield from checks_place.examine(settings)
    if sound.get("database"):
        database = library.db.database_at(settings.database_url)
        try:
            now = session.now_ms()
            running = database.read(library.processes.running)
            living = database.living({process.process_id: process.pid for process in running})
            serving = [process for process in running if process.process_id in living]
            yield from database.read(lambda tx: checks_books.examine(tx, settings, now, serving))
        except AbhiError as error:
            yield checks.Check("books", "fail", error.message)
    if not offline:
        yield from checks_network.examine(settings)
