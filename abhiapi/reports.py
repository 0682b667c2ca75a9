"""What people read: calls, entries, usage, open holds. Read-only; every function takes an open transaction.

Usage comes from the roll-ups only: an account's from its days, all accounts' from the totals of days and models, and
from the months and the days around them, so a report costs the same at ten million calls as at ten. Lists are paged
by key, newest first: ``cursor`` is the last id or seq of the page before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Select, bindparam, func, literal_column, select, text

from abhiapi import tables
from abhiapi.calls import OPEN
from abhiapi.days import EPOCH, day_number, month_after
from abhiapi.db import Row, Tx
from abhiapi.ids import key_text
from abhiapi.money import Micros, margin_percent_text
from abhiapi.spent import Spent

Grouping = Literal["day", "model", "key", "account"]
FIRST = 2**63 - 1  # the cursor before the newest

_c = tables.calls.c
_p = tables.price_versions.c
_a = tables.accounts.c
_e = tables.entries.c
_u = tables.usage_daily.c
_d = tables.usage_totals.c

_CALL_COLUMNS = (
    _c.call_id,
    _a.name,
    _c.key_id,
    _p.model,
    _c.mode,
    _c.state,
    _c.http_status,
    _c.held_micros,
    _c.charged_micros,
    _c.refunded_micros,
    _c.adjusted_micros,
    _c.units,
    _p.unit_price_usd,
    _c.usage_source,
    _c.fal_request_id,
    _c.fal_cost_nano_usd,
    _c.reason,
    _c.created_at,
    _c.finished_at,
)
_CALLS = (
    select(*_CALL_COLUMNS)
    .join_from(tables.calls, tables.accounts, _c.account_id == _a.account_id)
    .join(tables.price_versions, _c.price_id == _p.price_id)
)
_NEWEST_CALLS = _CALLS.where(_c.call_id < bindparam("before")).order_by(_c.call_id.desc()).limit(bindparam("most"))
_NEWEST_CALLS_OF = _NEWEST_CALLS.where(_c.account_id == bindparam("account"))
_ONE_CALL = _CALLS.where(_c.call_id == bindparam("call"))
# Sorted and joined by expressions, so that SQLite reads the few open calls from their index: not all calls in their
# order, nor those of each account, as where its statistics were taken while no call was open (0.75 s of a million).
_OPEN_HOLDS = (
    select(*_CALL_COLUMNS)
    .join_from(tables.calls, tables.accounts, _a.account_id == _c.account_id + 0)
    .join(tables.price_versions, _c.price_id == _p.price_id)
    .where(_c.state.in_([literal_column(f"'{state}'") for state in OPEN]))
    .order_by(_c.call_id + 0)
)
_ENTRY_COLUMNS = (
    _e.account_id,
    _e.seq,
    _e.kind,
    _e.amount_micros,
    _e.balance_after_micros,
    _e.call_id,
    _e.ref,
    _e.note,
    _e.created_at,
    _e.hash,
)
_NEWEST_ENTRIES = (
    select(*_ENTRY_COLUMNS)
    .where(_e.account_id == bindparam("account"), _e.seq < bindparam("before"))
    .order_by(_e.seq.desc())
    .limit(bindparam("most"))
)
_ONE_ENTRY = select(*_ENTRY_COLUMNS).where(_e.account_id == bindparam("account"), _e.seq == bindparam("number"))
_CHARGE_OF = select(*_ENTRY_COLUMNS).where(_e.call_id == bindparam("call"), _e.kind == literal_column("'charge'"))
_KEEPER = (
    select(_c.process_id, tables.processes.c.pid, _c.deadline_at)
    .join_from(tables.calls, tables.processes, _c.process_id == tables.processes.c.process_id)
    .where(_c.call_id == bindparam("call"))
)
_SPENT = (
    select(_u.day, _u.model, func.sum(_u.calls), func.sum(_u.charged_micros))
    .where(_u.account_id == bindparam("account"), _u.day >= bindparam("first"), _u.day <= bindparam("last"))
    .group_by(_u.day, _u.model)
    .order_by(_u.day, _u.model)
)
_ALL_ENTRIES = (
    select(*_ENTRY_COLUMNS, _a.name)
    .join_from(tables.entries, tables.accounts, _e.account_id == _a.account_id)
    .order_by(_e.account_id, _e.seq)
)


@dataclass(frozen=True, slots=True)
class CallRow:
    call_id: int
    account: str
    key_id: int
    model: str
    mode: str
    state: str
    status: int | None
    held_micros: Micros
    charged_micros: Micros
    refunded_micros: Micros
    adjusted_micros: Micros
    units: str | None
    unit_price_usd: str
    usage_source: str | None
    fal_request_id: str | None
    fal_cost_nano_usd: int | None
    reason: str | None
    created_at: int
    finished_at: int | None


@dataclass(frozen=True, slots=True)
class EntryRow:
    account_id: int
    seq: int
    kind: str
    amount_micros: Micros
    balance_after_micros: Micros
    call_id: int | None
    ref: str | None
    note: str | None
    created_at: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Ended calls of a group, what they were charged less refunds, and what they cost at fal (as far as known)."""

    group: str
    calls: int
    charged_micros: Micros
    fal_cost_nano_usd: int

    @property
    def margin_nano_usd(self) -> int:
        return self.charged_micros * 1000 - self.fal_cost_nano_usd

    @property
    def margin_percent(self) -> str | None:
        return margin_percent_text(self.charged_micros * 1000, self.fal_cost_nano_usd)


