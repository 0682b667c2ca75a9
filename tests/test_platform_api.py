"""fal's platform API as a neighbour: read to its end, politely and strictly, no error with the credential in it."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import brotli
import pytest

from abhiapi import price_sync, pricing
from abhiapi.errors import PlatformError, PlatformNotFound
from abhiapi.platform_api import PAUSE_MAX_S, TRIES, PlatformApi
from abhiapi.sync import fetched
from tests.sandbox_client import RULES, Fal, sim, simulator_url

__all__ = ["sim", "simulator_url"]  # fixtures

CREDENTIAL = "0123456789abcdef:fedcba9876543210fedcba9876543210"


@contextmanager
def client(url: str, waits: list[int] | None = None) -> Iterator[PlatformApi]:
    api = PlatformApi(f"{url}/v1", CREDENTIAL, sleep=(waits if waits is not None else []).append)
    try:
        yield api
    finally:
        api.close()


Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def scripted(script: Callable[[str, dict[str, list[str]]], Answer]) -> Iterator[tuple[str, list[str]]]:
    """A neighbour that says what a test wants; its address and the paths that it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            parts = urlsplit(self.path)
            status, headers, body = script(parts.path, parse_qs(parts.query))
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


@contextmanager
def looking(
    script: Callable[[str, dict[str, list[str]]], Answer], waits: list[int] | None = None
) -> Iterator[tuple[PlatformApi, list[str]]]:
    """A look at such a neighbour, and the paths that it was asked."""
    with scripted(script) as (url, asked), client(url, waits) as api:
        yield api, asked


def says(value: Any, status: int = 200, **headers: str) -> Callable[..., Answer]:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda path, query: (status, headers, body)


def prices(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"prices": list(rows), "next_cursor": None, "has_more": False, **more}


def row(**other: Any) -> dict[str, Any]:
    return {"endpoint_id": "acme/a", "unit_price": 0.04, "unit": "images", "currency": "USD"} | other


def test_all_models_and_all_prices_are_the_very_decimals_of_fals_bill(sim: Fal) -> None:
    with client(sim.url) as api:
        answer = fetched(api)
    assert set(answer.listed) == set(RULES)
    assert {model: one.unit_price for model, one in answer.quotes.items()} == {
        model: rule.fal_unit_price_usd for model, rule in RULES.items()
    }


@pytest.mark.parametrize(
    ("query", "status", "kind"),
    [
        ("?endpoint_id=fal-ai/flux/dev&endpoint_id=acme/unknown", 404, "not_found"),
        ("", 400, "validation_error"),
        ("?endpoint_id=" + ",".join(["fal-ai/flux/dev"] * 51), 400, "validation_error"),
    ],
)
def test_the_simulator_refuses_what_fal_refuses(sim: Fal, query: str, status: int, kind: str) -> None:
    refused = sim.get(f"/v1/models/pricing{query}")
    assert (refused.status_code, refused.json()["error"]["type"]) == (status, kind)


def test_the_simulator_tells_models_to_everybody_and_prices_to_whoever_has_a_key(sim: Fal) -> None:
    del sim.session.headers["Authorization"]
    assert sim.get("/v1/models?limit=2").json()["has_more"] is True
    assert sim.get("/v1/models?cursor=nonsense!").status_code == 400
    assert sim.get("/v1/models/pricing?endpoint_id=fal-ai/flux/dev").status_code == 401
    assert sim.calls() == []  # no calls of a model's
    assert sim.bill()["calls"] == 0


def test_prices_are_asked_for_fifty_at_a_time_and_pages_are_followed() -> None:
    names = [f"acme/model-{number:03}" for number in range(230)]

    def script(path: str, query: dict[str, list[str]]) -> Answer:
        if path.endswith("/models"):
            start = int(query.get("cursor", ["0"])[0])
            end = start + 100
            rows = [{"endpoint_id": name} for name in names[start:end]]
            more = end < len(names)
            return says({"models": rows, "next_cursor": str(end) if more else None, "has_more": more})(path, query)
        ids = query["endpoint_id"]
        assert len(ids) <= 50
        start = int(query.get("cursor", ["0"])[0])  # this list is paged as well
        more = start + 30 < len(ids)
        rows = [row(endpoint_id=name) for name in ids[start : start + 30]]
        return says(prices(*rows, next_cursor=str(start + 30) if more else None, has_more=more))(path, query)

    told: list[tuple[int, int]] = []
    with scripted(script) as (url, asked), client(url) as api:
        answer = fetched(api, lambda done, of: told.append((done, of)))
    assert len(answer.quotes) == 230
    assert len([path for path in asked if "pricing" in path]) == 9
    assert told[-1] == (230, 230)


