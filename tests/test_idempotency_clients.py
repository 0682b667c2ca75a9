"""The Idempotency-Key with a real server: races, crashes, callers who hang up, and fal's own client losing answers."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.harness import Fal, Server, until
from tests.raw_http import connect, request_bytes
from tests.test_queue import CAT, FLUX_MICROS, MODEL
from tests.test_queue_clients import CLIENTS, Site, TlsFront, is_paid, ran

LOST_EACH = 2  # answers that the network loses before one gets through


def post(server: Server, key: str, idempotency_key: str, path: str = "/fal-ai/flux/dev", **more: Any) -> Any:
    return server.post(key, path, headers={"Idempotency-Key": idempotency_key}, **more)


def charges(server: Server, account: str) -> int:
    return len([entry for entry in server.books.entries(account) if entry.kind == "charge"])


# --- one call, whatever happens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/fal-ai/flux/dev", MODEL])
def test_fifty_at_once_are_one_call(shared_server: Server, fal: Fal, path: str) -> None:
    """Row 28 of B3: fifty equal answers, one call at fal, one hold."""
    account, key = shared_server.books.account(5000)
    prompt = f"fifty {path}"
    with ThreadPoolExecutor(50) as pool:
        answers = list(
            pool.map(
                lambda _: post(shared_server, key, "k", path, body={**CAT, "prompt": prompt}, weather="delay_s=0.5"),
                range(50),
            )
        )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert len({answer.headers["x-abhiapi-call-id"] for answer in answers}) == 1
    assert len({answer.headers["x-fal-request-id"] for answer in answers}) == 1
    assert sum(answer.headers.get("idempotency-replayed") == "true" for answer in answers) == 49
    assert len(fal.calls(prompt)) == len(shared_server.books.calls(account)) == 1


def test_upstream_calls_are_as_many_as_holds_whatever_is_repeated(shared_server: Server, fal: Fal) -> None:
    """Row 29 of B3: the proxy itself repeats nothing."""
    account, key = shared_server.books.account(5000)
    prompt = "calls and holds"
    for weather in ("status=500", "status=429", "drop=before_headers", "drop=in_body", "status=422", ""):
        for _ in range(3):
            post(shared_server, key, f"k {weather}", body={**CAT, "prompt": prompt}, weather=weather)
    assert len(fal.calls(prompt)) == len(shared_server.books.calls(account)) == 3 * 4 + 2
    assert charges(shared_server, account) == 1
    assert shared_server.books.standing(account) == (5_000_000 - FLUX_MICROS, 0)


def test_a_large_request_is_one_call_too(shared_server: Server, fal: Fal) -> None:
    """A body that lies in a file while it waits; another that differs in its last byte only is another request."""
    account, key = shared_server.books.account(5000)
    body = {**CAT, "image_url": "data:image/png;base64," + "A" * 3_000_000}
    first, again = (post(shared_server, key, "k", body=body) for _ in range(2))
    assert first.content == again.content
    assert again.headers["idempotency-replayed"] == "true"
    other = post(shared_server, key, "k", body={**body, "image_url": body["image_url"] + "A"})
    assert (other.status_code, other.json()["error"]["type"]) == (422, "idempotency_key_reused")
    assert charges(shared_server, account) == 1


def test_a_killed_server_and_the_next_one_pay_once(fal: Fal, tmp_path: Path) -> None:
    """Answers are replayed after a restart; a call that was given back runs anew; a lost submit never does."""
    server = Server.start(tmp_path, fal.url)
    prompt = "killed with keys"
    body = {**CAT, "prompt": prompt}
    with ThreadPoolExecutor(2) as pool:
        try:
            account, key = server.books.account(5000)
            done, job = post(server, key, "done"), post(server, key, "job", MODEL)
            assert (done.status_code, job.status_code) == (200, 200)
            for path, name in (("/fal-ai/flux/dev", "call"), (MODEL, "submit")):
                pool.submit(post, server, key, name, path, body=body, weather="delay_s=5")
            until(lambda: len(fal.calls(prompt)) == 2, what="both are at fal")
        finally:
            server.process.kill()
    with Server.started(tmp_path, fal.url) as again:
        replayed = post(again, key, "done")
        assert (replayed.content, replayed.headers["idempotency-replayed"]) == (done.content, "true")
        assert replayed.headers["x-abhiapi-call-id"] == done.headers["x-abhiapi-call-id"]
        replayed = post(again, key, "job", MODEL)
        assert (replayed.content, replayed.headers["idempotency-replayed"]) == (job.content, "true")
        assert post(again, key, "call", body=body).status_code == 200
        lost = post(again, key, "submit", MODEL, body=body)
        assert (lost.status_code, lost.json()["error"]["type"]) == (500, "idempotency_outcome_unknown")
        assert len(fal.calls(prompt)) == 3
        until(lambda: charges(again, account) == 3, what="the job is settled, too")
        assert again.books.standing(account) == (5_000_000 - 3 * FLUX_MICROS, FLUX_MICROS)
        assert again.books.verify().problems == []


def test_a_waiter_who_hangs_up_gives_its_place_back(fal: Fal, tmp_path: Path) -> None:
    with Server.started(tmp_path, fal.url, ABHIAPI_CONCURRENCY="2") as server, ThreadPoolExecutor(1) as pool:
        account, key = server.books.account(5000)
        body = json.dumps({**CAT, "prompt": "hangs up"}).encode()
        data = request_bytes(key, body=body, Idempotency_Key="k", x_fal_sandbox="hold_until=waiter-hung-up")
        with connect(server.url) as first:
            first.sendall(data)
            until(lambda: len(fal.calls("hangs up")) == 1, what="the first is at fal")
            with connect(server.url) as waiter:
                waiter.sendall(data)
                until(lambda: server.post(key).status_code == 429, what="the waiter has the other place")
            until(lambda: server.post(key).status_code == 200, what="the place is free again")
            fal.release("waiter-hung-up")
            assert first.recv(12) == b"HTTP/1.1 200"
        again = pool.submit(
            requests.post, server.url + "/fal-ai/flux/dev", data=body, timeout=20,
            headers={"x-api-key": key, "content-type": "application/json", "idempotency-key": "k"},
        )  # fmt: skip
        assert again.result().headers["idempotency-replayed"] == "true"
        assert len(fal.calls("hangs up")) == 1
        assert server.books.standing(account)[1] == 0


# --- fal's own client -------------------------------------------------------------------------------------------


class LosingFront(TlsFront):
    """Passes every request on, and loses the first answers to each kind of POST."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.answers: Counter[str] = Counter()

    def _serve(self, client: socket.socket) -> None:
        with (
            suppress(OSError),
            socket.create_connection(self._target) as server,
            self._context.wrap_socket(client, server_side=True) as secure,
        ):
            asked: list[str] = []
            threading.Thread(target=self._ask, args=(secure, server, asked), daemon=True).start()
            while data := server.recv(65536):
                if asked and asked[-1]:
                    path, asked[-1] = asked[-1], ""
                    self.answers[path] += 1
                    if self.answers[path] <= LOST_EACH:
                        secure.shutdown(socket.SHUT_RDWR)  # the answer was on its way: the call has run
                        return
                secure.sendall(data)

    @staticmethod
    def _ask(secure: socket.socket, server: socket.socket, asked: list[str]) -> None:
        with suppress(OSError):
            while data := secure.recv(65536):
                line = re.match(rb"POST (\S+) ", data)
                asked.extend([line[1].decode()] if line else [])
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)