def newest_calls(tx: Tx, *, account_id: int | None = None, before: int = FIRST, most: int = 50) -> list[CallRow]:
    if account_id is None:
        return [_call(row) for row in tx.all(_NEWEST_CALLS, before=before, most=most)]
    return [_call(row) for row in tx.all(_NEWEST_CALLS_OF, account=account_id, before=before, most=most)]


def call(tx: Tx, call_id: int) -> CallRow | None:
    row = tx.one(_ONE_CALL, call=call_id)
    return _call(row) if row else None


def open_holds(tx: Tx) -> list[CallRow]:
    """Every call whose hold still stands, oldest first."""
    return [_call(row) for row in tx.all(_OPEN_HOLDS)]


def newest_entries(tx: Tx, account_id: int, *, before: int = FIRST, most: int = 50) -> list[EntryRow]:
    return [EntryRow(*row) for row in tx.all(_NEWEST_ENTRIES, account=account_id, before=before, most=most)]


def entry(tx: Tx, account_id: int, seq: int) -> EntryRow | None:
    row = tx.one(_ONE_ENTRY, account=account_id, number=seq)
    return EntryRow(*row) if row else None


def charge_of(tx: Tx, call_id: int) -> EntryRow | None:
    """The entry that charged a call; None where it was free, or has not ended."""
    row = tx.one(_CHARGE_OF, call=call_id)
    return EntryRow(*row) if row else None


def keeper(tx: Tx, call_id: int) -> tuple[int, int, int]:
    """The process that works on a call, its pid, and the call's deadline. The call must exist."""
    row = tx.one(_KEEPER, call=call_id)
    if row is None:
        raise AssertionError(f"call {call_id} is gone")
    return row[0], row[1], row[2]


def all_entries(tx: Tx) -> Iterator[tuple[EntryRow, str]]:
    """Every entry of every account as (EntryRow, account name), in order, in bounded memory."""
    return ((EntryRow(*row[:-1]), row[-1]) for row in tx.each(_ALL_ENTRIES))


def usage(
    tx: Tx, by: Grouping, *, account_id: int | None = None, since: date | None = None, until: date | None = None
) -> list[UsageRow]:
    """Usage of the days from ``since`` to ``until``, both included (UTC days on which the calls ended)."""
    first = day_number(since) if since else 0
    last = day_number(until) if until else day_number(date.max)
    if account_id is not None:
        rows = tx.all(_OF_ACCOUNT[by], account=account_id, first=first, last=last)
    elif by in ("day", "model"):
        rows = tx.all(_TOTALS[by], first=first, last=last)
    else:
        rows = tx.all(_OVER_ALL[by], **_stretches(since, until))
    return [UsageRow(_group_text(by, group), calls, Micros(micros), nanos) for group, calls, micros, nanos in rows]


def spent(tx: Tx, account_id: int, *, since: date, until: date) -> list[Spent]:
    """What an account spent, by day and model (UTC days on which the calls ended)."""
    rows = tx.all(_SPENT, account=account_id, first=day_number(since), last=day_number(until))
    return [Spent(EPOCH + timedelta(days=day), model, calls, Micros(micros)) for day, model, calls, micros in rows]


def total(rows: list[UsageRow]) -> UsageRow:
    return UsageRow(
        "total",
        sum(row.calls for row in rows),
        Micros(sum(row.charged_micros for row in rows)),
        sum(row.fal_cost_nano_usd for row in rows),
    )


def parse_day(text: str, *, today: date | None = None) -> date:
    """A day as ``2026-11-22`` or a span back from today such as ``7d``. Raises ValueError saying what is expected."""
    try:
        if text.endswith("d") and text[:-1].isdigit() and len(text) <= 5:
            return (today or datetime.now(UTC).date()) - timedelta(days=int(text[:-1]))
        return date.fromisoformat(text)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text[:40]!r} is no day: write 2026-11-22, or 7d for a week ago") from error


