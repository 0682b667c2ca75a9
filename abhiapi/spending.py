"""Spending limits of keys: at most so much in a day and in a month (UTC), whatever credit the account has.

What counts is what calls hold while they run and what they were charged when they ended, less refunds, in the day and
the month in which they were admitted; a charge above its hold counts in full. `WITHIN_LIMITS` is a condition of the
one UPDATE by which `ledger.hold` sets credit aside, so a limit can no more be passed by calls at once than a balance.
A key without a limit is counted nowhere and costs no statement: whether it has one is told by that UPDATE, and by the
one that ends a call, in the same transaction. A key and those it is rotated into share one limit and what was spent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, ScalarSelect, bindparam, func, insert, literal_column, or_, select, update

from abhiapi import tables
from abhiapi.days import parse_month, periods, start_ms
from abhiapi.db import Tx
from abhiapi.errors import KeyLimitReached
from abhiapi.ids import CHANCE_BITS
from abhiapi.money import Micros, credits_text

_k = tables.keys.c
_l = tables.key_limits.c
_s = tables.key_spending.c
_c = tables.calls.c


def _spent_in(period: str) -> ColumnElement[int]:
    spent = select(_s.spent_micros).where(_s.limit_id == _l.limit_id, _s.period == bindparam(period))
    return func.coalesce(spent.correlate(tables.key_limits).scalar_subquery(), literal_column("0"))


LIMIT_OF_KEY: ScalarSelect[Any] = select(_k.limit_id).where(_k.key_id == bindparam("key")).scalar_subquery()
# The limit by its number, and not by a join: PostgreSQL may begin that with what was spent of every limit.
WITHIN_LIMITS = ~(
    select(literal_column("1"))
    .where(
        _l.limit_id == LIMIT_OF_KEY,
        or_(
            _l.day_limit_micros - _spent_in("day") < bindparam("amount"),
            _l.month_limit_micros - _spent_in("month") < bindparam("amount"),
        ),
    )
    .exists()
)
# As text: within RETURNING SQLAlchemy leaves the tables' names out, and `key_id = key_id` would be any key.
LIMIT_OF_CALL: ColumnElement[int | None] = literal_column(
    "(SELECT limited.limit_id FROM keys limited WHERE limited.key_id = calls.key_id)"
)

_STANDING = select(_l.day_limit_micros, _l.month_limit_micros, _spent_in("day"), _spent_in("month")).where(
    _l.limit_id == bindparam("limit")
)
_MOVE = (
    update(tables.key_spending)
    .where(_s.limit_id == bindparam("limit"), _s.period == bindparam("in_period"))
    .values(spent_micros=_s.spent_micros + bindparam("more"))
)
_FIRST = insert(tables.key_spending).values(
    limit_id=bindparam("limit"), period=bindparam("in_period"), spent_micros=bindparam("more")
)
_LIMIT_OF = select(_k.limit_id).where(_k.key_id == bindparam("key"))
_CREATE = insert(tables.key_limits).values(
    day_limit_micros=bindparam("day_limit"), month_limit_micros=bindparam("month_limit"), created_at=bindparam("now")
)
_CHANGE = (
    update(tables.key_limits)
    .where(_l.limit_id == bindparam("limit"))
    .values(day_limit_micros=bindparam("day_limit"), month_limit_micros=bindparam("month_limit"))
)
_ATTACH = update(tables.keys).where(_k.key_id == bindparam("key")).values(limit_id=bindparam("limit"))
_COUNTS: ColumnElement[int] = literal_column(
    "CASE WHEN calls.state IN ('settled', 'released') THEN calls.charged_micros + calls.adjusted_micros"
    " - calls.refunded_micros"
    " ELSE calls.held_micros END"
)
_DAY_MS: ColumnElement[int] = literal_column("calls.created_at / 86400000 * 86400000")
_SPENT_SINCE = select(_DAY_MS, func.sum(_COUNTS)).where(
    _c.account_id == select(_k.account_id).where(_k.key_id == bindparam("key")).scalar_subquery(),
    _c.call_id >= bindparam("first_call"),
    _c.key_id == bindparam("key"),
    _c.created_at >= bindparam("since"),
).group_by(literal_column("1"))  # fmt: skip
_LINEAGE = select(_k.key_id, _k.replaces_key_id).where(
    _k.account_id == select(_k.account_id).where(_k.key_id == bindparam("key")).scalar_subquery()
)
# A clock may have stood this far apart from ours when it made a call's id, of which the time is a part.
_SKEW_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Limits:
    """A key's limits and what has been spent of them today and this month. None: no such limit."""

    day_limit_micros: Micros | None
    month_limit_micros: Micros | None
    day_spent_micros: Micros
    month_spent_micros: Micros


