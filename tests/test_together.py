"""The parts together: one submit with a key, a webhook, a target and a stream; two servers; kills and ends between."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from sqlalchemy import select

from abhiapi import tables, webhooks
from tests.harness import Fal, Server, free_port, own, until
from tests.postgres import sweep_at_once
from tests.receiver import Receiver

pytestmark = pytest.mark.engines

FLUX_MICROS = 26_250
SETTINGS = {"ABHIAPI_WEBHOOK_ALLOW_LOOPBACK": "1", "ABHIAPI_RECONCILE_INTERVAL_S": "1"}
WAVES = {"sqlite": 3, "postgresql": 1}
MODEL = "fal-ai/flux/dev"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver.started() as running:
        yield running


def submit(
    server: Server, key: str, name: str, receiver: Receiver, *, weather: str = "", by_target: bool = False
) -> Any:
    """One submit with everything; None where the server was killed meanwhile."""
    query = f"fal_webhook={requests.utils.quote(receiver.url(f'/{name}'), safe='')}"
    headers = {"authorization": f"Key {key}", "idempotency-key": name, "x-fal-sandbox": weather}
    path = f"/queue/{MODEL}?{query}"
    if by_target:
        headers["x-fal-target-url"] = f"https://queue.fal.run/{MODEL}?{query}"
        path = "/healthz?ignored=1"
    try:
        return requests.post(server.url + path, json={"prompt": name}, headers=headers, timeout=60)
    except requests.RequestException:
        return None


def test_a_submit_with_everything_is_one_job_one_charge_and_one_webhook(
    fal: Fal, tmp_path: Path, receiver: Receiver, database_url: str
) -> None:
    """failures.md B3-24, 26, 28: through either door, under one key, looked at by everybody at once."""
    port = free_port()
    settings = SETTINGS | {
        "PORT": str(port),
        "ABHIAPI_PUBLIC_URL": f"http://127.0.0.1:{port}",
        "ABHIAPI_FAL_REST_URL": f"{fal.url}/rest",
        "ABHIAPI_DATABASE_URL": database_url,
    }
    name = own("together")
    with Server.started(tmp_path, fal.url, **settings) as server, ThreadPoolExecutor(24) as pool:
        account, key = server.books.account(1000)
        weather = f"hold_until={name}; queue_s=0"
        several = [
            pool.submit(submit, server, key, name, receiver, weather=weather, by_target=bool(n % 2)) for n in range(20)
        ]
        answers = [one.result() for one in several]
        assert {one.status_code for one in answers} == {200}
        (request_id,) = {one.json()["request_id"] for one in answers}
        assert sorted("idempotency-replayed" in one.headers for one in answers) == [False, *[True] * 19]
        job = f"{server.url}/queue/fal-ai/flux/requests/{request_id}"
        stream = pool.submit(requests.get, f"{job}/status/stream", headers={"x-api-key": key}, timeout=60)
        fal.release(name)
        looks = [
            pool.submit(requests.get, f"{job}{part}", headers={"x-api-key": key}, timeout=60)
            for part in ("", "/status", "/response") * 10
        ]
        assert {look.result().status_code for look in looks} <= {200, 202, 400}
        assert '"credits_used": 26.25' in stream.result().text
        (told,) = receiver.delivered(request_id)
        assert told.json["_billing"]["credits_used"] == 26.25
        assert server.books.standing(account) == (1_000_000 - FLUX_MICROS, 0)
        assert len([call for call in fal.calls(name) if call["method"] == "POST"]) == 1
        assert server.books.verify().problems == []


def test_two_servers_on_one_database_are_one_service(
    fal: Fal, tmp_path: Path, receiver: Receiver, database_url: str
) -> None:
    """As at a reload: whichever is asked, a key is one job, and a webhook is delivered by one of them."""
    settings = SETTINGS | {"ABHIAPI_DATABASE_URL": database_url}
    with (
        Server.started(tmp_path, fal.url, **settings) as first,
        Server.started(tmp_path, fal.url, **settings) as second,
        ThreadPoolExecutor(24) as pool,
    ):
        account, key = first.books.account(1000)
        names = [f"reload-{n}" for n in range(8)]
        several = {
            name: [pool.submit(submit, server, key, name, receiver) for server in (first, second) * 3] for name in names
        }
        ids = {name: {one.result().json()["request_id"] for one in those} for name, those in several.items()}
        assert all(len(those) == 1 for those in ids.values())
        for (request_id,) in ids.values():
            receiver.delivered(request_id)
        until(lambda: first.books.standing(account) == (1_000_000 - 8 * FLUX_MICROS, 0), what="all are charged once")
        assert Counter(one.path for one in receiver.deliveries) == {f"/{name}": 1 for name in names}
        assert first.books.verify().problems == []


def test_kills_between_repeats_make_no_second_job(
    fal: Fal, tmp_path: Path, receiver: Receiver, engine: str, database_url: str
) -> None:
    """B3-28, B3-30: however often the server is killed while clients repeat, fal hears of each key once at most."""
    names: list[str] = []
    settings = SETTINGS | {"ABHIAPI_DATABASE_URL": database_url}
    server = Server.start(tmp_path, fal.url, **settings)
    account, key = server.books.account(5000)

    for wave in range(WAVES[engine]):
        if wave:
            server = Server.start(tmp_path, fal.url, **settings)
        try:
            new = [own(f"storm-{wave}-{n}") for n in range(10)]
            names += new
            with ThreadPoolExecutor(16) as pool:
                since = fal.total()
                for name in names:
                    pool.submit(submit, server, key, name, receiver)
                until(lambda since=since, wave=wave: fal.total() > since + 2 * wave, what="some are at fal")  # type: ignore[misc]
                server.process.kill()
        finally:
            server.process.kill()
    with Server.started(tmp_path, fal.url, **settings) as server:
        if engine == "postgresql":
            sweep_at_once(server)
        for name in names:
            submit(server, key, name, receiver)
        jobs = [call for call in server.books.calls(account) if call.fal_request_id]
        until(
            lambda: all(call.state not in ("held", "sent") for call in server.books.calls(account)),
            what="every hold has ended, or is the operator's",
        )
        for call in jobs:  # delivered, or still leased by a process that was killed
            row = server.books.read(lambda tx, call=call: webhooks.one(tx, call.call_id))  # type: ignore[misc]
            assert row is not None
            assert row.state == "delivered" or row.next_attempt_at is not None
        after = server.books.calls(account)
        lost = [call for call in after if call.state == "unknown"]
        assert {call.reason for call in lost} <= {"submit_outcome_unknown"}
        settled = [call for call in after if call.state == "settled"]
        assert len(settled) + len(lost) >= len(names)
        held = sum(call.held_micros for call in lost)
        assert server.books.standing(account) == (5_000_000 - len(settled) * FLUX_MICROS, held)
        heard = [len([call for call in fal.calls(name) if call["method"] == "POST"]) for name in names]
        assert max(heard) == 1
        assert sum(heard) >= len(settled)
        assert server.books.verify().problems == []


@pytest.mark.engines("sqlite")  # who hangs there is the customer's host
def test_an_end_in_order_waits_for_no_customers_host(
    fal: Fal, tmp_path: Path, receiver: Receiver, database_url: str
) -> None:
    """SIGTERM while a webhook hangs: the server ends all the same (the next one delivers: `test_webhooks`)."""
    receiver.hold = threading.Event()
    server = Server.start(tmp_path, fal.url, **SETTINGS, ABHIAPI_DATABASE_URL=database_url)
    try:
        _, key = server.books.account(1000)
        request_id = submit(server, key, "sigterm", receiver).json()["request_id"]
        receiver.delivered(request_id)
        assert server.process.stop() == 0
        columns = (tables.webhooks.c.state, tables.webhooks.c.last_status, tables.webhooks.c.last_error)
        left = server.books.read(lambda tx: tx.all(select(*columns)))
        assert left == [("due", None, None)]  # it was not waited for, not even until it failed
    finally:
        server.process.kill()
