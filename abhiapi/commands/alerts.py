"""`alerts`: what the operator was told of, and what still stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import json_option
from abhiapi.commands.output import print_rows

if TYPE_CHECKING:
    from abhiapi.alerts import Alert
    from abhiapi.db import Tx

COLUMNS = ("alert_id", "raised_at", "kind", "subject", "message", "cleared_at", "delivered_at")


@click.group()
def alerts() -> None:
    """Alerts: what needs the operator.

    Each is told once when it begins, by the running server: a line in the log, a counter in /metrics, and a POST of
    JSON to ABHIAPI_ALERT_WEBHOOK_URL if that is set. It can be told again only after it was over.

    \b
    Examples:
      abhiapi alerts list
      abhiapi accounts alert acme --below 500
    """


@alerts.command("list")
@click.option("--all", "with_past", is_flag=True, help="Also those that are over, newest first.")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="With --all: at most so many."
)
@json_option
def list_alerts(with_past: bool, limit: int, as_json: bool) -> None:
    """List the alerts that stand, oldest first.

    \b
    Examples:
      abhiapi alerts list
      abhiapi alerts list --all --json
    """

    def op(tx: Tx) -> list[Alert]:
        return library.alerts.newest(tx, most=limit) if with_past else library.alerts.standing(tx)

    rows = [library.shapes.alert(row) for row in session.read(op)]
    print_rows(rows, COLUMNS, as_json=as_json, none="nothing needs you", envelope={"alerts": rows})
