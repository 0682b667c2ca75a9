"""Authentication and what is forwarded (contract 3.2, 3.3): byte for byte both ways, less what must not cross."""

from __future__ import annotations

import gzip
import hashlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import psutil
import pytest
import requests

from abhiapi.sandbox import replies
from tests import raw_http
from tests.harness import OPERATOR_KEY, Books, Fal, Server
from tests.raw_http import Received, Upstream, without_billing

FLUX = "/fal-ai/flux/dev"
RSS_GROWTH_MAX = 60 * 1024 * 1024


def received_by(fal: Fal, response: requests.Response) -> dict[str, Any]:
    """What fal received of the call that was answered so."""
    (received,) = fal.calls(response.headers["x-fal-request-id"], last=50)
    return received


def sent_headers(received: dict[str, Any]) -> dict[str, str]:
    return {name.lower(): value for name, value in received["headers"]}


# --- to fal -----------------------------------------------------------------------------------------------------

BODIES = (
    b'{"prompt":"a cat"}',
    b' \r\n\t{ "prompt" :\t"a cat" ,\n "seed" : 7 }\n\n',
    b'{"prompt":"one","prompt":"two","prompt":"three"}',
    rb'{"prompt":"\u00e9\ud83d\ude00\/\"\\","raw":"' + "é😀\u2028".encode() + b'"}',
    rb'{"prompt":"lone \ud800 surrogate"}',
    b'{"prompt":"x","guidance_scale":1.0,"steps":1e5,"a":-0,"b":1E+2,"c":0.10000000000000000000000001}',
    b'{"prompt":"x","seed":123456789012345678901234567890}',
    b'{"z":1,"prompt":"order","a":2,"":null,"nested":{"b":[{}],"a":[]}}',
    b"{}",
)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_body_goes_to_fal_byte_for_byte(
    shared_server: Server, fal: Fal, books: Books, body: bytes, chunked: bool
) -> None:
    _, key = books.account()
    headers = {"x-api-key": key, "Content-Type": "application/json", "x-fal-sandbox": "status=200"}
    sent = iter([body[:3], body[3:]]) if chunked and len(body) > 3 else body
    response = requests.post(shared_server.url + FLUX, data=sent, headers=headers, timeout=60)
    assert response.status_code == 200
    received = received_by(fal, response)
    assert received["body"] == body.decode()
    assert received["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert sent_headers(received)["content-length"] == str(len(body))


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
@pytest.mark.parametrize("body", [b"not json {", b"a=1&b=2", bytes(range(256))])
def test_a_body_that_does_not_call_itself_json_is_not_looked_at(
    shared_server: Server, fal: Fal, books: Books, body: bytes, content_type: str | None
) -> None:
    _, key = books.account()
    headers = {"x-api-key": key, "x-fal-sandbox": "echo=1"} | ({"Content-Type": content_type} if content_type else {})
    response = requests.post(shared_server.url + FLUX, data=body, headers=headers, timeout=60)
    assert json.loads(without_billing(response.content))["sha256"] == hashlib.sha256(body).hexdigest()
    assert sent_headers(received_by(fal, response)).get("content-type") == content_type


@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
def test_no_body_with_a_json_content_type_is_fine(shared_server: Server, fal: Fal, books: Books, method: str) -> None:
    """fal's JavaScript client sends the content type always (fal-protocol 1.5)."""
    _, key = books.account()
    headers = {"x-api-key": key, "Content-Type": "application/json", "x-fal-sandbox": "body=object"}
    response = requests.request(method, shared_server.url + FLUX + "?prompt=x", headers=headers, timeout=60)
    received = received_by(fal, response)
    assert (received["method"], received["body_length"]) == (method, 0)
    assert response.status_code == (405 if method == "PUT" else 200)
    assert "transfer-encoding" not in sent_headers(received)


@pytest.mark.parametrize(
    ("query", "forwarded"),
    [
        ("prompt=a%20b+c&num_images=2", "prompt=a%20b+c&num_images=2"),
        ("prompt=%e4%bd%a0&&=&x", "prompt=%e4%bd%a0&&=&x"),
        ("prompt=x&fal_jwt_token=abc&y=1", "prompt=x&y=1"),
        ("prompt=x&fal%5Fjwt%5Ftoken=abc", "prompt=x"),
        ("prompt=../../..//%2e%2e%2f@:8080/?a=b", "prompt=../../..//%2e%2e%2f@:8080/?a=b"),
    ],
)
def test_a_query_goes_to_fal_byte_for_byte(
    shared_server: Server, fal: Fal, books: Books, query: str, forwarded: str
) -> None:
    name, key = books.account()
    data = raw_http.request_bytes(key, target=f"{FLUX}?{query}", body=b"").replace(b"POST", b"GET", 1)
    answer = raw_http.exchange(shared_server.url, data)
    assert answer.status == 200
    (received,) = fal.calls(answer.value("x-fal-request-id") or "-", last=50)
    assert (received["method"], received["path"], received["query"]) == ("GET", FLUX, forwarded)
    assert books.calls(name)[0].held_micros == (52_500 if "num_images=2" in query else 26_250)


def test_a_large_body_goes_to_fal_byte_for_byte(shared_server: Server, fal: Fal, books: Books) -> None:
    _, key = books.account()
    body = b'{"prompt":"x","image_url":"data:image/png;base64,' + b"iVBORw0KGgo" * 1_900_000 + b'"}'
    assert len(body) > 20_000_000
    for sent in (body, iter([body[:1], body[1:9_000_000], body[9_000_000:]])):
        response = requests.post(
            shared_server.url + FLUX, data=sent, timeout=60,
            headers={"x-api-key": key, "Content-Type": "application/json", "x-fal-sandbox": "echo=1"},
        )  # fmt: skip
        told = json.loads(without_billing(response.content))
        assert told == {"sha256": hashlib.sha256(body).hexdigest(), "length": len(body)}


def test_fal_sees_none_of_the_callers_secrets(odd_server: Server, odd_fal: Upstream) -> None:
    """Everything that fal receives is listed here: header by header."""
    _, key = odd_server.books.account()
    odd_fal.answer("HTTP/1.1 200 OK\ncontent-type: application/json\ncontent-length: 2\nx-fal-billable-units: 1", b"{}")
    sent = {
        "x-api-key": key, "Authorization": f"Key {key}", "Cookie": f"session={key}", "X-Forwarded-For": "10.0.0.1",
        "Forwarded": "for=10.0.0.1", "Origin": "https://customer.example", "Referer": "https://customer.example/x",
        "X-Fal-Store-IO": "0", "X-Fal-Object-Lifecycle-Preference": "{}", "X-Fal-Object-Lifecycle": "{}",
        "X-Fal-Tags": "a=b", "X-Fal-No-Retry": "1", "X-Fal-Retry-Config": "{}", "X-Fal-Runner-Hint": "h",
        "x-fal-cdn-token": "t", "X-Fal-User-Id": "u", "TE": "trailers", "Upgrade": "h2c",
        "Connection": "close, x-fal-x",
        "Proxy-Authorization": "Basic x", "Accept-Encoding": "gzip, br", "Idempotency-Key": "k", "X-Other": "o",
        "Expect": "100-continue", "If-None-Match": '"e"', "Range": "bytes=0-1",
        "User-Agent": "fal-client/1.0.3 (python)", "Accept": "text/event-stream", "Content-Type": "application/json",
        "X-Fal-Request-Timeout": "5.0", "X-Fal-Queue-Priority": "low", "x-app-fal-disable-fallback": "1",
    }  # fmt: skip
    response = requests.post(odd_server.url + FLUX + "?a=1", data=BODIES[0], headers=sent, timeout=60)
    assert response.status_code == 200
    received = odd_fal.received[-1]
    assert received.line == f"POST {FLUX}?a=1 HTTP/1.1"
    assert sorted(received.headers) == sorted(
        [
            ("host", odd_fal.url.removeprefix("http://")),
            ("authorization", f"Key {OPERATOR_KEY}"),
            ("accept-encoding", "identity"),
            ("user-agent", "fal-client/1.0.3 (python)"),
            ("accept", "text/event-stream"),
            ("content-type", "application/json"),
            ("content-length", str(len(BODIES[0]))),
            ("x-fal-request-timeout", "5.0"),
            ("x-fal-queue-priority", "low"),
            ("x-app-fal-disable-fallback", "1"),
        ]
    )
    assert received.body == BODIES[0]
    assert key not in repr(received)


# --- from fal ---------------------------------------------------------------------------------------------------

OBJECTS = ("object", "nested", "latin1", "whitespace", "escaped", "billing")
OTHERS = ("array", "text", "binary", "empty", "html")


@pytest.mark.parametrize("weather", ["", "; chunked=1", "; encoding=gzip", "; chunked=1; encoding=gzip"])
@pytest.mark.parametrize("body", OBJECTS)
def test_an_object_gets_one_more_member_and_no_other_byte_changes(
    shared_server: Server, books: Books, body: str, weather: str
) -> None:
    _, key = books.account()
    response = shared_server.post(key, weather=f"body={body}{weather}")
    whole = b"".join(replies.odd(200, body).body)
    assert without_billing(response.content) == whole
    assert response.headers["Content-Type"] == replies.odd(200, body).content_type
    assert int(response.headers["Content-Length"]) == len(response.content)
    assert "Content-Encoding" not in response.headers
    if body != "latin1":
        shown = json.loads(response.content, parse_float=Decimal)
        assert shown == json.loads(whole, parse_float=Decimal) | {"_billing": shown["_billing"]}
        assert list(shown)[-1] == "_billing" or body == "billing"


@pytest.mark.parametrize("weather", ["", "; chunked=1", "; encoding=gzip"])
@pytest.mark.parametrize("body", OTHERS)
def test_anything_else_comes_back_untouched(shared_server: Server, books: Books, body: str, weather: str) -> None:
    name, key = books.account()
    request = raw_http.request_bytes(key, x_fal_sandbox=f"body={body}{weather}", Accept_Encoding="gzip")
    answer = raw_http.exchange(shared_server.url, request)
    whole = b"".join(replies.odd(200, body).body)
    packed = "gzip" in weather and answer.value("content-encoding") == "gzip"
    assert (gzip.decompress(answer.body) if packed else answer.body) == whole
    assert packed == ("gzip" in weather and body in ("text", "binary", "html"))
    assert answer.whole
    assert books.calls(name)[0].charged_micros == 26_250


def test_an_ordinary_answer_is_the_one_that_fal_gives(shared_server: Server, fal: Fal, books: Books) -> None:
    _, key = books.account()
    body = b'{"prompt":"the same"}'
    direct = requests.post(
        fal.url + FLUX, data=body, headers={"Authorization": "Key any", "Content-Type": "application/json"}, timeout=60
    )
    response = requests.post(
        shared_server.url + FLUX, data=body, headers={"x-api-key": key, "Content-Type": "application/json"}, timeout=60
    )
    assert without_billing(response.content) == direct.content
    framing = {"content-length", "date", "server", "connection", "x-fal-request-id"}
    kept = {name.lower(): value for name, value in direct.headers.items() if name.lower() not in framing}
    shown = {name.lower(): value for name, value in response.headers.items()}
    assert kept.items() <= shown.items()


def test_fals_headers_come_back_less_those_of_the_connection(odd_server: Server, odd_fal: Upstream) -> None:
    _, key = odd_server.books.account()
    odd_fal.answer(
        "HTTP/1.1 200 OK\nContent-Type: application/json\nContent-Length: 2\nx-fal-billable-units: 1\n"
        "Set-Cookie: a=1; Path=/\nSet-Cookie: b=2\nX-Multi: one\nX-Multi: two\nx-FAL-Odd-Case: \xe9\nX-Empty:\n"
        'Vary: Accept\nCache-Control: no-store\nETag: "e"\nContent-MD5: x\nConnection: close, X-Hop\nX-Hop: 1\n'
        f"Keep-Alive: timeout=5\nProxy-Authenticate: Basic\nTrailer: X\nServer: uvicorn\nX-Echo: {OPERATOR_KEY}\n"
        "x-abhiapi-balance-remaining: 9999\nX-RateLimit-Remaining: 9999",
        b"{}",
    )
    answer = raw_http.exchange(odd_server.url, raw_http.request_bytes(key))
    shown = [(name, value) for name, value in answer.headers if name not in ("Date", "Server", "Connection")]
    ours = [name for name, _ in shown[shown.index(("Cache-Control", "no-store")) + 1 :]]
    assert shown[: len(shown) - len(ours)] == [
        ("Content-Type", "application/json"), ("x-fal-billable-units", "1"), ("Set-Cookie", "a=1; Path=/"),
        ("Set-Cookie", "b=2"), ("X-Multi", "one"), ("X-Multi", "two"), ("x-FAL-Odd-Case", "\xe9"), ("X-Empty", ""),
        ("Vary", "Accept"), ("Cache-Control", "no-store"),
    ]  # fmt: skip
    assert sorted(ours) == [
        "Content-Length", "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset",
        "x-abhiapi-balance-remaining", "x-abhiapi-call-id", "x-abhiapi-credits-used",
    ]  # fmt: skip
    assert answer.value("x-abhiapi-balance-remaining") == "973.75"
    assert answer.value("server") == "gunicorn"


@pytest.mark.parametrize(
    "head",
    [
        "HTTP/1.1 200 OK\nContent-Type: application/json\nConnection: close",
        "HTTP/1.0 200 OK\nContent-Type: application/json",
        "HTTP/1.1 103 Early Hints\nLink: </x>\n\nHTTP/1.1 200 OK\nContent-Type: application/json\nContent-Length: 17",
        "HTTP/1.1 200\nContent-Type: application/vnd.fal+json; charset=utf-8\nContent-Length: 17",
    ],
)
def test_every_framing_that_http_allows_is_understood(odd_server: Server, odd_fal: Upstream, head: str) -> None:
    name, key = odd_server.books.account()
    odd_fal.answer(f"{head}\nx-fal-billable-units: 1", b'{"images": [ ] }\n')
    answer = raw_http.exchange(odd_server.url, raw_http.request_bytes(key))
    assert (answer.status, without_billing(answer.body)) == (200, b'{"images": [ ] }\n')
    assert odd_server.books.calls(name)[0].charged_micros == 26_250


def test_an_answer_without_a_body_stays_without_one(odd_server: Server, odd_fal: Upstream) -> None:
    name, key = odd_server.books.account()
    odd_fal.answer("HTTP/1.1 204 No Content\nx-fal-billable-units: 1", b"")
    answer = raw_http.exchange(odd_server.url, raw_http.request_bytes(key))
    assert (answer.status, answer.body) == (204, b"")
    assert odd_server.books.calls(name)[0].charged_micros == 26_250
    odd_fal.answer("HTTP/1.1 200 OK\ncontent-type: application/json\nx-fal-billable-units: 0\ncontent-length: 99", b"")
    answer = raw_http.exchange(odd_server.url, raw_http.request_bytes(key).replace(b"POST", b"HEAD", 1))
    assert answer.status == 200


# --- large answers ----------------------------------------------------------------------------------------------


def read_through(server: Server, key: str, size_bytes: int, weather: str = "") -> bytes:
    """Make a call with a huge answer and check each byte of it on the way; its last bytes."""
    expected = hashlib.sha256()
    for piece in replies.sized(200, size_bytes).body:
        expected.update(piece.removesuffix(b"}") if piece.endswith(b'"}}') else piece)
    headers = {"x-api-key": key, "x-fal-sandbox": f"size_bytes={size_bytes}{weather}"}
    got, left, tail = hashlib.sha256(), size_bytes - 1, b""
    with requests.post(server.url + FLUX, json={"prompt": "x"}, headers=headers, stream=True, timeout=120) as response:
        for piece in response.iter_content(256 * 1024):
            got.update(piece[:left])
            tail += piece[left:]
            left = max(0, left - len(piece))
    assert got.digest() == expected.digest()
    return tail


@pytest.mark.parametrize("weather", ["", "; chunked=1", "; encoding=gzip"])
def test_a_large_answer_is_the_one_that_fal_gives(shared_server: Server, books: Books, weather: str) -> None:
    name, key = books.account()
    tail = read_through(shared_server, key, 3_000_001, weather)
    assert json.loads(b'{"image":1' + tail)["_billing"]["balance_remaining"] == Decimal("973.75")
    assert books.calls(name)[0].charged_micros == 26_250


def test_huge_bodies_pass_in_bounded_memory(shared_server: Server, books: Books) -> None:
    """Answers of 50 MB with and without units, and requests of 20 MB, several at once."""
    name, key = books.account()
    (worker,) = psutil.Process(shared_server.process.popen.pid).children()
    read_through(shared_server, key, 1_000_000)
    before, peak = worker.memory_info().rss, 0
    size = 50_000_000
    upload = b'{"prompt":"x","image_url":"' + b"iVBORw0KGgo" * 1_900_000 + b'"}'
    headers = {"x-api-key": key, "Content-Type": "application/json", "x-fal-sandbox": "echo=1"}
    with ThreadPoolExecutor(6) as pool:
        work = [pool.submit(read_through, shared_server, key, size, weather) for weather in ("", "", "; units=none")]
        work += [
            pool.submit(
                lambda: requests.post(shared_server.url + FLUX, data=upload, headers=headers, timeout=120).content
            )
            for _ in range(2)
        ]
        waiting = threading.Event()
        while not all(done.done() for done in work):
            peak = max(peak, worker.memory_info().rss)
            waiting.wait(0.02)
        for done in work:
            assert b'"_billing": {' in done.result()
    assert peak - before < RSS_GROWTH_MAX
    charged = [(call.state, call.charged_micros, call.usage_source) for call in books.calls(name)[:5]]
    assert sorted(charged) == [("settled", 26_250, "catalogue")] + [("settled", 26_250, "fal")] * 4


# --- event streams ----------------------------------------------------------------------------------------------

FIRST, SECOND = b'data: {"images":[],"seed":1}\n\n', b'id: 7\nevent: output\ndata: {"seed":2}\n\n'


@pytest.mark.parametrize("chunked", [False, True])
def test_events_pass_as_they_come(odd_server: Server, odd_fal: Upstream, chunked: bool) -> None:
    """Head and each event are with the customer before fal sends what follows; the last line is one comment more."""
    name, key = odd_server.books.account()
    head_seen, seen = threading.Event(), threading.Event()
    in_time: list[bool] = []
    framing = "Transfer-Encoding: chunked" if chunked else "Connection: close"

    def frame(data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if chunked else data

    def stream(sock: socket.socket, received: Received) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{framing}\r\nx-fal-billable-units: 2\r\n\r\n"
        sock.sendall(head.encode())
        in_time.append(head_seen.wait(raw_http.TIMEOUT_S / 2))
        sock.sendall(frame(FIRST))
        in_time.append(seen.wait(raw_http.TIMEOUT_S / 2))
        sock.sendall(frame(SECOND) + (b"0\r\n\r\n" if chunked else b""))

    odd_fal.script = stream
    headers = {"x-api-key": key, "Accept": "text/event-stream"}
    with requests.post(
        odd_server.url + FLUX + "/stream", json={"prompt": "x"}, headers=headers, stream=True, timeout=60
    ) as response:
        head_seen.set()
        pieces = response.iter_content(None)
        got = next(pieces)
        assert got == FIRST
        assert odd_server.books.calls(name)[0].state == "held"
        seen.set()
        got += b"".join(pieces)
    assert in_time == [True, True]
    assert got.startswith(FIRST + SECOND + b": _billing {")
    (last,) = got.removeprefix(FIRST + SECOND).splitlines()
    assert json.loads(last.removeprefix(b": _billing "))["credits_used"] == Decimal("52.5")
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["Content-Type"] == "text/event-stream"
    assert odd_fal.received[-1].line == f"POST {FLUX}/stream HTTP/1.1"
    call = odd_server.books.calls(name)[0]
    assert (call.model, call.mode, call.charged_micros) == ("fal-ai/flux/dev", "stream", 52_500)


def test_a_stream_that_is_cut_has_no_billing_line_and_costs_nothing(odd_server: Server, odd_fal: Upstream) -> None:
    name, key = odd_server.books.account()
    odd_fal.answer(
        "HTTP/1.1 200 OK\nContent-Type: text/event-stream\nTransfer-Encoding: chunked\nx-fal-billable-units: 2",
        b"%x\r\n%b\r\n" % (len(FIRST), FIRST),
    )
    answer = raw_http.exchange(odd_server.url, raw_http.request_bytes(key, target=f"{FLUX}/stream"))
    assert answer.body == FIRST
    assert not answer.whole
    assert odd_server.books.calls(name)[0].state == "released"