@pytest.fixture
def lossy(shared_server: Server, tmp_path: Path) -> Iterator[tuple[Site, LosingFront]]:
    front = LosingFront(tmp_path)
    with Server.started(
        tmp_path, shared_server.env["ABHIAPI_FAL_RUN_URL"], ABHIAPI_PUBLIC_URL=f"https://{front.address}"
    ) as server:
        front.lead_to(server.url)
        account, key = server.books.account(5000)
        yield Site(server, account, key, front), front
    front.close()


@pytest.mark.parametrize("with_keys", [True, False])
def test_fals_python_client_behind_a_network_that_loses_answers(
    lossy: tuple[Site, LosingFront], fal: Fal, with_keys: bool
) -> None:
    """Row 28 of B3: with an Idempotency-Key one call and one charge each; without, as many charges as calls."""
    site, front = lossy
    prompt = f"losing answers {with_keys}"
    env = site.env(PROMPT=prompt) | ({"WITH_KEYS": "1"} if with_keys else {})
    told = json.loads(ran([sys.executable, str(CLIENTS / "python_repeats.py")], env))
    assert all(is_paid(answer) for answer in told.values())
    assert min(front.answers.values()) > LOST_EACH, "the client met losses on every route"
    calls = [call for call in fal.calls(prompt) if call["method"] == "POST"]
    until(lambda: site.charges() == len(calls), what="every job is settled")
    assert len(calls) == (3 if with_keys else 3 + 2 * LOST_EACH)
    assert site.server.books.standing(site.account) == (5_000_000 - len(calls) * FLUX_MICROS, 0)
    assert site.server.books.verify().problems == []


def test_fals_python_client_that_is_told_429_makes_no_job_of_it(fal: Fal, tmp_path: Path) -> None:
    """Row 28 of B3: it repeats a 429 by itself, and none of ours has reached fal."""
    front = TlsFront(tmp_path)
    with (
        Server.started(
            tmp_path,
            fal.url,
            ABHIAPI_CONCURRENCY="1",
            ABHIAPI_PUBLIC_URL=f"https://{front.address}",
            ABHIAPI_METRICS_TOKEN="token",
        ) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        front.lead_to(server.url)
        account, key = server.books.account(5000)
        site = Site(server, account, key, front)
        prompt = "told 429"
        busy = pool.submit(server.post, key, weather="hold_until=busy-no-more", body={**CAT, "prompt": "busy, 429"})
        until(lambda: fal.calls("busy, 429"), what="the only place is taken")
        env = site.env(PROMPT=prompt)
        client = pool.submit(ran, [sys.executable, str(CLIENTS / "python_repeats.py")], env)
        refused = 'abhiapi_refused_total{type="too_many_concurrent"}'
        token = {"Authorization": "Bearer token"}
        until(
            lambda: refused in requests.get(server.url + "/metrics", headers=token, timeout=10).text,
            what="the client was refused",
        )
        assert fal.calls(prompt) == []
        fal.release("busy-no-more")
        assert busy.result().status_code == 200
        assert all(is_paid(answer) for answer in json.loads(client.result()).values())
        calls = [call for call in fal.calls(prompt) if call["method"] == "POST"]
        until(lambda: site.charges() == len(calls) + 1, what="every job is settled")
        assert len(calls) == 3
    front.close()
