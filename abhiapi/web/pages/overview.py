"""The first page of a customer: what is there, what was spent, how long it lasts, and the last calls."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from flask import redirect, url_for

from abhiapi import accounts, reports, spent
from abhiapi.accounts import Account
from abhiapi.db import Tx
from abhiapi.money import Micros
from abhiapi.reports import CallRow
from abhiapi.spent import Spent
from abhiapi.web.caller import runtime
from abhiapi.web.pages import charts, words
from abhiapi.web.pages.desk import Desk, Reply, Role, render, visitor

CHART_DAYS, CHART_MODELS, LAST_CALLS = 30, 6, 10


@dataclass(frozen=True, slots=True)
class Figures:
    account: Account
    spent: list[Spent]
    calls: list[CallRow]


def add_to(desk: Desk) -> None:
    desk.add(Role.USER, "/", overview, nav="Overview", nav_for=Role.CUSTOMER)  # operators are led on to theirs


def overview() -> Reply:
    who = visitor()
    if not who.has_account:
        return redirect(url_for("pages.operator_list_accounts"))
    rt = runtime()
    today = datetime.fromtimestamp(rt.now_ms() // 1000, UTC).date()
    first = min(today.replace(day=1), today - timedelta(days=CHART_DAYS - 1))
    figures = rt.read_aside(lambda tx: _read(tx, who.account_id, first, today))
    stacks = spent.stacked(
        figures.spent, since=today - timedelta(days=CHART_DAYS - 1), until=today, models_max=CHART_MODELS
    )
    return render(
        "overview.html",
        account=figures.account,
        today_micros=spent.total_micros(figures.spent, since=today, until=today),
        month_micros=spent.total_micros(figures.spent, since=today.replace(day=1), until=today),
        days_left=spent.days_left(figures.account.available_micros, figures.spent, today=today),
        pace_days=spent.PACE_DAYS,
        stacks=stacks,
        chart=charts.stacked_bars(stacks, words.credits),
        model_totals=_model_totals(stacks),
        calls=figures.calls,
    )


def _read(tx: Tx, account_id: int, first: date, today: date) -> Figures:
    return Figures(
        accounts.by_id(tx, account_id),
        reports.spent(tx, account_id, since=first, until=today),
        reports.newest_calls(tx, account_id=account_id, most=LAST_CALLS),
    )


def _model_totals(stacks: spent.Stacks) -> list[Micros]:
    return [Micros(sum(day.amounts_micros[number] for day in stacks.days)) for number, _ in enumerate(stacks.models)]
