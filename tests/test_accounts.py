"""Accounts: their names, plans and status."""

from __future__ import annotations

import pytest

from abhiapi import accounts
from abhiapi.db import Database
from abhiapi.errors import BadRequest, NotFound, Refused
from tests.harness import Clock
from tests.rows import Customer, credit

pytestmark = pytest.mark.engines


def test_a_new_account_is_active_and_empty(database: Database) -> None:
    account = database.write(lambda tx: accounts.create(tx, "Ann & Söhne", plan="pro", now_ms=5))
    assert account == accounts.Account(1, "Ann & Söhne", "pro", "active", credit(0), credit(0))
    assert account.available_micros == 0


def test_a_name_is_taken_once(database: Database) -> None:
    database.write(lambda tx: accounts.create(tx, "ann", now_ms=1))
    with pytest.raises(Refused, match="there is an account 'ann' already"):
        database.write(lambda tx: accounts.create(tx, "ann", now_ms=2))
    assert len(database.read(accounts.everyone)) == 1


@pytest.mark.parametrize(
    "name", ["", " ann", "ann ", "a\nb", "a\x00b", "a\u2028b", "x" * 65, "sk-fal-something", "-v", "key_12"]
)
def test_a_name_that_could_be_mistaken_is_refused(database: Database, name: str) -> None:
    with pytest.raises(BadRequest):
        database.write(lambda tx: accounts.create(tx, name, now_ms=1))
    assert database.read(accounts.everyone) == []


@pytest.mark.parametrize("name", ["a", "x" * 64, "Ann Example <ann@example.com>", "客户", "'; DROP TABLE keys; --"])
def test_a_name_that_can_be_typed_again_is_kept_as_it_is(database: Database, name: str) -> None:
    database.write(lambda tx: accounts.create(tx, name, now_ms=1))
    found = database.read(lambda tx: accounts.find(tx, name))
    assert found is not None
    assert found.name == name


def test_what_does_not_exist_is_not_found(database: Database) -> None:
    assert database.read(lambda tx: accounts.find(tx, "ann")) is None
    with pytest.raises(NotFound, match="no account has the number 7"):
        database.read(lambda tx: accounts.by_id(tx, 7))


def test_plan_and_status_change_and_nothing_else_does(database: Database, clock: Clock) -> None:
    customer, other = Customer.new(database, clock), Customer.new(database, clock, name="bob")
    customer.write(lambda tx: accounts.set_plan(tx, customer.account_id, "pro"))
    customer.write(lambda tx: accounts.set_status(tx, customer.account_id, "suspended"))
    ann = customer.account()
    assert (ann.plan, ann.status, ann.balance_micros) == ("pro", "suspended", 1_000_000)
    bob = other.account()
    assert (bob.plan, bob.status) == ("free", "active")


def test_everyone_is_listed_by_name(database: Database) -> None:
    for name in ("bob", "ann", "cid"):
        database.write(lambda tx, name=name: accounts.create(tx, name, now_ms=1))
    assert [account.name for account in database.read(accounts.everyone)] == ["ann", "bob", "cid"]
