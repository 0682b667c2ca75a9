"""Requests that are no HTTP: refused before the application, in our words and without their bytes."""

from __future__ import annotations

import json

import pytest
import requests

from tests import raw_http
from tests.harness import Books, Fal, Server

SECRET = "sk-fal-" + "Abcd1234" * 4

# What is sent, and the status that answers it. A folded line is put together, as HTTP allows, and names no key.
ODD = {
    "a control character in a value": (f"GET /x HTTP/1.1\r\nHost: x\r\nx-api-key: {SECRET}\x00\r\n\r\n", 400),
    "a blank in a name": (f"GET /x HTTP/1.1\r\nHost: x\r\nx-api-key {SECRET}: y\r\n\r\n", 400),
    "a line without a colon": (f"GET /x HTTP/1.1\r\nHost: x\r\nx-api-key {SECRET}\r\n\r\n", 400),
    "a folded line": (f"GET /x HTTP/1.1\r\nHost: x\r\nX-Y: 1\r\n {SECRET}\r\n\r\n", 401),
    "no request line": (f"x-api-key: {SECRET}\r\n\r\n", 400),
    "an odd method": (f"G{SECRET[:2]}@ /x?key={SECRET} HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "an odd version": (f"GET /x?key={SECRET} HTTP/9.9\r\nHost: x\r\n\r\n", 400),
    "a head of a megabyte": (f"GET /x HTTP/1.1\r\nHost: x\r\nX-Y: {SECRET * 200}\r\n" * 200, 400),
    "a path of a megabyte": (f"GET /{SECRET * 2_000} HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    "an unknown coding": (
        f"POST /x HTTP/1.1\r\nHost: x\r\nx-api-key: {SECRET}\r\nTransfer-Encoding: {SECRET}\r\n\r\n",
        400,
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_no_http_gets_our_error_and_leaves_no_trace(shared_server: Server, fal: Fal, case: str) -> None:
    """The contract's error body, never gunicorn's page; nothing of the request in the answer or the log."""
    text, status = ODD[case]
    seen = fal.total()
    answer = raw_http.exchange_unread(shared_server.url, text.encode("latin-1"))
    if answer is not None:
        assert answer.value("content-type") == "application/json"
        body = json.loads(answer.body)
        assert answer.status == body["error"]["code"] == status
        assert body["detail"] == body["message"] == body["error"]["message"]
        assert b"Abcd1234" not in answer.body
    assert "Abcd1234" not in shared_server.process.output()
    assert fal.total() == seen
    assert requests.get(f"{shared_server.url}/healthz", timeout=30).status_code == 200


@pytest.mark.parametrize("method", ["TRACE", "CONNECT"])
def test_what_would_show_the_operators_credential_is_not_passed_on(
    shared_server: Server, fal: Fal, books: Books, method: str
) -> None:
    """A server that honours TRACE sends the request back, its Authorization included."""
    name, key = books.account()
    seen = fal.total()
    answer = raw_http.exchange(shared_server.url, raw_http.request_bytes(key).replace(b"POST", method.encode(), 1))
    assert (answer.status, json.loads(answer.body)["error"]["type"]) == (405, "method_not_allowed")
    assert answer.value("allow") == "GET, POST"
    assert fal.total() == seen
    assert books.calls(name) == []


@pytest.mark.parametrize("chunks", [b"zz\r\n{}\r\n0\r\n\r\n", b"2\r\n{}XX0\r\n\r\n", b"-2\r\n{}\r\n0\r\n\r\n"])
def test_a_body_in_bad_chunks_is_the_callers_mistake(shared_server: Server, books: Books, chunks: bytes) -> None:
    name, key = books.account()
    head = f"POST /fal-ai/flux/dev HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw_http.exchange(shared_server.url, head.encode() + chunks)
    assert (answer.status, json.loads(answer.body)["error"]["type"]) == (400, "incomplete_body")
    assert books.calls(name) == []
