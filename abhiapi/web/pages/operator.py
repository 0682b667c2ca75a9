"""The operator's view of accounts: all of them, one, and credit and status changed by the command line's functions.

Every change is asked about on a page of its own first. What is on that page is what is done: a top-up carries its
reference, and a correction the entry that it was looked at after, so that a second click changes nothing.
"""

from __future__ import annotations

import logging
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import NamedTuple

from flask import request, url_for

from abhiapi import accounts, keys, ledger, reports, users
from abhiapi.accounts import Account
from abhiapi.db import Tx
from abhiapi.errors import AbhiError, BadRequest, NotFound
from abhiapi.keys import Key
from abhiapi.money import Micros, credits_text, parse_amount
from abhiapi.reports import CallRow, EntryRow
from abhiapi.users import User
from abhiapi.web.caller import runtime
from abhiapi.web.pages import words
from abhiapi.web.pages.desk import Desk, Reply, Role, go, render, visitor

log = logging.getLogger("abhiapi")

ROWS_MAX, LAST_CALLS, LAST_ENTRIES = 200, 20, 20
REF_MAX, NOTE_MAX = 200, 500
REPEAT_ENTRIES_MAX = 500  # how far back a second click is looked for
_NUMBER = re.compile(r"\d{1,18}")


class Wanted(NamedTuple):
    """A change as its page asks about it."""

    title: str
    question: str
    button: str
    is_grave: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    account: Account
    month_micros: Micros


@dataclass(frozen=True, slots=True)
class Whole:
    """One account, whole."""

    account: Account
    month_micros: Micros
    users: list[User]
    keys: list[Key]
    calls: list[CallRow]
    entries: list[EntryRow]


def add_to(desk: Desk) -> None:
    desk.add(Role.OPERATOR, "/operator", list_accounts, nav="All accounts")
    one = "/operator/accounts/<int:account_id>"
    desk.add(Role.OPERATOR, one, show_account)
    desk.add(Role.OPERATOR, f"{one}/topup", topup, methods=("POST",))
    desk.add(Role.OPERATOR, f"{one}/adjust", adjust, methods=("POST",))
    desk.add(Role.OPERATOR, f"{one}/<any(suspend, resume):change>", change_status, methods=("GET", "POST"))


def list_accounts() -> Reply:
    wanted = request.args.get("find", "").strip()[:64]
    rt = runtime()
    rows = rt.read_aside(lambda tx: _rows(tx, today(rt.now_ms())))
    found = [row for row in rows if wanted.lower() in row.account.name.lower()]
    return render("operator.html", rows=found[:ROWS_MAX], found=len(found), find=wanted, everyone=len(rows))


def show_account(account_id: int) -> Reply:
    return _page(account_id)


def topup(account_id: int) -> Reply:
    rt = runtime()
    try:
        micros = parse_amount(request.form.get("amount", ""), usd=_in_usd())
        ref = _text("ref", REF_MAX) or f"dashboard-{secrets.token_hex(8)}"
        note = _text("note", NOTE_MAX)
        if not _is_confirmed():
            account = rt.reader.read(lambda tx: _account(tx, account_id))
            asked = Wanted(
                "Top up",
                f"Add {words.credits(micros)} credits ({words.usd(micros)}) to {account.name}, under the "
                f"reference {ref}?",
                "Add the credit",
            )
            return _ask(asked, account, amount=credits_text(micros), ref=ref, note=note or "")

        def op(tx: Tx) -> ledger.Entry:
            _account(tx, account_id)
            return ledger.topup(tx, account_id, micros, ref=ref, note=note, now_ms=rt.now_ms())

        entry = rt.write(op)
    except NotFound:
        raise
    except AbhiError as error:
        return _page(account_id, problem=error)
    if entry.repeated:
        return _back(account_id, f"Nothing changed: this reference was topped up before, as {entry.entry_id}.")
    _note("topped up", account_id)
    return _back(account_id, f"{words.credits(micros)} credits were added.")


