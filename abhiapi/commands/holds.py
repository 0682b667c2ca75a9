"""`holds`: credit that is set aside for calls which have not ended, and the operator's word on those that cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from abhiapi import ids
from abhiapi.commands import library, session
from abhiapi.commands.options import AmountCommand, call_argument, force_option, json_option, parse_credits_or_zero
from abhiapi.commands.output import print_one, print_rows, say
from abhiapi.errors import NotFound, Refused
from abhiapi.money import Micros, credits

if TYPE_CHECKING:
    from abhiapi.db import Database, Tx
    from abhiapi.shapes import Json

COLUMNS = ("call_id", "account", "model", "credits", "age_s", "reason")
WAITING = "making sure that nobody serves the call any more"


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


def _watch(database: Database, call_id: int, now_ms: int) -> None:
    """Find out whether the process that serves a call lives, before the transaction that needs to know."""
    row = database.read(lambda tx: library.reports.call(tx, call_id))
    if row is not None and row.state in ("held", "sent"):
        process_id, pid, deadline_at = database.read(lambda tx: library.reports.keeper(tx, call_id))
        if now_ms <= deadline_at:
            database.watch(process_id, pid, lambda wait_s: say(f"{WAITING} (up to {wait_s} s; --force does not wait)"))


def _end(text: str, charge_micros: Micros | None, *, force: bool, as_json: bool) -> None:
    """End a hold by the operator's word: as a charge, or (None) as a release. Prints how the call stands now."""
    number = session.call_id(text)
    now = session.now_ms()
    database = session.open_database()

    def op(tx: Tx) -> Json:
        ended = library.holds.end(tx, database, number, charge_micros, force=force, now_ms=now)
        entry = ended.entry
        return {
            "call_id": text,
            "account": ended.call.account,
            "model": ended.call.model,
            "state": "released" if charge_micros is None else "settled",
            "credits": credits(charge_micros or 0),
            "entry_id": None if entry is None else ids.entry_text(entry.account_id, entry.seq),
            "balance": credits(ended.balance_micros),
        }

    if not force:
        _watch(database, number, now)
    try:
        shape = database.write(op)
    except NotFound as error:
        raise session.no_such_call(text) from error
    except library.holds.StillServed as error:
        raise Refused(f"{error.message}. --force ends it now") from error
    if shape["balance"] < 0:
        say(f"the balance of {shape['account']!r} is below zero: its calls are refused until it is topped up")
    print_one(shape, as_json=as_json)
