"""Event streams through a real gunicorn: when events leave, and how the hold ends whatever becomes of the caller."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests import raw_http
from tests.harness import Books, Fal, Server, own, until
from tests.raw_http import Received, connect, request_bytes
from tests.test_queue import CAT, FLUX_MICROS, Jobs

STREAM = "/fal-ai/flux/dev/stream"
ABANDONED = 1_000


def opened(server: Server, key: str, weather: str, body: Any = None, path: str = STREAM) -> requests.Response:
    headers = {"Authorization": f"Key {key}", "x-fal-sandbox": weather, "Accept": "text/event-stream"}
    return requests.post(server.url + path, json=body or CAT, headers=headers, stream=True, timeout=60)


def shown(text: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in text.split(b"\n") if line.startswith(b"data: ")]


def bill_in(text: bytes) -> dict[str, Any]:
    """What the closing comment says; it is the last line."""
    *_, last = text.splitlines()
    told: dict[str, Any] = json.loads(last.removeprefix(b": _billing "))
    return told


@pytest.mark.engines
def test_each_event_arrives_before_fal_sends_the_next(shared_server: Server, books: Books, fal: Fal) -> None:
    """fal sends event n + 1 only when the caller, who has event n, lets it."""
    account, key = books.account()
    gate = own("in-step")
    got = b""
    with opened(shared_server, key, f"events=5; event_gate={gate}") as stream:
        assert stream.headers["x-accel-buffering"] == "no"
        pieces = stream.iter_content(None)
        for number in range(1, 5):
            while len(shown(got)) < number:
                got += next(pieces)
            assert len(shown(got)) == number
            assert books.calls(account)[0].state == "held"
            fal.release(f"{gate}-{number}")
        got += b"".join(pieces)
    assert len(shown(got)) == 5
    assert bill_in(got) == {
        "model": "fal-ai/flux/dev", "credits_used": 26.25, "cost_usd": 0.02625, "balance_remaining": 973.75,
    }  # fmt: skip
    (call,) = books.calls(account)
    assert (call.model, call.mode, call.state, call.charged_micros) == (
        "fal-ai/flux/dev", "stream", "settled", FLUX_MICROS,
    )  # fmt: skip


@pytest.mark.parametrize(
    "weather",
    ["pings=1", "split=1", "unended=1", "units=none", "encoding=gzip", "events=1", "events=300", "chunked=1"],
)
def test_the_bytes_are_fals_own_and_one_comment(shared_server: Server, books: Books, fal: Fal, weather: str) -> None:
    account, key = books.account()
    body = {"prompt": "a café \N{CAT FACE}", "seed": 7}
    url = fal.url + STREAM
    direct = requests.post(url, json=body, headers={"Authorization": "Key x:y", "x-fal-sandbox": weather}, timeout=60)
    through = opened(shared_server, key, weather, body).content
    of_fal = b"".join(line for line in direct.content.splitlines(keepends=True) if not line.startswith(b": ping"))
    ours = b"".join(line for line in through.splitlines(keepends=True) if not line.startswith(b": ping"))
    separator = b"" if of_fal.endswith(b"\n") else b"\n"
    assert ours.startswith(of_fal + separator + b": _billing {")
    assert bill_in(through)["credits_used"] == 26.25
    assert books.calls(account)[0].usage_source == ("catalogue" if weather == "units=none" else "fal")
    assert through.count(b": ping ") == direct.content.count(b": ping ")


@pytest.mark.parametrize(
    ("weather", "body", "path", "status", "kind"),
    [
        ("", {"image_size": "square"}, STREAM, 422, None),
        ("", CAT, "/fal-ai/kling-video/v2.6/pro/text-to-video/stream", 404, None),
        ("", CAT, "/fal-ai/no-such-model/stream", 404, "unpriced_model"),
        ("status=500", CAT, STREAM, 500, None),
        ("status=403", CAT, STREAM, 502, "upstream_refused"),
        ("drop=before_headers", CAT, STREAM, 500, "upstream_outcome_unknown"),
    ],
)
def test_what_goes_wrong_before_the_stream_is_a_plain_answer(
    shared_server: Server, books: Books, weather: str, body: Any, path: str, status: int, kind: str | None
) -> None:
    account, key = books.account()
    answer = opened(shared_server, key, weather, body, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.json().get("error", {}).get("type") == kind
    assert books.standing(account) == (1_000_000, 0)


@pytest.mark.engines
def test_a_stream_that_cannot_be_paid_never_reaches_fal(shared_server: Server, books: Books, fal: Fal) -> None:
    _, key = books.account(1)
    marker = own("too dear a stream")
    refused = opened(shared_server, key, "", {**CAT, "prompt": marker})
    assert (refused.status_code, refused.json()["error"]["type"]) == (402, "insufficient_credits")
    assert not fal.calls(marker)


@pytest.mark.engines
def test_a_stream_that_breaks_is_broken_for_the_caller_too_and_costs_nothing(
    shared_server: Server, books: Books
) -> None:
    account, key = books.account()
    got: list[bytes] = []
    with opened(shared_server, key, "cut_after=2; events=5") as stream, pytest.raises(requests.RequestException):
        got.extend(stream.iter_content(None))
    assert len(shown(b"".join(got))) == 2
    assert b"_billing" not in b"".join(got)
    call = until(lambda: next((c for c in books.calls(account) if c.state != "held"), None), what="it ends")
    assert (call.state, call.reason) == ("released", "upstream_broken")
    assert books.standing(account) == (1_000_000, 0)


@pytest.mark.engines
def test_an_abandoned_stream_is_drained_and_charged(shared_server: Server, books: Books, fal: Fal) -> None:
    """Row 14 of B2: while fal goes on after the hang-up its hold stands; at fal's end it is charged as fal bills it."""
    account, key = books.account()
    gate = own("abandoned")
    with opened(shared_server, key, f"events=40; event_gate={gate}; units=2") as stream:
        assert len(shown(next(stream.iter_content(None)))) == 1
    for number in range(1, 39):
        fal.release(f"{gate}-{number}")
    assert books.calls(account)[0].state == "held"
    assert not [call for call in books.calls(account) if call.finished_at]
    fal.release(f"{gate}-39")
    until(lambda: books.calls(account)[0].state == "settled", what="it is settled")
    assert books.standing(account) == (1_000_000 - 2 * FLUX_MICROS, 0)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def used_by(pid: int) -> tuple[int, int]:
    """Open files and threads of a process."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def connections_to(server: Server) -> list[str]:
    """Callers' connections that the server has not closed."""
    port, closing, listening = f":{int(server.url.rpartition(':')[2]):04X}", "06", "0A"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [row[2] for row in rows if row[1].endswith(port) and row[3] not in (closing, listening)]