def _stretches(since: date | None, until: date | None) -> dict[str, Any]:
    """A time as whole months and the days before and after them, both included; empty where first is after last."""
    first = day_number(since) if since else 0
    last = day_number(until) if until else day_number(date.max)
    opening = EPOCH if since is None else since if since.day == 1 else month_after(since)
    after = None if until is None else until + timedelta(days=1)
    closing = date.max if after is None else after.replace(day=1)  # the first day after the whole months
    if opening >= closing:
        return {"first_month": "1", "last_month": "0", "first": first, "last": last, "then": 1, "end": 0}
    return {
        "first_month": opening.isoformat()[:7],
        "last_month": "9999-12" if until is None else (closing - timedelta(days=1)).isoformat()[:7],
        "first": first,
        "last": day_number(opening) - 1,
        "then": 1 if until is None else day_number(closing),
        "end": 0 if until is None else last,
    }


def _sums(of: Any) -> tuple[Any, ...]:
    return func.sum(of.calls), func.sum(of.charged_micros), func.sum(of.fal_cost_nano_usd)


def _of_account(by: str) -> Select[Any]:
    """One account's usage: its rows of the daily roll-up lie side by side."""
    group: Any = {"day": _u.day, "model": _u.model, "key": _u.key_id, "account": _a.name}[by]
    statement = select(group, *_sums(_u)).where(
        _u.account_id == bindparam("account"), _u.day >= bindparam("first"), _u.day <= bindparam("last")
    )
    if by == "account":
        statement = statement.join_from(tables.usage_daily, tables.accounts, _u.account_id == _a.account_id)
    return statement.group_by(group).order_by(group)


def _totals(by: str) -> Select[Any]:
    group = _d[by]
    statement = select(group, *_sums(_d)).where(_d.day >= bindparam("first"), _d.day <= bindparam("last"))
    return statement.group_by(group).order_by(group)


# All accounts' usage: whole months from the monthly roll-up, the days around them account by account from the daily
# one. CROSS JOIN keeps SQLite to that order: each account's days lie side by side, those of one day do not.
_BY_KEY = text(
    "SELECT key_id, SUM(calls), SUM(charged), SUM(cost) FROM ("
    " SELECT key_id, calls, charged_micros AS charged, fal_cost_nano_usd AS cost FROM usage_monthly"
    "  WHERE month BETWEEN :first_month AND :last_month"
    " UNION ALL SELECT u.key_id, u.calls, u.charged_micros, u.fal_cost_nano_usd FROM accounts a"
    "  CROSS JOIN usage_daily u WHERE u.account_id = a.account_id AND u.day BETWEEN :first AND :last"
    " UNION ALL SELECT u.key_id, u.calls, u.charged_micros, u.fal_cost_nano_usd FROM accounts a"
    "  CROSS JOIN usage_daily u WHERE u.account_id = a.account_id AND u.day BETWEEN :then AND :end"
    ") p GROUP BY key_id ORDER BY key_id"
)
_BY_ACCOUNT = text(
    "SELECT n.name, SUM(p.calls), SUM(p.charged), SUM(p.cost) FROM ("
    " SELECT account_id, SUM(calls) AS calls, SUM(charged_micros) AS charged, SUM(fal_cost_nano_usd) AS cost"
    "  FROM usage_monthly WHERE month BETWEEN :first_month AND :last_month GROUP BY account_id"
    " UNION ALL SELECT a.account_id, SUM(u.calls), SUM(u.charged_micros), SUM(u.fal_cost_nano_usd) FROM accounts a"
    "  CROSS JOIN usage_daily u WHERE u.account_id = a.account_id AND u.day BETWEEN :first AND :last"
    "  GROUP BY a.account_id"
    " UNION ALL SELECT a.account_id, SUM(u.calls), SUM(u.charged_micros), SUM(u.fal_cost_nano_usd) FROM accounts a"
    "  CROSS JOIN usage_daily u WHERE u.account_id = a.account_id AND u.day BETWEEN :then AND :end"
    "  GROUP BY a.account_id"
    ") p JOIN accounts n ON n.account_id = p.account_id GROUP BY p.account_id, n.name ORDER BY n.name"
)
_TOTALS = {by: _totals(by) for by in ("day", "model")}
_OF_ACCOUNT = {by: _of_account(by) for by in ("day", "model", "key", "account")}
_OVER_ALL = {"key": _BY_KEY, "account": _BY_ACCOUNT}


def _group_text(by: Grouping, group: Any) -> str:
    if by == "day":
        return (EPOCH + timedelta(days=group)).isoformat()
    return key_text(group) if by == "key" else str(group)


def _call(row: Row) -> CallRow:
    return CallRow(*row)
