"""The ledger: the only writer of money. Accounts' balances and holds, and the immutable entries behind them.

Every function takes an open transaction and never opens one, so callers compose them. Amounts are micros.
Invariants, which the database guards as well and `audit.verify` recounts:
- balance = sum of the account's entries; held = sum of its open calls' holds;
- a hold is taken only by one conditional UPDATE (balance - held >= amount, within the key's limits, account active),
  so credit is never promised twice, however many ask at once;
- entries are chained: hash = SHA-256(previous hash, this row), seq without gaps; nothing is ever edited.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import bindparam, insert, select, update

from abhiapi import alerts, spending, tables
from abhiapi.days import periods
from abhiapi.db import Tx, Written
from abhiapi.errors import AccountSuspended, InsufficientCredits, Refused
from abhiapi.ids import entry_text
from abhiapi.money import MICROS_MAX, Micros, credits_text

EntryKind = Literal["topup", "charge", "refund", "adjustment"]

_a = tables.accounts.c
_e = tables.entries.c

_HOLD = (
    update(tables.accounts)
    .where(
        _a.account_id == bindparam("account"),
        _a.status == "active",
        _a.balance_micros - _a.held_micros >= bindparam("amount"),
        spending.WITHIN_LIMITS,
    )
    .values(held_micros=_a.held_micros + bindparam("amount"))
    .returning(spending.LIMIT_OF_KEY)
)
_STANDING = select(_a.status, _a.balance_micros, _a.held_micros).where(_a.account_id == bindparam("account"))
HEAD = (
    # The last entry's time as an expression: as a join PostgreSQL may read all of the account's entries for it.
    select(
        _a.balance_micros, _a.last_seq, _a.last_hash, _a.name, _a.alert_below_micros,
        select(_e.created_at)
        .where(_e.account_id == _a.account_id, _e.seq == _a.last_seq).correlate(tables.accounts).scalar_subquery(),
    ).where(_a.account_id == bindparam("account"))
)  # fmt: skip
_UNHOLD = (
    update(tables.accounts)
    .where(_a.account_id == bindparam("account"))
    .values(held_micros=_a.held_micros - bindparam("amount"))
)
_APPEND = insert(tables.entries).values({column.name: bindparam(column.name) for column in tables.entries.c})
_MOVE_HEAD = (
    update(tables.accounts)
    .where(_a.account_id == bindparam("account"))
    .values(
        balance_micros=bindparam("balance"),
        last_seq=bindparam("seq"),
        last_hash=bindparam("hash"),
        held_micros=_a.held_micros - bindparam("unhold"),
    )
)
_BY_REF = select(_e.seq, _e.kind, _e.amount_micros, _e.balance_after_micros).where(
    _e.account_id == bindparam("account"), _e.ref == bindparam("ref")
)


@dataclass(frozen=True, slots=True)
class Head:
    """Where an account's chain ends, and who must hear of its balance."""

    balance_micros: Micros
    last_seq: int
    last_hash: bytes
    account: str
    alert_below_micros: Micros | None
    last_at: int | None


@dataclass(frozen=True, slots=True)
class Entry:
    """A movement just written: its place in the account's chain and the balance after it."""

    account_id: int
    seq: int
    amount_micros: Micros
    balance_after_micros: Micros
    repeated: bool = False  # it had been written before, under the same reference

    @property
    def entry_id(self) -> str:
        return entry_text(self.account_id, self.seq)


def hold(
    tx: Tx, account_id: int, amount_micros: Micros, *, key_id: int, now_ms: int, call: Written | None = None
) -> None:
    """Set credit aside for a call of a key, admitted now, and write the call by an INSERT.

    Raises `InsufficientCredits`, `KeyLimitReached` or `AccountSuspended`, with nothing changed.
    """
    day, month = periods(now_ms)
    of = {"account": account_id, "amount": amount_micros, "key": key_id, "day": day, "month": month}
    held = tx.one(_HOLD, **of) if call is None else tx.one_then((_HOLD, of), call)
    if held is not None:
        (limit_id,) = held
        if limit_id is not None:
            spending.count(tx, limit_id, now_ms, amount_micros)
        return
    standing = tx.one(_STANDING, account=account_id)
    if standing is None or standing[0] != "active":
        raise AccountSuspended("this account is suspended: ask the operator")
    available = standing[1] - standing[2]
    if available >= amount_micros:
        spending.refuse(tx, key_id, amount_micros, now_ms=now_ms)
    raise too_little(amount_micros, available)


