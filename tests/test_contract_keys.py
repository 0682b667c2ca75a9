"""Keys while serving, and secrets: a change holds for the very next request, and no secret is ever found anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import requests

from abhiapi import accounts, keys
from abhiapi.db import Tx
from tests import raw_http
from tests.harness import OPERATOR_KEY, Books, Fal, Server
from tests.raw_http import Upstream

pytestmark = pytest.mark.engines

FLUX = "/fal-ai/flux/dev"


def change(books: Books, key: str, how: Callable[[Tx, keys.Key], Any]) -> Any:
    """Change a key from this process, as the command line does."""

    def find(tx: Tx) -> Any:
        found = keys.find(tx, key)
        assert found is not None
        return how(tx, found)

    return books.write(find)


def set_status(status: str) -> Callable[[Tx, keys.Key], Any]:
    return lambda tx, key: keys.set_status(tx, key, status)


def answered(server: Server, key: str) -> tuple[int, str | None]:
    """Status and error type of one call, the same for every way to send the key, and of our own routes."""
    seen = set()
    for headers in ({"x-api-key": key}, {"Authorization": f"Bearer {key}"}, {"Authorization": f"Key {key}"}):
        response = requests.post(server.url + FLUX, json={"prompt": "x"}, headers=headers, timeout=30)
        seen.add((response.status_code, response.json().get("error", {}).get("type")))
        own = requests.get(f"{server.url}/v1/account", headers=headers, timeout=30)
        if seen != {(403, "account_suspended")}:
            assert own.status_code == response.status_code
    (one,) = seen
    return one


# --- changes while serving --------------------------------------------------------------------------------------


def test_a_key_is_disabled_enabled_and_revoked_for_the_very_next_request(shared_server: Server, books: Books) -> None:
    _, key = books.account()
    for _ in range(3):
        assert answered(shared_server, key) == (200, None)
        change(books, key, set_status("disabled"))
        assert answered(shared_server, key) == (403, "key_disabled")
        change(books, key, set_status("active"))
    assert answered(shared_server, key) == (200, None)
    change(books, key, set_status("revoked"))
    assert answered(shared_server, key) == (403, "key_revoked")


def test_a_key_expires_at_its_moment(shared_server: Server, books: Books) -> None:
    name, _ = books.account()

    def create(expires_in_ms: int) -> str:
        def op(tx: Tx) -> str:
            account = accounts.find(tx, name)
            assert account is not None
            now = books.clock()
            return keys.create(tx, account.account_id, name=None, expires_at=now + expires_in_ms, now_ms=now)[0]

        return books.write(op)

    assert answered(shared_server, create(60_000)) == (200, None)
    assert answered(shared_server, create(0)) == (403, "key_expired")


def test_a_rotated_key_works_through_its_grace_and_no_longer(shared_server: Server, books: Books) -> None:
    """Both spend the one account's credit: rotating makes none (failures B5)."""
    name, old = books.account(1000)
    new = change(books, old, lambda tx, key: keys.rotate(tx, key, grace_ms=60_000, now_ms=books.clock()))[0]
    assert answered(shared_server, old) == (200, None)
    assert answered(shared_server, new) == (200, None)
    assert books.standing(name) == (1_000_000 - 6 * 26_250, 0)
    newest = change(books, new, lambda tx, key: keys.rotate(tx, key, grace_ms=0, now_ms=books.clock()))[0]
    assert answered(shared_server, new) == (403, "key_expired")
    assert answered(shared_server, newest) == (200, None)
    assert answered(shared_server, old) == (200, None)


def test_a_suspended_account_calls_nothing_until_it_is_resumed(shared_server: Server, fal: Fal, books: Books) -> None:
    name, key = books.account()

    def set_account(status: str) -> None:
        def op(tx: Tx) -> None:
            account = accounts.find(tx, name)
            assert account is not None
            accounts.set_status(tx, account.account_id, status)

        books.write(op)

    set_account("suspended")
    seen = fal.total()
    assert answered(shared_server, key) == (403, "account_suspended")
    assert fal.total() == seen
    set_account("active")
    assert answered(shared_server, key) == (200, None)


