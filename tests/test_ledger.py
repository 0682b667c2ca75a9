"""The ledger: holds, charges, top-ups, adjustments, and the chain of entries. (Calls around them: test_calls.py)"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from abhiapi import accounts, ledger, reports
from abhiapi.db import Database, Tx, database_at
from abhiapi.errors import AccountSuspended, InsufficientCredits, Refused
from abhiapi.money import MICROS_MAX, Micros
from tests.harness import Clock, each_in_a_process
from tests.rows import FLUX_MICROS, Customer, credit

pytestmark = pytest.mark.engines


@pytest.fixture
def customer(database: Database, clock: Clock) -> Customer:
    return Customer.new(database, clock, credits=1000)


def _entries(customer: Customer) -> list[reports.EntryRow]:
    """Oldest first."""
    return customer.write(lambda tx: reports.newest_entries(tx, customer.account_id, most=100))[::-1]


def test_a_hold_takes_from_what_is_available_and_not_from_the_balance(customer: Customer) -> None:
    customer.hold(credit(300))
    assert customer.standing() == (1_000_000, 300_000)
    assert customer.account().available_micros == 700_000


def test_a_hold_of_all_that_is_available_fits_and_a_micro_more_does_not(customer: Customer) -> None:
    customer.hold(credit(999))
    with pytest.raises(InsufficientCredits, match=r"needs 1\.001 credits and 1 are available"):
        customer.hold(Micros(1001))
    assert customer.standing() == (1_000_000, 999_000)
    customer.hold(credit(1))
    assert customer.standing() == (1_000_000, 1_000_000)


def test_a_hold_of_nothing_fits_even_when_nothing_is_available(database: Database, clock: Clock) -> None:
    poor = Customer.new(database, clock, name="poor", credits=0)
    poor.hold(Micros(0))
    assert poor.standing() == (0, 0)


def test_a_debtor_is_refused_even_a_free_hold(customer: Customer) -> None:
    customer.write(lambda tx: ledger.adjust(tx, customer.account_id, credit(-1001), note="debt", now_ms=1))
    with pytest.raises(InsufficientCredits, match="-1 are available"):
        customer.hold(Micros(0))


def test_a_suspended_account_holds_nothing(customer: Customer) -> None:
    customer.write(lambda tx: accounts.set_status(tx, customer.account_id, "suspended"))
    with pytest.raises(AccountSuspended):
        customer.hold(credit(1))
    assert customer.standing() == (1_000_000, 0)


def test_an_account_that_does_not_exist_holds_nothing(customer: Customer) -> None:
    with pytest.raises(AccountSuspended):
        customer.write(lambda tx: ledger.hold(tx, 999, credit(1), key_id=1, now_ms=1))


def test_a_charge_ends_its_hold_and_writes_one_entry(customer: Customer) -> None:
    call = customer.settle(20_000, held_micros=26_250)
    assert customer.standing() == (980_000, 0)
    last = _entries(customer)[-1]
    assert (last.kind, last.amount_micros, last.balance_after_micros, last.call_id) == (
        "charge", -20_000, 980_000, call.call_id,
    )  # fmt: skip


def test_a_charge_above_its_hold_is_taken_in_full_and_may_leave_a_debt(database: Database, clock: Clock) -> None:
    poor = Customer.new(database, clock, name="poor", credits=30)
    poor.settle(78_750, held_micros=26_250)
    assert poor.standing() == (-48_750, 0)
    with pytest.raises(InsufficientCredits):
        poor.admit(1)


def test_a_charge_of_zero_frees_the_hold_and_writes_no_entry(customer: Customer) -> None:
    customer.settle(0)
    assert customer.standing() == (1_000_000, 0)
    assert [entry.kind for entry in _entries(customer)] == ["topup"]


def test_a_topup_says_where_it_stands_in_the_chain(customer: Customer) -> None:
    entry = customer.topup(500, note="by hand")
    assert entry == ledger.Entry(customer.account_id, 2, credit(500), credit(1500))
    assert entry.entry_id == f"entry_{customer.account_id}_2"
    assert _entries(customer)[-1].note == "by hand"


def test_a_repeated_reference_of_the_same_amount_changes_nothing(customer: Customer) -> None:
    first = customer.topup(500, ref="pay-1")
    customer.topup(7)
    again = customer.topup(500, ref="pay-1", note="another note")
    assert (again.repeated, first.repeated) == (True, False)
    assert (again.seq, again.balance_after_micros) == (first.seq, first.balance_after_micros)
    assert customer.standing() == (1_507_000, 0)


def test_a_reference_of_another_amount_is_refused(customer: Customer) -> None:
    customer.topup(500, ref="pay-1")
    with pytest.raises(Refused, match="reference 'pay-1' is already used by a topup of 500 credits"):
        customer.topup(501, ref="pay-1")
    assert customer.standing() == (1_500_000, 0)


def test_a_reference_used_by_another_kind_of_entry_is_refused(customer: Customer) -> None:
    def adjusted_by_hand(tx: Tx) -> None:
        ledger.append(tx, customer.account_id, "adjustment", credit(500), now_ms=1, ref="pay-1")

    customer.write(adjusted_by_hand)
    with pytest.raises(Refused, match="is already used by a adjustment"):
        customer.topup(500, ref="pay-1")


def test_references_belong_to_their_account(database: Database, customer: Customer, clock: Clock) -> None:
    other = Customer.new(database, clock, name="bob", credits=0)
    customer.topup(500, ref="pay-1")
    assert not other.topup(600, ref="pay-1").repeated
    assert other.standing() == (600_000, 0)


def test_an_adjustment_goes_up_or_down_and_may_name_a_call(customer: Customer) -> None:
    call = customer.settle()

    def adjust(tx: Tx) -> None:
        ledger.adjust(tx, customer.account_id, credit(-10), note="too little", now_ms=5, call_id=call.call_id)
        ledger.adjust(tx, customer.account_id, credit(2), note="a gift", now_ms=6)

    customer.write(adjust)
    assert [(entry.amount_micros, entry.note, entry.call_id) for entry in _entries(customer)[-2:]] == [
        (-10_000, "too little", call.call_id),
        (2_000, "a gift", None),
    ]
    assert customer.standing() == (1_000_000 - 26_250 - 8_000, 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_no_balance_passes_a_billion_dollars(customer: Customer, sign: int) -> None:
    with pytest.raises(Refused, match="billion"):
        customer.write(
            lambda tx: ledger.adjust(
                tx, customer.account_id, Micros(sign * MICROS_MAX - 1_000_000 + sign), note="no", now_ms=1
            )
        )
    edge = Micros(sign * MICROS_MAX - 1_000_000)
    entry = customer.write(lambda tx: ledger.adjust(tx, customer.account_id, edge, note="yes", now_ms=1))
    assert entry.balance_after_micros == sign * MICROS_MAX


def test_an_account_that_is_gone_is_a_bug_and_not_an_answer(customer: Customer) -> None:
    with pytest.raises(AssertionError, match="gone"):
        customer.write(lambda tx: ledger.balance_micros(tx, 999))
    with pytest.raises(AssertionError, match="gone"):
        customer.write(lambda tx: ledger.adjust(tx, 999, credit(1), note="no", now_ms=1))


def test_entries_are_chained_by_sha256_over_the_row_before_and_this_one(customer: Customer) -> None:
    customer.topup(500, ref="pay-1", note='für später \u2028 "quoted"')
    customer.settle()
    previous = b""
    for number, entry in enumerate(_entries(customer), start=1):
        row = [
            entry.account_id, entry.seq, entry.kind, entry.amount_micros, entry.balance_after_micros, entry.call_id,
            entry.ref, entry.note, entry.created_at,
        ]  # fmt: skip
        document = json.dumps(row, separators=(",", ":")).encode("ascii")
        assert entry.hash == hashlib.sha256(previous + document).digest()
        assert entry.seq == number
        previous = entry.hash


def test_two_accounts_have_chains_of_their_own(database: Database, customer: Customer, clock: Clock) -> None:
    other = Customer.new(database, clock, name="bob", credits=5)
    customer.topup(1)
    other.topup(1)
    assert [entry.seq for entry in _entries(customer)] == [1, 2]
    assert [entry.seq for entry in _entries(other)] == [1, 2]
    assert _entries(customer)[0].hash != _entries(other)[0].hash


def test_the_balance_is_the_exact_sum_of_many_odd_charges(customer: Customer) -> None:
    amounts = [1, 7, 26_250, 12_345, 999, 3] * 8
    for amount in amounts:
        customer.settle(amount)
    assert customer.standing() == (1_000_000 - sum(amounts), 0)
    assert sum(entry.amount_micros for entry in _entries(customer)) == 1_000_000 - sum(amounts)


HOLDS_THAT_FIT = 37


def _hold_25_times(url: str, account_id: int) -> int:
    """In a process of its own: how many holds it got."""
    database, got = database_at(url), 0
    for _ in range(25):
        try:
            database.write(lambda tx: ledger.hold(tx, account_id, FLUX_MICROS, key_id=1, now_ms=1))
            got += 1
        except InsufficientCredits:
            pass
    return got


def test_four_processes_hold_exactly_what_is_there(database: Database, database_url: str, clock: Clock) -> None:
    """A hundred holds in four processes, credit for thirty-seven: no credit is promised twice, none is left over."""
    poor = Customer.new(database, clock, name="poor", credits=0)
    poor.write(
        lambda tx: ledger.topup(
            tx, poor.account_id, Micros(HOLDS_THAT_FIT * FLUX_MICROS), ref=None, note=None, now_ms=1
        )
    )
    assert sum(each_in_a_process(_hold_25_times, [(database_url, poor.account_id)] * 4)) == HOLDS_THAT_FIT
    assert poor.standing() == (HOLDS_THAT_FIT * FLUX_MICROS, HOLDS_THAT_FIT * FLUX_MICROS)


def test_a_payment_told_of_fifty_times_at_once_is_added_once(customer: Customer) -> None:
    with ThreadPoolExecutor(10) as threads:
        told = [threads.submit(customer.topup, 500, ref="pay-1") for _ in range(50)]
        entries = [one.result(60) for one in told]
    assert sum(not entry.repeated for entry in entries) == 1
    assert {entry.seq for entry in entries} == {2}
    assert customer.standing() == (1_500_000, 0)
