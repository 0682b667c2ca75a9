"""Uploads: fal's answer as it is to whoever may spend, nothing for nothing else; and the simulator's side of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from abhiapi import accounts, upload_gateway
from abhiapi.errors import RateLimited
from abhiapi.limits import UPLOADS_PER_MINUTE, CallLimits
from abhiapi.settings import Settings
from tests.harness import OPERATOR_KEY, Books, Clock, Fal, Server
from tests.raw_http import Upstream
from tests.sandbox_client import Fal as Simulator
from tests.sandbox_client import fresh, simulator

STORAGE = "https://rest.fal.ai/storage/upload"
CDN = "?storage_type=fal-cdn-v3"
INITIATE = f"{STORAGE}/initiate{CDN}"
WANTED = b'{"content_type": "image/png",  "file_name":"cat.png"}'


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with simulator() as url, fresh(url) as client:
        yield client


def begin(server: Server, key: str, target: str = INITIATE, *, method: str = "POST", **more: Any) -> requests.Response:
    headers = {"x-fal-target-url": target, "Content-Type": "application/json"} | more.pop("headers", {})
    if "Authorization" not in headers:
        headers["x-api-key"] = key
    more.setdefault("data", WANTED)
    return requests.request(method, server.url + "/api/fal/proxy", headers=headers, timeout=60, **more)


def uploads_counted(server: Server) -> int:
    (line,) = re.findall(
        r"^abhiapi_uploads_total (\d+)\.0$", requests.get(server.url + "/metrics", timeout=30).text, re.M
    )
    return int(line)


def refused(response: requests.Response, code: int, error_type: str) -> None:
    assert (response.status_code, response.json()["error"]["type"]) == (code, error_type)


def test_an_upload_and_a_call_with_it(shared_server: Server, fal: Fal, books: Books) -> None:
    """failures.md rows 62 and 64: brokered, with the operator's credential and without the caller's."""
    name, key = books.account()
    counted = uploads_counted(shared_server)
    lifecycle = {"X-Fal-Object-Lifecycle": "{}", "x-fal-object-lifecycle-preference": "{}", "cookie": "a=b"}
    begun = begin(shared_server, key, headers=lifecycle)
    assert begun.status_code == 200
    assert uploads_counted(shared_server) == counted + 1
    assert set(begun.json()) == {"file_url", "upload_url"}
    assert "x-abhiapi-credits-used" not in begun.headers
    received = fal.calls("cat.png")[-1]
    assert (received["path"], received["query"]) == ("/rest/storage/upload/initiate", CDN[1:])
    assert received["body"] == WANTED.decode()
    headers = {header.lower(): value for header, value in received["headers"]}
    assert headers["authorization"] == f"Key {OPERATOR_KEY}"
    assert not headers.keys() & {name.lower() for name in lifecycle} | headers.keys() & {"x-fal-target-url"}
    assert "sk-fal-" not in str(received)
    put = requests.put(begun.json()["upload_url"], data=b"a picture", headers={"Content-Type": "image/png"}, timeout=30)
    assert put.status_code == 200
    served = requests.get(begun.json()["file_url"], timeout=30)
    assert (served.content, served.headers["content-type"]) == (b"a picture", "image/png")
    assert books.calls(name) == []
    assert books.standing(name) == (1_000_000, 0)
    enlarged = shared_server.post(key, "/fal-ai/clarity-upscaler", {"image_url": begun.json()["file_url"]})
    assert enlarged.status_code == 200
    assert len(books.calls(name)) == 1


@pytest.mark.parametrize("step", ["initiate", "initiate-multipart", "complete-multipart"])
def test_what_fal_answers_comes_back_byte_for_byte(odd_server: Server, odd_fal: Upstream, step: str) -> None:
    _, key = odd_server.books.account()
    answer = b'{ "file_url" : "https://v3b.fal.media/\\u00e9", "upload_url":"x", "n": 1.0 }\n'
    odd_fal.answer(
        f"HTTP/1.1 200 OK\nContent-Type: application/json\nx-fal-a: b\nContent-Length: {len(answer)}", answer
    )
    response = begin(odd_server, key, f"{STORAGE}/{step}{CDN}", data=b'{"a" : 1}')
    assert (response.status_code, response.content, response.headers["x-fal-a"]) == (200, answer, "b")
    received = odd_fal.received[-1]
    assert received.line == f"POST /rest/storage/upload/{step}{CDN} HTTP/1.1"
    assert received.body == b'{"a" : 1}'


@pytest.mark.parametrize(
    ("status", "key_code", "own_code"),
    [(422, 422, 400), (404, 404, 404), (429, 429, 429), (500, 500, 502), (503, 503, 502)],
)
def test_fals_errors_come_back_in_the_callers_dialect(
    odd_server: Server, odd_fal: Upstream, status: int, key_code: int, own_code: int
) -> None:
    _, key = odd_server.books.account()
    odd_fal.answer(f"HTTP/1.1 {status} X\nContent-Type: application/json\nContent-Length: 16", b'{"detail": "no"}')
    for headers, code in (({"Authorization": f"Key {key}"}, key_code), ({"x-api-key": key}, own_code)):
        response = begin(odd_server, key, headers=headers)
        assert (response.status_code, response.content) == (code, b'{"detail": "no"}')


def test_a_redirect_is_passed_on_and_not_followed(odd_server: Server, odd_fal: Upstream) -> None:
    """failures.md row 61: the operator's key goes nowhere else."""
    _, key = odd_server.books.account()
    seen = len(odd_fal.received)
    odd_fal.answer(f"HTTP/1.1 307 X\nLocation: {odd_fal.url}/elsewhere\nContent-Length: 0", b"")
    response = begin(odd_server, key, allow_redirects=False)
    assert (response.status_code, response.headers["Location"]) == (307, f"{odd_fal.url}/elsewhere")
    assert len(odd_fal.received) == seen + 1