# --- what is no key ---------------------------------------------------------------------------------------------

GOOD = keys.new_key()
NO_KEYS = {
    "missing": None,
    "empty": "",
    "of nobody": GOOD,
    "of another kind": "sk-live-" + "a" * 32,
    "without its prefix": GOOD.removeprefix("sk-fal-"),
    "too short": GOOD[:-1],
    "too long": GOOD + "a",
    "with a wrong checksum": GOOD[:-1] + ("0" if GOOD[-1] != "0" else "1"),
    "with two letters swapped": GOOD[:8] + GOOD[9] + GOOD[8] + GOOD[10:] if GOOD[8] != GOOD[9] else GOOD[:9],
    "in capitals": GOOD.upper(),
    "twice": f"{GOOD}, {GOOD}",
    "quoted": f"'{GOOD}'",
    "sql": "sk-fal-' OR '1'='1' --aaaaaaaaaaaaaaaaa",
    "sql of a key's length": "sk-fal-" + "' UNION SELECT 1,1,1,1,1,1,1,1--"[:32],
    "a format": "sk-fal-%s%n{0}${jndi:ldap://x}",
    "latin-1": "sk-fal-" + "\xe9" * 32,
    "utf-8": ("sk-fal-" + "é" * 16).encode().decode("latin-1"),
    "long": "sk-fal-" + "a" * 7000,
    "of the operator": OPERATOR_KEY,
    "of the operator, with the scheme": f"Key {OPERATOR_KEY}",
}


@pytest.mark.parametrize("key", NO_KEYS.values(), ids=NO_KEYS.keys())
def test_what_is_no_key_is_unauthorized(shared_server: Server, fal: Fal, key: str | None) -> None:
    """However it is sent; nothing is forwarded, and the answer does not repeat it."""
    seen = fal.total()
    expected = "missing_key" if not key else "invalid_key"
    for header in ("x-api-key: {}", "Authorization: Bearer {}", "Authorization: Key {}"):
        line = "X-Other: 1" if key is None else header.format(key)
        data = f"POST {FLUX} HTTP/1.1\r\nHost: x\r\n{line}\r\nContent-Length: 14\r\n\r\n" + '{"prompt":"x"}'
        answer = raw_http.exchange(shared_server.url, data.encode("latin-1"))
        body = json.loads(answer.body)
        assert (answer.status, body["error"]["type"]) == (401, expected)
        assert answer.value("content-type") == "application/json"
        assert answer.value("x-abhiapi-call-id")
        if key:
            assert key.encode("latin-1") not in answer.body + repr(answer.headers).encode()
    assert fal.total() == seen


@pytest.mark.parametrize(
    "key",
    ["sk-fal-" + "a" * 1_000_000, "sk-fal-\x00", GOOD[:20] + "\x00" + GOOD[21:], "a\x01", "\x7f"],
    # By name: a fresh key in a test's name would be another one in each worker.
    ids=["a megabyte", "NUL", "NUL within", "SOH", "DEL"],
)
def test_a_header_that_http_does_not_allow_is_refused(shared_server: Server, fal: Fal, key: str) -> None:
    seen = fal.total()
    try:
        answer = raw_http.exchange(shared_server.url, raw_http.request_bytes(key))
    except ConnectionError:
        return  # the server ended the connection while a megabyte was still being sent
    assert answer.status in (400, 431)
    assert fal.total() == seen
    assert requests.get(f"{shared_server.url}/healthz", timeout=30).status_code == 200


def test_with_several_keys_the_first_header_counts(shared_server: Server, books: Books) -> None:
    mine, key = books.account()
    other, others = books.account()
    headers = {"x-api-key": key, "Authorization": f"Key {others}"}
    assert requests.post(shared_server.url + FLUX, json={"prompt": "x"}, headers=headers, timeout=30).status_code == 200
    assert (len(books.calls(mine)), len(books.calls(other))) == (1, 0)
    headers = {"x-api-key": "sk-fal-wrong", "Authorization": f"Key {others}"}
    assert requests.post(shared_server.url + FLUX, json={"prompt": "x"}, headers=headers, timeout=30).status_code == 401


# --- secrets ----------------------------------------------------------------------------------------------------

