"""Our books against fal's bill: each event once, charges moved by entries, drift told both ways."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abhiapi import alerts, audit, billing, calls, fal_bill, jobs, ledger, reports
from abhiapi.billing import Event
from abhiapi.db import Database
from abhiapi.errors import Refused, UpstreamBroken
from abhiapi.fal_bill import DAY_MS, LAG_MS, Compared
from abhiapi.ids import CallIds
from abhiapi.metering import Verdict, released
from abhiapi.money import Micros, product_nanos
from tests.harness import Clock, ready
from tests.rows import FLUX_MICROS, FLUX_NANO_USD, MODEL, Customer, settled

pytestmark = pytest.mark.engines

FAL_PRICE = Decimal("0.025")
COMPUTED = Verdict("settled", FLUX_MICROS, "1", "catalogue", FLUX_NANO_USD, "no_units")


Row = dict[str, Any]


def row_of(event: Event) -> Row:
    """An event as fal's API prints it."""
    at = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=event.happened_at)
    return {
        "request_id": event.request_id,
        "endpoint_id": event.model,
        "timestamp": at.isoformat(),
        "output_units": event.units,
        "cost_estimate_nano_usd": event.cost_nano_usd,
    }


class Books:
    """A customer whose calls have ids made of the time, and fal's bill of them."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self.database, self.clock = database, clock
        self.customer = Customer.new(database, clock, credits=100_000)
        self.ids = CallIds(lambda bits: 0)
        self.events: list[Event] = []
        self.started = clock.now_ms

    def admit(self, mode: calls.Mode = "sync") -> calls.OpenCall:
        self.clock.tick()
        call = calls.OpenCall(
            self.ids.new(self.clock.now_ms), self.customer.account_id, self.customer.key_id, MODEL, FLUX_MICROS
        )
        admission = self.customer.admission(call, mode=mode)
        self.database.write(lambda tx: calls.admit(tx, admission))
        return call

    def call(self, verdict: Verdict, request_id: str | None) -> calls.OpenCall:
        """A call from its admission to its end, answered under fal's id."""
        call = self.admit()
        self.end(call, verdict, request_id)
        return call

    def end(self, call: calls.OpenCall, verdict: Verdict, request_id: str | None) -> None:
        self.database.write(
            lambda tx: calls.finish(tx, call, verdict, now_ms=self.clock.now_ms, fal_request_id=request_id)
        )

    def bill(self, request_id: str, units: str = "1", *, model: str = MODEL, skew_ms: int = 0) -> Event:
        at = self.clock.now_ms + skew_ms
        event = Event(request_id, model, Decimal(units), product_nanos(Decimal(units), FAL_PRICE), at)
        self.events.append(event)
        return event

    def compare(self, **more: int) -> Compared:
        now = self.clock.now_ms
        done = fal_bill.compare(
            self.database,
            self.between,
            since_ms=self.started - billing.SKEW_MS,
            until_ms=now + billing.SKEW_MS,
            now_ms=now,
            **{"lag_ms": 0} | more,
        )
        assert self.database.read(audit.verify).problems == []
        return done

    def compare_since(self, since_ms: int | None) -> Compared:
        """As the command does it: from the mark on, or from a given time."""
        now = self.clock.now_ms
        reached = self.database.read(lambda tx: billing.reached_at(tx, fal_bill.BOOKMARK))
        since, until = fal_bill.span(reached, since_ms, now)
        return fal_bill.compare(self.database, self.between, since_ms=since, until_ms=until, now_ms=now, lag_ms=0)

    def between(self, since_ms: int, until_ms: int) -> list[Row]:
        return [row_of(event) for event in self.events if since_ms <= event.happened_at < until_ms]

    def row(self, call: calls.OpenCall) -> reports.CallRow:
        row = self.database.read(lambda tx: reports.call(tx, call.call_id))
        assert row is not None
        return row

    @property
    def balance(self) -> int:
        return self.customer.standing()[0]

    @property
    def fal_cost(self) -> int:
        return self.database.read(lambda tx: reports.total(reports.usage(tx, "day")).fal_cost_nano_usd)


@pytest.fixture
def books(database: Database, clock: Clock) -> Books:
    return Books(database, clock)


def test_a_call_and_its_event_agree(books: Books) -> None:
    call = books.call(settled(), "r1")
    books.bill("r1")
    before = books.balance
    done = books.compare()
    assert (done.events, done.adjusted, done.settled, done.drift) == (1, 0, 0, {})
    assert books.balance == before
    assert books.row(call).fal_cost_nano_usd == books.fal_cost == FLUX_NANO_USD


