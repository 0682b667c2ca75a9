"""Pages of other origins: nothing for any by default; by the setting every answer, and never a cookie."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from abhiapi.web import cors
from tests.harness import ROOT, Books, Fal, Server
from tests.raw_http import Received, Upstream

PAGE, OTHER = "https://app.example.com", "http://127.0.0.1:5173"
ROUTES = (
    "/fal-ai/flux/dev", "/queue/fal-ai/flux/dev", "/api/fal/proxy", "/v1/account", "/v1/prices", "/", "/tokens/",
    "/healthz", "/fal-ai/queue/requests/x", "/fal-ai/flux/dev/stream", "/storage/upload/initiate", "/no/such%2f",
)  # fmt: skip
STRANGERS = (
    "https://evil.example", "https://app.example.com.evil.example", "null", "http://app.example.com", "*", "",
    "https://app.example.com:8443", "https://APP.example.com", "https://app.example.com/",
)  # fmt: skip
OURS = ("access-control-allow-origin", "access-control-allow-methods", "access-control-allow-headers",
        "access-control-max-age", "access-control-expose-headers", "access-control-allow-credentials")  # fmt: skip
FALS = "Access-Control-Allow-Origin: *\nAccess-Control-Allow-Credentials: true\naccess-control-expose-headers: x-a"


@pytest.fixture(scope="module")
def open_server(odd_fal: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that two origins may call, before a fal that has its own mind about origins."""
    settings = {"ABHIAPI_CORS_ORIGINS": f"{PAGE},{OTHER}"}
    with Server.started(tmp_path_factory.mktemp("cors"), odd_fal.url, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def wide_open_server(odd_fal: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.started(tmp_path_factory.mktemp("wide"), odd_fal.url, ABHIAPI_CORS_ORIGINS="*") as running:
        yield running


def preflight(
    server: Server, path: str, origin: str | None = PAGE, *, asks: str = "", **more: str
) -> requests.Response:
    headers = {"Access-Control-Request-Method": "POST"} | more
    if origin is not None:
        headers["Origin"] = origin
    if asks:
        headers["Access-Control-Request-Headers"] = asks
    return requests.options(server.url + path, headers=headers, timeout=30)


def shown(response: requests.Response) -> dict[str, str]:
    """The headers about origins, by their names in lower case."""
    return {
        name.lower(): value for name, value in response.headers.items() if name.lower().startswith("access-control-")
    }


def varies(response: requests.Response) -> bool:
    return "Origin" in [part.strip() for part in response.headers.get("Vary", "").split(",")]


@pytest.mark.parametrize("path", ROUTES)
def test_a_preflight_is_answered_without_a_key_and_not_forwarded(
    open_server: Server, odd_fal: Upstream, path: str
) -> None:
    asks = "authorization, content-type, accept, x-fal-target-url, x-fal-queue-priority, x-app-fal-disable-fallback"
    response = preflight(open_server, path, asks=asks, **{"x-fal-target-url": "https://fal.run/fal-ai/flux/dev"})
    assert (response.status_code, response.content) == (204, b"")
    assert shown(response) == {
        "access-control-allow-origin": PAGE,
        "access-control-allow-methods": "GET, POST, PUT, OPTIONS",
        "access-control-allow-headers": asks,
        "access-control-max-age": "7200",
    }
    assert varies(response)
    assert odd_fal.received == []


@pytest.mark.parametrize("origin", STRANGERS)
def test_a_page_of_another_origin_gets_no_leave(open_server: Server, odd_fal: Upstream, origin: str) -> None:
    response = preflight(open_server, "/fal-ai/flux/dev", origin, asks="authorization")
    assert (response.status_code, shown(response), varies(response)) == (204, {}, True)
    response = requests.get(open_server.url + "/v1/prices", headers={"Origin": origin}, timeout=30)
    assert (response.status_code, shown(response), varies(response)) == (200, {}, True)
    assert odd_fal.received == []


def test_only_headers_that_mean_something_here_are_allowed(open_server: Server) -> None:
    asks = "X-API-Key,cookie, *, x-evil, Idempotency-Key , x-fal-, x-fal-ü, x-fal-a b, host, x-fal-tags"
    assert shown(preflight(open_server, "/", asks=asks))["access-control-allow-headers"] == (
        "x-api-key, idempotency-key, x-fal-, x-fal-tags"
    )
    assert "access-control-allow-headers" not in shown(preflight(open_server, "/", asks="x-evil"))


def test_an_answer_may_be_read_with_its_headers(open_server: Server, odd_fal: Upstream) -> None:
    """fal's own leave never passes beside ours: two would make browsers refuse both."""
    _, key = open_server.books.account()
    odd_fal.answer(f"HTTP/1.1 200 OK\nContent-Type: application/json\nVary: accept\n{FALS}\nContent-Length: 2", b"{}")
    for origin in (PAGE, OTHER):
        response = open_server.post(key, headers={"Origin": origin})
        assert response.status_code == 200
        assert shown(response) == {
            "access-control-allow-origin": origin,
            "access-control-expose-headers": ", ".join(cors.EXPOSED),
        }
        assert varies(response)
        assert "accept" in response.headers["Vary"]
    response = open_server.post(key)
    assert (shown(response), varies(response)) == ({}, True)


def test_every_header_of_ours_may_be_read() -> None:
    """A new `x-abhiapi-` header cannot be forgotten in the list."""
    said = {
        name
        for path in (ROOT / "abhiapi").rglob("*.py")
        for name in re.findall(r'"((?:x-abhiapi-|X-RateLimit-)[A-Za-z-]+[a-z])"', path.read_text())
    }
    assert len(said) >= 6
    assert {name.lower() for name in said} <= set(cors.EXPOSED)


@pytest.mark.parametrize(
    ("path", "code"), [("/fal-ai/flux/dev", 401), ("/v1/account", 401), ("/v1/no", 404), ("/a%2fb", 401)]
)
def test_errors_may_be_read_too(open_server: Server, path: str, code: int) -> None:
    response = requests.get(open_server.url + path, headers={"Origin": PAGE}, timeout=30)
    assert response.status_code == code
    assert shown(response)["access-control-allow-origin"] == PAGE
    assert "retry-after" in shown(response)["access-control-expose-headers"]


def test_events_may_be_read_as_they_come(open_server: Server, odd_fal: Upstream) -> None:
    _, key = open_server.books.account()

    def stream(sock: socket.socket, received: Received) -> None:
        head = f"HTTP/1.1 200 OK\nContent-Type: text/event-stream\n{FALS}\nConnection: close\n\n"
        sock.sendall(head.replace("\n", "\r\n").encode() + b"data: {}\n\n")

    odd_fal.script = stream
    response = open_server.post(key, "/fal-ai/flux/dev/stream", headers={"Origin": PAGE})
    assert response.content.startswith(b"data: {}\n\n: _billing {")
    assert shown(response)["access-control-allow-origin"] == PAGE
    assert set(shown(response)) == {"access-control-allow-origin", "access-control-expose-headers"}


def test_any_origin_may_be_allowed(wide_open_server: Server) -> None:
    """And even then no browser sends or stores a cookie for it."""
    for response in (
        preflight(wide_open_server, "/fal-ai/flux/dev", "https://anywhere.example"),
        requests.get(wide_open_server.url + "/v1/prices", timeout=30),
    ):
        assert shown(response)["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in shown(response)


@pytest.mark.parametrize("path", ["/fal-ai/flux/dev", "/v1/account", "/api/fal/proxy", "/queue/fal-ai/flux/dev"])
def test_by_default_there_is_nothing_of_it(shared_server: Server, fal: Fal, books: Books, path: str) -> None:
    seen = fal.total()
    response = preflight(shared_server, path, asks="authorization")
    assert response.status_code in (401, 200, 405)
    assert not set(OURS) & set(shown(response))
    assert fal.total() == seen


def test_fals_leave_does_not_pass_by_default(odd_fal: Upstream, tmp_path: Any) -> None:
    odd_fal.answer(f"HTTP/1.1 200 OK\nContent-Type: application/json\n{FALS}\nContent-Length: 2", b"{}")
    with Server.started(tmp_path, odd_fal.url) as closed:
        _, key = closed.books.account()
        response = closed.post(key, headers={"Origin": PAGE})
        assert (response.status_code, shown(response)) == (200, {})
        assert "Vary" not in response.headers
