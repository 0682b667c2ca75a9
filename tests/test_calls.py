"""Calls: one row for each request to fal, whose hold ends exactly once, and what reports count of it."""

from __future__ import annotations

from itertools import product
from typing import Literal

import pytest
from sqlalchemy import text

from abhiapi import calls, reports
from abhiapi.db import Database, Tx
from abhiapi.errors import InsufficientCredits, NotFound, Refused
from abhiapi.metering import Verdict, released
from abhiapi.money import Micros
from tests.harness import Clock
from tests.rows import DEAD_PID, FLUX_MICROS, FLUX_NANO_USD, MINUTE_MS, MODEL, Customer, settled

pytestmark = pytest.mark.engines

DAY_MS = 86_400_000
ENDS: tuple[Literal["settled", "released", "unknown"], ...] = ("settled", "released", "unknown")
VERDICTS = {
    "settled": settled(),
    "released": released("upstream_timeout"),
    "unknown": Verdict("unknown", units="-5", reason="bad_units"),
}


@pytest.fixture
def customer(database: Database, clock: Clock) -> Customer:
    return Customer.new(database, clock, credits=1000)


def _row(customer: Customer, call: calls.OpenCall) -> reports.CallRow:
    row = customer.write(lambda tx: reports.call(tx, call.call_id))
    assert row is not None
    return row


def _usage(customer: Customer) -> list[reports.UsageRow]:
    return customer.write(lambda tx: reports.usage(tx, "day", account_id=customer.account_id))


def _set_state(customer: Customer, call: calls.OpenCall, state: str) -> None:
    statement = text("UPDATE calls SET state = :state WHERE call_id = :call")
    customer.write(lambda tx: tx.run(statement, state=state, call=call.call_id))


def test_an_admitted_call_is_held_with_all_that_its_end_needs(customer: Customer) -> None:
    call = customer.admit()
    row = _row(customer, call)
    assert (row.state, row.mode, row.model, row.held_micros, row.charged_micros) == (
        "held", "sync", MODEL, FLUX_MICROS, 0,
    )  # fmt: skip
    assert (row.finished_at, row.unit_price_usd) == (None, "0.02625")
    assert customer.write(lambda tx: calls.open_call(tx, call.call_id)) == call


def test_a_call_that_does_not_fit_leaves_no_row(customer: Customer) -> None:
    with pytest.raises(InsufficientCredits):
        customer.admit(1_000_001)
    assert customer.write(lambda tx: reports.newest_calls(tx)) == []


def test_a_settled_call_keeps_what_its_charge_was_computed_from(customer: Customer, clock: Clock) -> None:
    call = customer.admit()
    clock.tick(1500)
    customer.write(
        lambda tx: calls.finish(tx, call, settled(), now_ms=clock.now_ms, http_status=200, fal_request_id="r-1")
    )
    row = _row(customer, call)
    assert (row.state, row.status, row.charged_micros, row.units, row.usage_source) == (
        "settled", 200, FLUX_MICROS, "1", "fal",
    )  # fmt: skip
    assert (row.fal_request_id, row.fal_cost_nano_usd, row.reason) == ("r-1", FLUX_NANO_USD, None)
    assert row.finished_at == row.created_at + 1500


@pytest.mark.parametrize(("first", "second"), list(product(("settled", "released"), ENDS)))
def test_hold_resolves_once(customer: Customer, first: str, second: str) -> None:
    """Whatever ended a call, nothing ends it again: no state, entry, balance, hold or count moves."""
    call = customer.admit()
    customer.finish(call, VERDICTS[first])
    before = (_row(customer, call), customer.standing(), _usage(customer))
    with pytest.raises(calls.CallEnded):
        customer.finish(call, VERDICTS[second])
    with pytest.raises(calls.CallEnded):
        customer.write(lambda tx: calls.open_call(tx, call.call_id))
    assert (_row(customer, call), customer.standing(), _usage(customer)) == before


@pytest.mark.parametrize(("source", "target"), list(product(calls.MOVES, ENDS)))
def test_states_move_as_the_table_says_and_not_otherwise(
    customer: Customer, source: calls.State, target: Literal["settled", "released", "unknown"]
) -> None:
    call = customer.admit()
    if source in ("settled", "released"):
        customer.finish(call, VERDICTS[source])
    else:
        _set_state(customer, call, source)
    if target in calls.MOVES[source]:
        customer.finish(call, VERDICTS[target])
        assert _row(customer, call).state == target
    else:
        with pytest.raises(calls.CallEnded):
            customer.finish(call, VERDICTS[target])
        assert _row(customer, call).state == source


def test_an_unknown_outcome_keeps_its_hold_until_the_operator_ends_it(customer: Customer) -> None:
    call = customer.admit()
    assert customer.finish(call, VERDICTS["unknown"]) == 1_000_000
    assert customer.standing() == (1_000_000, FLUX_MICROS)
    row = _row(customer, call)
    assert (row.state, row.units, row.reason, row.finished_at) == ("unknown", "-5", "bad_units", None)
    assert _usage(customer) == []
    customer.finish(customer.write(lambda tx: calls.open_call(tx, call.call_id)), settled(20_000))
    assert customer.standing() == (980_000, 0)


def test_the_operators_word_loses_nothing_that_fal_had_said(customer: Customer) -> None:
    call = customer.admit()
    parked = Verdict("unknown", units="1,5", reason="bad_units")
    customer.write(lambda tx: calls.finish(tx, call, parked, now_ms=1, http_status=200, fal_request_id="r-1"))
    decided = Verdict("settled", FLUX_MICROS, reason="operator")
    customer.write(lambda tx: calls.finish(tx, call, decided, now_ms=2, usage_source="operator"))
    row = _row(customer, call)
    assert (row.status, row.fal_request_id, row.units) == (200, "r-1", "1,5")
    assert (row.state, row.usage_source, row.reason) == ("settled", "operator", "operator")