def hang_up(server: Server, key: str, number: int) -> None:
    """Ask for a stream and go away: at once, with its head, or in its middle; some with a reset."""
    weather = "events=6; event_delay_s=0.005"
    with connect(server.url) as sock:
        sock.sendall(request_bytes(key, target=STREAM, x_fal_sandbox=weather, body=json.dumps(CAT).encode()))
        got = b""
        wanted = (b"", b"\r\n\r\n", b"data: ")[number % 3]
        while wanted not in got:
            got += sock.recv(65536)
        if number % 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


THREADS_OF_GEVENT = 11  # its pool for look-ups grows to ten, whenever it likes


def test_a_thousand_abandoned_streams_are_charged_and_leave_nothing(fal: Fal, tmp_path: Path) -> None:
    """Row 14 of B2: charges are fal's bill, and no socket, thread or place among the calls at once is left."""
    at_once = 200
    with Server.started(tmp_path, fal.url, ABHIAPI_CONCURRENCY=str(at_once)) as server:
        account, key = server.books.account(100_000)
        (worker,) = children(server.process.popen.pid)
        counted = [0]

        def all_settled() -> bool:
            states = {call.state for call in server.books.calls(account)[: counted[0]]}
            return states == {"settled"} and len(server.books.calls(account)) == counted[0]

        with ThreadPoolExecutor(16) as pool:
            for count in (100, ABANDONED):
                before = used_by(worker)
                list(pool.map(lambda number: hang_up(server, key, number), range(count)))
                counted[0] += count
                until(all_settled, what="all are settled", within_s=60)
        until(lambda: not connections_to(server), what="the callers' sockets are closed")
        files, threads = used_by(worker)
        assert (
            files < before[0] + at_once
        )  # connections to fal are kept for the next call, as many as were busy at once
        assert threads < before[1] + THREADS_OF_GEVENT
        billed = requests.get(f"{fal.url}/_sandbox/bill", timeout=10).json()["billed"]
        ours = {call.fal_request_id for call in server.books.calls(account)}
        assert len([one for one in billed if one["request_id"] in ours]) == len(ours) == counted[0]
        assert server.books.standing(account) == (100_000_000 - counted[0] * FLUX_MICROS, 0)
        with ThreadPoolExecutor(at_once) as pool:
            burst = [pool.submit(server.post, key, weather="hold_until=all-places-free") for _ in range(at_once)]
            until(lambda: len(open_calls(server, account)) == at_once, what="all are with fal")
            fal.release("all-places-free")
            assert {answer.result().status_code for answer in burst} == {200}
        assert server.books.verify().problems == []


