"""Statements: one account's month, from its opening to its closing balance, with every entry between.

A month is one stretch of the account's chain, since an entry's time is never before its predecessor's; its ends are
found by halving, so the opening balance is the one written in the entry before and no sum over all. A statement that
does not foot (opening + entries = closing, entry by entry) is refused. Entries are immutable, so a statement may be
read in pages, in bounded memory, with no transaction open between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import bindparam, literal_column, select, text

from abhiapi import tables
from abhiapi.days import month_after, parse_month, start_ms
from abhiapi.db import Tx
from abhiapi.errors import Refused
from abhiapi.money import Micros, credits_text

PAGE = 1000
KINDS = ("topup", "charge", "refund", "adjustment")

_a = tables.accounts.c
_e = tables.entries.c
_c = tables.calls.c
_p = tables.price_versions.c

_ACCOUNT = select(_a.name, _a.last_seq).where(_a.account_id == bindparam("account"))
_AT = select(_e.created_at).where(_e.account_id == bindparam("account"), _e.seq == bindparam("number"))
_AFTER = select(_e.balance_after_micros).where(_e.account_id == bindparam("account"), _e.seq == bindparam("number"))
_KINDS = text(
    "SELECT kind, COUNT(*), SUM(amount_micros) FROM entries"
    " WHERE account_id = :account AND seq BETWEEN :first AND :last GROUP BY kind"
)
_MISFITS = text(
    "SELECT seq FROM (SELECT seq, amount_micros,"
    "  balance_after_micros - LAG(balance_after_micros, 1, CAST(:opening AS BIGINT)) OVER (ORDER BY seq) AS moved"
    "  FROM entries WHERE account_id = :account AND seq BETWEEN :first AND :last) steps"
    " WHERE moved <> amount_micros LIMIT 1"
)
_PAGE = (
    select(
        _e.seq, _e.created_at, _e.kind, _p.model, _e.call_id, _e.ref, _e.note, _e.amount_micros, _e.balance_after_micros
    )
    .join_from(tables.entries, tables.calls, _e.call_id == _c.call_id, isouter=True)
    .join(tables.price_versions, _c.price_id == _p.price_id, isouter=True)
    .where(_e.account_id == bindparam("account"), _e.seq > bindparam("after"), _e.seq <= bindparam("last"))
    .order_by(_e.seq)
    .limit(literal_column(str(PAGE)))
)


@dataclass(frozen=True, slots=True)
class Line:
    """An entry as a statement shows it."""

    seq: int
    created_at: int
    kind: str
    model: str | None  # of the call that it is about; None: it is about none
    call_id: int | None
    ref: str | None
    note: str | None
    amount_micros: Micros
    balance_after_micros: Micros


@dataclass(frozen=True, slots=True)
class Sum:
    """What the entries of one kind come to."""

    entries: int
    amount_micros: Micros


@dataclass(frozen=True, slots=True)
class Statement:
    """A month that foots. Its entries are those numbered from ``first_seq`` to ``last_seq``; read them by `page`."""

    account_id: int
    account: str
    month: str
    opening_micros: Micros
    closing_micros: Micros
    first_seq: int
    last_seq: int
    sums: dict[str, Sum]

    @property
    def entries(self) -> int:
        return self.last_seq - self.first_seq + 1


def of_month(tx: Tx, account_id: int, month: str) -> Statement:
    """The statement of a month such as ``2026-11`` (UTC). Raises ValueError for what is none, `Refused` if it does
    not foot."""
    opens = parse_month(month)
    row = tx.one(_ACCOUNT, account=account_id)
    if row is None:
        raise AssertionError(f"account {account_id} is gone")
    name, end = row
    first = _first_since(tx, account_id, end, start_ms(opens))
    last = _first_since(tx, account_id, end, start_ms(month_after(opens))) - 1
    opening, closing = _balance_after(tx, account_id, first - 1), _balance_after(tx, account_id, last)
    bounds = {"account": account_id, "first": first, "last": last}
    sums = {kind: Sum(entries, Micros(amount)) for kind, entries, amount in tx.all(_KINDS, **bounds)}
    statement = Statement(account_id, name, month, opening, closing, first, last, sums)
    _check(statement, tx.one(_MISFITS, opening=opening, **bounds))
    return statement


def page(tx: Tx, statement: Statement, after_seq: int) -> list[Line]:
    """At most `PAGE` lines after an entry; begin with ``first_seq - 1``. Empty at the end."""
    rows = tx.all(_PAGE, account=statement.account_id, after=after_seq, last=statement.last_seq)
    return [Line(*row) for row in rows]


def lines(tx: Tx, statement: Statement) -> Iterator[Line]:
    """Every line, a page at a time."""
    after = statement.first_seq - 1
    while rows := page(tx, statement, after):
        yield from rows
        after = rows[-1].seq


def _first_since(tx: Tx, account_id: int, end: int, at_ms: int) -> int:
    """The number of the first entry that is not before a moment; one more than the last if there is none."""
    low, high = 1, end + 1
    while low < high:
        middle = (low + high) // 2
        row = tx.one(_AT, account=account_id, number=middle)
        if row is None:
            raise Refused(f"entry {middle} of account {account_id} is missing: run `abhiapi ledger verify`")
        if row[0] < at_ms:
            low = middle + 1
        else:
            high = middle
    return low


def _balance_after(tx: Tx, account_id: int, seq: int) -> Micros:
    row = tx.one(_AFTER, account=account_id, number=seq) if seq else (0,)
    if row is None:
        raise Refused(f"entry {seq} of account {account_id} is missing: run `abhiapi ledger verify`")
    return Micros(row[0])


def _check(statement: Statement, misfit: tuple[int] | tuple[object, ...] | None) -> None:
    """Refuse what does not foot: as a whole, in its number of entries, or at any one of them."""
    moved = sum(part.amount_micros for part in statement.sums.values())
    entries = sum(part.entries for part in statement.sums.values())
    if (
        misfit is not None
        or entries != statement.entries
        or statement.opening_micros + moved != statement.closing_micros
    ):
        where = "" if misfit is None else f" at entry {misfit[0]}"
        raise Refused(
            f"the statement of {statement.account!r} for {statement.month} does not foot{where}: "
            f"{credits_text(statement.opening_micros)} and {credits_text(moved)} are not "
            f"{credits_text(statement.closing_micros)}. It is not printed; run `abhiapi ledger verify`"
        )