def test_a_refund_is_never_more_than_the_charge(customer: Customer) -> None:
    call = customer.settle(20_000)
    customer.write(lambda tx: calls.refund(tx, call.call_id, Micros(5_000), now_ms=1))
    with pytest.raises(Refused, match=r"charged 20 credits, of which 5 are already refunded: 15\.001 cannot"):
        customer.write(lambda tx: calls.refund(tx, call.call_id, Micros(15_001), now_ms=2))
    entry = customer.write(lambda tx: calls.refund(tx, call.call_id, None, now_ms=3))
    assert (entry.amount_micros, entry.balance_after_micros) == (15_000, 1_000_000)
    with pytest.raises(Refused, match="nothing is left"):
        customer.write(lambda tx: calls.refund(tx, call.call_id, None, now_ms=4))
    assert _row(customer, call).refunded_micros == 20_000


@pytest.mark.parametrize("amount", [0, -1])
def test_a_refund_of_nothing_or_less_is_refused(customer: Customer, amount: int) -> None:
    call = customer.settle()
    with pytest.raises(Refused):
        customer.write(lambda tx: calls.refund(tx, call.call_id, Micros(amount), now_ms=1))
    assert customer.standing() == (1_000_000 - FLUX_MICROS, 0)


@pytest.mark.parametrize("amount", [None, Micros(1)])
def test_a_call_without_a_charge_is_not_refunded(customer: Customer, amount: Micros | None) -> None:
    still_open, free = customer.admit(), customer.settle(0)
    for call in (still_open, free):
        with pytest.raises(Refused):
            customer.write(lambda tx, call=call: calls.refund(tx, call.call_id, amount, now_ms=1))
    assert customer.standing() == (1_000_000, FLUX_MICROS)


def test_what_does_not_exist_is_not_found(customer: Customer) -> None:
    for look in (
        lambda tx: calls.refund(tx, 7, None, now_ms=1),
        lambda tx: calls.ended_as(tx, 7),
        lambda tx: calls.open_call(tx, 7),
    ):
        with pytest.raises(NotFound, match="no call has the id call_0"):
            customer.write(look)


def test_who_comes_too_late_is_told_how_the_call_ended(customer: Customer) -> None:
    call = customer.settle(20_000)
    customer.topup(1)
    assert customer.write(lambda tx: calls.ended_as(tx, call.call_id)) == (20_000, 981_000, None)


def test_usage_counts_every_ended_call_on_the_day_of_its_end(customer: Customer, clock: Clock) -> None:
    clock.now_ms = 20_000 * DAY_MS - 10
    late = customer.admit()
    customer.settle()
    customer.settle(0)
    customer.finish(customer.admit(), released("fal_5xx"))
    clock.tick(20)
    customer.finish(late, settled())
    first, second = _usage(customer)
    assert (first.calls, first.charged_micros, first.fal_cost_nano_usd) == (3, FLUX_MICROS, 2 * FLUX_NANO_USD)
    assert (second.calls, second.charged_micros, second.fal_cost_nano_usd) == (1, FLUX_MICROS, FLUX_NANO_USD)
    assert (first.group, second.group) == ("2024-10-03", "2024-10-04")


def test_a_refund_is_counted_on_the_day_of_its_call(customer: Customer, clock: Clock) -> None:
    call = customer.settle()
    clock.tick(3 * DAY_MS)
    customer.write(lambda tx: calls.refund(tx, call.call_id, None, now_ms=clock.now_ms))
    (row,) = _usage(customer)
    assert (row.calls, row.charged_micros, row.margin_nano_usd) == (1, 0, -FLUX_NANO_USD)


def test_a_charge_whose_cost_at_fal_is_not_known_counts_as_none(customer: Customer) -> None:
    call = customer.admit()
    customer.finish(call, settled(FLUX_MICROS, None))
    assert _row(customer, call).fal_cost_nano_usd is None
    assert _usage(customer)[0].fal_cost_nano_usd == 0


def test_only_held_calls_past_their_deadline_are_overdue(customer: Customer, clock: Clock) -> None:
    late, later = customer.admit(deadline_in_ms=10), customer.admit(deadline_in_ms=11)
    queued, parked = customer.admit(deadline_in_ms=1), customer.admit(deadline_in_ms=1)
    _set_state(customer, queued, "sent")
    customer.finish(parked, VERDICTS["unknown"])
    customer.finish(customer.admit(deadline_in_ms=1), settled())

    def overdue(tx: Tx) -> list[calls.OpenCall]:
        return calls.overdue(tx, customer.process_id, now_ms=clock.now_ms, most=10)

    clock.tick(10)
    assert customer.write(overdue) == []
    clock.tick(1)
    assert customer.write(overdue) == [late]
    clock.tick(1)
    assert customer.write(overdue) == [late, later]
    much_later = clock.now_ms + MINUTE_MS
    assert customer.write(lambda tx: calls.overdue(tx, customer.process_id, now_ms=much_later, most=1)) == [late]
    assert customer.write(lambda tx: calls.overdue(tx, customer.process_id + 1, now_ms=much_later, most=1)) == []


def test_a_process_is_known_by_its_held_calls_only(database: Database, customer: Customer, clock: Clock) -> None:
    other = Customer.new(database, clock, name="bob")
    mine = customer.admit()
    other.finish(other.admit(), settled())
    assert customer.write(calls.holding_processes) == [(customer.process_id, DEAD_PID)]
    assert customer.write(lambda tx: calls.of_process(tx, customer.process_id, most=10)) == [mine]
    assert customer.write(lambda tx: calls.of_process(tx, other.process_id, most=10)) == []
