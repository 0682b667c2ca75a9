"""`ledger verify`: recounts everything that is kept twice, and says in a sentence where two counts differ.

Reads one snapshot in bounded memory, so it runs while the server serves. The entries and calls are the truth;
balances, holds, chains and roll-ups are checked against them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import ColumnElement, Select, func, literal_column, or_, select, text, union_all

from abhiapi import reports, tables
from abhiapi.db import Tx, month_start, utc
from abhiapi.ids import call_text, entry_text
from abhiapi.ledger import entry_hash
from abhiapi.money import credits_text

PROBLEMS_MAX = 100
PROGRESS_EVERY = 50_000


@dataclass(frozen=True, slots=True)
class Finding:
    accounts: int
    entries: int
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems


def _differing(both: Any, by: str, figures: str) -> Select[Any]:
    """Where two counts of the same, one of them with a minus, do not come to nothing."""
    groups = [both[name] for name in by.split()]
    sums = [func.sum(both[name]) for name in figures.split()]
    return select(*groups, *sums).group_by(*groups).having(or_(*(total != literal_column("0") for total in sums)))


_ACCOUNTS = text(
    "SELECT account_id, name, balance_micros, held_micros, last_seq, last_hash FROM accounts ORDER BY account_id"
)
# Grouped by an expression, so that SQLite reads the few open calls from their index and not all of an account.
_HELD = text(
    "SELECT account_id + 0, SUM(held_micros) FROM calls WHERE state IN ('held', 'sent', 'unknown')"
    " GROUP BY account_id + 0"
)
_LAST_ENTRIES = text(
    "SELECT a.account_id, a.name, a.balance_micros, a.held_micros, a.last_seq, a.last_hash,"
    " e.balance_after_micros, e.hash"
    " FROM accounts a LEFT JOIN entries e ON e.account_id = a.account_id AND e.seq = a.last_seq ORDER BY a.account_id"
)
# Each row of these is a problem: (account_id or call_id, left, right).
_CHARGES_WITHOUT_ENTRY = text(
    "SELECT c.call_id, c.charged_micros, COALESCE(-e.amount_micros, 0) FROM calls c"
    " LEFT JOIN entries e ON e.call_id = c.call_id AND e.kind = 'charge'"
    " WHERE c.charged_micros <> COALESCE(-e.amount_micros, 0) OR (e.account_id <> c.account_id)"
)
_ENTRIES_WITHOUT_CHARGE = text(
    "SELECT e.call_id, -e.amount_micros, c.charged_micros FROM entries e"
    " LEFT JOIN calls c ON c.call_id = e.call_id WHERE e.kind = 'charge' AND c.call_id IS NULL"
)
_REFUNDS = text(
    "SELECT e.call_id, SUM(e.amount_micros), MAX(c.refunded_micros) FROM entries e"
    " JOIN calls c ON c.call_id = e.call_id WHERE e.kind = 'refund' GROUP BY e.call_id"
    " HAVING SUM(e.amount_micros) <> MAX(c.refunded_micros)"
)
_REFUNDED_WITHOUT_ENTRY = text(
    "SELECT call_id, refunded_micros, 0 FROM calls WHERE refunded_micros > 0 AND call_id NOT IN"
    " (SELECT call_id FROM entries WHERE kind = 'refund')"
)
_ADJUSTED = text(
    "SELECT c.call_id, c.adjusted_micros, -SUM(e.amount_micros) FROM calls c"
    " JOIN entries e ON e.call_id = c.call_id AND e.kind = 'adjustment' GROUP BY c.call_id"
    " HAVING c.adjusted_micros <> -SUM(e.amount_micros)"
)
_ADJUSTED_WITHOUT_ENTRY = text(
    "SELECT call_id, adjusted_micros, 0 FROM calls WHERE adjusted_micros <> 0 AND call_id NOT IN"
    " (SELECT call_id FROM entries WHERE kind = 'adjustment' AND call_id IS NOT NULL)"
)
_ROLL_UPS = text(
    "SELECT account_id, day, model, key_id, SUM(calls), SUM(charged), SUM(cost) FROM ("
    " SELECT c.account_id, c.finished_at / 86400000 AS day, p.model, c.key_id, 1 AS calls,"
    "  c.charged_micros - c.refunded_micros + c.adjusted_micros AS charged, COALESCE(c.fal_cost_nano_usd, 0) AS cost"
    "  FROM calls c JOIN price_versions p ON p.price_id = c.price_id WHERE c.state IN ('settled', 'released')"
    " UNION ALL"
    " SELECT account_id, day, model, key_id, -calls, -charged_micros, -fal_cost_nano_usd FROM usage_daily"
    ") counted GROUP BY account_id, day, model, key_id HAVING SUM(calls) <> 0 OR SUM(charged) <> 0 OR SUM(cost) <> 0"
)


_m, _d = tables.usage_monthly.c, tables.usage_daily.c
_BY_MONTH = union_all(
    select(
        utc(literal_column("'%Y-%m'"), _d.day * literal_column("86400")).label("month"), _d.account_id, _d.key_id,
        _d.calls, _d.charged_micros.label("charged"), _d.fal_cost_nano_usd.label("cost"),
    ),
    select(_m.month, _m.account_id, _m.key_id, -_m.calls, -_m.charged_micros, -_m.fal_cost_nano_usd),
).subquery("both_months")  # fmt: skip
_MONTHS = _differing(_BY_MONTH.c, "month account_id key_id", "calls charged cost")
_TOTALS = text(
    "SELECT day, model, SUM(calls), SUM(charged), SUM(cost) FROM ("
    " SELECT day, model, calls, charged_micros AS charged, fal_cost_nano_usd AS cost FROM usage_daily"
    " UNION ALL SELECT day, model, -calls, -charged_micros, -fal_cost_nano_usd FROM usage_totals"
    ") counted GROUP BY day, model HAVING SUM(calls) <> 0 OR SUM(charged) <> 0 OR SUM(cost) <> 0"
)
# What calls of limited keys hold and were charged, by the day and the month of their admission, against the counters.
# Months before a limit was set were never counted.
_LIMITED = text("SELECT 1 FROM keys WHERE limit_id IS NOT NULL LIMIT 1")
_SPENT = (
    select(
        literal_column("k.limit_id").label("limit_id"),
        literal_column("c.created_at / 86400000 * 86400").label("at"),
        literal_column(
            "SUM(CASE WHEN c.state IN ('settled', 'released')"
            " THEN c.charged_micros + c.adjusted_micros - c.refunded_micros ELSE c.held_micros END)"
        ).label("micros"),
    )
    .select_from(text("calls c CROSS JOIN keys k CROSS JOIN key_limits l"))
    .where(
        text("k.key_id = c.key_id AND l.limit_id = k.limit_id"),
        literal_column("c.created_at / 1000") >= month_start(literal_column("l.created_at / 1000")),
    )
    .group_by(text("1"), text("2"))
    .cte("spent")
)
_s = tables.key_spending.c
_ZERO: ColumnElement[int] = literal_column("0")
_FORMS: tuple[ColumnElement[str], ...] = (literal_column("'%Y-%m-%d'"), literal_column("'%Y-%m'"))
_BY_PERIOD = union_all(
    *(
        select(
            _SPENT.c.limit_id, utc(form, _SPENT.c.at).label("period"), _SPENT.c.micros, _ZERO.label("counted")
        )
        for form in _FORMS
    ),
    select(_s.limit_id, _s.period, _ZERO, _s.spent_micros),
).subquery("moved")  # fmt: skip
_SPENDING = (
    select(
        _BY_PERIOD.c.limit_id, _BY_PERIOD.c.period, func.sum(_BY_PERIOD.c.micros), func.sum(_BY_PERIOD.c.counted)
    )
    .group_by(_BY_PERIOD.c.limit_id, _BY_PERIOD.c.period)
    .having(func.sum(_BY_PERIOD.c.micros) != func.sum(_BY_PERIOD.c.counted))
)  # fmt: skip


def verify(tx: Tx, *, progress: Callable[[int], None] = lambda entries: None) -> Finding:
    """Recount the whole ledger. ``progress`` hears of the entries read so far."""
    problems: list[str] = []
    count = 0
    chain = _Chain()
    for row, _name in reports.all_entries(tx):
        problems.extend(chain.follow(row))
        count += 1
        if count % PROGRESS_EVERY == 0:
            progress(count)
        if len(problems) > PROBLEMS_MAX:
            break
    accounts = list(tx.each(_ACCOUNTS))
    problems.extend(_account_problems(accounts, chain, dict(tx.all(_HELD))))
    problems.extend(islice(_call_problems(tx), PROBLEMS_MAX))
    # Whoever removes an account or a call takes its entries out of every sum above; what points at it still tells.
    problems.extend(
        f"{rows} rows of {table} name rows of {parent} that are gone" for table, parent, rows in tx.dangling()
    )
    return Finding(len(accounts), count, problems[:PROBLEMS_MAX])


def verify_ends(tx: Tx) -> Finding:
    """A quick look for `doctor`: each account against its newest entry and its open calls, at the cost of neither."""
    held: dict[int, int] = dict(tx.all(_HELD))
    problems: list[str] = []
    count = entries = 0
    for account_id, name, balance, held_micros, last_seq, last_hash, balance_after, end in tx.each(_LAST_ENTRIES):
        count, entries = count + 1, entries + last_seq
        if (balance, last_hash) != (balance_after or 0, end or b""):
            problems.append(f"account {name!r} does not agree with its newest entry")
        if held_micros != held.get(account_id, 0):
            problems.append(f"account {name!r} does not agree with its open calls")
    return Finding(count, entries, problems[:PROBLEMS_MAX])


class _Chain:
    """Follows the entries of one account after the other; keeps the end of each account's chain."""

    def __init__(self) -> None:
        self.ends: dict[int, tuple[int, int, bytes]] = {}  # account -> (sum, seq, hash)

    def follow(self, row: reports.EntryRow) -> Iterator[str]:
        balance, seq, previous = self.ends.get(row.account_id, (0, 0, b""))
        name = entry_text(row.account_id, row.seq)
        balance += row.amount_micros
        if row.seq != seq + 1:
            yield f"{name} follows number {seq}: an entry is missing"
        if row.balance_after_micros != balance:
            said = credits_text(row.balance_after_micros)
            yield f"{name} says a balance of {said}, the sum is {credits_text(balance)}"
        expected = entry_hash(
            previous,
            row.account_id,
            row.seq,
            row.kind,
            row.amount_micros,
            row.balance_after_micros,
            row.call_id,
            row.ref,
            row.note,
            row.created_at,
        )
        if row.hash != expected:
            yield f"{name} does not match its hash: it or an entry before it was changed"
        self.ends[row.account_id] = (balance, row.seq, row.hash)


