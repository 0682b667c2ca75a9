"""The reconciler and settlement where they can be raced by hand: each job ends once, however many look."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gevent
import pytest
import requests

from abhiapi import calls, jobs, prices, processes, queue_gateway, reconcile, runtime, settlement, sweep, turns, vitals
from abhiapi import fal as fal_client
from abhiapi.admission import Request
from abhiapi.db import Database
from abhiapi.errors import BadAmount
from abhiapi.metering import SUBMIT_UNKNOWN, Verdict
from abhiapi.money import Micros
from abhiapi.settings import Settings
from tests.harness import OPERATOR_KEY, WEBHOOK_KEY, Books, Clock, Fal, own, until
from tests.plain_session import PlainSession
from tests.test_queue import CAT, FLUX_MICROS

pytestmark = pytest.mark.engines

NO_PID = 2**22 + 1  # beyond what Linux gives


@pytest.fixture
def rt(database: Database, database_url: str, fal: Fal) -> Iterator[runtime.Runtime]:
    """A runtime without a server, whose rounds are started by hand."""
    made = started(database_url, fal)
    yield made
    made.close()


def started(
    database_url: str, fal: Fal, now_ms: Callable[[], int] = runtime.system_now_ms, **settings: str
) -> runtime.Runtime:
    return runtime.start(
        Settings.from_env(
            {
                "FAL_KEY": OPERATOR_KEY,
                "ABHIAPI_DATABASE_URL": database_url,
                "ABHIAPI_WEBHOOK_KEY": WEBHOOK_KEY,
                "ABHIAPI_FAL_RUN_URL": fal.url,
                "ABHIAPI_FAL_QUEUE_URL": f"{fal.url}/queue",
            }
            | settings
        ),
        now_ms=now_ms,
    )


def placed(
    rt: runtime.Runtime, fal: Fal, books: Books, count: int, *, weather: str = "", credits: int = 5000
) -> tuple[str, list[jobs.Job]]:
    """Jobs at fal, and the rows that a server would have written for them."""
    account, key = books.account(credits)
    caller = rt.authenticate(key)
    price = rt.catalogue().price_of("fal-ai/flux/dev")
    session = PlainSession()
    session.headers.update({"Authorization": "Key x:y"} | ({"x-fal-sandbox": weather} if weather else {}))
    for _ in range(count):
        request_id = session.post(f"{fal.url}/queue/fal-ai/flux/dev", json=CAT, timeout=10).json()["request_id"]
        call = calls.OpenCall(
            rt.call_ids.new(rt.now_ms()), caller.account_id, caller.key_id, price.model, Micros(FLUX_MICROS)
        )

        def write(tx: Any, call: Any = call, request_id: str = request_id) -> None:
            admission = calls.Admission(
                call, prices.version_of(tx, price, now_ms=1), rt.process_id, "queue", 2**60, rt.now_ms()
            )
            calls.admit(tx, admission)
            jobs.remember(tx, call, request_id, http_status=200)

        books.write(write)
    session.close()
    return account, rt.reader.read(lambda tx: jobs.sent_after(tx, 0, most=1000))


def is_done(fal: Fal, job: jobs.Job) -> bool:
    listed = requests.get(f"{fal.url}/_sandbox/jobs", timeout=10).json()["jobs"]
    return (job.request_id, "COMPLETED") in {(one["request_id"], one["status"]) for one in listed}


def test_many_settlers_of_one_job_end_it_once(rt: runtime.Runtime, fal: Fal, database: Database) -> None:
    """Row 37 of B5: pollers, results and reconcilers at once, in one process and with nothing shared between them."""
    books = Books(database)
    account, found = placed(rt, fal, books, 3)
    until(lambda: all(is_done(fal, job) for job in found), what="fal is done")

    def alone(job: jobs.Job) -> object:
        return settlement._settle(rt, job)  # as another process would, without the shared look

    racing = [gevent.spawn(settlement.settle, rt, job) for job in found for _ in range(20)]
    racing += [gevent.spawn(alone, job) for job in found for _ in range(20)]
    racing += [gevent.spawn(reconcile.run_once, rt) for _ in range(3)]
    gevent.joinall(racing, raise_error=True)
    for number, job in enumerate(found):
        told = {racing[number * 20 + each].value for each in range(20)}
        assert told == {settlement.known(rt, job)}
        assert told.pop().charge_micros == FLUX_MICROS
    charges = [entry for entry in books.entries(account) if entry.kind == "charge"]
    assert len(charges) == 3
    assert books.standing(account) == (5_000_000 - 3 * FLUX_MICROS, 0)
    assert books.verify().problems == []


def test_a_round_leaves_running_jobs_alone(rt: runtime.Runtime, fal: Fal, database: Database) -> None:
    gate = own("a-round-passed")
    books = Books(database)
    account, _ = placed(rt, fal, books, 2, weather=f"hold_until={gate}")
    done = reconcile.run_once(rt)
    assert (done.looked_at, done.ended, done.failed) == (2, 0, 0)
    assert books.standing(account)[1] == 2 * FLUX_MICROS
    fal.release(gate)


def test_one_process_at_a_time_looks_for_all(fal: Fal, database: Database, database_url: str, clock: Clock) -> None:
    """fal is asked about a job once a round, however many processes there are; by another one when one has died."""
    gate = own("a-round-for-all")
    books = Books(database)
    one, other = (started(database_url, fal, clock) for _ in range(2))
    placed(one, fal, books, 1, weather=f"hold_until={gate}")
    interval_ms = one.settings.reconcile_interval_s * 1000
    try:
        for _ in range(3):
            racing = [gevent.spawn(reconcile.run_in_turn, rt) for rt in (one, other)]
            gevent.joinall(racing, raise_error=True)
            assert [each.value.looked_at for each in racing if each.value] == [1]
            clock.tick(interval_ms)
        with pytest.raises(Died):
            turns.take(one, vitals.ROUND, die, interval_ms=interval_ms)
        assert reconcile.run_in_turn(other) is None
        one.database.write(lambda tx: processes.end(tx, one.process_id, now_ms=clock.now_ms))  # as a sweep does
        assert reconcile.run_in_turn(other) is not None
        clock.tick(-600_000)  # clocks are set right at times, and no job may wait for that
        assert reconcile.run_in_turn(other) is not None
    finally:
        fal.release(gate)
        one.close()
        other.close()


@pytest.mark.parametrize("minutes", [-10, -1, 1, 10])
def test_a_machine_whose_clock_is_off_stops_no_rounds(
    fal: Fal, database: Database, database_url: str, clock: Clock, minutes: int
) -> None:
    """It dies in a round, and nobody sees that: the other looks within twice the interval."""
    wrong = Clock(clock.now_ms + minutes * 60_000)
    one, other = started(database_url, fal, wrong), started(database_url, fal, clock)
    interval_ms = other.settings.reconcile_interval_s * 1000
    try:
        assert reconcile.run_in_turn(one) is not None
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(reconcile, "run_once", lambda _: die())
            with pytest.raises(Died):
                reconcile.run_in_turn(one)
        clock.tick(2 * interval_ms)
        assert reconcile.run_in_turn(other) is not None
    finally:
        one.close()
        other.close()


def test_who_can_look_at_nothing_gives_way_to_others(fal: Fal, database: Database, database_url: str) -> None:
    """Else a process without a way to fal would take every turn; alone it tries again as ever."""
    blind, seeing = reconcile.Round(failed=2), reconcile.Round(looked_at=1, failed=1)
    one = started(database_url, fal)
    interval_ms = one.settings.reconcile_interval_s * 1000
    try:
        assert reconcile.pause_ms(one, blind, 4000) == interval_ms - 4000
        other = started(database_url, fal)
        assert reconcile.pause_ms(one, blind, 4000) == interval_ms
        assert reconcile.pause_ms(one, seeing, 60_000) == reconcile.PAUSE_MS
        assert reconcile.pause_ms(one, None, 0) == min(interval_ms, reconcile.LOOK_MS)
        other.close()
    finally:
        one.close()


class Died(BaseException):
    """The process was killed."""


def die() -> None:
    raise Died


def test_a_round_waits_for_many_answers_at_once(rt: runtime.Runtime, fal: Fal, database: Database) -> None:
    """Row 40 of B5: with fal far away a round over many jobs takes hardly longer than one look."""
    gate = own("never-far-away")
    books = Books(database)
    placed(rt, fal, books, reconcile.AT_ONCE, weather=f"poll_delay_s=0.5; hold_until={gate}", credits=10_000)
    started = time.monotonic()
    done = reconcile.run_once(rt)
    assert (done.looked_at, done.ended, done.failed) == (reconcile.AT_ONCE, 0, 0)
    assert time.monotonic() - started < reconcile.AT_ONCE * 0.5 / 4  # a quarter of the time that one by one would take
    assert reconcile.AT_ONCE * 5 / 0.15 > 5_000  # answers of 0.15 s, in one interval


def test_a_round_with_fal_in_trouble_ends_nothing(rt: runtime.Runtime, fal: Fal, database: Database) -> None:
    books = Books(database)
    account, (job,) = placed(rt, fal, books, 1)
    until(lambda: is_done(fal, job), what="fal is done")
    weather = [{"match": f"queue/status/{job.request_id}", "status": 403}]
    requests.post(fal.url + "/_sandbox/weather", json=weather, timeout=10).raise_for_status()
    assert reconcile.run_once(rt).failed == 1
    assert books.standing(account) == (5_000_000, FLUX_MICROS)
    assert reconcile.run_once(rt).ended == 1
    assert books.standing(account) == (5_000_000 - FLUX_MICROS, 0)


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(
    ("age_ms", "is_cancelled", "state", "reason"),
    [
        (0, False, "sent", None),
        (120_000, False, "unknown", "not_found_at_fal"),
        (0, True, "released", "client_cancelled"),
    ],
)
def test_a_job_that_fal_does_not_know(
    rt: runtime.Runtime, fal: Fal, database: Database, age_ms: int, is_cancelled: bool, state: str, reason: str | None
) -> None:
    books = Books(database)
    account, (job,) = placed(rt, fal, books, 1)
    missing = "019da0f9-0000-7eb0-9e16-" + job.request_id[-12:]
    database.write(
        lambda tx: tx._connection.execute(  # type: ignore[func-returns-value]
            "UPDATE calls SET created_at = created_at - ?, fal_request_id = ?", (age_ms, missing)
        )
    )
    if is_cancelled:
        books.write(lambda tx: jobs.note_cancel(tx, job))
    reconcile.run_once(rt)
    (call,) = books.calls(account)
    assert (call.state, call.reason) == (state, reason)
    assert books.standing(account)[1] == (0 if state == "released" else FLUX_MICROS)


def test_after_a_restart_an_answer_without_units_is_the_operators(
    rt: runtime.Runtime, fal: Fal, database: Database
) -> None:
    """What was asked for is not kept on disk, and a cost is never guessed."""
    books = Books(database)
    account, (job,) = placed(rt, fal, books, 1, weather="units=none")
    until(lambda: is_done(fal, job), what="fal is done")
    reconcile.run_once(rt)
    (call,) = books.calls(account)
    assert (call.state, call.reason, call.held_micros) == ("unknown", "no_units", FLUX_MICROS)
    assert books.standing(account) == (5_000_000, FLUX_MICROS)


def test_an_ended_job_is_never_ended_again(rt: runtime.Runtime, fal: Fal, database: Database) -> None:
    """Row 44 of B5: a second release or charge of a hold changes nothing."""
    books = Books(database)
    account, (job,) = placed(rt, fal, books, 1)
    books.write(lambda tx: calls.finish(tx, job.call, Verdict("released", reason="operator"), now_ms=rt.now_ms()))
    until(lambda: is_done(fal, job), what="fal is done")
    assert settlement._settle(rt, job).charge_micros == 0
    assert books.calls(account)[0].state == "released"
    assert books.verify().problems == []


def test_one_id_is_one_call(rt: runtime.Runtime, fal: Fal, database: Database) -> None:
    books = Books(database)
    _, (first, second) = placed(rt, fal, books, 2)
    with pytest.raises(Exception, match="another call's"):
        books.write(lambda tx: jobs.remember(tx, second.call, first.request_id, http_status=200))


@pytest.mark.engines("sqlite")
def test_a_sweep_leaves_jobs_to_the_reconciler(rt: runtime.Runtime, fal: Fal, database: Database) -> None:
    gate = own("swept")
    books = Books(database)
    account, _ = placed(rt, fal, books, 1, weather=f"hold_until={gate}")
    other = books.write(lambda tx: processes.start(tx, pid=NO_PID, now_ms=rt.now_ms()))
    database.write(lambda tx: tx._connection.execute("UPDATE calls SET process_id = ?, deadline_at = 1", (other,)))  # type: ignore[func-returns-value]
    sweep.run_once(rt)
    assert books.calls(account)[0].state == "sent"
    fal.release(gate)


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("whose", ["dead", "overdue"])
def test_a_sweep_gives_no_submit_back(rt: runtime.Runtime, database: Database, whose: str) -> None:
    books = Books(database)
    account, key = books.account(5000)
    caller = rt.authenticate(key)
    price = rt.catalogue().price_of("fal-ai/flux/dev")
    dead = books.write(lambda tx: processes.start(tx, pid=NO_PID, now_ms=rt.now_ms()))
    process_id, deadline_at = (dead, 2**60) if whose == "dead" else (rt.process_id, 1)
    modes: tuple[calls.Mode, ...] = ("sync", "stream", "queue")
    for mode in modes:
        call = calls.OpenCall(
            rt.call_ids.new(rt.now_ms()), caller.account_id, caller.key_id, price.model, Micros(FLUX_MICROS)
        )

        def write(tx: Any, call: calls.OpenCall = call, mode: calls.Mode = mode) -> None:
            price_id = prices.version_of(tx, price, now_ms=1)
            calls.admit(tx, calls.Admission(call, price_id, process_id, mode, deadline_at, rt.now_ms()))

        books.write(write)
    assert sweep.run_once(rt) == 3
    assert sweep.run_once(rt) == 0
    assert {call.mode: call.state for call in books.calls(account)} == {
        "sync": "released",
        "stream": "released",
        "queue": "unknown",
    }
    assert books.standing(account) == (5_000_000, FLUX_MICROS)
    assert books.verify().problems == []


@pytest.mark.parametrize(
    ("weather", "state"),
    [("", "sent"), ("drop=before_headers", "unknown"), ("drop=in_body", "unknown")],
)
def test_this_process_lets_go_of_a_submit_once_its_outcome_is_written(
    rt: runtime.Runtime, database: Database, weather: str, state: str
) -> None:
    books = Books(database)
    account, key = books.account(5000)
    headers = {"authorization": f"Key {key}", "content-type": "application/json"}
    headers |= {"x-fal-sandbox": weather} if weather else {}
    body = _Body(json.dumps(CAT).encode(), CAT)
    queue_gateway.run(rt, Request("POST", "/queue/fal-ai/flux/dev", "", headers, lambda: body, "http://here"))
    assert books.calls(account)[0].state == state
    assert rt.working_on == set()


def test_a_job_that_fal_accepted_while_its_process_was_taken_for_dead_is_one_all_the_same(
    rt: runtime.Runtime, fal: Fal, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has left its hold to the operator. Whose id this process knows, it can settle."""
    books = Books(database)
    account, key = books.account(5000)
    send = fal_client.Fal.send

    def swept_meanwhile(self: fal_client.Fal, method: str, *arguments: Any, **more: Any) -> Any:
        reply = send(self, method, *arguments, **more)
        if method == "POST":
            call_id = books.calls(account)[0].call_id
            books.write(lambda tx: calls.finish(tx, calls.open_call(tx, call_id), SUBMIT_UNKNOWN, now_ms=1))
        return reply

    monkeypatch.setattr(fal_client.Fal, "send", swept_meanwhile)
    headers = {"authorization": f"Key {key}", "content-type": "application/json"}
    body = _Body(json.dumps(CAT).encode(), CAT)
    reply = queue_gateway.run(rt, Request("POST", "/queue/fal-ai/flux/dev", "", headers, lambda: body, "http://here"))
    assert reply.status == 200
    assert (books.calls(account)[0].state, books.calls(account)[0].reason) == ("sent", None)
    until(lambda: reconcile.run_once(rt).settled == 1, what="the job has ended")
    assert books.standing(account) == (5_000_000 - FLUX_MICROS, 0)
    assert books.verify().problems == []


def test_a_job_whose_charge_the_ledger_refuses_is_the_operators(
    rt: runtime.Runtime, fal: Fal, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the reconciler would try it for ever."""
    books = Books(database)
    account, (job,) = placed(rt, fal, books, 1)
    until(lambda: is_done(fal, job), what="fal is done")
    finish = calls.finish

    def refusing(tx: Any, call: calls.OpenCall, verdict: Verdict, **more: Any) -> Micros:
        if verdict.end == "settled":
            raise BadAmount("too much")
        return finish(tx, call, verdict, **more)

    monkeypatch.setattr(calls, "finish", refusing)
    assert reconcile.run_once(rt).ended == 1
    (call,) = books.calls(account)
    assert (call.state, call.reason) == ("unknown", "charge_refused")
    assert books.standing(account) == (5_000_000, FLUX_MICROS)


@dataclass(frozen=True)
class _Body:
    content: bytes
    call_input: Mapping[str, Any]