@pytest.mark.parametrize(("units", "right_micros"), [("3", 78_750), ("0.5", 13_125), ("0", 0), ("1", 26_250)])
def test_a_computed_charge_is_moved_to_fals_units_by_one_entry(books: Books, units: str, right_micros: int) -> None:
    """Up or down, never edited; a second comparison, and events that arrive twice, change nothing (row 37)."""
    call = books.call(COMPUTED, "r1")
    start = books.balance + FLUX_MICROS
    books.bill("r1", units)
    books.events *= 3
    done = books.compare()
    assert books.balance == start - right_micros
    assert done.adjusted == (right_micros != FLUX_MICROS)
    assert (done.drift, books.compare().adjusted, books.compare().costed) == ({}, 0, 0)
    row = books.row(call)
    assert (row.charged_micros, row.adjusted_micros) == (FLUX_MICROS, right_micros - FLUX_MICROS)
    assert (row.usage_source, row.fal_cost_nano_usd) == ("events", product_nanos(Decimal(units), FAL_PRICE))
    kinds = [entry.kind for entry in books.database.read(lambda tx: reports.newest_entries(tx, row_account(books)))]
    assert kinds.count("charge") == 1
    assert kinds.count("adjustment") == (right_micros != FLUX_MICROS)
    (usage,) = books.database.read(lambda tx: reports.usage(tx, "day"))
    assert (usage.calls, usage.charged_micros) == (1, right_micros)


def row_account(books: Books) -> int:
    return books.customer.account_id


def test_an_event_that_is_corrected_later_moves_the_charge_again(books: Books) -> None:
    books.call(COMPUTED, "r1")
    start = books.balance
    books.bill("r1", "2")
    books.compare()
    books.events.clear()
    books.bill("r1", "4")
    books.compare()
    assert books.balance == start - 3 * FLUX_MICROS
    assert books.fal_cost == 4 * FLUX_NANO_USD


def test_what_was_refunded_is_not_taken_again(books: Books) -> None:
    call = books.call(COMPUTED, "r1")
    books.database.write(lambda tx: calls.refund(tx, call.call_id, Micros(20_000), now_ms=books.clock.now_ms))
    start = books.balance
    books.bill("r1", "0.1")  # worth 2.625 credits, of which more was refunded
    books.compare()
    assert books.balance == start + (FLUX_MICROS - 20_000)
    with pytest.raises(Refused, match="nothing is left"):
        books.database.write(lambda tx: calls.refund(tx, call.call_id, None, now_ms=books.clock.now_ms))


def test_a_charge_by_fals_own_units_is_never_moved(books: Books) -> None:
    """The customer was told that price; fal's other word is told to the operator."""
    call = books.call(settled(), "r1")
    start = books.balance
    books.bill("r1", "2")
    done = books.compare()
    assert books.balance == start
    assert done.drift == {"units_differ": 1}
    assert done.listed[0].call_id == call.call_id
    assert books.fal_cost == 2 * FLUX_NANO_USD


@pytest.mark.parametrize("reason", ["no_units", "result_not_available", "submit_outcome_unknown"])
def test_a_call_whose_cost_was_not_known_is_settled(books: Books, reason: str) -> None:
    """The hold ends once, by fal's units at the price of admission (row 39)."""
    call = books.call(Verdict("unknown", reason=reason), "r1")
    balance, held = books.customer.standing()
    assert held == FLUX_MICROS
    books.bill("r1", "2")
    done = books.compare()
    assert books.customer.standing() == (balance - 2 * FLUX_MICROS, 0)
    assert (done.settled, done.drift) == (1, {})
    row = books.row(call)
    assert (row.state, row.usage_source, row.units) == ("settled", "events", "2")
    assert books.compare().settled == 0


@pytest.mark.parametrize(("units", "model"), [("999999999999", MODEL), ("1", "fal-ai/flux/schnell")])
def test_an_absurd_event_settles_nothing(books: Books, units: str, model: str) -> None:
    call = books.call(Verdict("unknown", reason="no_units"), "r1")
    before = books.customer.standing()
    cost = 1
    books.events.append(Event("r1", model, Decimal(units), cost, books.clock.now_ms))
    for _ in range(2):
        done = books.compare()
        assert (done.settled, done.drift) == (0, {"not_settled": 1})
    assert books.customer.standing() == before
    assert books.row(call).state == "unknown"
    verdict = Verdict("settled", FLUX_MICROS, "1", None, None)
    books.database.write(lambda tx: calls.finish(tx, call, verdict, now_ms=books.clock.now_ms, usage_source="operator"))
    books.events.clear()  # days later: fal's bill is not read again, and its cost is known all the same
    assert (books.compare().drift, books.fal_cost) == ({}, cost)


