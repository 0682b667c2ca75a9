"""Routes (contract 3.1): what is ours answers as documented, and what is nobody's never reaches fal."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import requests
from flask.testing import FlaskClient

from abhiapi import accounts, calls, ledger, pricing, runtime
from abhiapi.money import Micros
from abhiapi.settings import Settings
from abhiapi.web import V1_LIMIT, create_app
from abhiapi.web.api import BODY_BYTES_MAX
from tests.harness import OPERATOR_KEY, Books, Fal, Server, until

FLUX = "/fal-ai/flux/dev"
TIME = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Any]:
    """The application in this process, for settings and limits of its own: a function of settings."""
    running = []

    def make(**settings: str) -> FlaskClient:
        env = {"FAL_KEY": OPERATOR_KEY, "ABHIAPI_DATABASE_URL": f"sqlite:///{tmp_path / 'abhiapi.db'}"} | settings
        running.append(runtime.start(Settings.from_env(env)))
        return create_app(running[-1]).test_client()

    yield make
    for rt in running:
        rt.close()


def get(server: Server, path: str, key: str | None = None, **params: Any) -> Any:
    response = fetch(server, path, key, **params)
    assert response.status_code == 200, response.text
    return json.loads(response.text, parse_float=Decimal)


def fetch(
    server: Server, path: str, key: str | None = None, *, method: str = "GET", **params: Any
) -> requests.Response:
    headers = {"x-api-key": key} if key else {}
    return requests.request(method, server.url + path, headers=headers, params=params, timeout=30)


def assert_error(response: requests.Response, code: int, error_type: str) -> None:
    assert (response.status_code, response.json()["error"]["type"]) == (code, error_type)
    error = response.json()["error"]
    assert response.json() == {"error": error, "detail": error["message"], "message": error["message"]}
    assert (error["code"], set(error)) == (code, {"code", "name", "type", "message"})


# --- /v1 --------------------------------------------------------------------------------------------------------


def test_the_account(shared_server: Server, fal: Fal, books: Books) -> None:
    name, key = books.account(1000)
    shared_server.post(key)
    shared_server.post(
        key, "/fal-ai/creative-upscaler", {"image_url": "https://example.com/x.jpg"}, weather="units=none"
    )
    assert get(shared_server, "/v1/account", key) == {
        "account": name, "plan": "free", "balance": Decimal("973.75"), "held": 100, "available": Decimal("873.75"),
        "limits": {"requests_per_minute": 100_000, "concurrent": 1000},
    }  # fmt: skip
    assert '"balance":973.75,' in fetch(shared_server, "/v1/account", key).text.replace(" ", "")


def test_every_caller_may_ask_in_its_own_way(shared_server: Server, books: Books) -> None:
    name, key = books.account()
    for headers in ({"x-api-key": key}, {"Authorization": f"Key {key}"}, {"Authorization": f"Bearer {key}"}):
        response = requests.get(f"{shared_server.url}/v1/account", headers=headers, timeout=30)
        assert response.json()["account"] == name


OWN_ROUTES = ("/v1/account", "/v1/calls", "/v1/calls/call_0000000000000", "/v1/usage", "/v1/ledger")


@pytest.mark.parametrize("path", [*OWN_ROUTES, "POST /v1/estimate"])
def test_own_routes_want_a_key(shared_server: Server, path: str) -> None:
    method, _, path = path.rpartition(" ")
    assert_error(fetch(shared_server, path, method=method or "GET"), 401, "missing_key")
    assert_error(fetch(shared_server, path, "sk-fal-x", method=method or "GET"), 401, "invalid_key")


def test_a_suspended_account_sees_what_it_has(shared_server: Server, books: Books) -> None:
    name, key = books.account()

    def suspend(tx: Any) -> None:
        account = accounts.find(tx, name)
        assert account is not None
        accounts.set_status(tx, account.account_id, "suspended")

    books.write(suspend)
    for path in ("/v1/account", "/v1/calls", "/v1/usage", "/v1/ledger"):
        assert fetch(shared_server, path, key).status_code == 200
    assert_error(shared_server.post(key), 403, "account_suspended")


def test_the_calls_of_an_account(shared_server: Server, books: Books) -> None:
    _, key = books.account(5000)
    for weather in ("units=2", "status=422", "units=none"):
        shared_server.post(key, weather=weather)
    shared_server.post(key, "/fal-ai/creative-upscaler", {"image_url": "https://example.com/x.jpg"}, weather="units=-5")
    listed = get(shared_server, "/v1/calls", key)
    assert listed["next_cursor"] is None
    upscaled, computed, invalid, drawn = listed["calls"]
    assert set(drawn) == {
        "call_id", "key_id", "model", "mode", "state", "status", "held", "credits", "units", "unit_price_usd",
        "usage_source", "fal_request_id", "created_at", "finished_at",
    }  # fmt: skip
    expected = {
        "model": "fal-ai/flux/dev", "mode": "sync", "state": "settled", "status": 200, "held": Decimal("26.25"),
        "credits": Decimal("52.5"), "units": "2", "unit_price_usd": Decimal("0.02625"), "usage_source": "fal",
    }  # fmt: skip
    assert expected.items() <= drawn.items()
    assert TIME.fullmatch(drawn["created_at"])
    assert TIME.fullmatch(drawn["finished_at"])
    assert {"state": "released", "status": 422, "credits": 0, "usage_source": None}.items() <= invalid.items()
    assert {"state": "settled", "usage_source": "catalogue", "units": "1"}.items() <= computed.items()
    assert {"state": "unknown", "units": "-5", "finished_at": None, "held": 100}.items() <= upscaled.items()
    assert get(shared_server, f"/v1/calls/{drawn['call_id']}", key) == drawn


def test_lists_are_paged_without_gaps_or_repeats(shared_server: Server, books: Books) -> None:
    _, key = books.account(5000)
    for _ in range(7):
        shared_server.post(key)
    for path, name, field in (("/v1/calls", "calls", "call_id"), ("/v1/ledger", "entries", "entry_id")):
        whole = get(shared_server, path, key, limit=200)
        assert whole["next_cursor"] is None
        paged, cursor = [], None
        while True:
            page = get(shared_server, path, key, limit=3, **({"cursor": cursor} if cursor else {}))
            paged += page[name]
            cursor = page["next_cursor"]
            if cursor is None:
                break
            assert len(page[name]) == 3
        assert paged == whole[name]
        assert len({row[field] for row in paged}) == len(paged) == (7 if name == "calls" else 8)


def test_the_ledger_of_an_account(shared_server: Server, books: Books) -> None:
    _, key = books.account(100)
    call_id = shared_server.post(key).headers["x-abhiapi-call-id"]
    charge, topup = get(shared_server, "/v1/ledger", key)["entries"]
    assert set(charge) == {
        "entry_id", "seq", "kind", "credits", "balance_after", "call_id", "ref", "note", "created_at", "hash"
    }  # fmt: skip
    assert {
        "seq": 2, "kind": "charge", "credits": Decimal("-26.25"), "balance_after": Decimal("73.75"), "call_id": call_id,
        "ref": None, "note": None,
    }.items() <= charge.items()  # fmt: skip
    assert {"seq": 1, "kind": "topup", "credits": 100, "balance_after": 100, "call_id": None}.items() <= topup.items()
    assert re.fullmatch(r"[0-9a-f]{64}", charge["hash"])


def test_the_usage_of_an_account(shared_server: Server, books: Books) -> None:
    name, key = books.account(5000)
    shared_server.post(key)
    shared_server.post(key, weather="status=500")
    call_id = shared_server.post(key, "/fal-ai/flux/schnell").headers["x-abhiapi-call-id"]
    (key_id,) = {call["key_id"] for call in get(shared_server, "/v1/calls", key)["calls"]}
    total = {"calls": 3, "credits": Decimal("29.4"), "cost_usd": Decimal("0.0294")}
    by_model = get(shared_server, "/v1/usage", key, by="model")
    assert sorted(by_model["rows"], key=lambda row: row["group"]) == [
        {"group": "fal-ai/flux/dev", "calls": 2, "credits": Decimal("26.25"), "cost_usd": Decimal("0.02625")},
        {"group": "fal-ai/flux/schnell", "calls": 1, "credits": Decimal("3.15"), "cost_usd": Decimal("0.00315")},
    ]
    assert by_model["total"] == total
    day = get(shared_server, "/v1/calls", key)["calls"][0]["created_at"][:10]
    assert get(shared_server, "/v1/usage", key) == {"rows": [{"group": day} | total], "total": total}
    assert get(shared_server, "/v1/usage", key, by="key", since=day) == {
        "rows": [{"group": key_id} | total], "total": total
    }  # fmt: skip
    nothing = {"calls": 0, "credits": 0, "cost_usd": 0}
    assert get(shared_server, "/v1/usage", key, since="2999-01-01") == {"rows": [], "total": nothing}
    books.write(lambda tx: calls.refund(tx, _number(tx, name, call_id), None, now_ms=books.clock()))
    assert get(shared_server, "/v1/usage", key)["total"]["credits"] == Decimal("26.25")


def _number(tx: Any, account: str, call_id: str) -> int:
    from abhiapi.ids import parse_call

    number = parse_call(call_id)
    assert number is not None
    return number


def test_another_accounts_things_are_not_there(shared_server: Server, books: Books) -> None:
    """The same answer for what belongs to somebody else and for what does not exist."""
    _, mine = books.account()
    _, theirs = books.account()
    call_id = shared_server.post(theirs).headers["x-abhiapi-call-id"]
    foreign = fetch(shared_server, f"/v1/calls/{call_id}", mine)
    assert_error(foreign, 404, "not_found")
    for path in ("call_0000000000000", "call_zzzzzzzzzzzzz", "x", "%00", "call_" + "0" * 200):
        unknown = fetch(shared_server, f"/v1/calls/{path}", mine)
        assert (unknown.status_code, unknown.content) == (404, foreign.content)
    assert get(shared_server, "/v1/calls", mine)["calls"] == []
    assert len(get(shared_server, "/v1/ledger", mine)["entries"]) == 1
    assert get(shared_server, "/v1/usage", mine)["rows"] == []
    beyond = get(shared_server, "/v1/calls", mine, cursor=call_id)
    assert beyond == {"calls": [], "next_cursor": None}


@pytest.mark.parametrize(
    "query",
    ["/v1/calls?limit=0", "/v1/calls?limit=201", "/v1/calls?limit=x", "/v1/calls?limit=-1", "/v1/calls?limit=٣",
     "/v1/calls?cursor=x", "/v1/calls?cursor=12", "/v1/ledger?cursor=x", "/v1/ledger?cursor=-1", "/v1/ledger?limit=1e3",
     "/v1/ledger?cursor=" + "9" * 40, "/v1/usage?by=account", "/v1/usage?by=", "/v1/usage?since=yesterday",
     "/v1/usage?until=2026-13-01", "/v1/usage?since=2026-1-1x"],
)  # fmt: skip
def test_parameters_that_make_no_sense_are_refused(shared_server: Server, books: Books, query: str) -> None:
    _, key = books.account()
    assert_error(fetch(shared_server, query, key), 400, "bad_request")


def test_the_price_list_needs_no_key_and_names_every_model(shared_server: Server) -> None:
    listed = get(shared_server, "/v1/prices")["prices"]
    by_model = {price["model"]: price for price in listed}
    assert set(by_model) == {rule.model for rule in pricing.shipped_rules()}
    flux = by_model["fal-ai/flux/dev"]
    assert set(flux) == {"model", "unit", "unit_price_usd", "fal_unit_price_usd", "margin", "source", "updated_at"}
    assert (flux["unit_price_usd"], flux["fal_unit_price_usd"]) == (Decimal("0.02625"), Decimal("0.025"))
    assert (flux["margin"], flux["unit"]) == (Decimal("0.05"), "megapixels")


def estimate(server: Server, key: str, body: Any) -> requests.Response:
    data = body if isinstance(body, bytes) or not isinstance(body, dict) else json.dumps(body)
    return requests.post(f"{server.url}/v1/estimate", data=data, headers={"x-api-key": key}, timeout=30)


def test_an_estimate_is_what_a_call_holds(shared_server: Server, fal: Fal, books: Books) -> None:
    name, key = books.account()
    wanted = {"prompt": "x", "num_images": 3, "image_size": {"width": 2000, "height": 1000}}
    told = estimate(shared_server, key, {"model": "fal-ai/flux/dev", "input": wanted}).json()
    assert set(told) == {"model", "credits", "basis"}
    assert told["model"] == "fal-ai/flux/dev"
    assert "3 images" in told["basis"]
    shared_server.post(key, body=wanted)
    assert books.calls(name)[0].held_micros == Decimal(str(told["credits"])) * 1000 == 6 * 26_250
    assert estimate(shared_server, key, {"model": "/fal-ai/flux/dev/"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "code", "error_type"),
    [
        (b"", 400, "malformed_json"), (b"{", 400, "malformed_json"), (b"[]", 400, "bad_request"),
        (b"{}", 400, "bad_request"), (b'{"model":1}', 400, "bad_request"),
        (b'{"model":"fal-ai/flux/dev","input":[]}', 400, "bad_request"),
        (b'{"model":"fal-ai/flux/dev","inputs":{}}', 400, "bad_request"),
        (b'{"model":"fal-ai/nothing"}', 404, "unpriced_model"),
        (b" " * (BODY_BYTES_MAX + 1), 413, "body_too_large"),
        (iter([b" " * 1000] * 2000), 413, "body_too_large"),
    ],
    ids=range(10),
)  # fmt: skip
def test_an_estimate_of_nonsense_is_refused(
    shared_server: Server, books: Books, body: Any, code: int, error_type: str
) -> None:
    _, key = books.account()
    assert_error(estimate(shared_server, key, body), code, error_type)


def test_own_routes_have_a_limit_of_their_own(app: Any) -> None:
    client = app()
    most = int(V1_LIMIT.split()[0])
    statuses = [client.get("/v1/prices").status_code for _ in range(most + 2)]
    assert statuses == [200] * most + [429] * 2
    refused = client.get("/v1/prices")
    assert refused.json["error"]["type"] == "rate_limited"
    assert int(refused.headers["Retry-After"]) > 0
    assert client.get("/healthz").status_code == 200


# --- health and metrics -----------------------------------------------------------------------------------------


def test_health_is_whether_the_database_can_be_written(strict_server: Server) -> None:
    until(lambda: fetch(strict_server, "/healthz").json() == {"status": "ok"}, what="well")
    other = sqlite3.connect(strict_server.books.database.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        until(lambda: not fetch(strict_server, "/healthz").ok, what="ill, a second later at most")
        response = fetch(strict_server, "/healthz")
    finally:
        other.execute("ROLLBACK")
        other.close()
    assert (response.status_code, response.json()["status"]) == (503, "unavailable")
    until(lambda: fetch(strict_server, "/healthz").ok, what="well again")


def test_metrics_count_what_happened(shared_server: Server, books: Books) -> None:
    _, key = books.account()

    def count(name: str) -> Decimal:
        text = fetch(shared_server, "/metrics").text
        return sum((Decimal(line.split()[1]) for line in text.splitlines() if line.startswith(name + " ")), Decimal())

    watched = {
        'abhiapi_calls_total{end="settled"}': 1, 'abhiapi_calls_total{end="released"}': 1,
        'abhiapi_refused_total{type="unpriced_model"}': 1, "abhiapi_charged_micros_total": 52_500,
        "abhiapi_charges_over_hold_total": 1,
    }  # fmt: skip
    before = {name: count(name) for name in watched}
    shared_server.post(key, weather="units=2")
    shared_server.post(key, weather="status=500")
    shared_server.post(key, "/fal-ai/nothing")
    assert {name: count(name) - before[name] for name in watched} == watched
    assert fetch(shared_server, "/metrics").headers["Content-Type"].startswith("text/plain; version=0.0.4")


def test_metrics_are_for_this_machine_only(shared_server: Server, app: Any) -> None:
    forwarded = requests.get(f"{shared_server.url}/metrics", headers={"X-Forwarded-For": "10.0.0.1"}, timeout=30)
    assert_error(forwarded, 404, "unknown_route")
    client = app()
    assert client.get("/metrics").status_code == 200
    assert client.get("/metrics", environ_base={"REMOTE_ADDR": "10.0.0.1"}).status_code == 404


def test_metrics_behind_a_token(app: Any) -> None:
    client = app(ABHIAPI_METRICS_TOKEN="a-token")
    elsewhere = {"REMOTE_ADDR": "10.0.0.1"}
    for authorization in (None, "a-token", "Bearer b-token", "Bearer a-tokenx", "Bearer \xe9"):
        headers = {"Authorization": authorization} if authorization else {}
        refused = client.get("/metrics", headers=headers)
        assert refused.status_code == 401
        assert refused.get_json()["error"]["type"] == ("invalid_key" if authorization else "missing_key")
    told = client.get("/metrics", headers={"Authorization": "Bearer a-token"}, environ_base=elsewhere)
    assert told.status_code == 200


# --- neither ours nor fal's -------------------------------------------------------------------------------------

FORBIDDEN = (
    "/tokens", "/tokens/", "/tokens/x", "/storage/auth/token", "/storage/upload/initiate", "/api/fal/proxy/x", "/api/x",
    "/queue", "/queue/", "/static/x", "/v1",
    "/v1/", "/v1/nothing", "/v1/keys", "/favicon.ico", "/robots.txt", "/.well-known/x", "/tokens%2f", "/v1%2fx",
)  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", FORBIDDEN)
def test_what_is_nobodys_is_not_found_and_not_forwarded(
    shared_server: Server, fal: Fal, books: Books, path: str, method: str
) -> None:
    name, key = books.account()
    seen = fal.total()
    assert_error(fetch(shared_server, path, key, method=method), 404, "unknown_route")
    assert fal.total() == seen
    assert books.calls(name) == []


@pytest.mark.parametrize("path", ["/v1/account", "/v1/prices", "/healthz", "/metrics", "/", "/docs"])
def test_a_wrong_method_on_a_route_of_ours_is_said_so(shared_server: Server, fal: Fal, path: str) -> None:
    seen = fal.total()
    for method in ("POST", "PUT", "DELETE"):
        assert_error(fetch(shared_server, path, method=method), 405, "method_not_allowed")
    assert fal.total() == seen


def test_the_first_page_says_what_this_is(shared_server: Server, app: Any) -> None:
    page = fetch(shared_server, "/")
    assert page.status_code == 200
    assert f"{shared_server.url}/fal-ai/flux/dev" in page.text
    assert "https://fal.example.com/fal-ai" in app(ABHIAPI_PUBLIC_URL="https://fal.example.com/").get("/").text


def test_a_topup_is_seen_by_the_very_next_request(shared_server: Server, books: Books) -> None:
    name, key = books.account(10)
    assert shared_server.post(key).status_code == 402

    def topup(tx: Any) -> None:
        account = accounts.find(tx, name)
        assert account is not None
        ledger.topup(tx, account.account_id, Micros(16_250), ref=None, note=None, now_ms=books.clock())

    books.write(topup)
    assert shared_server.post(key).status_code == 200
    assert get(shared_server, "/v1/account", key)["balance"] == 0