@pytest.mark.parametrize("status", [401, 402, 403])
@pytest.mark.parametrize("scheme", ["Key", "Bearer"])
def test_trouble_with_the_operators_account_is_not_shown(
    odd_server: Server, odd_fal: Upstream, status: int, scheme: str
) -> None:
    _, key = odd_server.books.account()
    body = b'{"detail": "User is locked. Top up your balance"}'
    odd_fal.answer(f"HTTP/1.1 {status} X\nContent-Type: application/json\nContent-Length: {len(body)}", body)
    response = begin(odd_server, key, headers={"Authorization": f"{scheme} {key}"})
    refused(response, 502, "upstream_refused")
    assert "locked" not in response.text


@pytest.mark.parametrize(
    ("head", "body", "code"),
    [
        ("HTTP/1.1 503 X\nContent-Type: text/html\nContent-Length: 5", b"nginx", 503),
        ("HTTP/1.1 200 OK\nContent-Type: application/json\nContent-Length: 99", b"{", 502),
        ("HTTP/1.1 200 OK\nContent-Type: application/json\nConnection: close", b'{"a":"' + b"x" * 300_000 + b'"}', 502),
        ("HTTP/1.1 200 OK\nContent-Type: text/plain\nConnection: close", OPERATOR_KEY.encode(), 502),
        ("no HTTP", b"", 502),
    ],
)
def test_an_answer_that_is_none_is_an_error_that_may_be_repeated(
    odd_server: Server, odd_fal: Upstream, head: str, body: bytes, code: int
) -> None:
    """An upload costs nothing, so fal's own clients, which repeat a 502 or 503, get one."""
    _, key = odd_server.books.account()
    odd_fal.answer(head, body)
    response = begin(odd_server, key, headers={"Authorization": f"Key {key}"})
    assert response.status_code == code
    assert response.json()["error"]["type"].startswith("upstream_")
    assert "nginx" not in response.text
    assert OPERATOR_KEY not in response.text


def test_who_may_not_spend_may_not_upload(shared_server: Server, fal: Fal, books: Books) -> None:
    """failures.md row 64."""
    seen = fal.total()
    _, poor = books.account(0)
    refused(begin(shared_server, poor), 402, "insufficient_credits")
    assert "0 credits are available" in begin(shared_server, poor).json()["message"]
    refused(begin(shared_server, "sk-fal-x"), 401, "invalid_key")
    name, key = books.account()

    def suspend(tx: Any) -> None:
        account = accounts.find(tx, name)
        assert account is not None
        accounts.set_status(tx, account.account_id, "suspended")

    books.write(suspend)
    refused(begin(shared_server, key), 403, "account_suspended")
    assert fal.total() == seen


def test_what_is_no_beginning_of_an_upload_is_not_forwarded(shared_server: Server, fal: Fal, books: Books) -> None:
    _, key = books.account()
    seen = fal.total()
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        refused(begin(shared_server, key, method=method), 405, "method_not_allowed")
    refused(begin(shared_server, key, data=b"[]"), 400, "malformed_json")
    refused(begin(shared_server, key, data=b"{" + b" " * upload_gateway.BODY_BYTES_MAX), 413, "body_too_large")
    assert fal.total() == seen