CANARY = "canary-id:5ec2e7c0ffee-0f-the-operator"
BAD_WEATHER = (
    "", "status=401", "status=403", "status=422", "status=500; body=html", "garbage=1", "units=NaN", "hold_until=never",
    "drop=in_body; size_bytes=300000", "huge_head=1", "status=307", "nonsense",
)  # fmt: skip


def test_no_secret_is_found_anywhere(fal: Fal, odd_fal: Upstream, tmp_path: Any) -> None:
    """After all that can go wrong: not in an answer, the log, the database, the metrics, nor at fal."""
    answers: list[bytes] = []
    with Server.started(tmp_path, fal.url, FAL_KEY=CANARY, ABHIAPI_UPSTREAM_TIMEOUT_S="1") as server:
        _, key = server.books.account(100_000)
        _, poor = server.books.account(0)
        revoked = server.books.account()[1]
        change(server.books, revoked, set_status("revoked"))
        secrets = (key, poor, revoked)
        for weather in BAD_WEATHER:
            for sent in ({"x-api-key": key}, {"Authorization": f"Key {key}"}):
                answers.append(raw(server, FLUX, sent | ({"x-fal-sandbox": weather} if weather else {})))
        for path in (FLUX, "/fal-ai/nothing", "/fal-ai/../x", "/tokens/", "/v1/account", "/v1/calls", "/v1/nothing"):
            for secret in secrets:
                for sent in ({"x-api-key": secret}, {"Authorization": f"Bearer {secret}"}, {"Cookie": secret}):
                    answers.append(raw(server, path, sent))
                    answers.append(raw(server, path, sent, method="GET"))
        answers.append(raw(server, f"{FLUX}?x=1", {"x-api-key": CANARY}))
        answers.append(raw(server, FLUX, {"x-api-key": key, "x-fal-\x01": key}))
        answers.append(raw(server, FLUX, {"x-api-key": key[:-1]}))
        for path in ("/", "/v1/prices", "/healthz", "/metrics", "/docs"):
            answers.append(requests.get(server.url + path, headers={"x-api-key": key}, timeout=30).content)
        server.process.stop()
        log = server.process.log.read_bytes()
        stored = b"".join(file.read_bytes() for file in tmp_path.iterdir() if file != server.process.log)
    assert len(answers) > 100
    assert b"SQLite format 3" in stored
    for secret in (*secrets, CANARY):
        for part in (secret.encode(), secret.encode()[8:-4]):
            assert not any(part in answer for answer in answers)
            assert part not in log
            assert part not in stored
    received = repr(fal.calls())
    assert not any(secret in received for secret in secrets)


def raw(server: Server, path: str, headers: dict[str, str], *, method: str = "POST") -> bytes:
    """Every byte of an answer."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", "Content-Length: 14"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    received = b""
    with raw_http.connect(server.url) as sock:
        sock.sendall("\r\n".join([*lines, "", '{"prompt":"x"}']).encode("latin-1"))
        while piece := sock.recv(65536):
            received += piece
    return received


def test_a_fal_that_repeats_the_credential_is_not_quoted(odd_fal: Upstream, tmp_path: Any) -> None:
    kind, shown = "content-type: application/json", b'{"detail":"Key %b"}' % CANARY.encode()
    with Server.started(tmp_path, odd_fal.url, FAL_KEY=CANARY) as server:
        _, key = server.books.account()
        for status, header, body, answered in (
            ("200 OK", f"x-echo: {CANARY}", b"{}", b"200"),
            ("200 OK", "x: y", shown, b"502"),
            ("302 Found", f"Location: https://fal.run/?key={CANARY}", shown, b"502"),
            ("400 Bad Request", f"www-authenticate: {CANARY}", shown, b"400"),
            ("500 Oops", f"set-cookie: key={CANARY}", shown, b"502"),
        ):
            odd_fal.answer(f"HTTP/1.1 {status}\n{kind}\n{header}\ncontent-length: {len(body)}", body)
            got = raw(server, FLUX, {"x-api-key": key})
            assert got.startswith(b"HTTP/1.1 %b " % answered)
            assert CANARY.encode() not in got
