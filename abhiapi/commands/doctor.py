"""`doctor`: is everything as it should be, and if not, what to do."""

from __future__ import annotations

import click

from abhiapi.commands import session
from abhiapi.commands.options import json_option
from abhiapi.commands.output import print_json
from abhiapi.errors import Refused


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check that everything is as it should be.

    Looks at settings, fal credential, database, prices, open holds and ledger. Prints a line for each check: ok,
    warn, or fail with what to do. Exits with 1 when something needs you. Changes nothing, and runs beside a serving
    proxy.

    \b
    Examples:
      abhiapi doctor
      abhiapi doctor --json | jq '.checks[] | select(.status != "ok")'
    """
    from abhiapi.commands import checks

    done: list[checks.Check] = []
    for check in checks.examine(session.now_ms()):
        done.append(check)
        if not as_json:
            click.echo(f"{check.status:<5} {check.name:<15} {' '.join(check.message.split())}")
    failed = sum(check.status == "fail" for check in done)
    if as_json:
        shapes = [{"check": check.name, "status": check.status, "message": check.message} for check in done]
        print_json({"ok": not failed, "checks": shapes})
    if failed:
        raise Refused(f"{failed} of {len(done)} checks need you: they are marked fail above")