def test_uploads_are_limited_apart_from_calls() -> None:
    seconds = Clock(1_000_000)
    limits = CallLimits(Settings.from_env({"ABHIAPI_RATE_PER_MINUTE": "1"}), now=seconds)
    for _ in range(UPLOADS_PER_MINUTE):
        limits.allow_upload(1)
    with pytest.raises(RateLimited):
        limits.allow_upload(1)
    limits.allow_upload(2)
    limits.enter(1, "free").release()
    seconds.tick(61)
    limits.allow_upload(1)


def test_a_flood_of_uploads_is_refused(fal: Fal, tmp_path: Path) -> None:
    with Server.started(tmp_path, fal.url) as server:
        _, poor = server.books.account(0)
        codes = [begin(server, poor).status_code for _ in range(UPLOADS_PER_MINUTE + 2)]
        assert codes == [402] * UPLOADS_PER_MINUTE + [429] * 2
        refused(begin(server, poor), 429, "rate_limited")
        assert begin(server, poor).headers["Retry-After"]


# --- the simulator's side ---------------------------------------------------------------------------------------


def begun(sim: Simulator, step: str = "initiate", name: str = "a b/\u00fc.png") -> dict[str, str]:
    wanted = {"content_type": "image/png", "file_name": name}
    reply = sim.session.post(f"{sim.url}/rest/storage/upload/{step}{CDN}", json=wanted, timeout=30)
    assert reply.status_code == 200
    return dict(reply.json())


def test_a_file_is_there_once_it_was_put_with_its_signature(sim: Simulator) -> None:
    urls = begun(sim)
    assert urls["file_url"].endswith("/a_b__.png")
    assert requests.get(urls["file_url"], timeout=30).status_code == 404
    assert requests.put(urls["file_url"], data=b"x", timeout=30).status_code == 403
    assert requests.put(urls["file_url"] + "?signature=x", data=b"x", timeout=30).status_code == 403
    assert requests.put(urls["upload_url"], data=b"x" * 700_000, timeout=30).status_code == 200
    for _ in range(2):
        assert requests.get(urls["file_url"], timeout=30).content == b"x" * 700_000
    head = requests.head(urls["file_url"], timeout=30)
    assert (head.status_code, head.headers["content-length"]) == (200, "700000")
    assert requests.delete(urls["upload_url"], timeout=30).status_code == 405
    assert requests.get(f"{sim.url}/uploads/{'0' * 32}/x", timeout=30).status_code == 404


def test_a_large_file_comes_in_parts(sim: Simulator) -> None:
    urls = begun(sim, "initiate-multipart")
    path, _, query = urls["upload_url"].partition("?")
    parts = []
    for number, piece in ((2, b"world"), (1, b"hello "), (2, b"there")):
        reply = requests.put(f"{path}/{number}?{query}", data=piece, timeout=30)
        assert reply.json() == {"partNumber": number, "etag": reply.headers["etag"]}
        parts.append(reply.json())
    complete = f"{path}/complete?{query}"
    assert requests.post(complete, json={"parts": parts[:2]}, timeout=30).status_code == 400
    assert requests.get(urls["file_url"], timeout=30).status_code == 404
    assert requests.post(complete, json={"parts": parts[1:]}, timeout=30).json() == {}
    assert requests.get(urls["file_url"], timeout=30).content == b"hello there"
    assert requests.put(f"{path}/0?{query}", data=b"", timeout=30).status_code == 400


@pytest.mark.parametrize("body", [b"", b"[]", b'{"file_name": 1, "content_type": "a"}', b'{"file_name": "a"}'])
def test_an_upload_of_nothing_is_refused_as_fal_does(sim: Simulator, body: bytes) -> None:
    reply = sim.session.post(f"{sim.url}/rest/storage/upload/initiate{CDN}", data=body, timeout=30)
    assert reply.status_code == 422
    assert isinstance(json.loads(reply.text)["detail"], list)


def test_weather_for_uploads(sim: Simulator) -> None:
    sim.order({"match": "storage/upload/initiate", "status": 403})
    url = f"{sim.url}/rest/storage/upload/initiate{CDN}"
    assert sim.session.post(url, data=b"{}", timeout=30).status_code == 403
    assert requests.post(url, data=b"{}", timeout=30).status_code == 401
    assert sim.session.post(url.replace("fal-cdn-v3", "gcs"), data=b"{}", timeout=30).status_code == 400