def test_a_price_of_fals_that_rose_unseen_is_told_and_no_charge_is_touched(books: Books) -> None:
    """Section B11: between two syncs fal's own bill is the first to show that a model loses money."""
    books.call(settled(), "r1")
    books.events.append(Event("r1", MODEL, Decimal(1), FLUX_MICROS * 1000 + 1, books.clock.now_ms))
    books.call(settled(), "r2")
    books.events.append(Event("r2", MODEL, Decimal(1), FLUX_MICROS * 1000, books.clock.now_ms))
    balance = books.balance
    done = books.compare()
    assert (done.below_cost, done.drift, done.losses, books.balance) == ({MODEL: 1}, {}, 0, balance)
    assert [alert.subject for alert in books.database.read(alerts.standing)] == [MODEL]
    for request_id in ("r3", "r4"):  # each comparison looks at the two days before the last one again
        books.clock.tick(3 * DAY_MS)
        books.call(settled(), request_id)
        books.bill(request_id)
        books.compare_since(None)
    assert books.database.read(alerts.standing) == []


def test_what_was_given_back_and_billed_all_the_same_is_a_loss(books: Books) -> None:
    """Contract 3.5: the customer pays nothing for an answer cut in the middle; fal's cost is known all the same."""
    books.call(released("upstream_broken"), "r1")
    start = books.balance
    books.bill("r1")
    done = books.compare()
    assert (done.losses, done.loss_nano_usd, done.drift) == (1, FLUX_NANO_USD, {})
    assert (books.balance, books.fal_cost) == (start, FLUX_NANO_USD)


def test_drift_is_told_both_ways(books: Books) -> None:
    call = books.call(settled(), "charged-only")
    books.bill("billed-only", model="acme/other")
    done = books.compare()
    assert done.drift == {"not_billed_by_fal": 1, "unexplained_event": 1}
    assert {(one.kind, one.call_id, one.fal_request_id) for one in done.listed} == {
        ("not_billed_by_fal", call.call_id, "charged-only"),
        ("unexplained_event", None, "billed-only"),
    }
    assert all(fal_bill.describe(one) for one in done.listed)


def test_a_late_event_is_no_drift_any_more(books: Books) -> None:
    """fal's events lag: a call that has just ended waits for its own, and is found when it comes a day later."""
    books.call(settled(), "r1")
    assert books.compare(lag_ms=LAG_MS).drift == {}
    assert books.compare(lag_ms=LAG_MS).pending == 1
    books.clock.tick(DAY_MS)
    assert books.compare().drift == {"not_billed_by_fal": 1}
    books.bill("r1")
    assert books.compare().drift == {}


def test_an_event_before_its_calls_end_waits_for_it(books: Books) -> None:
    """A sync call's id is known when it ends; a queued job's earlier, and it ends by fal's own answer."""
    running, job = books.admit(), books.admit("queue")
    books.database.write(lambda tx: jobs.remember(tx, job, "r2", http_status=200))
    books.bill("r1")
    books.bill("r2")
    before = books.customer.standing()
    done = books.compare()
    assert (done.drift, done.pending > 0, books.customer.standing()) == ({}, True, before)
    books.end(running, settled(), "r1")
    books.end(job, settled(), None)
    assert books.compare().drift == {}
    assert books.fal_cost == 2 * FLUX_NANO_USD


@pytest.mark.parametrize("skew_ms", [-240_000, 0, 240_000])
def test_a_lost_answer_takes_fals_cost_and_nobody_is_charged(books: Books, skew_ms: int) -> None:
    """The connection was cut before fal's id came (row 30), on clocks that are minutes apart."""
    call = books.call(released("upstream_broken"), None)
    start = books.balance
    books.bill("never-seen", skew_ms=skew_ms)
    books.clock.tick(600_000)
    done = books.compare()
    assert (done.drift, books.balance, books.fal_cost) == ({}, start, FLUX_NANO_USD)
    assert books.row(call).fal_request_id == "never-seen"
    assert books.compare().losses == 1


def test_each_lost_answer_explains_one_event(books: Books) -> None:
    books.call(released("upstream_broken"), None)
    books.bill("a")
    books.bill("b")
    assert books.compare().drift == {"unexplained_event": 1}
    assert books.compare().drift == {"unexplained_event": 1}


def lost_submit(books: Books) -> calls.OpenCall:
    return books.call(Verdict("unknown", reason="submit_outcome_unknown"), None)


