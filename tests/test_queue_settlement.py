"""A job's hold ends once, by what fal did: failures, cancels, races, crashes, and jobs that nobody asks about."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gevent
import pytest
import requests

from abhiapi import calls, jobs, prices, processes, queue_gateway, reconcile, runtime, settlement, sweep
from abhiapi.admission import Request
from abhiapi.db import Database
from abhiapi.errors import BadAmount
from abhiapi.metering import Verdict
from abhiapi.money import Micros
from abhiapi.settings import Settings
from tests.harness import OPERATOR_KEY, WEBHOOK_KEY, Books, Fal, Server, own, until
from tests.test_queue import CAT, FLUX_MICROS, Jobs

pytestmark = pytest.mark.engines

NO_PID = 2**22 + 1  # beyond what Linux gives


def ended(books: Books, account: str, *, within_s: float = 20) -> Any:
    """The account's one call, once its hold has ended or waits for the operator."""
    return until(
        lambda: next((call for call in books.calls(account) if call.state not in ("held", "sent")), None),
        what="the hold ends",
        within_s=within_s,
    )


@pytest.mark.parametrize(
    ("weather", "state", "micros", "http_status", "table_status"),
    [
        ("status=422", "released", 0, 422, 400),
        ("status=422; units=2", "settled", 2 * FLUX_MICROS, 422, 400),
        ("status=400; units=0", "settled", 0, 400, 400),
        ("status=500", "released", 0, 500, 502),
        ("status=500; units=3", "released", 0, 500, 502),
        ("status=504", "released", 0, 504, 504),
        ("units=2.5", "settled", 65_625, 200, 200),
        ("units=0", "settled", 0, 200, 200),
    ],
)
def test_a_jobs_end_by_its_own_answer(
    shared_server: Server, books: Books, weather: str, state: str, micros: int, http_status: int, table_status: int
) -> None:
    """Row 43 of B5: a job that failed without units is given back."""
    account, key = books.account(1000)
    by_fal, by_table = Jobs(shared_server, key), Jobs(shared_server, key, dialect="table")
    request_id = by_fal.job(weather=weather)
    status = by_fal.completed(request_id)
    assert status.status_code == 200
    assert ("error" in status.json()) is (http_status >= 400)
    result = by_fal.result(request_id)
    assert result.status_code == http_status
    assert by_table.result(request_id).status_code == table_status
    assert result.json()["_billing"]["credits_used"] * 1000 == micros
    assert result.json()["_billing"] == status.json()["_billing"]
    (call,) = books.calls(account)
    assert (call.state, call.charged_micros) == (state, micros)
    assert books.standing(account) == (1_000_000 - micros, 0)


def test_bad_input_is_found_out_by_the_result(shared_server: Server, books: Books) -> None:
    account, key = books.account(1000)
    customer = Jobs(shared_server, key)
    request_id = customer.job(body={"image_size": "landscape_4_3"})
    customer.completed(request_id)
    result = customer.result(request_id)
    assert result.status_code == 422
    assert result.json()["detail"][0]["loc"] == ["body", "prompt"]
    assert result.json()["_billing"]["credits_used"] == 0
    assert books.calls(account)[0].charged_micros == 0


def test_an_answer_without_units_is_computed_from_what_was_asked(shared_server: Server, books: Books) -> None:
    account, key = books.account(1000)
    customer = Jobs(shared_server, key)
    customer.completed(customer.job(weather="units=none"))
    (call,) = books.calls(account)
    assert (call.state, call.charged_micros, call.usage_source) == ("settled", FLUX_MICROS, "catalogue")


def test_a_result_before_the_end_is_fals_400_and_free(shared_server: Server, books: Books, fal: Fal) -> None:
    gate = own("not-ready-yet")
    account, key = books.account(1000)
    customer = Jobs(shared_server, key)
    request_id = customer.job(weather=f"hold_until={gate}; queue_s=0")
    early = customer.result(request_id)
    assert early.status_code == 400
    assert early.json()["detail"] == "Request is still in progress"
    assert early.json()["_billing"]["credits_used"] == 0
    assert books.calls(account)[0].state == "sent"
    fal.release(gate)
    customer.completed(request_id)
    assert books.calls(account)[0].charged_micros == FLUX_MICROS


