"""Ledger: the account's statement with its running balance, month by month; to print as a whole, and as CSV."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import chain
from typing import cast

from flask import Response, current_app, request

from abhiapi import lookups, statement_forms, statements
from abhiapi.days import month_after, parse_month
from abhiapi.db import Tx
from abhiapi.errors import BadRequest
from abhiapi.money import Micros
from abhiapi.runtime import Runtime
from abhiapi.statements import Line, Statement
from abhiapi.web.caller import runtime
from abhiapi.web.pages import filters, headers
from abhiapi.web.pages.desk import Desk, Reply, Role, render, visitor

LINES = 100  # of a page
MONTHS_MAX = 120  # to choose from
_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)


def add_to(desk: Desk) -> None:
    desk.add(Role.CUSTOMER, "/ledger", show, nav="Ledger")
    desk.add(Role.CUSTOMER, "/ledger.csv", download)
    desk.add(Role.CUSTOMER, "/ledger/print", printable)


def show() -> Reply:
    """A month, newest entries first, a hundred at a time: a page by its number, or by an entry that is on it."""
    who, month = visitor(), _month()
    page, entry = _number("page"), _number("entry")

    def read(tx: Tx) -> tuple[Statement, list[Line], int | None, int]:
        found = lookups.month(tx, who.account_id, who.account.name, month)
        is_in = entry is not None and found.first_seq <= entry <= found.last_seq
        number = (found.last_seq - entry) // LINES + 1 if entry is not None and is_in else page or 1
        last = found.last_seq - (number - 1) * LINES
        first = max(found.first_seq, last - LINES + 1)
        lines = list(lookups.lines(tx, found, first, last)) if last >= first else []
        return found, lines[::-1], lookups.first_entry_at(tx, who.account_id), number

    statement, lines, began_at, number = runtime().read_aside(read)
    months = _months(began_at)
    opens = parse_month(month)
    return render(
        "ledger.html",
        statement=statement,
        lines=lines,
        kinds=statements.KINDS,
        number=number,
        pages=max(1, -(-statement.entries // LINES)),
        months=months,
        earlier=_name(opens - timedelta(days=1)) if months and month > months[-1] else None,
        later=_name(month_after(opens)) if months and month < months[0] else None,
        title=f"{opens:%B %Y}",
    )


def download() -> Reply:
    """The whole month as CSV."""
    response = _whole(statement_forms.as_csv, "text/csv; charset=utf-8")
    response.headers["Content-Disposition"] = f'attachment; filename="statement-{_month()}.csv"'
    return response


def printable() -> Reply:
    """The whole month as a page to print. Its own style is let through by its digest, and no other."""
    response = _whole(_page_to_print, "text/html; charset=utf-8")
    response.headers["Content-Security-Policy"] = headers.policy(style_src=f"'{_style_digest()}'")
    return response


def _whole(write: Callable[[Statement, Iterable[Line]], Iterator[str]], content_type: str) -> Response:
    """Every line of a month, in pieces; the database is asked for the next thousand lines when they are wanted."""
    rt, account_id, month = runtime(), visitor().account_id, _month()
    statement = rt.read_aside(lambda tx: statements.of_month(tx, account_id, month))
    return Response(write(statement, _lines(rt, statement)), content_type=content_type)


def _lines(rt: Runtime, statement: Statement) -> Iterator[Line]:
    after = statement.first_seq - 1
    while rows := rt.read_aside(lambda tx, seq=after: statements.page(tx, statement, seq)):  # type: ignore[misc]
        yield from rows
        after = rows[-1].seq


def _page_to_print(statement: Statement, lines: Iterable[Line]) -> Iterator[str]:
    """The statement as the command line prints it, with our icon: else browsers ask for one that is not there."""
    pieces = statement_forms.as_html(statement, lines)
    asset = cast(Callable[[str], str], current_app.jinja_env.globals["asset"])
    head = next(pieces).replace("<style>", f'<link rel="icon" href="{asset("icon.svg")}"><style>', 1)
    return chain([head], pieces)


def _style_digest() -> str:
    """What a Content-Security-Policy calls the style of the printed statement."""
    empty = Statement(0, "", "2026-01", Micros(0), Micros(0), 1, 0, {})
    style = _STYLE.search("".join(statement_forms.as_html(empty, [])))
    assert style is not None
    return "sha256-" + base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()


def _month() -> str:
    """The month of the address, else this one. Raises `BadRequest`."""
    text = request.args.get("month") or _name(filters.today())
    try:
        parse_month(text)
    except ValueError as error:
        raise BadRequest(f"month: {error}.") from error
    return text


def _number(name: str) -> int | None:
    """A number of the address, None where it has none. Raises `BadRequest`."""
    text = request.args.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) >= 1):
        raise BadRequest(f"{name} is a number from 1 on.")
    return int(text)


def _months(began_at: int | None) -> list[str]:
    """The months that the account has been there, newest first."""
    now = filters.today().replace(day=1)
    first = now if began_at is None else datetime.fromtimestamp(began_at // 1000, UTC).date().replace(day=1)
    found: list[str] = []
    while now >= first and len(found) < MONTHS_MAX:
        found.append(_name(now))
        now = (now - timedelta(days=1)).replace(day=1)
    return found


def _name(day: date) -> str:
    return day.isoformat()[:7]