def test_a_lost_submit_is_settled_where_one_call_and_one_event_fit_each_other(books: Books) -> None:
    """The connection was cut after fal had accepted the job (row 30): resolved from fal's bill, not repeated."""
    call = lost_submit(books)
    balance, held = books.customer.standing()
    books.clock.tick(3_600_000)
    books.bill("its-job", "2")
    assert books.compare().drift == {}
    assert books.customer.standing() == (balance - 2 * FLUX_MICROS, held - FLUX_MICROS)
    row = books.row(call)
    assert (row.state, row.fal_request_id, row.usage_source) == ("settled", "its-job", "events")


@pytest.mark.parametrize(("submits", "events"), [(1, 2), (2, 1), (2, 2)])
def test_lost_submits_are_never_settled_by_a_guess(books: Books, submits: int, events: int) -> None:
    for _ in range(submits):
        lost_submit(books)
    before = books.customer.standing()
    for number in range(events):
        books.bill(f"perhaps-{number}")
    assert books.compare().drift == {"unexplained_event": events}
    assert books.customer.standing() == before


def test_a_comparison_that_breaks_off_is_resumed(books: Books) -> None:
    """What was taken in stays, the mark stands at the last whole day, and nothing is counted twice."""
    for day in range(4):
        books.call(COMPUTED, f"r{day}")
        books.bill(f"r{day}", "2")
        books.clock.tick(DAY_MS)
    start = books.balance

    def breaking(since_ms: int, until_ms: int) -> Iterator[Row]:
        for row in books.between(since_ms, until_ms):
            if row["request_id"] == "r2":
                raise UpstreamBroken("the third page")
            yield row

    now = books.clock.now_ms
    with pytest.raises(UpstreamBroken):
        fal_bill.compare(books.database, breaking, since_ms=books.started, until_ms=now, now_ms=now)
    reached = books.database.read(lambda tx: billing.reached_at(tx, fal_bill.BOOKMARK))
    assert reached == books.started + 2 * DAY_MS
    assert books.balance == start - 2 * FLUX_MICROS
    since, until = fal_bill.span(reached, None, now)
    assert since < books.started + 2 * DAY_MS
    done = fal_bill.compare(books.database, books.between, since_ms=since, until_ms=until, now_ms=now, lag_ms=0)
    assert (done.adjusted, books.balance) == (2, start - 4 * FLUX_MICROS)
    assert books.database.read(audit.verify).ok


def test_two_bills_of_one_call_move_its_charge_once(books: Books) -> None:
    """One request billed twice with other figures: told as drift; no run moves the charge to and fro (row 37)."""
    call = books.call(COMPUTED, "r1")
    books.bill("r1", "2")
    books.bill("r1", "3")
    entries = []
    for _ in range(3):
        assert books.compare().drift == {"billed_twice": 1}
        entries.append(len(books.database.read(lambda tx: reports.newest_entries(tx, row_account(books)))))
    assert entries[0] == entries[1] == entries[2]
    assert books.row(call).adjusted_micros == FLUX_MICROS


def test_a_look_at_the_last_days_only_leaves_no_day_out_for_ever(books: Books) -> None:
    """`--since` jumps over calls that were never compared: the next whole run still begins before them."""
    books.call(COMPUTED, "r1")
    books.bill("r1", "2")
    books.clock.tick(10 * DAY_MS)
    books.call(COMPUTED, "r2")
    books.bill("r2", "2")
    now = books.clock.now_ms
    books.compare_since(now - DAY_MS)
    done = books.compare_since(None)
    assert (done.adjusted, done.drift) == (1, {})
    assert books.compare_since(None).adjusted == 0


def test_a_mark_in_the_future_hides_nothing(books: Books) -> None:
    """A clock that was a year ahead for one run: the next one looks at everything, not at nothing for a year."""
    now = books.clock.now_ms
    assert fal_bill.span(now + 365 * DAY_MS, None, now) == fal_bill.span(None, None, now)
    assert fal_bill.span(now + billing.SKEW_MS, None, now)[0] > now - 3 * DAY_MS


def test_what_a_run_that_broke_off_did_not_list_the_next_one_does(books: Books) -> None:
    """Drift of its first days, from which the next run's events begin days later (row 79)."""
    books.call(settled(), "r0")  # which fal never bills
    for day in range(6):
        books.clock.tick(DAY_MS)
        books.call(settled(), f"r{day + 1}")
        books.bill(f"r{day + 1}")
    now = books.clock.now_ms

    def breaking(since_ms: int, until_ms: int) -> Iterator[Row]:
        for row in books.between(since_ms, until_ms):
            if row["request_id"] == "r6":
                raise UpstreamBroken("the last page")
            yield row

    with pytest.raises(UpstreamBroken):
        fal_bill.compare(books.database, breaking, since_ms=books.started, until_ms=now + 1, now_ms=now)
    assert books.compare_since(None).drift == {"not_billed_by_fal": 1}


