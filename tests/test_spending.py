"""Spending limits of keys: never passed, whoever calls at once; shared by what replaces a key. And lists of models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abhiapi import audit, calls, keys, ledger, spending
from abhiapi.db import Database, Tx, database_at
from abhiapi.errors import BadRequest, InsufficientCredits, KeyLimitReached, ModelNotAllowed
from abhiapi.ids import CallIds
from abhiapi.metering import Verdict, released
from abhiapi.money import Micros
from tests.harness import Clock, Fal, Server, each_in_a_process
from tests.rows import FLUX_MICROS, MODEL, Customer, credit, settled

pytestmark = pytest.mark.engines

DAY_MS = 86_400_000
AT_ONCE = 200
FITTING = 10


@pytest.fixture
def customer(database: Database, clock: Clock) -> Customer:
    return Customer.new(database, clock)


def spent(customer: Customer) -> tuple[int, int]:
    """What counts today and this month."""
    limits = customer.limits()
    assert limits is not None
    return limits.day_spent_micros, limits.month_spent_micros


def sound(database: Database) -> None:
    assert database.read(audit.verify).problems == []


def test_a_key_without_a_limit_spends_what_the_account_has(customer: Customer) -> None:
    customer.admit(credit(1000))
    assert customer.limits() is None


def test_a_limit_is_used_up_to_the_last_micro_and_not_passed(database: Database, customer: Customer) -> None:
    customer.limit(day=100)
    customer.admit(credit(60))
    customer.admit(credit(40))
    with pytest.raises(KeyLimitReached, match=r"may cost 0\.001 credits, and of the 100"):
        customer.admit(1)
    assert customer.standing() == (credit(1000), credit(100))
    assert spent(customer) == (credit(100), credit(100))
    sound(database)


def test_a_refusal_writes_nothing(database: Database, customer: Customer) -> None:
    customer.limit(day=10, month=20)
    with pytest.raises(KeyLimitReached):
        customer.admit(credit(11))
    assert customer.standing() == (credit(1000), 0)
    assert spent(customer) == (0, 0)
    sound(database)


def test_releases_and_smaller_charges_give_back_and_larger_ones_count_in_full(
    database: Database, customer: Customer
) -> None:
    customer.limit(day=100)
    customer.finish(customer.admit(credit(100)), released("upstream_timeout"))
    assert spent(customer) == (0, 0)
    customer.settle(credit(30), held_micros=credit(100))
    assert spent(customer) == (credit(30), credit(30))
    customer.settle(credit(90), held_micros=credit(10))
    assert spent(customer) == (credit(120), credit(120))
    with pytest.raises(KeyLimitReached, match="0 are left"):
        customer.admit(0)
    sound(database)


def test_a_call_left_to_the_operator_counts_its_hold(database: Database, customer: Customer) -> None:
    customer.limit(day=100)
    call = customer.admit(credit(80))
    customer.finish(call, Verdict("unknown", reason="no_units"))
    assert spent(customer) == (credit(80), credit(80))
    customer.finish(call, settled(credit(5)))
    assert spent(customer) == (credit(5), credit(5))
    sound(database)


def test_a_refund_gives_the_limit_back_too(database: Database, customer: Customer, clock: Clock) -> None:
    """Row 38: what was used goes down with what was given back, in the day of the call."""
    customer.limit(day=100)
    call = customer.settle(credit(50), held_micros=credit(50))
    customer.write(lambda tx: calls.refund(tx, call.call_id, credit(20), now_ms=clock.now_ms))
    assert spent(customer) == (credit(30), credit(30))
    sound(database)


def test_a_day_and_a_month_begin_anew_and_a_call_belongs_to_its_admission(
    database: Database, customer: Customer, clock: Clock
) -> None:
    clock.now_ms = 1_795_996_799_000  # 2026-11-29T23:59:59Z
    customer.limit(day=100, month=150)
    late = customer.admit(credit(100))
    clock.tick(2000)
    assert spent(customer) == (0, credit(100))
    customer.finish(late, settled(credit(70)))  # ends on the 30th, and counts on the 29th
    assert spent(customer) == (0, credit(70))
    customer.admit(credit(80))
    with pytest.raises(KeyLimitReached, match="in a month"):
        customer.admit(credit(1))
    clock.tick(DAY_MS)
    assert spent(customer) == (0, 0)
    customer.admit(credit(100))
    sound(database)


def test_a_limit_set_late_counts_what_was_spent_before(database: Database, customer: Customer, clock: Clock) -> None:
    """This month's calls of the key and of those that it replaced; nobody gets the day twice by a change."""
    clock.now_ms = 1_795_910_400_000  # 2026-11-29
    ids = CallIds(lambda bits: 1)

    def call(micros: int) -> calls.OpenCall:
        made = calls.OpenCall(ids.new(clock.now_ms), customer.account_id, customer.key_id, MODEL, Micros(micros))
        customer.write(lambda tx: calls.admit(tx, customer.admission(made)))
        return made

    yesterday, clock.now_ms = clock.now_ms, clock.now_ms
    early = call(credit(40))
    customer.finish(early, settled(credit(35)))
    clock.now_ms = yesterday + DAY_MS
    running = call(credit(20))
    old = customer.write(lambda tx: keys.by_id(tx, customer.key_id))
    _, new = customer.write(lambda tx: keys.rotate(tx, old, grace_ms=DAY_MS, now_ms=clock.now_ms))
    customer.limit(day=30, month=100)
    assert spent(customer) == (credit(20), credit(55))
    limits = customer.write(lambda tx: spending.of_key(tx, new.key_id, now_ms=clock.now_ms))
    assert limits == customer.limits()
    with pytest.raises(KeyLimitReached):
        call(credit(11))
    customer.finish(running, settled(credit(1)))
    assert spent(customer) == (credit(1), credit(36))
    sound(database)


