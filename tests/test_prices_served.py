"""Prices in a running server: taken over at its first start, in force for the next call, and never its undoing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import requests

from abhiapi import costs, fal_prices, timers
from abhiapi.price_terms import FalPrice
from abhiapi.pricing import shipped_rules
from tests.harness import Books, Fal, Process, Server, environment, free_port, until

FLUX, FLUX_MICROS = "fal-ai/flux/dev", 26_250
CAT = {"prompt": "a cat", "image_size": "landscape_4_3"}

MODELS = len(shipped_rules())  # the simulator serves these


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Fal]]:
    """A server that takes prices over, before a simulator of its own."""
    folder = tmp_path_factory.mktemp("synced")
    with Fal.started(folder) as fal:
        settings = {"ABHIAPI_PRICES_SYNC_S": "86400", "ABHIAPI_LEARN_HOLDS": "1"}
        with Server.started(folder, fal.url, **settings) as server:
            until(lambda: words(server.books), what="prices were taken over at the first start")
            yield server, fal


def words(books: Books) -> dict[str, FalPrice]:
    return {word.model: word for word in books.read(fal_prices.newest)}


def append(books: Books, model: str, price: str, unit: str = "images") -> None:
    """What a sync by another process writes."""
    word = FalPrice(model, unit, Decimal(price), "priced", "fal api", "")
    books.write(lambda tx: fal_prices.append(tx, [word], now_ms=books.clock()))


def order(fal: Fal, *weather: dict[str, Any]) -> None:
    requests.post(f"{fal.url}/_sandbox/weather", json=list(weather), timeout=10).raise_for_status()


def metric(server: Server, name: str) -> Decimal:
    for line in requests.get(f"{server.url}/metrics", timeout=10).text.splitlines():
        if line.startswith(f"{name} "):
            return Decimal(line.rpartition(" ")[2])
    raise AssertionError(f"no metric {name}")


def shown(server: Server, model: str) -> dict[str, Any] | None:
    found = requests.get(f"{server.url}/v1/prices", timeout=10).content
    rows = json.loads(found, parse_float=Decimal)["prices"]
    return next((row for row in rows if row["model"] == model), None)


def credits_used(response: requests.Response) -> Decimal:
    assert response.status_code == 200, response.text
    return Decimal(str(json.loads(response.content, parse_float=Decimal)["_billing"]["credits_used"]))


def test_a_server_takes_fals_prices_over_at_its_first_start(synced: tuple[Server, Fal]) -> None:
    server, _ = synced
    assert sum(not model.startswith("acme/") for model in words(server.books)) == MODELS  # that is of another test
    assert server.books.read(lambda tx: timers.done_at(tx, "prices")) is not None
    row = shown(server, FLUX)
    assert row is not None
    assert list(row) == [
        *("model", "unit", "unit_price_usd", "fal_unit_price_usd", "margin", "source", "updated_at"),
    ]
    assert (row["source"], row["unit_price_usd"]) == ("fal api", Decimal("0.02625"))
    assert metric(server, 'abhiapi_price_syncs_total{end="done"}') == 1


def test_a_new_price_is_in_force_for_the_very_next_call(synced: tuple[Server, Fal]) -> None:
    server, _ = synced
    name, key = server.books.account(1000)
    path = "fal-ai/nano-banana"
    assert credits_used(server.post(key, f"/{path}")) == Decimal("40.95")
    append(server.books, path, "0.1")
    assert credits_used(server.post(key, f"/{path}")) == 105
    assert [row.unit_price_usd for row in server.books.calls(name)] == ["0.105", "0.04095"]


def test_a_model_that_only_fal_lists_can_be_called_at_once(synced: tuple[Server, Fal]) -> None:
    server, _ = synced
    _, key = server.books.account(1000)
    path = "/acme/brand-new"
    assert server.post(key, path).status_code == 404
    append(server.books, "acme/brand-new", "0.1")
    answer = server.post(key, path)
    assert answer.status_code == 404
    assert answer.json()["_billing"]["credits_used"] == 0  # fal's own 404: the simulator does not know it


def test_a_price_that_changes_while_a_job_runs_is_not_its_price(synced: tuple[Server, Fal]) -> None:
    """failures.md 39: settled at the price of the submit, by whoever settles it, and both prices are on record."""
    server, fal = synced
    name, key = server.books.account(1000)
    path = "fal-ai/flux-lora"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, key, f"/{path}", CAT, weather="hold_until=sync-price")
        until(lambda: server.books.standing(name)[1], what="the call is admitted")
        job = server.post(key, f"/queue/{path}", CAT, weather="hold_until=job-price; queue_s=0")
        assert job.status_code == 200
        append(server.books, path, "3.5", "megapixels")
        assert shown(server, path)["unit_price_usd"] == Decimal("3.675")  # type: ignore[index]
        fal.release("sync-price")
        fal.release("job-price")
        assert credits_used(running.result()) == Decimal("36.75")
    until(lambda: server.books.standing(name)[1] == 0, what="the job is settled by the reconciler")
    assert [row.charged_micros for row in server.books.calls(name)] == [36_750, 36_750]
    after = server.post(key, f"/{path}", CAT)
    assert after.status_code == 402  # the new price counts from the next call on


def test_what_a_call_really_cost_raises_the_next_hold(synced: tuple[Server, Fal]) -> None:
    """failures.md 9: the observed cost of one call is in the hold of the next, across processes."""
    server, _ = synced
    name, key = server.books.account(1000)
    path = "/fal-ai/qwen-image"
    server.post(key, path, CAT)
    server.post(key, path, CAT, weather="units=2")
    server.post(key, path, CAT)
    assert [row.held_micros for row in server.books.calls(name)] == [42_000, 21_000, 21_000]
    asked = requests.post(
        f"{server.url}/v1/estimate",
        json={"model": path.strip("/"), "input": CAT},
        headers={"x-api-key": key},
        timeout=10,
    ).json()
    assert asked["credits"] == 42
    assert asked["basis"].endswith("raised to 200 % since calls cost more lately")


def test_a_guessed_hold_follows_what_calls_cost(synced: tuple[Server, Fal]) -> None:
    """failures.md 77 and 78: a model billed by the compute second is held by what it costs, not by a guess for ever."""
    server, _ = synced
    name, key = server.books.account(5000)
    path = "/fal-ai/creative-upscaler"
    body = {"image_url": "https://example.com/a.png"}
    server.post(key, path, body, weather="units=300")  # 349.65 credits, and the guess is 100
    server.post(key, path, body, weather="units=1")
    newest, dearest = server.books.calls(name)
    assert (dearest.held_micros, dearest.charged_micros) == (100_000, 349_650)
    assert newest.held_micros == costs.bound_of(dearest.charged_micros)


def test_who_cannot_pay_is_told_how_the_hold_came_about(synced: tuple[Server, Fal]) -> None:
    server, _ = synced
    _, key = server.books.account(10)
    for path in (f"/{FLUX}", f"/queue/{FLUX}"):
        refused = server.post(key, path, CAT)
        assert refused.status_code == 402
        message = refused.json()["message"]
        assert "needs 26.25 credits and 10 are available" in message
        assert "1 image of up to 1 MP = 1 x 0.02625 USD (megapixels)" in message


def test_trouble_with_fals_prices_neither_delays_nor_ends_a_server(tmp_path: Path, fal: Fal) -> None:
    """It starts, serves at the shipped prices, says so, and the next try is on record."""
    with Server.started(
        tmp_path, fal.url, ABHIAPI_FAL_API_URL=f"{fal.url}/nowhere", ABHIAPI_PRICES_SYNC_S="3600"
    ) as server:
        _, key = server.books.account(1000)
        until(lambda: "were not taken over" in server.process.output(), what="the failure is told")
        assert credits_used(server.post(key, f"/{FLUX}", CAT)) == Decimal("26.25")
        assert metric(server, 'abhiapi_price_syncs_total{end="failed"}') == 1
        assert words(server.books) == {}
        assert server.env["FAL_KEY"].partition(":")[2] not in server.process.output()


def test_the_simulators_prices_are_taken_over_under_sandbox(tmp_path: Path) -> None:
    """`serve --sandbox` points the platform API at the simulator, and asks no fal for anything."""
    port = free_port()
    env = environment(ABHIAPI_DATABASE_URL=f"sqlite:///{tmp_path / 'sandbox.db'}")
    process = Process.start(["cli.py", "serve", "--sandbox", "--bind", f"127.0.0.1:{port}"], tmp_path / "log", env)
    try:
        until(
            lambda: f"fal's prices taken over: {MODELS} models" in process.output(),
            what="the sync is told",
            within_s=30,
        )
        rows = requests.get(f"http://127.0.0.1:{port}/v1/prices", timeout=10).json()["prices"]
        assert {row["source"] for row in rows} == {"fal api"}
    finally:
        process.kill()


def test_without_an_interval_fal_is_not_asked(shared_server: Server) -> None:
    assert metric(shared_server, 'abhiapi_price_syncs_total{end="done"}') == 0
    assert words(shared_server.books) == {}


def test_a_sync_that_is_not_due_is_not_made_again_at_the_next_start(tmp_path: Path) -> None:
    with Fal.started(tmp_path) as fal:
        with Server.started(tmp_path, fal.url, ABHIAPI_PRICES_SYNC_S="86400") as server:
            until(lambda: words(server.books), what="prices were taken over")
            first = server.books.read(lambda tx: timers.done_at(tx, "prices"))
            assert server.process.stop() == 0
        order(fal, {"match": "v1/models", "status": 401})
        with Server.started(tmp_path, fal.url, ABHIAPI_PRICES_SYNC_S="86400") as server:
            _, key = server.books.account(1000)
            assert credits_used(server.post(key, f"/{FLUX}", CAT)) == Decimal("26.25")
            assert server.books.read(lambda tx: timers.done_at(tx, "prices")) == first
        waiting = requests.get(f"{fal.url}/_sandbox/weather", timeout=10).json()
        assert waiting == [{"match": "v1/models", "status": 401}]  # nobody came by


def test_prices_that_are_all_wrong_leave_the_old_ones_in_force(tmp_path: Path) -> None:
    """failures.md 20: the server goes on at the prices it has."""
    with Fal.started(tmp_path) as fal:
        order(fal, *[{"match": "v1/models/pricing", "prices": "currency"}] * 4)
        with Server.started(tmp_path, fal.url, ABHIAPI_PRICES_SYNC_S="3600") as server:
            _, key = server.books.account(1000)
            until(lambda: "the old prices stay" in server.process.output(), what="the refusal is told")
            assert credits_used(server.post(key, f"/{FLUX}", CAT)) == Decimal("26.25")
            assert words(server.books) == {}