def too_little(amount_micros: Micros, available_micros: int) -> InsufficientCredits:
    """Why a hold does not fit."""
    return InsufficientCredits(
        f"this call needs {credits_text(amount_micros)} credits and {credits_text(available_micros)} are available: "
        "top up your balance"
    )


def charge(
    tx: Tx, account_id: int, call_id: int, charge_micros: Micros, *, head: Head, held_micros: Micros, now_ms: int
) -> Micros:
    """End a hold as a charge, or without one; the balance after it. ``head`` is of this transaction.

    A charge above its hold is taken in full: a debt, if need be.
    """
    if charge_micros == 0:
        tx.run(_UNHOLD, account=account_id, amount=held_micros)
        return head.balance_micros
    entry = append(
        tx,
        account_id,
        "charge",
        Micros(-charge_micros),
        now_ms=now_ms,
        call_id=call_id,
        unhold_micros=held_micros,
        head=head,
    )
    return entry.balance_after_micros


def topup(tx: Tx, account_id: int, amount_micros: Micros, *, ref: str | None, note: str | None, now_ms: int) -> Entry:
    """Add credit. The same ``ref`` with the same amount returns the entry that is there; with another, `Refused`."""
    if ref is not None:
        there = tx.one(_BY_REF, account=account_id, ref=ref)
        if there is not None:
            seq, kind, amount, balance_after = there
            if kind != "topup" or amount != amount_micros:
                raise Refused(
                    f"reference {ref!r} is already used by a {kind} of {credits_text(amount)} credits: "
                    "nothing was added"
                )
            return Entry(account_id, seq, amount, balance_after, repeated=True)
    return append(tx, account_id, "topup", amount_micros, now_ms=now_ms, ref=ref, note=note)


def adjust(
    tx: Tx, account_id: int, amount_micros: Micros, *, note: str, now_ms: int, call_id: int | None = None
) -> Entry:
    """Correct the balance by the operator's word, up or down; the past is never edited."""
    return append(tx, account_id, "adjustment", amount_micros, now_ms=now_ms, note=note, call_id=call_id)


def balance_micros(tx: Tx, account_id: int) -> Micros:
    standing = tx.one(_STANDING, account=account_id)
    if standing is None:
        raise AssertionError(f"account {account_id} is gone")
    return Micros(standing[1])


def append(
    tx: Tx,
    account_id: int,
    kind: EntryKind,
    amount_micros: Micros,
    *,
    now_ms: int,
    call_id: int | None = None,
    ref: str | None = None,
    note: str | None = None,
    unhold_micros: int = 0,
    head: Head | None = None,
) -> Entry:
    """Write one entry at the end of the account's chain and move its balance (and a hold that it ends).

    Its time is never before its predecessor's, whatever clocks do, so that a month is one stretch of the chain.
    """
    head = head or _head(tx, account_id)
    now_ms = max(now_ms, head.last_at or 0)
    after = Micros(head.balance_micros + amount_micros)
    if abs(after) > MICROS_MAX:
        raise Refused("the balance would pass a billion dollars: nothing was changed")
    seq = head.last_seq + 1
    digest = entry_hash(head.last_hash, account_id, seq, kind, amount_micros, after, call_id, ref, note, now_ms)
    row = {
        "account_id": account_id,
        "seq": seq,
        "kind": kind,
        "amount_micros": amount_micros,
        "balance_after_micros": after,
        "call_id": call_id,
        "ref": ref,
        "note": note,
        "created_at": now_ms,
        "hash": digest,
    }
    moved = {"account": account_id, "balance": after, "seq": seq, "hash": digest, "unhold": unhold_micros}
    tx.run_both((_APPEND, row), (_MOVE_HEAD, moved))
    if head.alert_below_micros is not None:
        alerts.balance_moved(tx, head.account, head.alert_below_micros, head.balance_micros, after, now_ms=now_ms)
    return Entry(account_id, seq, amount_micros, after)


def _head(tx: Tx, account_id: int) -> Head:
    row = tx.one(HEAD, account=account_id)
    if row is None:
        raise AssertionError(f"account {account_id} is gone")
    return Head(*row)


def entry_hash(
    previous: bytes,
    account_id: int,
    seq: int,
    kind: str,
    amount_micros: int,
    balance_after_micros: int,
    call_id: int | None,
    ref: str | None,
    note: str | None,
    created_at: int,
) -> bytes:
    """SHA-256 over the previous hash and the row as a JSON array, in the order of the columns."""
    row = [account_id, seq, kind, amount_micros, balance_after_micros, call_id, ref, note, created_at]
    return hashlib.sha256(previous + json.dumps(row, separators=(",", ":")).encode("ascii")).digest()
