"""Accounts: who owns credit, on which plan, and whether it may be spent. Balances are moved by `ledger` only."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import bindparam, insert, select, update

from abhiapi import tables
from abhiapi.db import Row, Tx
from abhiapi.errors import BadRequest, NotFound, Refused
from abhiapi.ids import parse_key_id
from abhiapi.money import Micros

_a = tables.accounts.c
_COLUMNS = (_a.account_id, _a.name, _a.plan, _a.status, _a.balance_micros, _a.held_micros)
_BY_NAME = select(*_COLUMNS).where(_a.name == bindparam("of_name"))
_BY_ID = select(*_COLUMNS).where(_a.account_id == bindparam("account"))
_ALL = select(*_COLUMNS).order_by(_a.name)
_CREATE = insert(tables.accounts).values(
    name=bindparam("of_name"),
    plan=bindparam("on_plan"),
    status="active",
    balance_micros=0,
    held_micros=0,
    last_seq=0,
    last_hash=b"",
    created_at=bindparam("now"),
)
_SET_STATUS = update(tables.accounts).where(_a.account_id == bindparam("account")).values(status=bindparam("to_status"))
_SET_PLAN = update(tables.accounts).where(_a.account_id == bindparam("account")).values(plan=bindparam("to_plan"))


@dataclass(frozen=True, slots=True)
class Account:
    account_id: int
    name: str
    plan: str
    status: str
    balance_micros: Micros
    held_micros: Micros

    @property
    def available_micros(self) -> Micros:
        return Micros(self.balance_micros - self.held_micros)


def create(tx: Tx, name: str, *, plan: str = "free", now_ms: int) -> Account:
    """A new account. Raises `BadRequest` for a bad name, `Refused` if there is one of that name."""
    check_name(name)
    if find(tx, name) is not None:
        raise Refused(f"there is an account {name!r} already")
    return by_id(tx, tx.insert(_CREATE, of_name=name, on_plan=plan, now=now_ms))


def check_name(name: str) -> None:
    """Raises `BadRequest` for a name that could be mistaken for something else, or not be typed again."""
    if not 1 <= len(name) <= 64 or not name.isprintable() or name != name.strip():
        raise BadRequest("an account's name has 1 to 64 printable characters and no space at its ends")
    if name.startswith(("sk-fal-", "-")) or parse_key_id(name) is not None:
        raise BadRequest("an account's name cannot start with 'sk-fal-' or '-', or be a key's id such as key_1")


def find(tx: Tx, name: str) -> Account | None:
    row = tx.one(_BY_NAME, of_name=name)
    return _account(row) if row else None


def by_id(tx: Tx, account_id: int) -> Account:
    row = tx.one(_BY_ID, account=account_id)
    if row is None:
        raise NotFound(f"no account has the number {account_id}")
    return _account(row)


def everyone(tx: Tx) -> list[Account]:
    return [_account(row) for row in tx.all(_ALL)]


def set_status(tx: Tx, account_id: int, status: str) -> None:
    tx.run(_SET_STATUS, account=account_id, to_status=status)


def set_plan(tx: Tx, account_id: int, plan: str) -> None:
    tx.run(_SET_PLAN, account=account_id, to_plan=plan)


def _account(row: Row) -> Account:
    return Account(*row)
