"""Jobs: calls whose hold still stands, with their age, and webhook deliveries, which can be sent once more."""

from __future__ import annotations

from dataclasses import dataclass

from abhiapi import ids, lookups, reports, webhooks
from abhiapi.db import Tx
from abhiapi.errors import NotFound
from abhiapi.money import Micros
from abhiapi.reports import CallRow
from abhiapi.web.caller import runtime
from abhiapi.web.pages import cells, filters
from abhiapi.web.pages.cells import WebhookCells, webhook_cells
from abhiapi.web.pages.desk import Desk, Reply, Role, go, must_not_be_suspended, render, visitor

HOLDS, DELIVERIES = 100, 50
RESENDS = "30 per minute"


@dataclass(frozen=True, slots=True)
class Standing:
    """The oldest open calls, and what all of them come to."""

    rows: list[CallRow]
    calls: int
    held_micros: Micros
    webhooks: list[WebhookCells]
    before: int | None  # where older deliveries begin


def add_to(desk: Desk) -> None:
    desk.add(Role.CUSTOMER, "/jobs", list_jobs, nav="Jobs")
    desk.add(
        Role.CUSTOMER,
        "/jobs/<call_id>/resend",
        resend,
        methods=("POST",),
        limits=[(RESENDS, lambda: f"resend:{visitor().account_id}")],
    )


def list_jobs() -> Reply:
    account_id, before = visitor().account_id, filters.cursor()
    standing = runtime().read_aside(lambda tx: _standing(tx, account_id, before))
    return render(
        "jobs.html", standing=standing, is_first=before == reports.FIRST, now_ms=runtime().now_ms(), age=cells.age
    )


def resend(call_id: str) -> Reply:
    """The payload that was made goes out once more, from the first attempt on."""
    must_not_be_suspended()
    rt, account, number = runtime(), visitor().account.name, ids.parse_call(call_id)
    if number is None:
        raise NotFound("No webhook of yours belongs to that call.")

    def op(tx: Tx) -> None:
        found = webhooks.one(tx, number)
        if found is None or found.account != account:
            raise NotFound("No webhook of yours belongs to that call.")
        webhooks.resend(tx, number, now_ms=rt.now_ms())

    rt.write(op)
    rt.webhooks_due.set()
    return go("pages.jobs_list_jobs", f"The webhook of {call_id} is on its way once more.")


def _standing(tx: Tx, account_id: int, before: int) -> Standing:
    held = lookups.open_calls(tx, account_id)
    rows = [row for call in held[:HOLDS] if (row := reports.call(tx, call.call_id)) is not None]
    newest = webhooks.newest(tx, account_id=account_id, state=None, most=DELIVERIES + 1, before=before)
    return Standing(
        rows,
        len(held),
        Micros(sum(call.held_micros for call in held)),
        [webhook_cells(row) for row in newest[:DELIVERIES]],
        newest[DELIVERIES - 1].call_id if len(newest) > DELIVERIES else None,
    )
