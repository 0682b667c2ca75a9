"""`topup`, `balance`, `refund`, `adjust`: credit in, and the operator's word on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import (
    AmountCommand,
    Text,
    account_argument,
    call_argument,
    json_option,
    usd_option,
)
from abhiapi.commands.output import print_one, say
from abhiapi.errors import Refused
from abhiapi.money import credits, credits_text, parse_amount

if TYPE_CHECKING:
    from abhiapi.accounts import Account
    from abhiapi.db import Tx
    from abhiapi.ledger import Entry
    from abhiapi.reports import CallRow, EntryRow


@click.command(cls=AmountCommand)
@account_argument
@click.argument("amount")
@usd_option
@click.option("--ref", type=Text(), help="The payment's own number. Repeating a top-up with it changes nothing.")
@click.option("--note", type=Text(500), help="A word for the ledger.")
@json_option
def topup(account: str, amount: str, usd: bool, ref: str | None, note: str | None, as_json: bool) -> None:
    """Add credit to an account.

    ACCOUNT is its name, or one of its keys. AMOUNT is in credits (1 credit is 0.001 USD), at most 3 decimals. Give
    the payment's number as --ref and it is safe to repeat the command: the same amount is added once, another is
    refused.

    \b
    Examples:
      abhiapi topup acme 5000
      abhiapi topup acme 49.90 --usd --ref invoice-2026-118 --note "bank transfer"
    """
    amount_micros = parse_amount(amount, usd=usd)

    def op(tx: Tx) -> tuple[Entry, Account]:
        owner = session.account(tx, account)
        entry = library.ledger.topup(tx, owner.account_id, amount_micros, ref=ref, note=note, now_ms=session.now_ms())
        return entry, library.accounts.by_id(tx, owner.account_id)

    entry, owner = session.write(op)
    if entry.repeated:
        say(f"nothing changed: reference {ref!r} was topped up before, as {entry.entry_id}")
    if owner.status != "active":
        say(f"the account {owner.name!r} is {owner.status}: `abhiapi accounts resume` lets it spend this")
    shape = {
        "account": owner.name,
        "entry_id": entry.entry_id,
        "credits": credits(entry.amount_micros),
        "balance": credits(owner.balance_micros),
    }
    print_one(shape, as_json=as_json)


@click.command()
@account_argument
@json_option
def balance(account: str, as_json: bool) -> None:
    """Show an account's balance, and what is left to spend.

    Open calls hold a part of the balance; the rest is available. ACCOUNT is its name, or one of its keys.

    \b
    Examples:
      abhiapi balance acme
      abhiapi balance acme --json | jq .available
    """
    owner = session.read(lambda tx: session.account(tx, account))
    print_one(library.shapes.balance(owner), as_json=as_json)


@click.command(cls=AmountCommand)
@call_argument
@click.option("--credits", "amount", metavar="N", help="Give back this much only. Default: all that was charged.")
@json_option
def refund(call_id: str, amount: str | None, as_json: bool) -> None:
    """Give back a call's charge, wholly or in part.

    CALL_ID is in the header x-abhiapi-call-id of the call's answer, and in `abhiapi calls list`. All refunds of a
    call together never pass its charge.

    \b
    Examples:
      abhiapi refund call_01jd3k9x2m4q7
      abhiapi refund call_01jd3k9x2m4q7 --credits 2.5
    """
    amount_micros = None if amount is None else parse_amount(amount)
    number = session.call_id(call_id)

    def op(tx: Tx) -> tuple[str, EntryRow]:
        call = library.reports.call(tx, number)
        if call is None:
            raise session.no_such_call(call_id)
        _check_refundable(call_id, call)
        entry = library.calls.refund(tx, number, amount_micros, now_ms=session.now_ms())
        return call.account, _written(tx, entry)

    _print_entry(*session.write(op), as_json=as_json)


@click.command(cls=AmountCommand)
@account_argument
@click.argument("amount")
@usd_option
@click.option("--note", required=True, type=Text(500), help="Why: kept in the ledger for ever.")
@json_option
def adjust(account: str, amount: str, usd: bool, note: str, as_json: bool) -> None:
    """Correct a balance, up or down, by a new ledger entry.

    ACCOUNT is its name, or one of its keys. AMOUNT is in credits; with a minus sign it is taken away. What is in the
    ledger is never edited, so a mistake is put right this way.

    \b
    Examples:
      abhiapi adjust acme 100 --note "goodwill for the outage of 3 May"
      abhiapi adjust acme -5 --note "top-up entered twice"
    """
    amount_micros = parse_amount(amount, usd=usd, signed=True)

    def op(tx: Tx) -> tuple[str, EntryRow]:
        owner = session.account(tx, account)
        entry = library.ledger.adjust(tx, owner.account_id, amount_micros, note=note, now_ms=session.now_ms())
        return owner.name, _written(tx, entry)

    _print_entry(*session.write(op), as_json=as_json)


def _check_refundable(call_id: str, call: CallRow) -> None:
    """Say what can be done where there is nothing to give back."""
    if call.state not in ("settled", "released"):
        raise Refused(
            f"{call_id} has not ended, so nothing was charged yet: see `abhiapi holds settle` and `holds release`"
        )
    if call.charged_micros == call.refunded_micros:
        was = f"{credits_text(call.charged_micros)} credits, all refunded" if call.charged_micros else "nothing"
        raise Refused(f"{call_id} was charged {was}: there is nothing to give back (`abhiapi adjust` adds credit)")


def _written(tx: Tx, entry: Entry) -> EntryRow:
    row = library.reports.entry(tx, entry.account_id, entry.seq)
    if row is None:
        raise AssertionError(f"{entry.entry_id} was not written")
    return row


def _print_entry(account: str, row: EntryRow, *, as_json: bool) -> None:
    if row.balance_after_micros < 0:
        say(f"the balance of {account!r} is below zero: its calls are refused until it is topped up")
    print_one(library.shapes.entry(row, account=account), as_json=as_json)
