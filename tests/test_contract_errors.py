"""Errors (contract 3.4): every row, for every kind of caller, and never a word that is not the customer's business."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
from typing import Any

import pytest
import requests

from abhiapi.errors import STATUS_NAMES
from abhiapi.sandbox import replies
from tests import raw_http
from tests.conftest import STRICT_BODY_BYTES
from tests.harness import OPERATOR_KEY, Books, Fal, Server
from tests.raw_http import without_billing

FLUX = "/fal-ai/flux/dev"
CAT = b'{"prompt":"a cat"}'
CREDENTIALS = {"x-api-key": "x-api-key: {}", "bearer": "Authorization: Bearer {}", "fal": "Authorization: Key {}"}
TABLE, FAL = ("x-api-key", "bearer"), ("fal",)
callers = pytest.mark.parametrize("caller", [*TABLE, *FAL])


def call(
    server: Server, key: str, caller: str, *, path: str = FLUX, body: Any = CAT, weather: str = "", **headers: str
) -> requests.Response:
    name, _, value = CREDENTIALS[caller].partition(": ")
    sent = {name: value.format(key), "Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    if weather:
        sent["x-fal-sandbox"] = weather
    response = requests.post(server.url + path, data=body, headers=sent, timeout=60, allow_redirects=False)
    shown = response.content + repr(response.headers).encode()
    assert OPERATOR_KEY.encode() not in shown
    assert key.encode() not in shown or not key
    return response


def assert_ours(response: requests.Response, code: int, error_type: str, *, billed: bool = False) -> str:
    """The answer is our error, in the documented shape; its message."""
    body = response.json()
    assert response.status_code == code
    assert response.headers["Content-Type"] == "application/json"
    message: str = body["message"]
    error = {"code": code, "name": STATUS_NAMES[code], "type": error_type, "message": message}
    expected = {"error": error, "detail": message, "message": message}
    if billed:
        assert body["_billing"]["credits_used"] == 0
        expected["_billing"] = body["_billing"]
    assert body == expected
    assert len(message) > 20
    assert "nginx" not in response.text  # at which fal's Python client repeats a call (fal-protocol 1.4)
    assert re.fullmatch(r"call_[0-9a-z]{13}", response.headers["x-abhiapi-call-id"])
    return message


def assert_limits_shown(response: requests.Response) -> None:
    assert int(response.headers["X-RateLimit-Limit"]) > int(response.headers["X-RateLimit-Remaining"]) >= 0
    assert int(response.headers["X-RateLimit-Reset"]) > 1_700_000_000


def of_fal(status: int, host: str) -> bytes:
    return b"".join(replies.error(status, FLUX, host).body)


# --- our own ----------------------------------------------------------------------------------------------------

BAD_BODIES = (
    b"{", b'{"a":}', b"{'a':1}", b'{"a":1,}', b'{"a":1} {"b":2}', b"[]", b'[{"prompt":"x"}]', b'"text"', b"12",
    b"null", b"true", b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}', b'{"a":"\xff"}', b'{"a":"\x01"}', b"\x00",
    b" ", '{"a":1}'.encode("utf-16"), b"[" * 5000, b'{"a":' * 100_000, b'{"prompt":"' + b"x" * 300_000 + b'"',
    b"[" + b"1," * 200_000 + b"1]", b'{"prompt":"' + b"x" * 300_000 + b'"} x',
)  # fmt: skip


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_a_body_that_is_no_json_object_is_a_bad_request(
    shared_server: Server, fal: Fal, books: Books, body: bytes
) -> None:
    name, key = books.account()
    seen = fal.total()
    for caller in CREDENTIALS:
        response = call(shared_server, key, caller, body=body)
        assert_ours(response, 400, "malformed_json")
        assert_limits_shown(response)
    assert len(response.content) < 1000  # however long the path
    assert fal.total() == seen
    assert books.calls(name) == []


def test_a_body_that_breaks_off_is_a_bad_request(shared_server: Server, fal: Fal, books: Books) -> None:
    name, key = books.account()
    seen = fal.total()
    whole = b'{"prompt":"' + b"x" * 400_000 + b'"}'
    for part in (b"", b'{"prompt":"x"}', whole[:300_000]):
        for framing in ({"Content_Length": str(len(whole))}, {"Transfer_Encoding": "chunked"}):
            body = part if "Content_Length" in framing else b"%x\r\n%b" % (len(whole), part)
            with raw_http.connect(shared_server.url) as sock:
                sock.sendall(raw_http.request_bytes(key, body=body, **framing))
                sock.shutdown(socket.SHUT_WR)
                answer = raw_http.read_answer(sock)
            assert answer.status == 400
            assert json.loads(answer.body)["error"]["type"] == "incomplete_body"
    assert fal.total() == seen
    assert books.calls(name) == []


BAD_TARGETS = (
    "/fal-ai/../tokens/", "/..", "/fal-ai/%2e%2e/tokens", "/fal-ai/.%2E/x", "/fal-ai/%252e%252e/x",
    "/./fal-ai/flux/dev",
    "//evil.example/fal-ai/flux/dev", "/fal-ai//flux/dev", "/fal-ai/flux%2fdev", "/fal-ai/flux%252Fdev",
    "/fal-ai%5cflux/dev", "/fal-ai/flux%255cdev", "/fal-ai\\flux/dev", "/@evil.example/fal-ai/flux/dev",
    "/fal-ai/flux/dev@evil", "/fal-ai/flux/dev%40evil", "/fal-ai/flux/dev%00", "/fal-ai/flux/dev%0d%0aX:1",
    "/fal-ai/flux/dev%1f", "/fal-ai/flux/dev%7f", "/fal-ai/flux/dev%3fa=1", "/fal-ai/flux/dev%23", "/fal-ai/flux/dev#x",
    "http://evil.example/fal-ai/flux/dev", "https://fal.run/fal-ai/flux/dev", "/%25252525252e",
)  # fmt: skip


@pytest.mark.parametrize("target", BAD_TARGETS)
def test_a_path_that_could_leave_its_place_is_a_bad_request(
    shared_server: Server, fal: Fal, books: Books, target: str
) -> None:
    _, key = books.account()
    seen = fal.total()
    answer = raw_http.exchange(shared_server.url, raw_http.request_bytes(key, target=target))
    assert (answer.status, json.loads(answer.body)["error"]["type"]) == (400, "forbidden_path")
    assert fal.total() == seen


@pytest.mark.parametrize(
    "target",
    ["/fal-ai/flux/dev\x00", "/fal-ai/flux/\x01dev", "/fal-ai/flux\tdev", "/fal-ai/flux/d\xe9v",
     "/fal-ai/flux/dev?a=\x01",
     "/fal-ai/flux/dev?a=\nX-Evil:1", "/fal-ai/flux/dev?a=\rb", "fal-ai/flux/dev", "*", "evil.example:443"],
)  # fmt: skip
def test_a_request_line_that_http_does_not_allow_is_a_bad_request(
    shared_server: Server, fal: Fal, books: Books, target: str
) -> None:
    _, key = books.account()
    seen = fal.total()
    assert raw_http.exchange(shared_server.url, raw_http.request_bytes(key, target=target)).status == 400
    assert fal.total() == seen


@callers
def test_credit_that_does_not_suffice(shared_server: Server, fal: Fal, books: Books, caller: str) -> None:
    _, key = books.account(26)
    body = b'{"prompt":"too poor %s"}' % caller.encode()
    response = call(shared_server, key, caller, body=body)
    message = assert_ours(response, 402, "insufficient_credits")
    assert "26.25 credits" in message
    assert "26 are available" in message
    assert_limits_shown(response)
    assert fal.calls(f"too poor {caller}", last=50) == []


@callers
@pytest.mark.parametrize(
    "path",
    ["/fal-ai/no-such-model", "/fal-ai/flux/dev/x", "/fal-ai", "/x", "/fal-ai/FLUX/dev", "/fal-ai/" + "x" * 4000],
    ids=lambda path: path[:30],
)
def test_a_model_without_a_price_is_not_found_and_never_free(
    shared_server: Server, fal: Fal, books: Books, caller: str, path: str
) -> None:
    name, key = books.account()
    seen = fal.total()
    response = call(shared_server, key, caller, path=path)
    assert_ours(response, 404, "unpriced_model")
    assert_limits_shown(response)
    assert len(response.content) < 1000  # however long the path
    assert fal.total() == seen
    assert books.calls(name) == []


@callers
@pytest.mark.parametrize("size", [STRICT_BODY_BYTES + 1, 5_000_000])
def test_a_body_that_is_too_large(strict_server: Server, fal: Fal, caller: str, size: int) -> None:
    name, key = strict_server.books.account()
    seen = fal.total()
    body = b'{"prompt":"' + b"x" * (size - 13) + b'"}'
    assert len(body) == size
    announced = call(strict_server, key, caller, body=body)
    chunked = call(strict_server, key, caller, body=iter([body[:100_000], body[100_000:]]))
    for response in (announced, chunked):
        assert_limits_shown(response)
        assert str(STRICT_BODY_BYTES) in assert_ours(response, 413, "body_too_large")
    assert fal.total() == seen
    assert strict_server.books.calls(name) == []
    assert call(strict_server, key, caller, body=body[: STRICT_BODY_BYTES - 2] + b'"}').status_code == 200


def test_a_call_that_cannot_be_recorded_is_not_forwarded(strict_server: Server, fal: Fal) -> None:
    """The database is locked; a moment later everything is well again."""
    name, key = strict_server.books.account()
    other = sqlite3.connect(strict_server.books.database.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        response = call(strict_server, key, "fal", body=b'{"prompt":"while it is locked"}')
    finally:
        other.execute("ROLLBACK")
        other.close()
    assert_ours(response, 503, "database_unavailable")
    assert_limits_shown(response)
    assert int(response.headers["Retry-After"]) > 0
    assert fal.calls("while it is locked", last=50) == []
    assert strict_server.books.calls(name) == []
    assert call(strict_server, key, "fal").status_code == 200


# --- no whole answer of fal -------------------------------------------------------------------------------------


@callers
@pytest.mark.parametrize("weather", ["drop=before_headers", "drop=in_headers; reset=1", "drop=in_body", "garbage=1"])
def test_a_broken_answer_is_not_repeated_by_fals_clients(
    shared_server: Server, books: Books, caller: str, weather: str
) -> None:
    _, key = books.account()
    response = call(shared_server, key, caller, weather=weather)
    expected = (500, "upstream_outcome_unknown") if caller in FAL else (502, "upstream_broken")
    assert_ours(response, *expected, billed=True)
    assert_limits_shown(response)


@callers
def test_a_late_answer_is_not_repeated_by_fals_clients(strict_server: Server, caller: str) -> None:
    _, key = strict_server.books.account()
    response = call(strict_server, key, caller, weather="hold_until=never")
    expected = (500, "upstream_outcome_unknown") if caller in FAL else (504, "upstream_timeout")
    assert_ours(response, *expected, billed=True)
    assert_limits_shown(response)


# --- fal's own --------------------------------------------------------------------------------------------------


@callers
@pytest.mark.parametrize(
    ("status", "in_table"),
    [(400, 400), (422, 400), (404, 404), (405, 405), (408, 408), (409, 409), (418, 418), (429, 429), (499, 499),
     (500, 502), (501, 502), (502, 502), (503, 502), (504, 504), (599, 502)],
)  # fmt: skip
def test_fals_errors_keep_their_words(
    shared_server: Server, fal: Fal, books: Books, caller: str, status: int, in_table: int
) -> None:
    _, key = books.account()
    response = call(shared_server, key, caller, weather=f"status={status}")
    assert response.status_code == (status if caller in FAL else in_table)
    assert without_billing(response.content) == of_fal(status, fal.url)
    assert response.json()["_billing"]["credits_used"] == 0
    assert len(response.headers["x-fal-request-id"]) == 36
    assert_limits_shown(response)
    if status >= 500:
        assert response.headers["x-fal-error-type"]
    if status == 429:
        assert response.headers["x-fal-needs-retry"] == "1"


@callers
@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503, 504])
@pytest.mark.parametrize("body", ["html", "empty", "text", "binary"])
def test_an_error_of_fal_that_explains_nothing_gets_our_words(
    shared_server: Server, books: Books, caller: str, status: int, body: str
) -> None:
    _, key = books.account()
    response = call(shared_server, key, caller, weather=f"status={status}; body={body}")
    in_table = {422: 400, 500: 502, 503: 502}.get(status, status)
    message = assert_ours(response, status if caller in FAL else in_table, "upstream_error", billed=True)
    assert str(status) in message
    assert_limits_shown(response)


@callers
def test_an_error_of_fal_that_is_json_but_no_object_is_left_alone(
    shared_server: Server, books: Books, caller: str
) -> None:
    _, key = books.account()
    response = call(shared_server, key, caller, weather="status=422; body=array; units=1")
    assert response.content == b"".join(replies.odd(422, "array").body)
    assert response.headers["x-abhiapi-credits-used"] == "26.25"


@callers
@pytest.mark.parametrize("status", [401, 402, 403])
@pytest.mark.parametrize("body", ["", "; body=html", "; body=text", "; encoding=gzip"])
def test_trouble_with_the_operators_account_is_not_told(
    shared_server: Server, books: Books, caller: str, status: int, body: str
) -> None:
    _, key = books.account()
    response = call(shared_server, key, caller, weather=f"status={status}{body}")
    message = assert_ours(response, 502, "upstream_refused", billed=True)
    for word in ("locked", "balance", "dashboard", "credential", "fal.ai/", "invalid", str(status)):
        assert word not in message
    assert "x-fal-served-from" not in response.headers


@callers
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_passed_on_and_never_followed(
    shared_server: Server, fal: Fal, books: Books, caller: str, status: int
) -> None:
    name, key = books.account()
    body = f'{{"prompt":"redirected {name}"}}'.encode()
    response = call(shared_server, key, caller, body=body, weather=f"status={status}")
    assert response.status_code == status
    assert response.headers["Location"] == f"{fal.url}/redirected{FLUX}"
    assert without_billing(response.content) == of_fal(status, fal.url)
    assert_limits_shown(response)
    assert [received["path"] for received in fal.calls(f"redirected {name}", last=50)] == [FLUX]
    assert fal.calls("/redirected/", last=50) == []


@callers
@pytest.mark.parametrize("weather", ["", "; chunked=1", "; encoding=gzip"])
def test_a_large_error_of_fal_passes_whole(shared_server: Server, books: Books, caller: str, weather: str) -> None:
    name, key = books.account()
    response = call(shared_server, key, caller, weather=f"status=422; units=2; size_bytes=300000{weather}")
    assert response.status_code == (422 if caller in FAL else 400)
    assert without_billing(response.content) == b"".join(replies.sized(422, 300_000).body)
    assert_limits_shown(response)
    assert books.calls(name)[0].charged_micros == 52_500
    refused = call(shared_server, key, caller, weather=f"status=403; size_bytes=300000{weather}")
    assert_ours(refused, 502, "upstream_refused", billed=True)


@callers
def test_fals_own_validation_comes_back_whole(shared_server: Server, books: Books, caller: str) -> None:
    name, key = books.account(5000)
    response = call(shared_server, key, caller, body=b'{"num_images":99}')
    assert response.status_code == (422 if caller in FAL else 400)
    assert {tuple(problem["loc"]) for problem in response.json()["detail"]} >= {("body", "prompt")}
    assert books.calls(name)[0].status == 422
