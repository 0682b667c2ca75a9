"""The operator's books: what came in and what fal took, by day and model; open holds; and what needs a person."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import date, timedelta

from flask import request

from abhiapi import accounts, billing, fal_bill, holds, ids, price_problems, reports, spent
from abhiapi.accounts import Account
from abhiapi.billing import Event
from abhiapi.db import Tx
from abhiapi.errors import AbhiError, BadRequest, NotFound
from abhiapi.money import Micros, parse_amount
from abhiapi.price_problems import Problem
from abhiapi.reports import CallRow, UsageRow
from abhiapi.spent import Spent
from abhiapi.web.caller import runtime
from abhiapi.web.pages import charts, words
from abhiapi.web.pages.desk import Desk, Reply, Role, go, render, visitor
from abhiapi.web.pages.operator import today

log = logging.getLogger("abhiapi")

DAYS, DAYS_MAX = 30, 366
FAL, OURS = "fal's cost", "margin"
HOLDS_MAX, EVENTS_MAX, PROBLEMS_MAX, MODELS_MAX = 200, 50, 200, 200


@dataclass(frozen=True, slots=True)
class Figures:
    by_day: list[UsageRow]
    by_model: list[UsageRow]
    total: UsageRow


@dataclass(frozen=True, slots=True)
class Attention:
    """What needs the operator, and since when it is known."""

    below_zero: list[Account]
    unknown: list[CallRow]
    events: list[Event]
    compared_at: int | None
    prices: list[Problem]

    @property
    def is_empty(self) -> bool:
        return not (self.below_zero or self.unknown or self.events or self.prices)


def add_to(desk: Desk) -> None:
    desk.add(Role.OPERATOR, "/operator/revenue", revenue, nav="Revenue")
    desk.add(Role.OPERATOR, "/operator/holds", list_holds, nav="Open holds")
    one = "/operator/holds/<call_id>/<any(settle, release):change>"
    desk.add(Role.OPERATOR, one, end_hold, methods=("GET", "POST"), under="Open holds")
    desk.add(Role.OPERATOR, "/operator/attention", attention, nav="Attention")


def revenue() -> Reply:
    rt = runtime()
    now = today(rt.now_ms())
    problem = None
    try:
        until = _day("until", now)
        since = _day("since", until - timedelta(days=DAYS - 1))
        if not 0 <= (until - since).days < DAYS_MAX:
            raise BadRequest(f"The first day comes before the last, at most {DAYS_MAX} days before")
    except BadRequest as error:
        problem, until, since = f"{error.message}.", now, now - timedelta(days=DAYS - 1)
    figures = rt.read_aside(lambda tx: _figures(tx, since, until))
    stacks = spent.stacked(_layers(figures.by_day), since=since, until=until, models_max=2)
    return render(
        "operator_revenue.html",
        status=422 if problem else 200,
        problem=problem,
        since=since,
        until=until,
        figures=figures,
        models=sorted(figures.by_model, key=lambda row: (-row.charged_micros, row.group))[:MODELS_MAX],
        stacks=stacks,
        chart=charts.stacked_bars(stacks, words.credits),
        totals=[sum(day.amounts_micros[number] for day in stacks.days) for number, _ in enumerate(stacks.models)],
    )


def list_holds() -> Reply:
    rt = runtime()
    rows = rt.read_aside(reports.open_holds)
    held = Micros(sum(row.held_micros for row in rows))
    return render("operator_holds.html", rows=rows[:HOLDS_MAX], found=len(rows), held_micros=held, now_ms=rt.now_ms())


def end_hold(call_id: str, change: str) -> Reply:
    rt = runtime()
    number = ids.parse_call(call_id)
    row = None if number is None else rt.read_aside(lambda tx: reports.call(tx, number))
    if number is None or row is None:
        raise NotFound("There is no such call.")
    if request.method == "GET":
        return render("operator_hold.html", row=row, change=change, problem=None)
    try:
        amount = parse_amount_or_zero(request.form.get("credits", "")) if change == "settle" else None
        now = rt.now_ms()
        ended = rt.write(lambda tx: holds.end(tx, rt.database, number, amount, now_ms=now))
    except AbhiError as error:
        said = error.message[:1].upper() + error.message[1:] + "."
        return render("operator_hold.html", status=422, row=row, change=change, problem=said)
    log.warning("operator %d ended the hold of %s from the dashboard", visitor().user.user_id, call_id)
    charged = f"charged {words.credits(amount)} credits" if amount is not None else "released"
    return go("pages.operator_books_list_holds", f"{call_id} of {ended.call.account} was {charged}.")


def attention() -> Reply:
    rt = runtime()
    catalogue = rt.catalogue()

    def read(tx: Tx) -> Attention:
        return Attention(
            [account for account in accounts.everyone(tx) if account.balance_micros < 0],
            [row for row in reports.open_holds(tx) if row.state == "unknown"],
            billing.unexplained(tx, after="", most=EVENTS_MAX + 1),
            billing.reached_at(tx, fal_bill.BOOKMARK),
            price_problems.found(tx, catalogue),
        )

    return render("operator_attention.html", seen=rt.read_aside(read), most=EVENTS_MAX, prices_max=PROBLEMS_MAX)


def parse_amount_or_zero(text: str) -> Micros:
    """An amount in credits; 0 is one, since a call may have cost nothing."""
    return Micros(0) if text.strip() == "0" else parse_amount(text)


def _figures(tx: Tx, since: date, until: date) -> Figures:
    by_day = reports.usage(tx, "day", since=since, until=until)
    return Figures(by_day, reports.usage(tx, "model", since=since, until=until), reports.total(by_day))


def _layers(rows: list[UsageRow]) -> list[Spent]:
    """What was charged, as the part that fal took and the part that stayed; a day at a loss shows fal's part alone."""
    layers = []
    for row in rows:
        day, cost = date.fromisoformat(row.group), Micros(row.fal_cost_nano_usd // 1000)
        layers.append(Spent(day, FAL, row.calls, cost))
        layers.append(Spent(day, OURS, row.calls, Micros(max(0, row.charged_micros - cost))))
    return layers


def _day(name: str, otherwise: date) -> date:
    text = request.args.get(name, "")
    if not text:
        return otherwise
    try:
        day = date.fromisoformat(text)
        if day.year < 2000:  # before anything here, and too near the first day that Python knows
            raise ValueError("too early")
        return day
    except ValueError as error:
        raise BadRequest("A day is written as 2026-11-22") from error