def count(tx: Tx, limit_id: int, admitted_at: int, amount_micros: int) -> None:
    """Count a hold in the day and the month in which its call is admitted."""
    for period in periods(admitted_at):
        if tx.run(_MOVE, limit=limit_id, in_period=period, more=amount_micros) == 0:
            tx.run(_FIRST, limit=limit_id, in_period=period, more=amount_micros)


def correct(tx: Tx, limit_id: int, admitted_at: int, more_micros: int) -> None:
    """Count what a call's end or refund changes. Periods before the limit's first month were never counted."""
    if more_micros:
        for period in periods(admitted_at):
            tx.run(_MOVE, limit=limit_id, in_period=period, more=more_micros)


def refuse(tx: Tx, key_id: int, amount_micros: Micros, *, now_ms: int) -> None:
    """Raise `KeyLimitReached` where this hold would pass a limit of the key; for a hold that was refused."""
    limits = of_key(tx, key_id, now_ms=now_ms)
    if limits is None:
        return
    for limit, spent, span, until in (
        (limits.day_limit_micros, limits.day_spent_micros, "day", "tomorrow"),
        (limits.month_limit_micros, limits.month_spent_micros, "month", "the next month"),
    ):
        if limit is not None and limit - spent < amount_micros:
            raise KeyLimitReached(
                f"this call may cost {credits_text(amount_micros)} credits, and of the {credits_text(limit)} that this "
                f"key may spend in a {span} (UTC) {credits_text(max(0, limit - spent))} are left: wait for {until}, "
                "or have the limit raised"
            )


def of_key(tx: Tx, key_id: int, *, now_ms: int) -> Limits | None:
    """A key's limits and what is spent of them; None where it has none."""
    day, month = periods(now_ms)
    row = tx.one(_LIMIT_OF, key=key_id)
    if row is None or row[0] is None:
        return None
    standing = tx.one(_STANDING, limit=row[0], day=day, month=month)
    return None if standing is None else Limits(*standing)


def set_limits(
    tx: Tx, key_id: int, *, day_limit_micros: Micros | None, month_limit_micros: Micros | None, now_ms: int
) -> None:
    """Give a key, and those of its line that work, these limits. What was spent this month before counts at once."""
    row = tx.one(_LIMIT_OF, key=key_id)
    limit_id: int | None = row[0] if row else None
    if limit_id is not None:
        tx.run(_CHANGE, limit=limit_id, day_limit=day_limit_micros, month_limit=month_limit_micros)
        return
    if day_limit_micros is None and month_limit_micros is None:
        return
    limit_id = tx.insert(_CREATE, day_limit=day_limit_micros, month_limit=month_limit_micros, now=now_ms)
    month_ms = start_ms(parse_month(periods(now_ms)[1]))
    for member in lineage(tx, key_id):
        tx.run(_ATTACH, key=member, limit=limit_id)
        first_call = (month_ms - _SKEW_MS) << CHANCE_BITS
        for at_ms, spent in tx.all(_SPENT_SINCE, key=member, first_call=first_call, since=month_ms):
            count(tx, limit_id, at_ms, spent)


def share(tx: Tx, old_key_id: int, new_key_id: int) -> None:
    """Let a key that replaces another spend under the same limit, of which nothing is given twice."""
    row = tx.one(_LIMIT_OF, key=old_key_id)
    if row is not None and row[0] is not None:
        tx.run(_ATTACH, key=new_key_id, limit=row[0])


def lineage(tx: Tx, key_id: int) -> set[int]:
    """A key, those it was rotated from and those it was rotated into."""
    links: dict[int, set[int]] = {}
    for member, replaced in tx.all(_LINEAGE, key=key_id):
        if replaced is not None:
            links.setdefault(member, set()).add(replaced)
            links.setdefault(replaced, set()).add(member)
    found, waiting = {key_id}, [key_id]
    while waiting:
        for other in links.get(waiting.pop(), set()) - found:
            found.add(other)
            waiting.append(other)
    return found
