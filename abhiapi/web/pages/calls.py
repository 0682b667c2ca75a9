"""Calls: the account's calls by model, key, state and day, and one call with how its charge came about."""

from __future__ import annotations

from dataclasses import dataclass

from abhiapi import calls, ids, keys, lookups, reports, webhooks
from abhiapi.db import Tx
from abhiapi.errors import NotFound
from abhiapi.keys import Key
from abhiapi.lookups import CallPage
from abhiapi.reports import CallRow, EntryRow
from abhiapi.web.caller import runtime
from abhiapi.web.pages import cells, filters, story
from abhiapi.web.pages.cells import WebhookCells, webhook_cells
from abhiapi.web.pages.desk import Desk, Reply, Role, render, visitor

ROWS = 50
KEYS_MAX = 100
STATES = (*calls.OPEN, "settled", "released")


@dataclass(frozen=True, slots=True)
class Whole:
    """All that is told of one call."""

    row: CallRow
    unit: str
    billed_units: str | None
    key: Key
    entries: list[EntryRow]
    webhook: WebhookCells | None


def add_to(desk: Desk) -> None:
    desk.add(Role.CUSTOMER, "/calls", list_calls, under="Usage")
    desk.add(Role.CUSTOMER, "/calls/<call_id>", show_call, under="Usage")


def list_calls() -> Reply:
    account_id, before = visitor().account_id, filters.cursor()
    since, until, model, key_id = filters.day("since"), filters.day("until"), filters.model(), filters.key_id()
    state = filters.choice("state", STATES)

    def read(tx: Tx) -> tuple[CallPage, list[Key]]:
        page = lookups.calls_of_kind(
            tx,
            account_id,
            most=ROWS,
            before=before,
            since=since,
            until=until,
            model=model,
            key_id=key_id,
            state=state,
        )
        return page, keys.listed(tx, account_id)

    page, listed = runtime().read_aside(read)
    return render(
        "calls.html",
        page=page,
        looked_at=lookups.LOOKED_AT,
        is_first=before == reports.FIRST,
        key_names={key.key_id: key.name for key in listed},
        keys=listed[-KEYS_MAX:],
        states=STATES,
        asked={"since": since, "until": until, "model": model, "key": key_id and ids.key_text(key_id), "state": state},
        given=filters.given,
        net=story.net_micros,
    )


def show_call(call_id: str) -> Reply:
    who, number = visitor(), ids.parse_call(call_id)
    found = None if number is None else runtime().read_aside(lambda tx: _whole(tx, who.account.name, number))
    if found is None:
        raise NotFound("No call of yours has that id.")
    row = found.row
    return render(
        "call.html",
        call=row,
        unit=found.unit,
        key=found.key,
        entries=found.entries,
        webhook=found.webhook,
        told=story.of_call(row, found.unit, found.billed_units),
        net_micros=story.net_micros(row),
        took=None if row.finished_at is None else cells.took(row.finished_at - row.created_at),
        age=cells.age(runtime().now_ms() - row.created_at),
    )


def _whole(tx: Tx, account: str, call_id: int) -> Whole | None:
    """None where the call is unknown, or another account's, which is the same here."""
    row = reports.call(tx, call_id)
    if row is None or row.account != account:
        return None
    unit, billed = lookups.unit_of(tx, call_id)
    webhook = webhooks.one(tx, call_id)
    return Whole(
        row,
        unit,
        billed,
        keys.by_id(tx, row.key_id),
        lookups.entries_of(tx, call_id),
        None if webhook is None else webhook_cells(webhook),
    )
