"""The queue at size: many pollers, settlers in several processes, a kill with many jobs open. One charge for each."""

from __future__ import annotations

import json
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from abhiapi import accounts, calls, jobs, keys, ledger, prices, processes
from abhiapi.db import Database, Tx, database_at
from abhiapi.metering import Verdict, released
from abhiapi.money import Micros
from abhiapi.polls import FRESH_S
from tests.harness import Books, Fal, Server, until
from tests.postgres import sweep_at_once
from tests.rows import flux
from tests.test_queue import FLUX_MICROS, Jobs

pytestmark = pytest.mark.engines

OPEN = {"sqlite": 200, "postgresql": 60}
RACED = {"sqlite": 300, "postgresql": 60}
ROWS = 300
POLLS = {"sqlite": 1000, "postgresql": 300}
THREADS = 16


def charges(books: Books, account: str) -> list[int | None]:
    """The calls that were charged, one for each charge."""
    return [entry.call_id for entry in books.entries(account) if entry.kind == "charge"]


def test_a_thousand_polls_and_a_hundred_results_at_once_are_one_charge(
    shared_server: Server, books: Books, fal: Fal, engine: str
) -> None:
    """Rows 24 and 25 of B3: mixed, from the queue to the end; fal is asked for a status once in each moment."""
    account, key = books.account(1000)
    customer = Jobs(shared_server, key)
    request_id = customer.job(weather="queue_s=0.2; run_s=0.5")
    asked = [customer.status] * POLLS[engine] + [customer.result] * 100
    random.Random(24).shuffle(asked)
    started = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda ask: ask(request_id), asked))
    final = customer.completed(request_id).json()["_billing"]
    looks = (time.monotonic() - started) / FRESH_S + 3  # one for each moment, the reconciler's own, and the edges
    assert {answer.status_code for answer in answers} <= {200, 202, 400}
    seen = fal.calls(request_id)
    assert len([call for call in seen if call["path"].endswith("/status")]) <= 2 * looks  # with logs and without
    assert len([call for call in seen if call["path"].endswith(request_id)]) <= 100 + 1 + 1  # and the settler's own
    told = {json.dumps(answer.json()["_billing"]) for answer in answers if answer.status_code == 200}
    assert told <= {json.dumps(final)}
    assert [entry.amount_micros for entry in books.entries(account) if entry.kind == "charge"] == [-FLUX_MICROS]
    assert books.verify().problems == []


