"""The proxy protocol of fal's JavaScript client on the wire: the header decides, charged as our own routes."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
import requests

from tests import raw_http
from tests.harness import OPERATOR_KEY, Books, Fal, Server, until
from tests.raw_http import without_billing

FLUX = "https://fal.run/fal-ai/flux/dev"
QUEUE = "https://queue.fal.run/fal-ai/flux"
CAT = b'{"prompt": "a  cat", "image_size":"landscape_4_3"}'
PLACES = (
    "/api/fal/proxy",
    "/api/fal/proxy/?x=1",
    "/",
    "/v1/account",
    "/healthz",
    "/fal-ai/nothing",
    "/tokens/",
    "/queue/x",
)


def aimed(
    server: Server, key: str | None, target: str, at: str = "/api/fal/proxy", *, method: str = "POST", **more: Any
) -> requests.Response:
    headers = {"x-fal-target-url": target, "Content-Type": "application/json"} | more.pop("headers", {})
    if key is not None:
        headers.setdefault("x-api-key", key)
    return requests.request(method, server.url + at, headers=headers, timeout=60, **more)


def refused(response: requests.Response, code: int, error_type: str) -> None:
    body = response.json()
    assert (response.status_code, body["error"]["type"]) == (code, error_type)
    assert body["detail"] == body["message"] == body["error"]["message"]


@pytest.mark.parametrize("at", PLACES)
def test_a_call_is_what_its_header_says_wherever_it_comes_in(
    shared_server: Server, fal: Fal, books: Books, at: str
) -> None:
    """Charged as on our own route; fal hears the target's path and query, the body byte for byte, and no secret."""
    name, key = books.account()
    response = aimed(shared_server, key, FLUX + "?a=1", at, data=CAT, headers={"cookie": "a=b"})
    assert response.status_code == 200
    assert json.loads(response.text, parse_float=Decimal)["_billing"]["credits_used"] == Decimal("26.25")
    assert response.headers["x-abhiapi-call-id"].startswith("call_")
    (received,) = fal.calls(response.headers["x-fal-request-id"], last=50)
    assert (received["method"], received["path"], received["query"]) == ("POST", "/fal-ai/flux/dev", "a=1")
    assert received["body"] == CAT.decode()
    names = {header.lower() for header, _ in received["headers"]}
    assert not names & {"x-fal-target-url", "cookie", "x-api-key"}
    assert "sk-fal-" not in str(received)
    (call,) = books.calls(name)
    assert (call.model, call.mode, call.state) == ("fal-ai/flux/dev", "sync", "settled")


@pytest.mark.parametrize("path", ["/fal-ai/flux/dev", "/fal-ai/flux/dev?seed=1"])
def test_the_answer_is_that_of_our_own_route_byte_for_byte(shared_server: Server, books: Books, path: str) -> None:
    _, key = books.account()
    body = {"prompt": "the same cat", "image_size": "square"}
    direct = shared_server.post(key, path, body)
    through = aimed(shared_server, key, f"https://fal.run{path}", json=body)
    assert without_billing(through.content) == without_billing(direct.content)
    ours = ("x-abhiapi-", "x-ratelimit-")
    names = [{name.lower() for name in each.headers if name.lower().startswith(ours)} for each in (direct, through)]
    assert names[0] == names[1]


def test_a_get_takes_its_parameters_from_the_target(shared_server: Server, fal: Fal, books: Books) -> None:
    name, key = books.account()
    target = f"{FLUX}?prompt=a+cat&num_images=3&image_size=landscape_4_3"
    response = aimed(shared_server, key, target, "/api/fal/proxy?num_images=1", method="GET")
    assert response.status_code == 200
    (received,) = fal.calls(response.headers["x-fal-request-id"], last=50)
    assert received["query"] == "prompt=a+cat&num_images=3&image_size=landscape_4_3"
    (call,) = books.calls(name)
    assert call.held_micros == call.charged_micros == 3 * 26_250


@pytest.mark.parametrize(
    "short", ["https://fal.run/fal-ai/queue/requests", "https://queue.fal.run/fal-ai/queue/requests"]
)
def test_a_job_from_its_submit_to_its_result(shared_server: Server, books: Books, short: str) -> None:
    name, key = books.account()
    at = {"server": shared_server, "key": key}
    submitted = aimed(**at, target=f"{QUEUE}/dev", data=CAT).json()
    job = submitted["request_id"]
    assert submitted["status_url"] == f"{shared_server.url}/queue/fal-ai/flux/requests/{job}/status"
    status = f"{QUEUE}/requests/{job}/status?logs=1"
    until(lambda: aimed(**at, target=status, method="GET").json()["status"] == "COMPLETED", what="the job completes")
    stream = aimed(**at, target=f"{QUEUE}/requests/{job}/status/stream", method="GET")
    assert stream.headers["content-type"].startswith("text/event-stream")
    results = [
        aimed(**at, target=target, method="GET").json()
        for target in (f"{QUEUE}/requests/{job}", f"{QUEUE}/dev/requests/{job}/response", f"{short}/{job}/response")
    ]
    assert results[0] == results[1] == results[2]
    assert results[0]["_billing"]["credits_used"] == 26.25
    assert aimed(**at, target=f"{QUEUE}/requests/{job}/cancel", method="PUT").status_code == 400
    assert len([entry for entry in books.entries(name) if entry.kind == "charge"]) == 1