@pytest.mark.engines("sqlite")  # what is kept of the events is the same everywhere
def test_ten_thousand_events_need_no_more_memory_than_a_thousand(books: Books) -> None:
    def many(count: int) -> Callable[[int, int], Iterable[Row]]:
        def events(since_ms: int, until_ms: int) -> Iterator[Row]:
            if since_ms == books.started - 1:
                for number in range(count):
                    yield row_of(Event("one-call", MODEL, Decimal(number % 2), 1, books.started))

        return events

    books.call(released("fal_5xx"), "one-call")
    peaks = []
    for count in (1_000, 10_000):
        tracemalloc.start()
        now = books.clock.now_ms
        done = fal_bill.compare(books.database, many(count), since_ms=books.started - 1, until_ms=now + 1, now_ms=now)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert done.events == count
    assert peaks[1] < 2 * peaks[0]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["fal", "computed", "unknown", "released", "lost", "running"]),
        st.integers(0, 5),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, order=st.randoms(use_true_random=False))
def test_whatever_happened_the_books_stay_right(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, bool]], order: object
) -> None:
    """Any mix of calls and events, in any order and twice: verified books, and fal's cost is what fal billed."""
    database = ready(f"sqlite:///{tmp_path_factory.mktemp('bill') / 'a.db'}")
    books = Books(database, Clock())
    verdicts = {"fal": settled(), "computed": COMPUTED, "unknown": Verdict("unknown", reason="no_units")}
    billed = 0
    for number, (kind, units, is_billed) in enumerate(steps):
        request_id = f"r{number}"
        if kind == "running":
            books.admit()
        else:
            books.call(verdicts.get(kind, released("upstream_broken")), None if kind == "lost" else request_id)
        if is_billed:
            books.bill(request_id, str(units))
            billed += 0 if kind == "running" else units * FLUX_NANO_USD
    order.shuffle(books.events)  # type: ignore[attr-defined]
    books.events *= 2
    first = books.compare()
    balance = books.balance
    again = books.compare()
    assert books.balance == balance
    assert (again.adjusted, again.settled) == (0, 0)
    assert again.drift == first.drift
    ends = database.read(lambda tx: ledger.balance_micros(tx, books.customer.account_id))
    assert ends == balance
    if all(kind != "lost" and is_billed and kind != "running" for kind, _, is_billed in steps):
        assert books.fal_cost == billed


BAD_ROWS = {
    "no id": {"request_id": None},
    "an id of blanks": {"request_id": "a b"},
    "a huge id": {"request_id": "x" * 101},
    "no model": {"endpoint_id": ""},
    "negative units": {"output_units": Decimal("-1")},
    "units that are no number": {"output_units": Decimal("NaN")},
    "units of forty digits": {"output_units": Decimal("1" * 40)},
    "true units": {"output_units": True},
    "a negative cost": {"cost_estimate_nano_usd": -1},
    "an absurd cost": {"cost_estimate_nano_usd": 10**16},
    "no cost": {"cost_estimate_nano_usd": None},
    "no time": {"timestamp": "yesterday"},
    "a time beyond time": {"timestamp": "99999-01-01T00:00:00Z"},
}


@pytest.mark.engines("sqlite")  # refused before it comes to a database
@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_row_that_cannot_be_read_changes_nothing_and_is_named(books: Books, what: str) -> None:
    books.call(COMPUTED, "r1")
    good = row_of(books.bill("r1", "2"))
    before = books.customer.standing()
    now = books.clock.now_ms
    done = fal_bill.compare(
        books.database, lambda *_: [good | BAD_ROWS[what]], since_ms=books.started, until_ms=now + 1, now_ms=now
    )
    assert books.customer.standing() == before
    assert (done.left_out, len(done.unreadable), done.adjusted) == (1, 1, 0)
    assert "event" in done.unreadable[0]


@pytest.mark.parametrize(
    ("value", "nanos"), [("0.025", 25_000_000), ("1E-9", 1), ("0.0000000001", 1), ("0", 0), ("12", 12 * 10**9)]
)
def test_a_cost_in_dollars_serves_where_nanos_are_missing(value: str, nanos: int) -> None:
    row = row_of(Event("r", MODEL, Decimal(1), 0, 0)) | {"cost_estimate_nano_usd": None, "cost_total": Decimal(value)}
    assert fal_bill.parse_event(row).cost_nano_usd == nanos
