"""`prices check` and `prices replay`: whether prices cover what fal bills, and what another margin had earned."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import json_option, usage_error
from abhiapi.commands.output import print_json, print_rows, say, table
from abhiapi.errors import Refused
from abhiapi.money import credits, nanos_usd_text, usd

if TYPE_CHECKING:
    from abhiapi.db import Tx

COLUMNS = ("problem", "model", "unit", "unit_price_usd", "fal_unit_price_usd", "what")
REPLAY_COLUMNS = ("group", "calls", "fal_cost_usd", "cost_usd", "margin_usd", "would_cost_usd", "would_margin_usd")


@click.command("check")
@json_option
def check_prices(as_json: bool) -> None:
    """List the models whose price needs you; exit 1 when there are any.

    Those sold below fal's price, those whose last charge passed its hold, those whose price is a placeholder, and
    those that fal lists and that have no price here, so that calls to them are refused.

    \b
    Examples:
      abhiapi prices check
      abhiapi prices check --json | jq -r '.problems[].model'
    """
    problems = session.read(_problems)
    if as_json:
        print_json({"ok": not problems, "problems": problems})
    elif problems:
        click.echo(table(problems, COLUMNS))
    else:
        click.echo("every price covers fal's, and every last hold its charge")
    if problems:
        raise Refused("the prices above need you: `abhiapi prices set` changes a price or a hold")


@click.command("replay")
@click.option("--margin", metavar="M", required=True, help="Added to fal's unit price: 0.05 is five percent.")
@click.option("--since", metavar="DAY", help="First day (UTC): 2026-11-01, or 7d for a week ago. Else: all.")
@json_option
def replay_prices(margin: str, since: str | None, as_json: bool) -> None:
    """Compute what past usage would have earned under another margin.

    From the daily roll-ups: what each model's calls cost at fal, sold with that margin, beside what they were charged.
    Exact in nano-dollars; a real charge is rounded up to a micro-dollar a call, so it is a little more. Calls whose
    cost at fal is not known are left as they were charged.

    \b
    Examples:
      abhiapi prices replay --margin 0.1
      abhiapi prices replay --margin 0.08 --since 2026-11-01 --json
    """
    try:
        other = library.pricing.parse_price(margin)
    except ValueError as error:
        raise usage_error("--margin", error) from error
    try:
        first = None if since is None else library.reports.parse_day(since)
    except ValueError as error:
        raise usage_error("--since", error) from error
    found = session.read(lambda tx: library.reports.usage(tx, "model", since=first))
    rows = [_replayed(row, library.pricing.replayed_usd(row.fal_cost_nano_usd, other)) for row in found]
    names = REPLAY_COLUMNS[1:]
    total: dict[str, Any] = {name: sum((row[name] for row in rows), start=0) for name in names}
    if as_json:
        print_json({"margin": other, "rows": rows, "total": {**total, "credits": sum(row["credits"] for row in rows)}})
        return
    unknown = [row["group"] for row in rows if not row["replayed"]]
    if unknown:
        say(f"their cost at fal is not known, so they are left as they were: {', '.join(unknown)}")
    shown = [*rows, {"group": "total", **total}] if rows else []
    print_rows(shown, REPLAY_COLUMNS, as_json=False, none="no call ended since then")


def _replayed(row: Any, would_cost_usd: Any) -> dict[str, Any]:
    charged, cost = usd(row.charged_micros), Decimal(nanos_usd_text(row.fal_cost_nano_usd))
    replayed = row.fal_cost_nano_usd > 0 or row.charged_micros == 0
    would = library.pricing.plain(would_cost_usd) if replayed else charged
    return {
        "group": row.group,
        "calls": row.calls,
        "credits": credits(row.charged_micros),
        "fal_cost_usd": cost,
        "cost_usd": charged,
        "margin_usd": library.pricing.plain(charged - cost),
        "would_cost_usd": would,
        "would_margin_usd": library.pricing.plain(would - cost),
        "replayed": replayed,
    }


def _problems(tx: Tx) -> list[dict[str, Any]]:
    return [library.shapes.price_problem(row) for row in library.price_problems.found(tx, session.catalogue(tx))]