def test_a_job_cancelled_in_the_queue_costs_nothing(shared_server: Server, books: Books) -> None:
    account, key = books.account(1000)
    customer = Jobs(shared_server, key)
    request_id = customer.job(weather="queue_until=never-runs")
    cancelled = customer.cancel(request_id)
    assert cancelled.status_code == 202
    assert cancelled.json()["status"] == "CANCELLATION_REQUESTED"
    assert cancelled.json()["_billing"]["credits_used"] == 0
    status = customer.completed(request_id)
    assert status.json()["error_type"] == "client_cancelled"
    assert customer.result(request_id).status_code == 499
    assert books.calls(account)[0].state == "released"
    assert books.standing(account) == (1_000_000, 0)
    assert customer.cancel(request_id).status_code == 400


def test_a_job_that_finishes_all_the_same_is_charged(shared_server: Server, books: Books, fal: Fal) -> None:
    """Row 42 of B5, and fal-protocol 10.5: a cancel is no refund."""
    gate = own("finishes")
    account, key = books.account(1000)
    customer = Jobs(shared_server, key)
    request_id = customer.job(weather=f"hold_until={gate}; queue_s=0; ignores_cancel=1")
    until(lambda: customer.status(request_id).json()["status"] == "IN_PROGRESS", what="it runs")
    assert customer.cancel(request_id).status_code == 202
    assert books.standing(account) == (1_000_000, FLUX_MICROS)
    fal.release(gate)
    customer.completed(request_id)
    assert books.calls(account)[0].charged_micros == FLUX_MICROS


def test_a_submit_that_fal_refuses_is_released(shared_server: Server, books: Books, fal: Fal) -> None:
    account, key = books.account(1000)
    books.write(
        lambda tx: prices.set_own(
            tx, "fal-ai/not-at-fal", unit="images", unit_price_usd=prices.Decimal("0.1"), margin=None,
            hold_micros=None, now_ms=books.clock(),
        )
    )  # fmt: skip
    refused = Jobs(shared_server, key).submit("/queue/fal-ai/not-at-fal")
    assert refused.status_code == 404
    assert refused.json()["_billing"]["credits_used"] == 0
    assert books.calls(account)[0].state == "released"
    assert books.standing(account) == (1_000_000, 0)


@pytest.mark.parametrize("drop", ["before_headers", "in_headers", "in_body"])
@pytest.mark.parametrize(("dialect", "status"), [("fal", 500), ("table", 502)])
def test_a_submit_whose_answer_was_cut_keeps_its_hold(
    shared_server: Server, books: Books, fal: Fal, drop: str, dialect: str, status: int
) -> None:
    """Rows 29 and 30 of B3: fal accepted the job, the id was lost: never sent again, the operator's to look into."""
    account, key = books.account(1000)
    prompt = f"cut {drop} {dialect} {account}"
    cut = Jobs(shared_server, key, dialect=dialect).submit(body={**CAT, "prompt": prompt}, weather=f"drop={drop}")
    assert cut.status_code == status
    (call,) = books.calls(account)
    assert (call.state, call.reason) == ("unknown", "submit_outcome_unknown")
    assert books.standing(account) == (1_000_000, FLUX_MICROS)
    assert len(fal.calls(prompt)) == 1


def test_trouble_on_the_way_to_the_result_is_not_the_jobs(shared_server: Server, books: Books, fal: Fal) -> None:
    """An ingress's 503 page, or the operator's own 403, must not give a finished job away."""
    account, key = books.account(1000)
    customer = Jobs(shared_server, key)
    request_id = customer.job(weather="run_s=0.2")
    match = f"queue/result/{request_id}"
    ordered = [{"match": match, "status": 503, "body": "html"}, {"match": match, "drop": "in_headers"}]
    requests.post(fal.url + "/_sandbox/weather", json=ordered, timeout=10).raise_for_status()
    status = customer.completed(request_id)
    assert status.json()["_billing"]["credits_used"] == 26.25
    assert books.calls(account)[0].charged_micros == FLUX_MICROS


