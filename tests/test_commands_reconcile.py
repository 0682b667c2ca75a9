"""`reconcile`: jobs settled from the command line, beside a server or without one, each of them once."""

from __future__ import annotations

import importlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from sqlalchemy import func, select

from abhiapi import calls, fal_bill, jobs, tables
from abhiapi import reconcile as reconciler
from abhiapi.db import Database
from abhiapi.errors import Refused
from abhiapi.money import Micros
from tests.command_line import CommandLine, Done, finish
from tests.harness import OPERATOR_KEY, Clock, Fal, Server, own, until
from tests.raw_http import Received, upstream
from tests.rows import FLUX_MICROS, Customer
from tests.test_queue import Jobs, at_once

pytestmark = pytest.mark.engines

SIDE_BY_SIDE = 20
COMMAND: Any = importlib.import_module("abhiapi.commands.reconcile")
FIELDS = ["settled", "released", "adjusted", "drift", "unknown", "open", "failed"]
DRIFT_FIELDS = {"kind", "call_id", "fal_request_id", "model", "credits", "units", "fal_units", "fal_cost_usd"}
FIELDS_OF_BILL = ["events", "unreadable", "pending", "below_cost", "losses", "loss_usd"]


@pytest.fixture(scope="module")
def fal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fal]:
    """One of its own: what other tests' calls cost would stand in its bill."""
    with Fal.started(tmp_path_factory.mktemp("billed")) as started:
        yield started


@pytest.fixture
def server(fal: Fal, tmp_path: Path, database_url: str) -> Iterator[Server]:
    """A server whose own timer does not get in the way: its first round is over before the first job."""
    settings = {"ABHIAPI_RECONCILE_INTERVAL_S": "3600", "ABHIAPI_DATABASE_URL": database_url}
    with Server.started(tmp_path, fal.url, **settings) as running:
        yield running


def settings_of(server: Server) -> dict[str, str]:
    return {name: value for name, value in server.env.items() if name.startswith(("ABHIAPI_", "FAL_"))}


def run(server: Server, *arguments: str, **settings: str) -> Done:
    """The command beside the server, with its settings."""
    return CommandLine(server.folder)("reconcile", *arguments, **settings_of(server) | settings)


def told(done: Done, *, is_bill_read: bool = True) -> dict[str, Any]:
    assert done.exit_code == (0 if is_bill_read else 1), done.stderr
    shape: dict[str, Any] = json.loads(done.stdout)
    assert list(shape) == FIELDS + FIELDS_OF_BILL
    return {name: value for name, value in shape.items() if value and name in FIELDS and name != "drift"}


def completed(fal: Fal, ids: list[str]) -> bool:
    listed = requests.get(f"{fal.url}/_sandbox/jobs", timeout=10).json()["jobs"]
    done = {job["request_id"] for job in listed if job["status"] == "COMPLETED"}
    return set(ids) <= done


def test_what_has_completed_is_settled_now(server: Server, fal: Fal, engine: str) -> None:
    account, key = server.books.account(5000)
    customer = Jobs(server, key)
    paid = [answer.json()["request_id"] for answer in at_once(12, lambda _: customer.submit())]
    failed = [customer.job(weather="status=500") for _ in range(2)]
    customer.job(weather=f"hold_until=reconciled-{engine}")
    until(lambda: completed(fal, paid + failed), what="fal is done")
    assert server.books.standing(account) == (5_000_000, 15 * FLUX_MICROS)
    assert told(run(server, "--json")) == {"settled": 12, "released": 2, "open": 1}
    assert server.books.standing(account) == (5_000_000 - 12 * FLUX_MICROS, FLUX_MICROS)
    assert told(run(server, "--json")) == {"open": 1}
    assert server.books.verify().problems == []
    fal.release(f"reconciled-{engine}")
    table = until(lambda: (done := run(server)).stdout.startswith("settled     1\n") and done, what="the last one")
    assert sorted(line.split()[0] for line in table.lines[: len(FIELDS + FIELDS_OF_BILL)]) == sorted(
        FIELDS + FIELDS_OF_BILL
    )
    assert server.post(key).status_code == 200  # the server has noticed nothing