def test_pollers_and_the_reconcilers_of_two_processes_end_each_job_once(
    fal: Fal, tmp_path: Path, engine: str, database_url: str
) -> None:
    """Row 37 of B5: two servers on one database, each with its reconciler, and pollers of both, on the same jobs."""
    settings = {"ABHIAPI_RECONCILE_INTERVAL_S": "1", "ABHIAPI_DATABASE_URL": database_url}
    raced = RACED[engine]
    gate = f"raced {tmp_path.name}"
    with (
        Server.started(tmp_path, fal.url, **settings) as first,
        Server.started(tmp_path, fal.url, **settings) as second,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        account, key = first.books.account(raced * 30)
        customers = [Jobs(first, key), Jobs(second, key)]
        ids = list(pool.map(lambda n: customers[n % 2].job(weather=f"hold_until={gate}"), range(raced)))
        assert first.books.standing(account) == (raced * 30_000, raced * FLUX_MICROS)
        fal.release(gate)

        def poll(number: int) -> tuple[str, str]:
            """What one poller is told that a job cost, at the first sight of its end."""
            customer, request_id = customers[number % 2], ids[number // 2]
            shown = customer.completed(request_id) if number % 3 else customer.result_when_ready(request_id)
            return request_id, json.dumps(shown.json()["_billing"])

        told = list(pool.map(poll, range(2 * raced)))
        until(lambda: first.books.standing(account)[1] == 0, what="no hold is left")
        assert len(set(told)) == raced, "two pollers were told different charges for one job"
        ended = first.books.calls(account)
        assert [(call.state, call.charged_micros) for call in ended] == [("settled", FLUX_MICROS)] * raced
        assert sorted(charges(first.books, account)) == sorted(call.call_id for call in ended)
        assert first.books.standing(account) == (raced * (30_000 - FLUX_MICROS), 0)
        assert first.books.verify().problems == []


def test_a_kill_with_many_jobs_open_loses_and_doubles_none(
    fal: Fal, tmp_path: Path, engine: str, database_url: str
) -> None:
    """Row 12 of B2: some are settled, some are being settled and some run when the process is killed."""
    settings = {"ABHIAPI_RECONCILE_INTERVAL_S": "1", "ABHIAPI_DATABASE_URL": database_url}
    jobs_open = OPEN[engine]
    gate = f"killed {tmp_path.name}"
    server = Server.start(tmp_path, fal.url, **settings)
    try:
        account, key = server.books.account(jobs_open * 30)
        customer = Jobs(server, key)
        with ThreadPoolExecutor(THREADS) as pool:
            weathers = [f"hold_until={gate}{'-late' if number % 4 == 0 else ''}" for number in range(jobs_open)]
            list(pool.map(lambda weather: customer.job(weather=weather), weathers))
        assert server.books.standing(account) == (jobs_open * 30_000, jobs_open * FLUX_MICROS)
        fal.release(gate)
        until(lambda: charges(server.books, account), what="the first is settled")
    finally:
        server.process.stop(signal.SIGKILL)
        server.process.kill()
    left = server.books.standing(account)[1] // FLUX_MICROS
    assert left >= jobs_open // 4
    fal.release(f"{gate}-late")
    with Server.started(tmp_path, fal.url, **settings) as again:
        if engine == "postgresql":
            sweep_at_once(again)  # which moves the dead process's turn to settle
        until(lambda: again.books.standing(account)[1] == 0, what="no hold is left")
        ended = again.books.calls(account)
        assert [(call.state, call.charged_micros) for call in ended] == [("settled", FLUX_MICROS)] * jobs_open
        assert sorted(charges(again.books, account)) == sorted(call.call_id for call in ended)
        assert again.books.standing(account) == (jobs_open * (30_000 - FLUX_MICROS), 0)
        assert again.books.verify().problems == []


# --- below the server: the conditional update itself ----------------------------------------------------------------


@pytest.fixture
def sent(database: Database) -> tuple[str, list[calls.OpenCall]]:
    """Jobs that fal works on, as rows."""
    name = "racing"

    def make(tx: Tx) -> list[calls.OpenCall]:
        account = accounts.create(tx, name, plan="free", now_ms=1)
        ledger.topup(tx, account.account_id, Micros(1_000_000_000), ref=None, note=None, now_ms=1)
        key = keys.create(tx, account.account_id, name=None, expires_at=None, now_ms=1)[0]
        caller = keys.authenticate(tx, key, now_ms=1)
        process_id = processes.start(tx, pid=1, now_ms=1)
        price_id = prices.version_of(tx, flux(), now_ms=1)
        made = []
        for number in range(1, 1 + ROWS):
            call = calls.OpenCall(number, account.account_id, caller.key_id, "fal-ai/flux/dev", Micros(FLUX_MICROS))
            calls.admit(tx, calls.Admission(call, price_id, process_id, "queue", 2**60, 1))
            jobs.remember(tx, call, f"r-{number}", http_status=200)
            made.append(call)
        return made

    return name, database.write(make)


def test_three_settlers_of_each_job_end_it_once(
    database: Database, database_url: str, sent: tuple[str, list[calls.OpenCall]]
) -> None:
    """Row 37 of B5, at the database: a charge, a release and a second charge, on connections of their own, at once."""
    account, opened = sent
    verdicts = [Verdict("settled", Micros(FLUX_MICROS)), released("client_cancelled"), Verdict("settled", Micros(1))]
    start = Barrier(len(verdicts))

    def settle(verdict: Verdict) -> list[int]:
        """The jobs that this settler was the first to end."""
        own = database_at(database_url)
        first = []
        for call in opened:

            def finish(tx: Tx, call: calls.OpenCall = call) -> Any:
                return calls.finish(tx, call, verdict, now_ms=2, http_status=200)

            start.wait(30)
            try:
                own.write(finish)
            except calls.CallEnded:
                continue
            first.append(call.call_id)
        return first

    with ThreadPoolExecutor(len(verdicts)) as pool:
        won = list(pool.map(settle, verdicts))
    assert sorted(call_id for first in won for call_id in first) == [call.call_id for call in opened]
    assert sum(bool(first) for first in won) > 1, "they did not race"
    books = Books(database)
    ended = {call.call_id: (call.state, call.charged_micros) for call in books.calls(account)}
    for verdict, first in zip(verdicts, won, strict=True):
        assert {ended[call_id] for call_id in first} <= {(verdict.end, verdict.charge_micros)}
    spent = FLUX_MICROS * len(won[0]) + len(won[2])
    assert books.standing(account) == (1_000_000_000 - spent, 0)
    assert sorted(charges(books, account)) == sorted(won[0] + won[2])
    assert books.verify().problems == []