def open_calls(server: Server, account: str) -> list[Any]:
    return [call for call in server.books.calls(account) if call.state == "held"]


def test_an_abandoned_stream_without_end_is_dropped_in_time(strict_server: Server, fal: Fal) -> None:
    """Row 14 of B2: fal is waited for no longer than for any call (here a second)."""
    account, key = strict_server.books.account()
    with opened(strict_server, key, "events=1000000; event_delay_s=0.02") as stream:
        next(stream.iter_content(None))
    call = until(
        lambda: next((c for c in strict_server.books.calls(account) if c.state != "held"), None), what="an end"
    )
    assert (call.state, call.reason) in (("released", "upstream_timeout"), ("settled", None))
    assert strict_server.books.standing(account)[1] == 0


# --- the status stream ------------------------------------------------------------------------------------------


@pytest.fixture
def slow_fal() -> Iterator[tuple[raw_http.Upstream, threading.Event]]:
    """A fal whose status stream shows its head at once, and its first event when it is told to."""
    told = threading.Event()
    shown_status = b'data: {"status":"IN_QUEUE","request_id":"r-1","queue_position":0}\n\n'

    def answer(sock: socket.socket, received: Received) -> None:
        if received.line.startswith("POST"):
            body = b'{"status":"IN_QUEUE","request_id":"r-1"}'
            sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n")
            sock.sendall(b"content-length: %d\r\n\r\n" % len(body) + body)
            return
        if "/status/stream" not in received.line:
            return
        sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        if told.wait(raw_http.TIMEOUT_S / 2):
            sock.sendall(shown_status)

    with raw_http.upstream() as running:
        running.script = answer
        yield running, told
    told.set()


def test_the_head_of_a_status_stream_leaves_before_fals_first_event(
    slow_fal: tuple[raw_http.Upstream, threading.Event], tmp_path: Path
) -> None:
    fal, told = slow_fal
    with Server.started(tmp_path, fal.url) as server:
        _, key = server.books.account()
        jobs = Jobs(server, key)
        jobs.job()
        with jobs.get("/queue/fal-ai/flux/requests/r-1/status/stream", stream=True) as stream:
            assert stream.status_code == 200  # and fal has sent no event yet
            told.set()
            assert [event["status"] for event in shown(stream.content)] == ["IN_QUEUE"]


def test_the_books_are_right_after_all_of_it(books: Books, strict_server: Server) -> None:
    assert books.verify().problems == []
    assert strict_server.books.verify().problems == []
