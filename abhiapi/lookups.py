"""What one account looks up at the dashboard: usage cut any way, calls of a kind, one call's entries, a month.

Read-only; every function takes an open transaction. Nothing here costs more with more calls: usage comes from the
daily roll-up, a month's ends by halving, and calls of a kind are looked for among so many at a time, since no index
holds them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import islice
from typing import Any, Literal

from sqlalchemy import bindparam, func, literal_column, select, text

from abhiapi import reports, statements, tables
from abhiapi.calls import OPEN
from abhiapi.days import EPOCH, day_number, month_after, parse_month, start_ms
from abhiapi.db import Tx
from abhiapi.ids import key_text
from abhiapi.money import Micros
from abhiapi.reports import CallRow, EntryRow
from abhiapi.spent import Spent
from abhiapi.statements import Statement

By = Literal["day", "model", "key"]
LOOKED_AT = 5000  # calls that one page looks through at most
SUMS_MAX = 20_000  # entries of a month whose sums a page adds up

_ID_PER_MS = 1 << 20  # ids of calls sort by time (`ids.CallIds`)
_u = tables.usage_daily.c
_c = tables.calls.c
_p = tables.price_versions.c


def _is(column: Any, name: str) -> Any:
    """Whether a column is what was asked for; always, where nothing was."""
    return bindparam(name).is_(None) | (column == bindparam(name))


_FILTER = (
    _u.account_id == bindparam("account"),
    _u.day.between(bindparam("first"), bindparam("last")),
    _is(_u.model, "model"),
    _is(_u.key_id, "key"),
)
_SUMS = (func.sum(_u.calls), func.sum(_u.charged_micros))
_USAGE = {
    "day": select(_u.day, *_SUMS).where(*_FILTER).group_by(_u.day).order_by(_u.day.desc()),
    "model": select(_u.model, *_SUMS).where(*_FILTER).group_by(_u.model).order_by(_SUMS[1].desc(), _u.model),
    "key": select(_u.key_id, *_SUMS).where(*_FILTER).group_by(_u.key_id).order_by(_SUMS[1].desc(), _u.key_id),
}
_SPENT = select(_u.day, _u.model, *_SUMS).where(*_FILTER).group_by(_u.day, _u.model).order_by(_u.day, _u.model)
_LOOKED_AT = (
    select(_c.call_id, _c.key_id, _c.price_id, _c.state)
    .where(_c.account_id == bindparam("account"), _c.call_id >= bindparam("since"), _c.call_id < bindparam("before"))
    .order_by(_c.call_id.desc())
    .limit(bindparam("looked"))
    .subquery()
)
_l = _LOOKED_AT.c
_OF_KIND = (
    select(_l.call_id)
    .where(
        _is(_l.key_id, "key"),
        _is(_l.state, "state"),
        bindparam("model").is_(None) | _l.price_id.in_(select(_p.price_id).where(_p.model == bindparam("model"))),
    )
    .order_by(_l.call_id.desc())
    .limit(bindparam("most"))
)
_LOOKED = select(func.count(), func.min(_l.call_id)).select_from(_LOOKED_AT)
# "+ 0" keeps SQLite to the index of open calls, which are few, and from all calls of the account.
_OPEN = (
    select(_c.call_id, _c.state, _c.held_micros)
    .where(_c.account_id + 0 == bindparam("account"), _c.state.in_([literal_column(f"'{state}'") for state in OPEN]))
    .order_by(_c.call_id + 0)
)
_UNIT = (
    select(_p.unit, _c.billed_units)
    .join_from(tables.calls, tables.price_versions, _c.price_id == _p.price_id)
    .where(_c.call_id == bindparam("call"))
)
_CORRECTIONS = text(
    "SELECT account_id, seq, kind, amount_micros, balance_after_micros, call_id, ref, note, created_at, hash"
    " FROM entries WHERE call_id = :call AND kind <> 'charge' ORDER BY account_id, seq LIMIT :most"
)


@dataclass(frozen=True, slots=True)
class Used:
    """Ended calls of a group, and what they were charged less refunds."""

    group: str
    calls: int
    micros: Micros


@dataclass(frozen=True, slots=True)
class CallPage:
    """Calls newest first. ``cursor``: where older ones begin, None at the end. ``is_cut``: it looked no further."""

    rows: list[CallRow]
    cursor: int | None = None
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class OpenCall:
    call_id: int
    state: str
    held_micros: Micros


def usage(
    tx: Tx, by: By, account_id: int, *, since: date, until: date, model: str | None = None, key_id: int | None = None
) -> list[Used]:
    """Usage by day (newest first), or by model or key (the dearest first)."""
    rows = tx.all(_USAGE[by], **_filters(account_id, since, until, model, key_id))
    return [Used(_group_text(by, group), calls, Micros(micros)) for group, calls, micros in rows]


def spent(
    tx: Tx, account_id: int, *, since: date, until: date, model: str | None = None, key_id: int | None = None
) -> list[Spent]:
    """The same by day and model, as a chart stacks it."""
    rows = tx.all(_SPENT, **_filters(account_id, since, until, model, key_id))
    return [Spent(EPOCH + timedelta(days=day), name, calls, Micros(micros)) for day, name, calls, micros in rows]


def calls_of_kind(
    tx: Tx,
    account_id: int,
    *,
    most: int,
    before: int = reports.FIRST,
    since: date | None = None,
    until: date | None = None,
    model: str | None = None,
    key_id: int | None = None,
    state: str | None = None,
) -> CallPage:
    """An account's calls of a model, key and state that began on some days; a page of them, newest first."""
    first = 0 if since is None else start_ms(since) * _ID_PER_MS
    if until is not None:
        before = min(before, (start_ms(until) + 86_400_000) * _ID_PER_MS)
    if state in OPEN:
        numbers = (row.call_id for row in reversed(open_calls(tx, account_id)) if row.state == state)
        rows = (_call(tx, number) for number in numbers if first <= number < before)
        fitting = (row for row in rows if model in (None, row.model) and key_id in (None, row.key_id))
        standing = list(islice(fitting, most + 1))
        return CallPage(standing[:most], standing[most - 1].call_id if len(standing) > most else None)
    stretch = {"account": account_id, "since": first, "before": before, "looked": LOOKED_AT}
    found = [row[0] for row in tx.all(_OF_KIND, **stretch, model=model, key=key_id, state=state, most=most + 1)]
    page = [_call(tx, number) for number in found[:most]]
    if len(found) > most:
        return CallPage(page, found[most - 1])
    looked = tx.one(_LOOKED, **stretch)
    assert looked is not None
    return CallPage(page, looked[1], is_cut=True) if looked[0] == LOOKED_AT else CallPage(page)