def adjust(account_id: int) -> Reply:
    rt = runtime()
    try:
        micros = parse_amount(request.form.get("amount", ""), usd=_in_usd(), signed=True)
        note = _text("note", NOTE_MAX)
        if note is None:
            raise BadRequest("a correction needs a note: it is kept in the ledger for ever")
        if not _is_confirmed():
            account, last = rt.reader.read(lambda tx: (_account(tx, account_id), _last_seq(tx, account_id)))
            done = (
                f"Add {words.credits(micros)} credits to"
                if micros > 0
                else f"Take {words.credits(-micros)} credits from"
            )
            asked = Wanted("Correct the balance", f"{done} {account.name}? The note says: {note}", "Correct it", True)
            return _ask(asked, account, amount=credits_text(micros), note=note, after=str(last))
        after = request.form.get("after", "")
        if not _NUMBER.fullmatch(after):
            raise BadRequest("this form is not one of ours: begin again")

        def op(tx: Tx) -> bool:
            _account(tx, account_id)
            newer = reports.newest_entries(tx, account_id, most=REPEAT_ENTRIES_MAX)
            same = [row for row in newer if row.seq > int(after) and row.kind == "adjustment" and row.note == note]
            if any(row.amount_micros == micros for row in same):
                return False
            ledger.adjust(tx, account_id, micros, note=note, now_ms=rt.now_ms())
            return True

        is_done = rt.write(op)
    except NotFound:
        raise
    except AbhiError as error:
        return _page(account_id, problem=error)
    if not is_done:
        return _back(account_id, "Nothing changed: this form was sent a second time.")
    _note("corrected the balance of", account_id)
    return _back(account_id, f"The balance was corrected by {words.credits(micros)} credits.")


def change_status(account_id: int, change: str) -> Reply:
    rt = runtime()
    if request.method == "GET":
        account = rt.reader.read(lambda tx: _account(tx, account_id))
        if change == "suspend":
            meaning = "Its calls are refused from now on, and its users can only look. Running calls are charged."
            asked = Wanted("Suspend", f"Suspend {account.name}? {meaning}", "Suspend", True)
        else:
            asked = Wanted("Resume", f"Let {account.name} call again?", "Resume")
        return _ask(asked, account)

    def op(tx: Tx) -> Account:
        accounts.set_status(tx, _account(tx, account_id).account_id, "suspended" if change == "suspend" else "active")
        return accounts.by_id(tx, account_id)

    account = rt.write(op)
    _note("suspended" if change == "suspend" else "resumed", account_id)
    return _back(account_id, f"{account.name} is {account.status}.")


def today(now_ms: int) -> date:
    return datetime.fromtimestamp(now_ms // 1000, UTC).date()


def _rows(tx: Tx, day: date) -> list[Row]:
    spent = {row.group: row.charged_micros for row in reports.usage(tx, "account", since=day.replace(day=1))}
    return [Row(account, spent.get(account.name, Micros(0))) for account in accounts.everyone(tx)]


def _page(account_id: int, *, problem: AbhiError | None = None) -> Reply:
    rt = runtime()
    now = rt.now_ms()
    whole = rt.read_aside(lambda tx: _whole(tx, account_id, today(now)))
    said = None if problem is None else problem.message[:1].upper() + problem.message[1:] + "."
    status = 200 if problem is None else 422
    statuses = {key.key_id: key.status_at(now) for key in whole.keys}
    return render(
        "operator_account.html", status=status, problem=said, whole=whole, statuses=statuses, form=request.form
    )


def _whole(tx: Tx, account_id: int, day: date) -> Whole:
    account = _account(tx, account_id)
    month = reports.total(reports.usage(tx, "day", account_id=account_id, since=day.replace(day=1)))
    return Whole(
        account,
        month.charged_micros,
        users.listed(tx, account_id),
        keys.listed(tx, account_id),
        reports.newest_calls(tx, account_id=account_id, most=LAST_CALLS),
        reports.newest_entries(tx, account_id, most=LAST_ENTRIES),
    )


def _account(tx: Tx, account_id: int) -> Account:
    try:
        return accounts.by_id(tx, account_id)
    except (NotFound, OverflowError) as error:
        raise NotFound("There is no such account.") from error


def _ask(wanted: Wanted, account: Account, **fields: str) -> Reply:
    """The page that asks whether it is meant."""
    back = url_for("pages.operator_show_account", account_id=account.account_id)
    return render("operator_ask.html", wanted=wanted, fields=fields, back=back)


def _is_confirmed() -> bool:
    return request.form.get("confirmed") == "yes"


def _in_usd() -> bool:
    return request.form.get("unit") == "usd"


def _text(name: str, most: int) -> str | None:
    text = request.form.get(name, "").strip()
    if len(text) > most or not text.isprintable():
        raise BadRequest(f"the {name} has at most {most} printable characters")
    return text or None


def _last_seq(tx: Tx, account_id: int) -> int:
    newest = reports.newest_entries(tx, account_id, most=1)
    return newest[0].seq if newest else 0


def _note(done: str, account_id: int) -> None:
    """Who did it: the ledger's entry says what."""
    log.warning("operator %d %s account %d from the dashboard", visitor().user.user_id, done, account_id)


def _back(account_id: int, said: str) -> Reply:
    return go("pages.operator_show_account", said, account_id=account_id)