def test_a_job_of_last_month_that_ends_under_a_new_limit_changes_nothing(
    database: Database, customer: Customer, clock: Clock
) -> None:
    old = customer.admit(credit(50))
    clock.tick(40 * DAY_MS)
    customer.limit(month=10)
    customer.finish(old, settled(credit(90)))
    assert spent(customer) == (0, 0)
    sound(database)


def test_rotation_shares_a_limit_and_what_was_spent_of_it(database: Database, customer: Customer, clock: Clock) -> None:
    """Row 45: ten rotations with grace, and what all the keys together may spend is what the first one might."""
    customer.limit(day=100)
    customer.settle(credit(30), held_micros=credit(30))
    key = customer.write(lambda tx: keys.by_id(tx, customer.key_id))
    ids = [key.key_id]
    for _ in range(10):
        _, key = customer.write(lambda tx, of=key: keys.rotate(tx, of, grace_ms=DAY_MS, now_ms=clock.now_ms))
        ids.append(key.key_id)
    got = 0
    for key_id in ids * 2:
        customer.key_id = key_id
        try:
            customer.admit(credit(10))
            got += 1
        except KeyLimitReached:
            continue
    assert got == 7
    sound(database)


@given(
    balance=st.integers(1, 400),
    day=st.one_of(st.none(), st.integers(0, 400)),
    month=st.one_of(st.none(), st.integers(0, 400)),
    amounts=st.lists(st.integers(0, 120), min_size=1, max_size=12),
)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_balance_and_limit_hold_together(
    database: Database, clock: Clock, balance: int, day: int | None, month: int | None, amounts: list[int]
) -> None:
    """Row 3: whichever is smaller refuses, whatever the other allows; what fits both is admitted."""
    name = f"ann-{clock.tick()}"
    customer = Customer.new(database, clock, name=name, credits=balance)
    customer.limit(day=day, month=month)
    left = {"balance": balance} | {key: value for key, value in (("day", day), ("month", month)) if value is not None}
    for amount in amounts:
        try:
            customer.admit(credit(amount))
        except InsufficientCredits:
            assert amount > left["balance"]
        except KeyLimitReached:
            assert left["balance"] >= amount > min(left.values())
        else:
            left = {key: value - amount for key, value in left.items()}
            assert min(left.values()) >= 0


