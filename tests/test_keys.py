"""Keys: told from guesses by their checksum, stored as a digest only, and spendable by nobody else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abhiapi import accounts, keys
from abhiapi.db import Database, Tx
from abhiapi.errors import (
    AbhiError,
    AccountSuspended,
    InvalidKey,
    KeyDisabled,
    KeyExpired,
    KeyRevoked,
    MissingKey,
    NotFound,
    Refused,
)
from tests.harness import Clock
from tests.rows import MINUTE_MS, Customer

pytestmark = pytest.mark.engines

BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
LOWEST = "sk-fal-" + "0" * 26 + "3vSKjy"  # CRC-32 of twenty-six zeros, in base 62


@pytest.fixture
def customer(database: Database, clock: Clock) -> Customer:
    return Customer.new(database, clock)


def stored(customer: Customer) -> keys.Key:
    return customer.write(lambda tx: keys.by_id(tx, customer.key_id))


def who(customer: Customer, key: str | None, **more: Any) -> keys.Caller:
    return customer.write(lambda tx: keys.authenticate(tx, key, now_ms=customer.clock.now_ms, **more))


def test_a_key_has_the_promised_shape_and_a_checksum() -> None:
    assert keys.new_key(lambda below: 0) == LOWEST
    key = keys.new_key()
    assert keys.is_well_formed(key)
    assert len(key) == len("sk-fal-") + 32
    assert key != keys.new_key()


def test_every_typing_error_of_one_character_is_told_without_the_database() -> None:
    key = keys.new_key()
    for place in range(len("sk-fal-"), len(key)):
        for character in BASE62:
            if character != key[place]:
                assert not keys.is_well_formed(key[:place] + character + key[place + 1 :])


def test_two_characters_exchanged_are_told() -> None:
    key = keys.new_key()
    for place in range(len("sk-fal-"), len(key) - 1):
        first, second = key[place : place + 2]
        if first != second:
            assert not keys.is_well_formed(key[:place] + second + first + key[place + 2 :])


class NoDatabase:
    """A transaction that nobody may use."""

    def one(self, *_: object, **__: object) -> None:
        raise AssertionError("the database was asked")


@given(text=st.text(max_size=60))
@example(text="' OR 1=1 --")
@example(text="sk-fal-" + "0" * 31 + "\x00")
@example(text="sk-fal-" + "\u0663" * 32)
@example(text=LOWEST + "\n")
@example(text=LOWEST.upper())
@example(text="sk-fal-" + "x" * 1_000_000)
@settings(deadline=None, derandomize=True)
def test_what_is_no_key_never_reaches_the_database(text: str) -> None:
    with pytest.raises((InvalidKey, MissingKey)):
        keys.authenticate(NoDatabase(), text, now_ms=1)  # type: ignore[arg-type]


def test_no_key_at_all_is_said_differently_from_a_wrong_one(customer: Customer) -> None:
    with pytest.raises(MissingKey):
        who(customer, None)
    with pytest.raises(InvalidKey, match="not known here"):
        who(customer, keys.new_key())


@pytest.mark.engines("sqlite")  # whose file is looked into
def test_the_database_holds_the_digest_and_the_mask_and_never_the_key(database: Database, customer: Customer) -> None:
    with closing(database.connect()) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = database.path.read_bytes()
    assert hashlib.sha256(customer.key.encode()).digest() in content
    assert customer.key.encode() not in content
    assert customer.key[7:-6].encode() not in content
    assert stored(customer).masked == f"sk-fal-...{customer.key[-4:]}"


def test_an_active_key_tells_who_is_calling(customer: Customer) -> None:
    caller = who(customer, customer.key)
    assert (caller.key_id, caller.account_id, caller.account, caller.plan) == (
        customer.key_id, customer.account_id, "ann", "free",
    )  # fmt: skip
    assert (caller.price_version, caller.last_used_at) == ((0, 0, 0), 0)


def _set_status(status: str) -> Callable[[Tx, keys.Key], Any]:
    return lambda tx, key: keys.set_status(tx, key, status)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (_set_status("disabled"), KeyDisabled),
        (_set_status("revoked"), KeyRevoked),
        (lambda tx, key: keys.rotate(tx, key, grace_ms=0, now_ms=Clock().now_ms), KeyExpired),
        (lambda tx, key: accounts.set_status(tx, key.account_id, "suspended"), AccountSuspended),
    ],
    ids=["disabled", "revoked", "expired", "suspended"],
)
def test_a_change_by_another_process_holds_for_the_very_next_look(
    database: Database, customer: Customer, change: Callable[[Tx, keys.Key], Any], refusal: type[AbhiError]
) -> None:
    reader = database.reads()  # the connection of a running server

    def look() -> keys.Caller:
        return reader.read(lambda tx: keys.authenticate(tx, customer.key, now_ms=customer.clock.now_ms))

    assert look().key_id == customer.key_id
    customer.write(lambda tx: change(tx, keys.by_id(tx, customer.key_id)))
    with pytest.raises(refusal):
        look()
    reader.close()


def test_a_disabled_key_can_be_enabled_again(customer: Customer) -> None:
    customer.write(lambda tx: keys.set_status(tx, keys.by_id(tx, customer.key_id), "disabled"))
    customer.write(lambda tx: keys.set_status(tx, keys.by_id(tx, customer.key_id), "active"))
    assert who(customer, customer.key)


@pytest.mark.parametrize("status", ["active", "disabled"])
def test_a_revoked_key_never_comes_back(customer: Customer, status: str) -> None:
    revoked = customer.write(lambda tx: keys.set_status(tx, keys.by_id(tx, customer.key_id), "revoked"))
    with pytest.raises(Refused, match="never comes back"):
        customer.write(lambda tx: keys.set_status(tx, revoked, status))
    assert customer.write(lambda tx: keys.set_status(tx, revoked, "revoked")) == revoked


def test_a_suspended_account_may_still_look_at_what_it_has(customer: Customer) -> None:
    customer.write(lambda tx: accounts.set_status(tx, customer.account_id, "suspended"))
    assert who(customer, customer.key, may_be_suspended=True).account_id == customer.account_id


def test_a_key_ends_at_the_moment_it_expires(customer: Customer, clock: Clock) -> None:
    end = clock.now_ms + 10
    key, made = customer.write(
        lambda tx: keys.create(tx, customer.account_id, name="short", expires_at=end, now_ms=clock.now_ms)
    )
    clock.tick(9)
    assert who(customer, key)
    assert made.status_at(clock.now_ms) == "active"
    clock.tick(1)
    with pytest.raises(KeyExpired):
        who(customer, key)
    assert made.status_at(clock.now_ms) == "expired"


def test_a_rotated_key_works_on_for_its_grace_and_the_new_one_at_once(customer: Customer, clock: Clock) -> None:
    old = stored(customer)
    new, made = customer.write(lambda tx: keys.rotate(tx, old, grace_ms=1000, now_ms=clock.now_ms))
    assert who(customer, new).account_id == who(customer, customer.key).account_id
    clock.tick(1000)
    assert who(customer, new).key_id == made.key_id
    with pytest.raises(KeyExpired):
        who(customer, customer.key)


def test_a_rotation_never_prolongs_a_key(customer: Customer, clock: Clock) -> None:
    end = clock.now_ms + 10
    key, old = customer.write(
        lambda tx: keys.create(tx, customer.account_id, name=None, expires_at=end, now_ms=clock.now_ms)
    )
    _, new = customer.write(lambda tx: keys.rotate(tx, old, grace_ms=1_000_000, now_ms=clock.now_ms))
    assert customer.write(lambda tx: keys.find(tx, key)).expires_at == new.expires_at == end  # type: ignore[union-attr]


@pytest.mark.parametrize("status", ["disabled", "revoked"])
def test_only_an_active_key_is_rotated(customer: Customer, clock: Clock, status: str) -> None:
    dead = customer.write(lambda tx: keys.set_status(tx, keys.by_id(tx, customer.key_id), status))
    with pytest.raises(Refused, match=f"is {status}"):
        customer.write(lambda tx: keys.rotate(tx, dead, grace_ms=0, now_ms=clock.now_ms))


def test_ten_rotations_with_grace_leave_what_can_be_spent_as_it_was(customer: Customer, clock: Clock) -> None:
    """Row 45 of B5: credit belongs to the account: a copy of a key is no copy of its credit."""
    key = stored(customer)
    for _ in range(10):
        _, key = customer.write(lambda tx, key=key: keys.rotate(tx, key, grace_ms=MINUTE_MS, now_ms=clock.now_ms))
    assert len(customer.write(lambda tx: keys.listed(tx, customer.account_id))) == 11
    assert customer.standing() == (1_000_000, 0)


def test_keys_that_begin_alike_are_different_keys(customer: Customer) -> None:
    """Row 59 of B8."""
    ends = iter([5] * 25 + [6] + [5] * 25 + [7])
    first, second = (keys.new_key(lambda below: next(ends)) for _ in range(2))
    assert first[:32] == second[:32]
    customer.write(lambda tx: keys.create(tx, customer.account_id, name=None, expires_at=None, now_ms=1, key=first))
    assert who(customer, first)
    with pytest.raises(InvalidKey):
        who(customer, second)


def test_a_key_is_found_by_its_id_or_by_itself_and_by_nothing_else(customer: Customer) -> None:
    key = stored(customer)
    for text in (f"key_{key.key_id}", customer.key):
        assert customer.write(lambda tx, text=text: keys.find(tx, text)) == key
    for text in ("key_99", "key_0", "key_-1", keys.new_key(), key.masked, "ann", ""):
        assert customer.write(lambda tx, text=text: keys.find(tx, text)) is None
    with pytest.raises(NotFound, match="no key has the id key_99"):
        customer.write(lambda tx: keys.by_id(tx, 99))


def test_lists_show_an_accounts_own_keys(database: Database, customer: Customer, clock: Clock) -> None:
    other = Customer.new(database, clock, name="bob")
    assert [key.key_id for key in customer.write(lambda tx: keys.listed(tx, customer.account_id))] == [customer.key_id]
    everyone = [key.key_id for key in customer.write(keys.listed)]
    assert everyone == [customer.key_id, other.key_id]


def test_the_last_use_of_a_key_only_moves_forward(customer: Customer) -> None:
    for at, kept in ((5_000, 5_000), (4_000, 5_000), (6_000, 6_000)):
        customer.write(lambda tx, at=at: keys.touch(tx, customer.key_id, at))
        assert stored(customer).last_used_at == kept