def test_one_unknown_model_costs_its_batch_nothing(sim: Fal) -> None:
    """fal answers 404 for the whole call: it is halved until the unknown id stands alone."""
    with client(sim.url) as api:
        quotes = api.prices([*RULES, "acme/unknown", "acme/other"])
    assert {one.model for one in quotes} == set(RULES)


def test_too_many_unknown_models_are_no_answer() -> None:
    names = [f"acme/{number}" for number in range(500)]
    listed = [{"endpoint_id": name} for name in names]

    def script(path: str, query: dict[str, list[str]]) -> Answer:
        return says({"models": listed} if path.endswith("/models") else {}, 404 if "pricing" in path else 200)(
            path, query
        )

    with looking(script) as (api, asked), pytest.raises(PlatformError, match="too many"):
        fetched(api)
    assert len(asked) < 1000


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_trouble_of_the_moment_is_waited_out(sim: Fal, status: int) -> None:
    sim.order(*[{"match": "v1/models", "status": status}] * 2)
    waits: list[int] = []
    with client(sim.url, waits) as api:
        assert set(fetched(api).listed) == set(RULES)
    assert waits == [1, 2]


@pytest.mark.parametrize("weather", [{"drop": "in_body"}, {"drop": "before_headers"}, {"garbage": True}])
def test_a_broken_answer_is_asked_for_again(sim: Fal, weather: dict[str, Any]) -> None:
    sim.order({"match": "v1/models/pricing", **weather})
    with client(sim.url) as api:
        assert len(fetched(api).quotes) == len(RULES)


@pytest.mark.parametrize(("said", "waited"), [("7", 7), ("99999", PAUSE_MAX_S), ("soon", 1), ("-3", 1)])
def test_fal_is_left_alone_for_as_long_as_it_asks_within_reason(said: str, waited: int) -> None:
    answers = [(429, {"Retry-After": said}, b"{}"), (200, {}, json.dumps({"models": []}).encode())]
    waits: list[int] = []
    with scripted(lambda path, query: answers.pop(0)) as (url, _), client(url, waits) as api:
        assert list(api.models()) == [[]]
    assert waits == [waited]


def test_trouble_that_lasts_ends_in_plain_words() -> None:
    waits: list[int] = []
    body = {"error": {"type": "rate_limited", "message": "slow\n down"}}
    with (
        looking(says(body, 429), waits) as (api, asked),
        pytest.raises(PlatformError, match=r"did not answer /models: status 429 \(slow down\) \(5 tries\)"),
    ):
        list(api.models())
    assert (len(asked), waits) == (TRIES, [1, 2, 4, 8])


def test_nobody_there_is_told_in_plain_words() -> None:
    with client("http://127.0.0.1:9") as api, pytest.raises(PlatformError, match="did not answer /models"):
        list(api.models())


@pytest.mark.parametrize("status", [401, 403, 400])
def test_no_error_shows_the_credential(status: int) -> None:
    secret = CREDENTIAL.partition(":")[2]
    for said in (CREDENTIAL, secret):
        with (
            looking(says({"error": {"message": f"bad key {said}"}}, status)) as (api, _),
            pytest.raises(PlatformError) as refusal,
        ):
            list(api.models())
        assert str(status) in refusal.value.message
        assert secret not in refusal.value.message


def test_a_credential_that_fal_refuses_is_not_tried_again() -> None:
    with looking(says({}, 401)) as (api, asked), pytest.raises(PlatformError, match="check FAL_KEY"):
        list(api.models())
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"<html>", "no JSON"),
        (b"", "no JSON"),
        (b'{"prices": [{"endpoint_id": "acme/a", "unit_price": NaN}]}', "no JSON"),
        (b"[" * 100_000, "no JSON"),
        ([], "no object"),
        ({}, "no list of prices"),
        ({"prices": {}}, "no list of prices"),
        ({"prices": ["acme/a"]}, "no list of prices"),
        (prices(row(unit_price="0.04")), "no number"),
        (prices(row(unit_price=True)), "no number"),
        (prices(row(unit_price=None)), "no number"),
        (prices(row(endpoint_id=7)), "without endpoint_id"),
        (prices(row(unit=None)), "without unit"),
        (prices({"endpoint_id": "acme/a", "unit_price": 1, "unit": "images"}), "without currency"),
        (prices(row(endpoint_id="acme/other")), "nobody asked for"),
        (prices(row(), row(unit_price=1)), "two prices"),
        (prices(row(), has_more=True), "not where"),
        (prices(row(), has_more="yes"), "in its own way"),
        (prices(row(), next_cursor=7), "in its own way"),
    ],
)
def test_an_answer_of_another_shape_is_refused(said: Any, why: str) -> None:
    with scripted(says(said)) as (url, _), client(url) as api, pytest.raises(PlatformError, match=why):
        api.prices(["acme/a"])