def _account_problems(accounts: list[tuple[object, ...]], chain: _Chain, held: dict[int, int]) -> Iterator[str]:
    for account_id, name, balance, held_micros, last_seq, last_hash in accounts:
        total, seq, end = chain.ends.get(account_id, (0, 0, b""))  # type: ignore[call-overload]
        if balance != total:
            yield f"account {name!r}: balance {credits_text(int(str(balance)))}, sum of entries {credits_text(total)}"
        if last_seq == seq and last_hash != end:
            yield f"account {name!r}: its head does not match the hash of entry {seq}"
        if last_seq != seq:
            yield f"account {name!r}: its chain ends at entry {seq}, its head says {last_seq}"
        open_holds = held.get(account_id, 0)  # type: ignore[call-overload]
        if held_micros != open_holds:
            said = credits_text(int(str(held_micros)))
            yield f"account {name!r}: held {said}, open calls hold {credits_text(open_holds)}"


def _call_problems(tx: Tx) -> Iterator[str]:
    for statement, left, right in (
        (_CHARGES_WITHOUT_ENTRY, "charged", "its entry says"),
        (_ENTRIES_WITHOUT_CHARGE, "has an entry of", "its call says"),
        (_REFUNDS, "has refund entries of", "its call says"),
        (_REFUNDED_WITHOUT_ENTRY, "is refunded", "its entries say"),
        (_ADJUSTED, "is adjusted by", "its entries say"),
        (_ADJUSTED_WITHOUT_ENTRY, "is adjusted by", "its entries say"),
    ):
        for call_id, one, other in tx.each(statement):
            yield f"{call_text(call_id)} {left} {credits_text(one)}, {right} {credits_text(other or 0)}"
    for account_id, day, model, key_id, calls, charged, cost in tx.each(_ROLL_UPS):
        yield (
            f"roll-up of account {account_id}, day {day}, {model}, key {key_id} differs from its calls by "
            f"{calls} calls, {credits_text(charged)} credits, {cost} nano-USD"
        )
    yield from _roll_up_problems(tx)


def _roll_up_problems(tx: Tx) -> Iterator[str]:
    """What is added up once more from the daily usage, and what limited keys have spent."""
    for month, account_id, key_id, calls, charged, cost in tx.each(_MONTHS):
        yield (
            f"roll-up of account {account_id}, month {month}, key {key_id} differs from its days by "
            f"{calls} calls, {credits_text(charged)} credits, {cost} nano-USD"
        )
    for day, model, calls, charged, cost in tx.each(_TOTALS):
        yield (
            f"the total of day {day}, {model} differs from its accounts by "
            f"{calls} calls, {credits_text(charged)} credits, {cost} nano-USD"
        )
    if tx.one(_LIMITED) is None:  # a look at every call is spared where no key has a limit
        return
    for limit_id, period, spent, counted in tx.each(_SPENDING):
        yield f"limit {limit_id} in {period}: its calls spend {credits_text(spent)}, counted {credits_text(counted)}"
