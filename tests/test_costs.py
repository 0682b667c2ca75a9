"""What calls really cost: counted as they end, read as a percentile, and what passes a hold raises the next one."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from abhiapi import costs, pricing
from abhiapi.db import Database
from abhiapi.money import MICROS_MAX, Micros
from tests.harness import Clock
from tests.rows import FLUX_MICROS, MODEL, Customer, settled

pytestmark = pytest.mark.engines

PROPERTY = settings(deadline=None, derandomize=True)
DAY_MS = 86_400_000


@pytest.fixture
def customer(database: Database, clock: Clock) -> Customer:
    return Customer.new(database, clock, credits=10_000_000)


def known(database: Database, clock: Clock) -> pricing.Costs:
    return database.read(lambda tx: costs.of_models(tx, now_ms=clock.now_ms)).get(MODEL, pricing.NO_COSTS)


@PROPERTY
@given(st.integers(1, MICROS_MAX))
def test_a_bound_is_never_below_the_charge_and_hardly_above(amount: int) -> None:
    bound = costs.bound_of(Micros(amount))
    assert amount <= bound <= max(amount + 1, amount * 127 // 100)


def test_bounds_are_whole_and_grow() -> None:
    assert costs.BOUNDS[:10] == [1, 2, 3, 4, 6, 7, 8, 10, 13, 16]
    assert all(isinstance(bound, int) for bound in costs.BOUNDS)
    assert costs.BOUNDS[-1] >= MICROS_MAX // 2


def test_free_calls_are_not_counted(database: Database, clock: Clock, customer: Customer) -> None:
    customer.settle(0)
    assert known(database, clock) == pricing.NO_COSTS


def test_the_percentile_is_that_of_all_charges_there_were(database: Database, clock: Clock, customer: Customer) -> None:
    for number in range(200):
        customer.settle(9_000_000 if number % 100 == 0 else 1_000 + number, held_micros=10_000_000)
    found = known(database, clock)
    assert found.calls == 200
    assert 1_199 <= found.p99_micros <= 1_260
    assert 9_000_000 <= found.largest_micros <= 10_000_000


@PROPERTY
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=150))
def test_99_of_100_charges_are_within_the_percentile(charges: list[int]) -> None:
    counts: dict[int, int] = {}
    for charge in charges:
        bound = costs.bound_of(Micros(charge))
        counts[bound] = counts.get(bound, 0) + 1
    rows = [(MODEL, bound, count) for bound, count in sorted(counts.items())]
    p99 = costs._percentile(rows, len(charges))
    assert sum(charge <= p99 for charge in charges) * 100 >= 99 * len(charges)


def test_a_charge_above_its_hold_raises_the_next(database: Database, clock: Clock, customer: Customer) -> None:
    """failures.md 9: a video estimate that is too low is too low once."""
    customer.settle(31_000)
    assert known(database, clock).raised_percent == 120  # 31,000 of 26,250 is 118.1 percent, in steps of five
    price = pricing.Catalogue(
        pricing.shipped_rules(), (), Decimal("0.05"), costs={MODEL: known(database, clock)}
    ).price_of(MODEL)
    assert pricing.ceiling(price, {}).amount_micros == 31_500


def test_one_odd_charge_in_a_hundred_raises_nothing(database: Database, clock: Clock, customer: Customer) -> None:
    """One call that nobody's formula foresaw is no reason to hold more for a thousand others; the second is."""
    for _ in range(100):
        customer.settle()
    customer.settle(31_000)
    assert known(database, clock).raised_percent == 100
    customer.settle(31_000)
    assert known(database, clock).raised_percent == 120


def test_rounding_raises_nothing(database: Database, clock: Clock, customer: Customer) -> None:
    customer.settle(FLUX_MICROS + 1)
    assert known(database, clock).raised_percent == 100


def test_calls_that_were_held_before_the_raise_do_not_raise_it_twice(
    database: Database, clock: Clock, customer: Customer
) -> None:
    """Ten calls at once, each a fifth above its hold: what was learned from the first is not learned ten times."""
    waiting = [customer.admit() for _ in range(10)]
    for call in waiting:
        customer.finish(call, settled(31_500))
    assert known(database, clock).raised_percent == 120


def test_a_call_that_passes_a_raised_hold_raises_it_further(
    database: Database, clock: Clock, customer: Customer
) -> None:
    customer.settle(31_500)
    clock.tick(60_000)
    customer.numbers = iter(range((clock.now_ms << 20), (clock.now_ms << 20) + 100))  # type: ignore[assignment]
    customer.settle(63_000, held_micros=31_500)
    assert known(database, clock).raised_percent == 240


def test_a_raise_is_bounded_and_is_forgotten(database: Database, clock: Clock, customer: Customer) -> None:
    """One absurd bill does not make a model unusable, and not for ever."""
    customer.settle(FLUX_MICROS * 5_000)
    assert known(database, clock).raised_percent == costs.RAISE_MAX_PERCENT
    clock.tick(costs.RAISE_LASTS_MS - 1)
    assert known(database, clock).raised_percent == costs.RAISE_MAX_PERCENT
    clock.tick()
    assert known(database, clock).raised_percent == 100
    customer.settle(31_500)
    assert known(database, clock).raised_percent == 120


def test_only_what_is_larger_is_written_down(database: Database, clock: Clock, customer: Customer) -> None:
    for _ in range(20):
        customer.settle(31_000)
        customer.settle(29_000)
    assert database.read(lambda tx: tx.one(text("SELECT count(*) FROM hold_raises"))) == (1,)


def test_a_model_whose_last_charge_passed_its_hold_is_named(
    database: Database, clock: Clock, customer: Customer
) -> None:
    customer.settle(90_000)
    assert [(model, held, charged) for model, _, held, charged in database.read(costs.over_hold)] == [
        (MODEL, FLUX_MICROS, 90_000)
    ]
    customer.settle(20_000)  # of another bound than the first
    assert database.read(costs.over_hold) == []


def test_old_calls_fade_where_there_are_many(database: Database, clock: Clock, customer: Customer) -> None:
    customer.settle()
    database.write(costs.age)
    assert known(database, clock).calls == 1
    database.write(lambda tx: tx.run(text("UPDATE observed_costs SET calls = 20001")))
    database.write(costs.age)
    assert known(database, clock).calls == 10_001
    database.write(costs.age)
    database.write(costs.age)
    assert known(database, clock).calls == 5_001


def test_the_books_add_up_with_costs_beside_them(database: Database, clock: Clock, customer: Customer) -> None:
    from abhiapi import audit

    customer.settle(90_000)
    assert database.read(audit.verify).ok