def open_calls(tx: Tx, account_id: int) -> list[OpenCall]:
    """An account's calls whose hold still stands, oldest first."""
    return [OpenCall(*row) for row in tx.all(_OPEN, account=account_id)]


def unit_of(tx: Tx, call_id: int) -> tuple[str, str | None]:
    """What a call's price is for, such as ``megapixels``, and the units that fal billed, where an event told them."""
    row = tx.one(_UNIT, call=call_id)
    if row is None:
        raise AssertionError(f"call {call_id} is gone")
    return row[0], row[1]


def entries_of(tx: Tx, call_id: int, *, most: int = 100) -> list[EntryRow]:
    """What a call did to the balance: its charge, then refunds and adjustments in their order."""
    charge = reports.charge_of(tx, call_id)
    corrections = [EntryRow(*row) for row in tx.all(_CORRECTIONS, call=call_id, most=most)]
    return [*([] if charge is None else [charge]), *corrections]


def first_entry_at(tx: Tx, account_id: int) -> int | None:
    """When an account's ledger begins; None where nothing is written in it."""
    first = reports.entry(tx, account_id, 1)
    return None if first is None else first.created_at


def month(tx: Tx, account_id: int, account: str, wanted: str) -> Statement:
    """A month such as ``2026-11``, found by halving. Its sums are there if it has at most SUMS_MAX entries, and then it
    has been checked to foot. Raises ValueError for what is no month, `Refused` for one that does not foot."""
    opens = parse_month(wanted)
    newest = reports.newest_entries(tx, account_id, most=1)
    seqs = range(1, newest[0].seq + 1 if newest else 1)

    def since(day: date) -> int:
        return 1 + bisect_left(seqs, start_ms(day), key=lambda seq: _entry(tx, account_id, seq).created_at)

    first, last = since(opens), since(month_after(opens)) - 1
    if last - first < SUMS_MAX:
        return statements.of_month(tx, account_id, wanted)
    opening, closing = (
        _entry(tx, account_id, seq).balance_after_micros if seq else Micros(0) for seq in (first - 1, last)
    )
    return Statement(account_id, account, wanted, opening, closing, first, last, {})


def lines(tx: Tx, statement: Statement, first: int, last: int) -> Sequence[statements.Line]:
    """The lines of a month from one number to another, both included; at most `statements.PAGE`."""
    part = Statement(statement.account_id, "", statement.month, Micros(0), Micros(0), first, last, {})
    return statements.page(tx, part, first - 1)


def _filters(
    account_id: int, since: date, until: date, model: str | None, key_id: int | None
) -> dict[str, int | str | None]:
    return {
        "account": account_id,
        "first": day_number(since),
        "last": day_number(until),
        "model": model,
        "key": key_id,
    }


def _group_text(by: By, group: int | str) -> str:
    if by == "day":
        return (EPOCH + timedelta(days=int(group))).isoformat()
    return key_text(int(group)) if by == "key" else str(group)


def _call(tx: Tx, call_id: int) -> CallRow:
    row = reports.call(tx, call_id)
    if row is None:
        raise AssertionError(f"call {call_id} is gone")
    return row


def _entry(tx: Tx, account_id: int, seq: int) -> EntryRow:
    row = reports.entry(tx, account_id, seq)
    if row is None:
        raise AssertionError(f"entry {seq} of account {account_id} is gone")
    return row