def test_several_at_once_beside_the_servers_own_timer_end_each_job_once(
    fal: Fal, tmp_path: Path, database_url: str
) -> None:
    """Row 37 of B5, between processes."""
    settings = {"ABHIAPI_RECONCILE_INTERVAL_S": "1", "ABHIAPI_DATABASE_URL": database_url}
    with Server.started(tmp_path, fal.url, **settings) as server:
        account, key = server.books.account(5000)
        customer = Jobs(server, key)
        gate = own("all-reconcilers")
        weather = f"hold_until={gate}"
        ids = [answer.json()["request_id"] for answer in at_once(60, lambda _: customer.submit(weather=weather))]
        running = [CommandLine(tmp_path).start("reconcile", "--json", **settings_of(server)) for _ in range(3)]
        fal.release(gate)
        for process in running:
            told(finish(process))
        until(lambda: server.books.standing(account)[1] == 0, what="all are settled")
        assert {call.fal_request_id for call in server.books.calls(account)} == set(ids)
        assert server.books.standing(account) == (5_000_000 - 60 * FLUX_MICROS, 0)
        assert server.books.verify().problems == []


def test_what_a_job_asked_for_outlives_the_server_that_took_it(server: Server, fal: Fal) -> None:
    """An answer without units is computed from it, whoever looks: it is on disk until the hold ends, and no longer."""
    account, key = server.books.account(5000)
    customer = Jobs(server, key)
    request_id = customer.job(weather="units=none")
    until(lambda: completed(fal, [request_id]), what="fal is done")
    server.process.kill()
    assert kept_inputs(server) == 1
    assert told(run(server, "--json", FAL_ADMIN_KEY="api-only:x"), is_bill_read=False) == {"settled": 1}
    assert server.books.standing(account) == (5_000_000 - FLUX_MICROS, 0)
    assert server.books.calls(account)[0].usage_source == "catalogue"
    assert kept_inputs(server) == 0


def kept_inputs(server: Server) -> int:
    rows = server.books.read(lambda tx: tx.all(select(func.count()).select_from(tables.job_inputs)))
    return int(rows[0][0])


@pytest.mark.engines("sqlite")  # the bill's rules on both: test_fal_bill
def test_without_a_server_fals_bill_tells_or_it_is_the_operators(server: Server, fal: Fal) -> None:
    """What was asked for was too long to be kept; fal's bill knows the units, where one may read it."""
    account, key = server.books.account(5000)
    request_id = Jobs(server, key).job(weather="units=none", body={"prompt": "long " * 1000})
    until(lambda: completed(fal, [request_id]), what="fal is done")
    server.process.kill()
    refused = run(server, "--json", FAL_ADMIN_KEY="api-only:x")
    assert refused.exit_code == 1
    assert "FAL_ADMIN_KEY" in refused.stderr.splitlines()[-1]
    shape = json.loads(refused.stdout)
    assert (shape["unknown"], shape["drift"]) == (1, None)
    assert server.books.calls(account)[0].reason == "no_units"
    assert told(run(server, "--json")) == {"settled": 1}
    assert server.books.standing(account) == (5_000_000 - FLUX_MICROS, 0)
    assert server.books.verify().problems == []


def test_drift_is_listed_with_what_it_takes_to_look_into_it(server: Server, fal: Fal) -> None:
    """A call that somebody else made with the operator's credential, and one whose charge had to be computed."""
    account, key = server.books.account(5000)
    server.post(key, weather="units=none")
    direct = requests.post(
        f"{fal.url}/fal-ai/flux/dev",
        json={"prompt": "x", "image_size": "square_hd"},
        headers={"Authorization": f"Key {OPERATOR_KEY}"},
        timeout=30,
    )
    requests.post(
        f"{fal.url}/fal-ai/flux/schnell", json={"prompt": "x"}, headers={"Authorization": "Key a:b"}, timeout=30
    )
    done = run(server, "--json")
    assert done.exit_code == 0
    mine = [
        one for one in json.loads(done.stdout)["drift"] if one["fal_request_id"] == direct.headers["x-fal-request-id"]
    ]
    assert [(one["kind"], one["call_id"], one["model"]) for one in mine] == [
        ("unexplained_event", None, "fal-ai/flux/dev")
    ]
    assert all(set(one) == DRIFT_FIELDS for one in json.loads(done.stdout)["drift"])
    table = run(server).stdout
    assert direct.headers["x-fal-request-id"] in table
    assert server.books.calls(account)[0].usage_source == "events"
    assert server.books.verify().problems == []