def _hold_50_times(url: str, account_id: int, key_id: int, now_ms: int) -> int:
    """In a process of its own: how many holds it got."""
    database, got = database_at(url), 0
    for _ in range(AT_ONCE // 4):
        try:
            database.write(lambda tx: ledger.hold(tx, account_id, FLUX_MICROS, key_id=key_id, now_ms=now_ms))
            got += 1
        except KeyLimitReached:
            continue
    return got


def test_four_processes_at_once_get_what_the_limit_allows(customer: Customer, database_url: str) -> None:
    """Rows 1 and 10: two hundred holds in four processes under a limit of ten, with credit for many more."""
    customer.topup(9000)
    cap = Micros(FITTING * FLUX_MICROS)
    now = customer.clock.now_ms
    customer.write(
        lambda tx: spending.set_limits(tx, customer.key_id, day_limit_micros=cap, month_limit_micros=None, now_ms=now)
    )
    work = [(database_url, customer.account_id, customer.key_id, now)] * 4
    assert sum(each_in_a_process(_hold_50_times, work)) == FITTING
    assert spent(customer) == (cap, cap)


def test_two_hundred_calls_at_once_under_a_limit_of_ten(shared_server: Server, fal: Fal) -> None:
    """Rows 1, 4 and 10 over HTTP: ten reach fal, the others are told so before fal hears of them."""
    name, key = shared_server.books.account(100_000, plan="pro")

    def limit(tx: Tx) -> None:
        found = keys.find(tx, key)
        assert found is not None
        spending.set_limits(
            tx,
            found.key_id,
            day_limit_micros=Micros(FITTING * FLUX_MICROS),
            month_limit_micros=None,
            now_ms=shared_server.books.clock(),
        )

    shared_server.books.write(limit)
    prompt = f"limited {name}"
    body = {"prompt": prompt, "image_size": "landscape_4_3"}
    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(lambda _: shared_server.post(key, body=body), range(AT_ONCE)))
    assert sorted({answer.status_code for answer in answers}) == [200, 402]
    assert sum(answer.status_code == 200 for answer in answers) == FITTING == len(fal.calls(prompt))
    refused = next(answer.json() for answer in answers if answer.status_code == 402)
    assert refused["error"]["type"] == "key_limit_reached"
    assert "UTC" in refused["detail"]
    assert shared_server.books.standing(name) == (100_000_000 - FITTING * FLUX_MICROS, 0)
    assert shared_server.books.verify().problems == []


@pytest.mark.parametrize("path", ["/fal-ai/flux/dev", "/queue/fal-ai/flux/dev", "/fal-ai/flux/dev/stream"])
def test_a_key_calls_no_model_but_those_of_its_list(shared_server: Server, fal: Fal, path: str) -> None:
    """Row 18: through every door, and fal never hears of it."""
    name, key = shared_server.books.account()

    def allow(*patterns: str) -> None:
        def op(tx: Tx) -> None:
            found = keys.find(tx, key)
            assert found is not None
            keys.set_models(tx, found, patterns)

        shared_server.books.write(op)

    prompt = f"listed {name} {path}"
    allow("fal-ai/flux/schnell", "fal-ai/kling*")
    answer = shared_server.post(key, path, {"prompt": prompt})
    assert (answer.status_code, answer.json()["error"]["type"]) == (403, "model_not_allowed")
    assert fal.calls(prompt) == []
    assert shared_server.books.standing(name) == (1_000_000, 0)
    allow("fal-ai/flux/*")
    assert shared_server.post(key, path, {"prompt": prompt}).status_code != 403
    assert len(fal.calls(prompt)) == 1


@pytest.mark.parametrize(
    ("pattern", "model", "fits"),
    [
        ("fal-ai/flux/dev", "fal-ai/flux/dev", True),
        ("fal-ai/flux/dev", "fal-ai/flux/dev2", False),
        ("fal-ai/flux/*", "fal-ai/flux/dev/image-to-image", True),
        ("fal-ai/flux/*", "fal-ai/flux-pro", False),
        ("*/dev", "fal-ai/flux/dev", True),
        ("fal.ai/flux", "falXai/flux", False),
        ("*", "anything/at-all", True),
    ],
)
def test_patterns_mean_what_they_say(customer: Customer, pattern: str, model: str, fits: bool) -> None:
    key = customer.write(lambda tx: keys.set_models(tx, keys.by_id(tx, customer.key_id), [pattern]))
    caller = keys.Caller(key.key_id, key.account_id, key.account, "free", 0, 0, key.models)
    if fits:
        keys.check_model(caller, model)
    else:
        with pytest.raises(ModelNotAllowed):
            keys.check_model(caller, model)


def test_a_key_may_call_the_model_whose_path_the_operator_pasted(customer: Customer) -> None:
    """As it stands in an address: with a slash at its ends, or its /stream, which is the same model."""
    for pasted in ("/fal-ai/flux/dev", "fal-ai/flux/dev/", "fal-ai/flux/dev/stream", "/fal-ai/flux/dev/stream/"):
        made = customer.write(lambda tx, text=pasted: keys.set_models(tx, keys.by_id(tx, customer.key_id), [text]))
        assert made.models == "fal-ai/flux/dev"


@pytest.mark.parametrize("pattern", ["", "a b", "a\nb", "x" * 201, "fal-ai/[ab]", "é"])
def test_what_is_no_pattern_is_refused(customer: Customer, pattern: str) -> None:
    with pytest.raises(BadRequest):
        customer.write(lambda tx: keys.set_models(tx, keys.by_id(tx, customer.key_id), [pattern]))
