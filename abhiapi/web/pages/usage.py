"""Usage: what an account spent, by model, key or day, cut by filters that stand in the address; as CSV too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from flask import Response

from abhiapi import csvtext, ids, keys, lookups, money, spent
from abhiapi.db import Tx
from abhiapi.lookups import By, Used
from abhiapi.money import Micros
from abhiapi.spent import Spent
from abhiapi.web.caller import runtime
from abhiapi.web.pages import charts, filters, words
from abhiapi.web.pages.desk import Desk, Reply, Role, render, visitor

DAYS, DAYS_MAX, CSV_DAYS_MAX = 30, 62, 1100
ROWS_MAX = 100  # of the table, and of each list to choose from; the sum has all of them
MODELS_SHORT, MODELS_LONG = 6, 4  # of the chart: of a month, of more
BY = ("model", "key", "day")


@dataclass(frozen=True, slots=True)
class Figures:
    rows: list[Used]
    spent: list[Spent]
    models: list[Used]  # all of those days, to choose from
    key_names: dict[str, str]


def add_to(desk: Desk) -> None:
    desk.add(Role.CUSTOMER, "/usage", show, nav="Usage")
    desk.add(Role.CUSTOMER, "/usage.csv", download)


def show() -> Reply:
    by = _by()
    days, model, key_id = filters.days(usual=DAYS, most=DAYS_MAX), filters.model(), filters.key_id()
    account_id = visitor().account_id

    def read(tx: Tx) -> Figures:
        return Figures(
            lookups.usage(tx, by, account_id, since=days.since, until=days.until, model=model, key_id=key_id),
            lookups.spent(tx, account_id, since=days.since, until=days.until, model=model, key_id=key_id),
            lookups.usage(tx, "model", account_id, since=days.since, until=days.until),
            {ids.key_text(key.key_id): key.name or "" for key in keys.listed(tx, account_id)},
        )

    figures = runtime().read_aside(read)
    models_max = MODELS_SHORT if days.number <= 31 else MODELS_LONG
    stacks = spent.stacked(figures.spent, since=days.since, until=days.until, models_max=models_max)
    totals = [Micros(sum(day.amounts_micros[number] for day in stacks.days)) for number in range(len(stacks.models))]
    return render(
        "usage.html",
        by=by,
        choices=BY,
        days=days,
        model=model,
        key=key_id and ids.key_text(key_id),
        rows=figures.rows[:ROWS_MAX],
        rest=_sum(figures.rows[ROWS_MAX:]),
        total=_sum(figures.rows),
        models=[row.group for row in figures.models[:ROWS_MAX]],
        key_names=dict(list(figures.key_names.items())[-ROWS_MAX:]),
        all_key_names=figures.key_names,
        stacks=stacks,
        chart=charts.stacked_bars(stacks, words.credits),
        model_totals=totals,
        given=filters.given,
    )


def download() -> Reply:
    """The same rows, all of them, and more days at once."""
    by, days = _by(), filters.days(usual=DAYS, most=CSV_DAYS_MAX)
    model, key_id, account_id = filters.model(), filters.key_id(), visitor().account_id
    rows = runtime().read_aside(
        lambda tx: lookups.usage(tx, by, account_id, since=days.since, until=days.until, model=model, key_id=key_id)
    )
    lines = [csvtext.line((by, "calls", "credits", "cost_usd"))]
    lines += [csvtext.line((row.group, row.calls, money.credits(row.micros), money.usd(row.micros))) for row in rows]
    return attached("".join(lines), f"usage-by-{by}-{days.since}-{days.until}.csv")


def attached(text: str, name: str) -> Response:
    """A file to keep."""
    response = Response(text, content_type="text/csv; charset=utf-8")
    response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    return response


def _by() -> By:
    return cast(By, filters.choice("by", BY) or "model")


def _sum(rows: list[Used]) -> Used:
    return Used(f"{len(rows)}", sum(row.calls for row in rows), Micros(sum(row.micros for row in rows)))