@pytest.mark.parametrize("http_status", [500, 503])
def test_a_job_that_fal_calls_failed_is_released_whoever_words_its_result(
    shared_server: Server, books: Books, http_status: int
) -> None:
    """Row 43 of B5: a 5xx page without fal's id may be an ingress's, but not where the job's own status says error."""
    account, key = books.account(1000)
    customer = Jobs(shared_server, key)
    request_id = customer.job(weather=f"status={http_status}; body=html")
    status = customer.completed(request_id)
    assert status.json()["error"]
    assert status.json()["_billing"]["credits_used"] == 0
    assert [(call.state, call.reason) for call in books.calls(account)] == [("released", "fal_5xx")]
    assert books.standing(account) == (1_000_000, 0)
    assert customer.result(request_id).status_code == http_status


def test_a_poll_survives_trouble_on_the_way(shared_server: Server, books: Books, fal: Fal) -> None:
    """fal's Python client gives a job up at the first 502; so the proxy looks again before it answers."""
    _, key = books.account(1000)
    customer = Jobs(shared_server, key)
    request_id = customer.job()
    customer.completed(request_id)
    for action, ask in (("status", customer.status), ("result", customer.result)):
        match = f"queue/{action}/{request_id}"
        ordered = [{"match": match, "status": 503, "body": "html"}, {"match": match, "drop": "before_headers"}]
        requests.post(fal.url + "/_sandbox/weather", json=ordered, timeout=10).raise_for_status()

        def is_past(ask: Callable[[str], requests.Response] = ask, match: str = match) -> bool:
            assert ask(request_id).status_code == 200
            return match not in coming(fal)

        until(is_past, what="the trouble was met")


def test_a_poll_that_fal_does_not_answer_may_be_repeated(shared_server: Server, books: Books, fal: Fal) -> None:
    """502 even for fal's own clients, which repeat it: the job is still there, and is charged once it is seen."""
    gate = own("fal-is-back")
    account, key = books.account(1000)
    customer = Jobs(shared_server, key)
    request_id = customer.job(weather=f"queue_s=0; hold_until={gate}")
    match = f"queue/status/{request_id}"
    ordered = [{"match": match, "drop": "before_headers"}] * 40
    requests.post(fal.url + "/_sandbox/weather", json=ordered, timeout=10).raise_for_status()
    refused = until(lambda: (code := customer.status(request_id).status_code) != 202 and code, what="a refusal")
    assert refused == 502
    assert books.calls(account)[0].state == "sent"
    requests.delete(fal.url + "/_sandbox/weather", timeout=10).raise_for_status()
    fal.release(gate)
    assert customer.completed(request_id).json()["_billing"]["credits_used"] == 26.25


def coming(fal: Fal) -> str:
    return requests.get(fal.url + "/_sandbox/weather", timeout=10).text


def test_the_price_is_that_of_the_submit(shared_server: Server, books: Books, fal: Fal) -> None:
    """Row 39 of B5."""
    gate = own("price-changed")
    model = "fal-ai/flux/schnell"
    account, key = books.account(1000)

    def set_price(text: str) -> None:
        books.write(
            lambda tx: prices.set_own(
                tx, model, unit="megapixels", unit_price_usd=prices.Decimal(text), margin=None,
                hold_micros=None, now_ms=books.clock(),
            )
        )  # fmt: skip

    set_price("0.01")
    customer = Jobs(shared_server, key)
    request_id = customer.job(path=f"/queue/{model}", weather=f"hold_until={gate}; units=1")
    set_price("7")
    fal.release(gate)
    customer.completed(request_id)
    (call,) = books.calls(account)
    assert (call.charged_micros, call.unit_price_usd) == (10_000, "0.01")


def test_a_job_that_nobody_asks_about_is_settled(fal: Fal, tmp_path: Path) -> None:
    """Row 23 of B2, and row 40 of B5, whose 5,000 jobs `bench/run_queue.py` measures."""
    with Server.started(tmp_path, fal.url, ABHIAPI_RECONCILE_INTERVAL_S="1") as server:
        account, key = server.books.account(5000)
        customer = Jobs(server, key)
        with ThreadPoolExecutor(16) as pool:
            ids = list(pool.map(lambda _: customer.job(), range(60)))
        asked_at = time.monotonic()
        until(lambda: {call.state for call in server.books.calls(account)} == {"settled"}, what="all are settled")
        assert time.monotonic() - asked_at < 4
        assert {call.fal_request_id for call in server.books.calls(account)} == set(ids)
        assert server.books.standing(account) == (5_000_000 - 60 * FLUX_MICROS, 0)