def test_another_accounts_job_does_not_exist_under_any_address(shared_server: Server, books: Books) -> None:
    """failures.md row 57."""
    _, key = books.account()
    _, other = books.account()
    job = aimed(shared_server, key, f"{QUEUE}/dev", data=CAT).json()["request_id"]
    unknown = "019da0f9-f0d6-7eb0-9e16-d7bcfd663a72"
    for form, method in (("", "GET"), ("/status", "GET"), ("/status/stream", "GET"), ("/cancel", "PUT")):
        told = [
            aimed(shared_server, other, f"{QUEUE}/requests/{which}{form}", method=method) for which in (job, unknown)
        ]
        assert [each.status_code for each in told] == [404, 404]
        assert told[0].content == told[1].content


@pytest.mark.parametrize(
    ("target", "code", "error_type"),
    [
        ("https://fal.run.evil/x", 400, "forbidden_target"),
        ("https://fal.run@evil.example/x", 400, "forbidden_target"),
        ("https://evil.example/https://fal.run/x", 400, "forbidden_target"),
        ("http://fal.run/fal-ai/flux/dev", 400, "forbidden_target"),
        ("https://fal.run:443/fal-ai/flux/dev", 400, "forbidden_target"),
        ("https://fal.run/fal-ai/..%2fflux", 400, "forbidden_target"),
        ("", 400, "forbidden_target"),
        ("https://fal.run/", 400, "forbidden_path"),
        ("https://fal.run/fal-ai/no-such-model", 404, "unpriced_model"),
        ("https://fal.run/v1/account", 404, "unpriced_model"),
        ("https://api.fal.ai/v1/keys", 404, "unknown_route"),
        ("https://rest.fal.ai/tokens/", 404, "unknown_route"),
        ("https://rest.fal.ai/storage/auth/token?storage_type=fal-cdn-v3", 404, "unknown_route"),
        ("https://rest.fal.ai/storage/upload/initiate?storage_type=gcs", 400, "forbidden_target"),
    ],
)
@pytest.mark.parametrize("scheme", ["x-api-key", "Key"])
def test_what_is_refused_is_not_forwarded(
    shared_server: Server, fal: Fal, books: Books, target: str, code: int, error_type: str, scheme: str
) -> None:
    """failures.md rows 61 and 64: fal hears nothing, and nothing is held."""
    name, key = books.account()
    seen = fal.total()
    headers = {"x-api-key": key} if scheme == "x-api-key" else {"Authorization": f"Key {key}"}
    response = aimed(shared_server, None, target, headers=headers, data=CAT)
    refused(response, code, error_type)
    assert response.headers["x-abhiapi-call-id"]
    assert response.headers["X-RateLimit-Remaining"]
    assert OPERATOR_KEY not in response.text
    assert fal.total() == seen
    assert books.calls(name) == []


def test_the_key_comes_first(shared_server: Server, fal: Fal) -> None:
    seen = fal.total()
    for target in ("https://evil.example/", FLUX, "https://rest.fal.ai/tokens/", ""):
        refused(aimed(shared_server, None, target, data=CAT), 401, "missing_key")
        refused(aimed(shared_server, "sk-fal-x", target, data=CAT), 401, "invalid_key")
    assert fal.total() == seen


@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
@pytest.mark.parametrize("at", ["/api/fal/proxy", "/api/fal/proxy/"])
def test_the_documented_place_wants_the_header(shared_server: Server, books: Books, at: str, method: str) -> None:
    _, key = books.account()
    response = requests.request(method, shared_server.url + at, headers={"x-api-key": key}, timeout=30)
    refused(response, 400, "forbidden_target")
    assert requests.request(method, shared_server.url + at, timeout=30).status_code == 401


def test_two_targets_are_none(shared_server: Server, fal: Fal, books: Books) -> None:
    """failures.md row 61: whichever of two headers another reader would believe, fal hears of neither."""
    _, key = books.account()
    seen = fal.total()
    whole = raw_http.request_bytes(key, target="/api/fal/proxy", body=CAT, x_fal_target_url=FLUX)
    for second in (FLUX, "https://evil.example/", "evil", ""):
        twice = whole.replace(b"\r\n\r\n", f"\r\nX-Fal-Target-Url: {second}\r\n\r\n".encode(), 1)
        assert raw_http.exchange(shared_server.url, twice).status == 400
    assert fal.total() == seen


def test_a_call_that_does_not_fit_is_refused_in_words_that_the_client_shows(
    shared_server: Server, books: Books
) -> None:
    _, key = books.account(1)
    response = aimed(shared_server, None, FLUX, headers={"Authorization": f"Key {key}"}, data=CAT)
    refused(response, 402, "insufficient_credits")


def test_an_unlengthed_body_is_bounded_as_any(strict_server: Server) -> None:
    """A body in chunks is measured as it comes: here by the 64 KiB of an upload's beginning."""
    _, key = strict_server.books.account()
    pieces = iter([b'{"file_name": "', b"x" * 70_000, b'"}'])
    target = "https://rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3"
    refused(aimed(strict_server, key, target, data=pieces), 413, "body_too_large")