def test_numbers_are_what_their_digits_say() -> None:
    """0.1 plus 0.2 never becomes 0.30000000000000004 on the way, and digits beyond a double's are kept."""
    text = b'{"prices":[{"endpoint_id":"acme/a","unit":"images","currency":"USD","unit_price":%s}]}'
    for digits in ("0.1", "0.00000123456789012345", "1e-5", "25", "0.30"):
        with scripted(says(text % digits.encode())) as (url, _), client(url) as api:
            assert api.prices(["acme/a"])[0].unit_price == Decimal(digits)


@pytest.mark.parametrize("weather", ["repeat", "endless"])
def test_pages_that_go_in_circles_are_refused(sim: Fal, weather: str) -> None:
    sim.order(*[{"match": "v1/models", "prices": weather}] * 5)
    with client(sim.url) as api, pytest.raises(PlatformError, match=r"repeats a page|in circles"):
        fetched(api)


def test_a_cursor_that_comes_twice_ends_it() -> None:
    answers = iter(range(1000))

    def script(path: str, query: dict[str, list[str]]) -> Answer:
        rows = [{"endpoint_id": f"acme/{next(answers)}"}]
        return says({"models": rows, "next_cursor": "Mg", "has_more": True})(path, query)

    with looking(script) as (api, asked), pytest.raises(PlatformError, match="in circles"):
        list(api.models())
    assert len(asked) == 2


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("br", brotli.compress)])
def test_compressed_answers_are_read(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    body = json.dumps(prices(row())).encode()
    with scripted(says(pack(body), **{"content-encoding": encoding})) as (url, _), client(url) as api:
        assert api.prices(["acme/a"])[0].unit_price == Decimal("0.04")
    with (
        looking(says(pack(body)[:-4], **{"content-encoding": encoding})) as (api, _),
        pytest.raises(PlatformError, match="cut before its end"),
    ):
        api.prices(["acme/a"])
    with (
        looking(says(b"\x00\x01 not packed" * 9, **{"content-encoding": encoding})) as (api, _),
        pytest.raises(PlatformError, match=r"not compressed|cut before"),
    ):
        api.prices(["acme/a"])


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("br", brotli.compress)])
def test_a_bomb_stays_small(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    bomb = pack(b" " * (40 * 1024 * 1024))
    with (
        looking(says(bomb, **{"content-encoding": encoding})) as (api, _),
        pytest.raises(PlatformError, match="larger than any list"),
    ):
        api.prices(["acme/a"])


def test_a_list_without_an_end_is_left_when_its_time_is_up(sim: Fal) -> None:
    api = PlatformApi(f"{sim.url}/v1", CREDENTIAL, timeout_s=0)
    with pytest.raises(PlatformError, match="took longer than 0 s"):
        fetched(api)
    api.close()


def test_a_path_that_fal_does_not_know_says_so() -> None:
    with scripted(says({}, 404)) as (url, _), client(url) as api, pytest.raises(PlatformNotFound):
        list(api.models())


@pytest.mark.parametrize("weather", ["currency", "negative", "placeholder", "partial", "shape"])
def test_bad_weather_over_all_prices_is_refused_as_a_whole(sim: Fal, weather: str) -> None:
    """What the simulator can do to a price list never ends in a catalogue of nothing."""
    known = [
        pricing.FalPrice(model, rule.unit, rule.fal_unit_price_usd, "priced", "fal api", "2026-11-22")
        for model, rule in RULES.items()
    ]
    sim.order(*[{"match": "v1/models/pricing", "prices": weather}] * 20)
    with client(sim.url) as api, pytest.raises(PlatformError):
        price_sync.plan(known, RULES.values(), fetched(api), source="fal api")