def test_jobs_of_a_killed_server_are_settled_by_the_next(fal: Fal, tmp_path: Path) -> None:
    gate = own("server-killed")
    server = Server.start(tmp_path, fal.url, ABHIAPI_RECONCILE_INTERVAL_S="1")
    try:
        account, key = server.books.account(5000)
        customer = Jobs(server, key)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda _: customer.job(weather=f"hold_until={gate}"), range(50)))
        assert server.books.standing(account) == (5_000_000, 50 * FLUX_MICROS)
    finally:
        server.process.kill()
    fal.release(gate)
    with Server.started(tmp_path, fal.url, ABHIAPI_RECONCILE_INTERVAL_S="1") as again:
        until(lambda: again.books.standing(account)[1] == 0, what="no hold is left")
        assert {call.state for call in again.books.calls(account)} == {"settled"}
        assert again.books.standing(account) == (5_000_000 - 50 * FLUX_MICROS, 0)
        assert again.books.verify().problems == []


def test_a_submit_under_way_when_the_server_was_killed_is_the_operators(fal: Fal, tmp_path: Path) -> None:
    """fal may have accepted the job: its hold is not given back in silence, as a plain call's is."""
    server = Server.start(tmp_path, fal.url)
    prompt = "killed while submitting"
    with ThreadPoolExecutor(2) as pool:
        try:
            account, key = server.books.account(5000)
            submit = Jobs(server, key).submit
            lost = [
                pool.submit(submit, body={**CAT, "prompt": prompt}, weather="delay_s=5"),
                pool.submit(submit, "/fal-ai/flux/dev", body={**CAT, "prompt": prompt}, weather="delay_s=5"),
            ]
            until(lambda: len(fal.calls(prompt)) == 2, what="both are at fal")
        finally:
            server.process.kill()
        assert all(isinstance(answer.exception(), requests.RequestException) for answer in lost)
    with Server.started(tmp_path, fal.url) as again:
        ends = {call.mode: (call.state, call.reason) for call in again.books.calls(account)}
        assert ends == {"queue": ("unknown", "submit_outcome_unknown"), "sync": ("released", "process_died")}
        assert again.books.standing(account) == (5_000_000, FLUX_MICROS)
        assert again.books.verify().problems == []


# --- in this process: the parts that race -----------------------------------------------------------------------


@pytest.fixture
def rt(database: Database, database_url: str, fal: Fal) -> Iterator[runtime.Runtime]:
    """A runtime without a server, whose rounds are started by hand."""
    made = runtime.start(
        Settings.from_env(
            {
                "FAL_KEY": OPERATOR_KEY,
                "ABHIAPI_DATABASE_URL": database_url,
                "ABHIAPI_WEBHOOK_KEY": WEBHOOK_KEY,
                "ABHIAPI_FAL_RUN_URL": fal.url,
                "ABHIAPI_FAL_QUEUE_URL": f"{fal.url}/queue",
            }
        )
    )
    yield made
    made.close()


def placed(
    rt: runtime.Runtime, fal: Fal, books: Books, count: int, *, weather: str = "", credits: int = 5000
) -> tuple[str, list[jobs.Job]]:
    """Jobs at fal, and the rows that a server would have written for them."""
    account, key = books.account(credits)
    caller = rt.authenticate(key)
    price = rt.catalogue().price_of("fal-ai/flux/dev")
    session = requests.Session()
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


def test_a_round_waits_for_many_answers_at_once(rt: runtime.Runtime, fal: Fal, database: Database) -> None:
    """Row 40 of B5: with fal far away a round over many jobs takes hardly longer than one look."""
    gate = own("never-far-away")
    books = Books(database)
    placed(rt, fal, books, reconcile.AT_ONCE, weather=f"poll_delay_s=0.5; hold_until={gate}", credits=10_000)
    started = time.monotonic()
    done = reconcile.run_once(rt)
    assert (done.looked_at, done.ended, done.failed) == (reconcile.AT_ONCE, 0, 0)
    assert time.monotonic() - started < 4 * 0.5
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
