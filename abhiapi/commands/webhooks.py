"""`webhooks`: what customers asked to be told about, whether they were, and telling them once more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import Text, call_argument, json_option
from abhiapi.commands.output import print_one, print_rows

if TYPE_CHECKING:
    from abhiapi.db import Tx
    from abhiapi.webhooks import State, WebhookRow

COLUMNS = ("call_id", "created_at", "account", "url", "state", "attempts", "last_status", "last_error")


@click.group()
def webhooks() -> None:
    """Webhooks: deliveries to the URLs that customers gave with their jobs.

    A running server delivers them by itself and repeats what fails for about a day.

    \b
    Examples:
      abhiapi webhooks list --state failed
      abhiapi webhooks resend call_01jd3k9x2m4q7
    """


@webhooks.command("list")
@click.option("--account", metavar="ACCOUNT", type=Text(), help="Only this account: its name, or one of its keys.")
@click.option(
    "--state",
    type=click.Choice(("waiting", "due", "delivered", "failed")),
    help="waiting: the job runs; due: on its way; delivered; failed: given up.",
)
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="At most this many.")
@json_option
def list_webhooks(account: str | None, state: State | None, limit: int, as_json: bool) -> None:
    """List webhooks, newest first. The queries of URLs are not shown: they may hold secrets.

    \b
    Examples:
      abhiapi webhooks list --account acme --limit 10
      abhiapi webhooks list --state failed --json | jq -r '.webhooks[].call_id'
    """

    def op(tx: Tx) -> list[WebhookRow]:
        account_id = None if account is None else session.account(tx, account).account_id
        return library.webhooks.newest(tx, account_id=account_id, state=state, most=limit)

    rows = [library.shapes.webhook(row) for row in session.read(op)]
    print_rows(rows, COLUMNS, as_json=as_json, none="no webhooks", envelope={"webhooks": rows})


@webhooks.command("resend")
@call_argument
@json_option
def resend_webhook(call_id: str, as_json: bool) -> None:
    """Deliver a webhook once more, also one that was delivered or has failed.

    CALL_ID is in `abhiapi webhooks list`. The running server sends it within seconds. Refused while the job runs, and
    once the payload has been dropped, a week after the end.

    \b
    Examples:
      abhiapi webhooks resend call_01jd3k9x2m4q7
    """
    number, now = session.call_id(call_id), session.now_ms()
    row = session.write(lambda tx: library.webhooks.resend(tx, number, now_ms=now))
    print_one(library.shapes.webhook(row), as_json=as_json)
