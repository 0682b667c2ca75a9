"""A job's hold ends once, by what fal did: failures, cancels, races, crashes, and jobs that nobody asks about."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from abhiapi import prices
from tests.harness import Books, Fal, Server, own, until
from tests.postgres import sweep_at_once
from tests.test_queue import CAT, FLUX_MICROS, Jobs

pytestmark = pytest.mark.engines


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


def test_jobs_of_a_killed_server_are_settled_by_the_next(
    fal: Fal, tmp_path: Path, engine: str, database_url: str
) -> None:
    gate = own("server-killed")
    settings = {"ABHIAPI_RECONCILE_INTERVAL_S": "1", "ABHIAPI_DATABASE_URL": database_url}
    server = Server.start(tmp_path, fal.url, **settings)
    try:
        account, key = server.books.account(5000)
        customer = Jobs(server, key)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda _: customer.job(weather=f"hold_until={gate}"), range(50)))
        assert server.books.standing(account) == (5_000_000, 50 * FLUX_MICROS)
    finally:
        server.process.kill()
    fal.release(gate)
    with Server.started(tmp_path, fal.url, **settings) as again:
        if engine == "postgresql":
            sweep_at_once(again)
        until(lambda: again.books.standing(account)[1] == 0, what="no hold is left")
        assert {call.state for call in again.books.calls(account)} == {"settled"}
        assert again.books.standing(account) == (5_000_000 - 50 * FLUX_MICROS, 0)
        assert again.books.verify().problems == []


def test_a_submit_under_way_when_the_server_was_killed_is_the_operators(
    fal: Fal, tmp_path: Path, engine: str, database_url: str
) -> None:
    """fal may have accepted the job: its hold is not given back in silence, as a plain call's is."""
    server = Server.start(tmp_path, fal.url, ABHIAPI_DATABASE_URL=database_url)
    prompt = own("killed while submitting")
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
    with Server.started(tmp_path, fal.url, ABHIAPI_DATABASE_URL=database_url) as again:
        if engine == "postgresql":
            sweep_at_once(again)
        ends = {call.mode: (call.state, call.reason) for call in again.books.calls(account)}
        assert ends == {"queue": ("unknown", "submit_outcome_unknown"), "sync": ("released", "process_died")}
        assert again.books.standing(account) == (5_000_000, FLUX_MICROS)
        assert again.books.verify().problems == []
