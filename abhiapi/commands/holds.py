"""`holds`: credit that is set aside for calls which have not ended, and the operator's word on those that cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from abhiapi import ids
from abhiapi.commands import library, session
from abhiapi.commands.options import AmountCommand, call_argument, force_option, json_option, parse_credits_or_zero
from abhiapi.commands.output import print_one, print_rows, say
from abhiapi.errors import Refused
from abhiapi.money import Micros, credits

if TYPE_CHECKING:
    from abhiapi.calls import OpenCall
    from abhiapi.db import Database, Tx
    from abhiapi.reports import CallRow
    from abhiapi.shapes import Json

COLUMNS = ("call_id", "account", "model", "credits", "age_s", "reason")


@click.group()
def holds() -> None:
    """Holds: credit set aside for calls that have not ended.

    Most end by themselves, with the call. One in state unknown (fal answered, but not what it costs) waits for your
    word: settle it with what fal charged you, or release it.

    \b
    Examples:
      abhiapi holds list
      abhiapi holds settle call_01jd3k9x2m4q7 --credits 12
      abhiapi holds release call_01jd3k9x2m4q7
    """


@holds.command("list")
@json_option
def list_holds(as_json: bool) -> None:
    """List open holds, oldest first.

    \b
    Examples:
      abhiapi holds list
      abhiapi holds list --json | jq '.holds[] | select(.age_s > 3600)'
    """
    now = session.now_ms()
    rows = [library.shapes.hold(row, now_ms=now) for row in session.read(library.reports.open_holds)]
    print_rows(rows, COLUMNS, as_json=as_json, none="no open holds", envelope={"holds": rows})


@holds.command("settle", cls=AmountCommand)
@call_argument
@click.option("--credits", "amount", required=True, metavar="N", help="What the call is charged; may be 0.")
@force_option("End it although it may still be running.")
@json_option
def settle_hold(call_id: str, amount: str, force: bool, as_json: bool) -> None:
    """End a hold as a charge.

    CALL_ID is in `abhiapi holds list`. The account is charged N credits, also where that is more than was held.
    A call that is still being served is refused, because it ends by itself, unless --force is given.

    \b
    Examples:
      abhiapi holds settle call_01jd3k9x2m4q7 --credits 12
      abhiapi holds settle call_01jd3k9x2m4q7 --credits 0
    """
    _end(call_id, parse_credits_or_zero(amount), force=force, as_json=as_json)


@holds.command("release")
@call_argument
@force_option("End it although it may still be running.")
@json_option
def release_hold(call_id: str, force: bool, as_json: bool) -> None:
    """End a hold without a charge.

    CALL_ID is in `abhiapi holds list`. A call that is still being served is refused, because it ends by itself,
    unless --force is given.

    \b
    Examples:
      abhiapi holds release call_01jd3k9x2m4q7
    """
    _end(call_id, None, force=force, as_json=as_json)


def _end(text: str, charge_micros: Micros | None, *, force: bool, as_json: bool) -> None:
    """End a hold by the operator's word: as a charge, or (None) as a release. Prints how the call stands now."""
    number = session.call_id(text)
    now = session.now_ms()
    database = session.open_database()

    def op(tx: Tx) -> Json:
        row = library.reports.call(tx, number)
        if row is None:
            raise session.no_such_call(text)
        open_call = library.calls.open_call(tx, number)
        if not force:
            _check_abandoned(tx, database, row, now)
        balance = _finish(tx, open_call, row, charge_micros, now)
        entry = library.reports.charge_of(tx, number)
        return {
            "call_id": text,
            "account": row.account,
            "model": row.model,
            "state": "released" if charge_micros is None else "settled",
            "credits": credits(charge_micros or 0),
            "entry_id": None if entry is None else ids.entry_text(entry.account_id, entry.seq),
            "balance": credits(balance),
        }

    shape = database.write(op)
    if shape["balance"] < 0:
        say(f"the balance of {shape['account']!r} is below zero: its calls are refused until it is topped up")
    print_one(shape, as_json=as_json)


def _finish(tx: Tx, call: OpenCall, row: CallRow, charge_micros: Micros | None, now_ms: int) -> Micros:
    """Write the end; what was seen of fal's answer stays with the call. The balance afterwards."""
    verdict = library.metering.Verdict(
        "released" if charge_micros is None else "settled",
        charge_micros or Micros(0),
        fal_cost_nano_usd=row.fal_cost_nano_usd,
        reason="operator",
    )
    source = None if charge_micros is None else "operator"
    return library.calls.finish(tx, call, verdict, now_ms=now_ms, usage_source=source)


def _check_abandoned(tx: Tx, database: Database, row: CallRow, now_ms: int) -> None:
    """Refuse to end a call under the hands of the process that serves it, whose own end of it would then be lost."""
    process_id, pid, deadline_at = library.reports.keeper(tx, row.call_id)
    if row.state == "unknown" or now_ms > deadline_at or library.processes.reap(database.path, process_id, pid):
        return
    raise Refused(
        f"{ids.call_text(row.call_id)} is still being served and ends by itself, at the latest by "
        f"{ids.time_text(deadline_at)}; what fal charges for it would not be taken any more. --force ends it now"
    )
