"""fal's own JavaScript client by its `proxyUrl`, unmodified: in Node, and in a page of another origin in a browser."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import raw_http
from tests.harness import Books, Fal, Server, environment
from tests.raw_http import Received
from tests.test_queue_clients import CHARGE, CLIENTS, is_paid, node_folder, ran

__all__ = ["node_folder"]  # a fixture

REQUEST_ID = re.compile(r"[0-9a-f-]{36}")


@pytest.fixture
def customer(shared_server: Server, books: Books) -> Iterator[tuple[str, str]]:
    """An account and its key; afterwards every call has ended, each was charged once, and the books are right."""
    name, key = books.account(5000)
    yield name, key
    calls = books.calls(name)
    assert not [call for call in calls if call.state not in ("settled", "released")]
    charges = [entry for entry in books.entries(name) if entry.kind == "charge"]
    assert len(charges) == len([call for call in calls if call.charged_micros])
    assert books.verify().problems == []


def node(folder: Path, script: str, server: Server, key: str, **more: str) -> Any:
    shutil.copy(CLIENTS / script, folder)
    env = environment(BASE_URL=server.url, KEY=key, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1", **more)
    return json.loads(ran(["node", script], env, folder))


def test_everything_of_the_clients_own_readme(
    shared_server: Server, fal: Fal, books: Books, node_folder: Path, customer: tuple[str, str]
) -> None:
    """failures.md rows 61, 62 and 64: nothing of the caller's key reaches fal, and no minting route does."""
    name, key = customer
    told = node(node_folder, "proxy.mjs", shared_server, key)
    for call in ("run", "get", "polling", "streaming"):
        assert is_paid(told[call]["data"]), call
        assert REQUEST_ID.fullmatch(told[call]["requestId"])
    assert told["pollingUpdates"][-1] == told["streamingUpdates"][-1] == told["streamStatus"][-1] == "COMPLETED"
    queue = told["queue"]
    assert queue["submitted"]["_billing"]["credits_used"] == 0
    assert queue["submitted"]["status_url"].startswith(f"{shared_server.url}/queue/fal-ai/flux/requests/")
    assert queue["status"]["_billing"] == queue["result"]["data"]["_billing"]
    assert queue["result"]["requestId"] == queue["submitted"]["request_id"]
    assert told["cancelled"] == "client_cancelled"
    assert told["uploaded"] == "a small file"
    assert told["large"]["length"] == told["large"]["wanted"] == 91 * 1024 * 1024
    assert told["blob"]["data"]["image"]["url"]
    enlarged = [call for call in fal.calls("/fal-ai/clarity-upscaler") if "/uploads/" in str(call["body"])]
    assert enlarged
    assert len([entry for entry in books.entries(name) if entry.kind == "charge"]) == 6
    seen = fal.calls()
    assert not [call for call in seen if "tokens" in call["path"] or "auth" in call["path"]]
    assert key not in str(seen)


def test_errors_are_those_that_the_client_knows(
    shared_server: Server, books: Books, node_folder: Path, customer: tuple[str, str]
) -> None:
    _, poor = books.account(0)
    told = node(node_folder, "proxy_errors.mjs", shared_server, customer[1], POOR_KEY=poor)
    errors = told["errors"]
    kinds = {name: (error["kind"], error["status"]) for name, error in errors.items()}
    assert kinds == {
        "invalid": ("ValidationError", 422), "invalidJob": ("ValidationError", 422), "unpriced": ("ApiError", 404),
        "unpricedJob": ("ApiError", 404), "unknownJob": ("ApiError", 404), "poor": ("ApiError", 402),
        "poorJob": ("ApiError", 402), "poorUpload": ("ApiError", 402), "wrongKey": ("ApiError", 401),
    }  # fmt: skip
    assert {error["loc"][-1] for error in errors["invalid"]["fields"]} == {"prompt", "num_images"}
    assert "26.25 credits and 0 are available" in errors["poor"]["message"]
    assert "credits are available" in errors["poorUpload"]["message"]
    assert "no-such-model" in errors["unpriced"]["message"]
    assert errors["unknownJob"]["body"]["status"] == "NOT_FOUND"
    assert told["realtime"] == {"target": "https://rest.fal.ai/tokens/", "status": 404}


def test_a_stream_is_fals_events_and_nothing_else(node_folder: Path, tmp_path: Path) -> None:
    """The closing comment is invisible: the last event that the client resolves with is fal's last."""
    events = [{"step": 1, "text": "caf\u00e9"}, {"images": [{"url": "x"}]}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)

    def stream(sock: socket.socket, received: Received) -> None:
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\nx-fal-billable-units: 1\r\n"
        sock.sendall((head + "x-fal-request-id: r-1\r\n\r\n" + body).encode())

    with raw_http.upstream() as fal, Server.started(tmp_path, fal.url) as server:
        fal.script = stream
        name, key = server.books.account()
        told = node(node_folder, "proxy_stream.mjs", server, key)
        assert told == {"events": events, "last": events[-1], "requestId": "r-1"}
        (received,) = fal.received
        assert received.line == "POST /fal-ai/flux/dev/stream HTTP/1.1"
        assert ("accept", "application/json, text/event-stream") in received.headers
        (call,) = server.books.calls(name)
        assert (call.mode, call.charged_micros) == ("stream", int(CHARGE * 1000))