@pytest.mark.engines("sqlite")  # fal's answers are the same to both
@pytest.mark.parametrize("weather", [{"status": 403}, {"body": "html"}, {"body": "array"}, {"body": "object"}])
def test_a_bad_answer_of_fals_changes_nothing_and_is_said(server: Server, fal: Fal, weather: dict[str, Any]) -> None:
    account, key = server.books.account(5000)
    server.post(key, weather="units=none")
    before = server.books.standing(account)
    match = {"match": "v1/models/billing-events"}
    requests.post(fal.url + "/_sandbox/weather", json=[match | weather] * 5, timeout=10).raise_for_status()
    done = run(server, "--json")
    requests.delete(fal.url + "/_sandbox/weather", timeout=10)
    assert done.exit_code == 1
    assert json.loads(done.stdout)["drift"] is None
    assert "fal's bill could not be read" in done.stderr.splitlines()[-1]
    assert OPERATOR_KEY not in done.stderr + done.stdout
    assert server.books.standing(account) == before


def test_rows_of_fals_bill_that_make_no_sense_are_no_success() -> None:
    """They may be calls that nobody has paid: the exit status says so, not a line on stderr alone (row 79)."""
    compared = fal_bill.Compared(events=3, left_out=25, unreadable=["an event has no request_id"])
    assert COMMAND._shape(reconciler.Round(), compared, 0)["unreadable"] == 25
    with pytest.raises(Refused, match="25 rows of fal's bill could not be read"):
        COMMAND._tell(reconciler.Round(), compared, None)


@pytest.mark.engines("sqlite")
def test_a_bad_day_is_named(server: Server) -> None:
    assert "2026-11-22" in run(server, "--since", "yesterday").misused()


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("settings", [{"ABHIAPI_FAL_QUEUE_URL": "http://127.0.0.1:9"}, {}], ids=["gone", "refuses"])
def test_jobs_that_could_not_be_looked_at_are_said_and_stay(server: Server, fal: Fal, settings: dict[str, str]) -> None:
    account, key = server.books.account(5000)
    customer = Jobs(server, key)
    ids = [customer.job() for _ in range(3)]
    until(lambda: completed(fal, ids), what="fal is done")
    if not settings:
        ordered = [{"match": f"queue/status/{each}", "status": 403} for each in ids]
        requests.post(fal.url + "/_sandbox/weather", json=ordered, timeout=10).raise_for_status()
    started = CommandLine(server.folder).start("reconcile", "--json", **settings_of(server) | settings)
    done = finish(started)  # a process of its own, whose log is on stderr
    assert done.exit_code == 1
    assert json.loads(done.stdout)["failed"] == 3
    assert done.stderr.splitlines()[-1].startswith("error: 3 jobs could not be looked at")
    assert done.stderr.count("fal refused the operator's credential") == (0 if settings else 1)
    assert OPERATOR_KEY not in done.stderr + done.stdout
    assert server.books.standing(account) == (5_000_000, 3 * FLUX_MICROS)
    assert told(run(server, "--json")) == {"settled": 3}


@pytest.mark.engines("sqlite")
def test_without_a_credential_it_does_nothing(tmp_path: Path, database_url: str) -> None:
    assert "FAL_KEY" in CommandLine(tmp_path, database_url)("reconcile", FAL_KEY="").misused()


def test_jobs_are_looked_at_side_by_side_and_waiting_is_told(
    tmp_path: Path, clock: Clock, database: Database, database_url: str
) -> None:
    """A fal that answers only once twenty have asked: one after the other would never get an answer."""
    customer = Customer.new(database, clock, credits=5000)
    for number in range(3 * SIDE_BY_SIDE):
        call = customer.open_call()

        def write(tx: Any, call: calls.OpenCall = call, number: int = number) -> None:
            calls.admit(tx, customer.admission(call, mode="queue", deadline_in_ms=10**9))
            jobs.remember(tx, call, f"job-{number}", http_status=200)

        database.write(write)
    together, was_told = threading.Barrier(SIDE_BY_SIDE), threading.Event()

    def script(sock: socket.socket, received: Received) -> None:
        if "billing-events" in received.line:
            body = b'{"billing_events":[],"next_cursor":null,"has_more":false}'
        else:
            together.wait(20)
            assert was_told.wait(20)
            body = b'{"status":"IN_PROGRESS"}'
        head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    with upstream() as slow:
        slow.script = script
        process = CommandLine(tmp_path, database_url).start(
            "reconcile", "--json", FAL_KEY=OPERATOR_KEY, ABHIAPI_FAL_QUEUE_URL=slow.url, ABHIAPI_FAL_API_URL=slow.url
        )
        assert process.stderr is not None
        assert process.stderr.readline() == "0 jobs looked at, 0 of them ended, 0 failed\n"
        was_told.set()
        done = finish(process)
    assert told(done) == {"open": 3 * SIDE_BY_SIDE}
    assert customer.standing() == (5_000_000, Micros(3 * SIDE_BY_SIDE * FLUX_MICROS))
