"""`usage`: what was called, what it brought in, and what it cost at fal."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING, Any

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import Text, json_option, usage_error
from abhiapi.commands.output import print_csv, print_rows

if TYPE_CHECKING:
    from abhiapi.db import Tx
    from abhiapi.reports import UsageRow

COLUMNS = ("group", "calls", "credits", "cost_usd", "fal_cost_usd", "margin_usd", "margin_percent")


@click.command()
@click.option("--account", metavar="ACCOUNT", type=Text(), help="Only this account: its name, or one of its keys.")
@click.option(
    "--by",
    type=click.Choice(("day", "model", "key", "account")),
    default="day",
    show_default=True,
    help="What to add up by.",
)
@click.option("--since", metavar="DAY", help="First day (UTC): 2026-11-01, or 7d for a week ago.")
@click.option("--until", metavar="DAY", help="Last day, included.")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values, without the total.")
@json_option
def usage(account: str | None, by: Any, since: str | None, until: str | None, as_csv: bool, as_json: bool) -> None:
    """Add up calls, credits, cost at fal and margin.

    Credits are what was charged less refunds, margin what is left of them after fal's cost. Days are UTC days on
    which calls ended. The cost at fal counts as 0 where it is not known. The margin in percent is of the credits,
    rounded down to two decimals.

    \b
    Examples:
      abhiapi usage --by model --since 30d
      abhiapi usage --account acme --since 2026-11-01 --until 2026-11-30
      abhiapi usage --by account --csv > usage.csv
    """
    if as_csv and as_json:
        raise click.UsageError("choose one of --csv and --json")
    first, last = _day("--since", since), _day("--until", until)
    if first and last and first > last:
        raise usage_error("--since", ValueError(f"{first} is after --until {last}"))

    def op(tx: Tx) -> list[UsageRow]:
        account_id = None if account is None else session.account(tx, account).account_id
        return library.reports.usage(tx, by, account_id=account_id, since=first, until=last)

    found = session.read(op)
    rows = [library.shapes.usage(row, for_operator=True) for row in found]
    total = library.shapes.usage(library.reports.total(found), for_operator=True)
    if as_csv:
        print_csv(rows, COLUMNS)
        return
    print_rows(
        [*rows, total] if rows else [],
        COLUMNS,
        as_json=as_json,
        none="no calls have ended in that time",
        envelope={"rows": rows, "total": {column: total[column] for column in COLUMNS[1:]}},
    )


def _day(option: str, text: str | None) -> date | None:
    if text is None:
        return None
    try:
        return library.reports.parse_day(text)
    except ValueError as error:
        raise usage_error(option, error) from error
