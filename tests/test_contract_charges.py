"""What is charged (contract 3.5): every outcome, through a real gunicorn and a simulated fal."""

from __future__ import annotations

import json
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from abhiapi import prices, reports
from tests import raw_http
from tests.harness import Books, Fal, Server, free_port, own, until

pytestmark = pytest.mark.engines

MEGAPIXEL = 26_250  # micros of one unit of flux/dev: 0.025 USD and a margin of 5 percent
KLING, KLING_MICROS = "/fal-ai/kling-video/v2/master/text-to-video", 1_470_000
UPSCALER, UPSCALER_HOLD = "/fal-ai/creative-upscaler", 100_000
CREDITS = 2000
START = CREDITS * 1000


def billing(response: requests.Response) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(response.content, parse_float=Decimal)["_billing"]
    return shown


def assert_charged(books: Books, name: str, charge_micros: int) -> reports.CallRow:
    """The account's one call has ended with this charge, and everything says the same."""
    (call,) = books.calls(name)
    assert (call.charged_micros, call.finished_at is not None) == (charge_micros, True)
    assert call.state == ("settled" if charge_micros else call.state)
    assert books.standing(name) == (START - charge_micros, 0)
    charges = [entry.amount_micros for entry in books.entries(name) if entry.kind == "charge"]
    assert charges == ([-charge_micros] if charge_micros else [])
    return call


# --- what fal says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "charge_micros"),
    [("0", 0), ("0.0", 0), ("1", 26_250), ("1.0", 26_250), ("38.8", 1_018_500), ("8.439999999999998", 221_550),
     ("0.02", 525), ("0.00001", 1)],
)  # fmt: skip
def test_a_success_costs_its_units_rounded_up_to_a_micro(
    shared_server: Server, books: Books, units: str, charge_micros: int
) -> None:
    name, key = books.account(CREDITS)
    response = shared_server.post(key, weather=f"units={units}")
    assert response.status_code == 200
    call = assert_charged(books, name, charge_micros)
    assert (call.state, call.usage_source, call.units, call.reason) == ("settled", "fal", units, None)
    assert billing(response) == {
        "model": "fal-ai/flux/dev",
        "credits_used": Decimal(charge_micros) / 1000,
        "cost_usd": Decimal(charge_micros) / 1_000_000,
        "balance_remaining": Decimal(START - charge_micros) / 1000,
    }
    assert Decimal(response.headers["x-abhiapi-credits-used"]) * 1000 == charge_micros
    assert Decimal(response.headers["x-abhiapi-balance-remaining"]) * 1000 == START - charge_micros
    assert call.fal_request_id == response.headers["x-fal-request-id"]


@pytest.mark.parametrize(
    ("weather", "charge_micros", "state", "reason"),
    [
        ("status=422; units=2", 2 * MEGAPIXEL, "settled", None),
        ("status=400; units=0.5", MEGAPIXEL // 2, "settled", None),
        ("status=429; units=1", MEGAPIXEL, "settled", None),
        ("status=422; units=0", 0, "settled", None),
        ("status=422", 0, "released", "error_without_units"),
        ("status=400", 0, "released", "error_without_units"),
        ("status=409", 0, "released", "error_without_units"),
        ("status=422; units=-5", 0, "released", "error_without_units"),
        ("status=422; units=twice", 0, "released", "error_without_units"),
        ("status=422; body=html", 0, "released", "error_without_units"),
        ("status=500; units=3", 0, "released", "fal_5xx"),
        ("status=503; units=3; body=html", 0, "released", "fal_5xx"),
        ("status=504; units=3", 0, "released", "fal_5xx"),
        ("status=500", 0, "released", "fal_5xx"),
        ("status=401; units=3", 0, "released", "upstream_refused"),
        ("status=402; units=3", 0, "released", "upstream_refused"),
        ("status=403; units=3", 0, "released", "upstream_refused"),
        ("status=307; units=3", 0, "released", "not_billable_status"),
    ],
)
def test_an_error_costs_what_fal_says_and_a_broken_fal_never(
    shared_server: Server, books: Books, weather: str, charge_micros: int, state: str, reason: str | None
) -> None:
    name, key = books.account(CREDITS)
    response = shared_server.post(key, weather=weather, allow_redirects=False)
    assert response.status_code >= 300
    call = assert_charged(books, name, charge_micros)
    assert (call.state, call.reason) == (state, reason)
    assert billing(response)["credits_used"] * 1000 == charge_micros


@pytest.mark.parametrize("body", ["empty", "object", "array", "text", "binary", "latin1", "html"])
def test_every_kind_of_answer_writes_one_row_and_one_charge(shared_server: Server, books: Books, body: str) -> None:
    name, key = books.account(CREDITS)
    assert shared_server.post(key, weather=f"units=2; body={body}").status_code == 200
    assert_charged(books, name, 2 * MEGAPIXEL)


# --- what fal does not say --------------------------------------------------------------------------------------

ODD_UNITS = (
    "none",
    "-5",
    "NaN",
    "1e309",
    "",
    "twice",
    "9" * 40,
    "1,5",
    "+1",
    "1_0",
    "0x10",
    "Infinity",
    "1;2",
    ".",
    "1.",
)


@pytest.mark.parametrize("units", ODD_UNITS)
def test_a_success_without_plain_units_is_computed_and_marked(shared_server: Server, books: Books, units: str) -> None:
    """Never a credit to anyone, never a crash, never an estimate in silence."""
    name, key = books.account(CREDITS)
    response = post_with_units(shared_server, key, "/fal-ai/flux/dev", {"prompt": "x", "num_images": 2}, units)
    assert response.status_code == 200
    call = assert_charged(books, name, 2 * MEGAPIXEL)
    assert (call.state, call.usage_source, call.units) == ("settled", "catalogue", "2")
    assert call.reason == ("no_units" if units == "none" else "bad_units")


@pytest.mark.parametrize("units", ODD_UNITS)
def test_a_success_that_nobody_can_compute_keeps_its_hold_for_the_operator(
    shared_server: Server, books: Books, units: str
) -> None:
    name, key = books.account(CREDITS)
    response = post_with_units(shared_server, key, UPSCALER, {"image_url": "https://example.com/a.jpg"}, units)
    assert response.status_code == 200
    assert billing(response) == {
        "model": "fal-ai/creative-upscaler", "credits_used": 0, "cost_usd": 0, "balance_remaining": CREDITS
    }  # fmt: skip
    assert not {"x-abhiapi-credits-used", "x-abhiapi-balance-remaining"} & {name.lower() for name in response.headers}
    (call,) = books.calls(name)
    assert (call.state, call.finished_at, call.charged_micros) == ("unknown", None, 0)
    assert call.reason == ("no_units" if units == "none" else "bad_units")
    if units == "twice":
        first, second = (call.units or "").split(", ")
        assert first == second
    else:
        assert call.units == (None if units == "none" else units)
    assert books.standing(name) == (START, UPSCALER_HOLD)
    assert call.call_id in [hold.call_id for hold in books.read(reports.open_holds)]


def post_with_units(server: Server, key: str, path: str, body: Any, units: str) -> requests.Response:
    if ";" in units:  # which separates weathers
        requests.post(f"{server.env['ABHIAPI_FAL_RUN_URL']}/_sandbox/weather", json={"units": units}, timeout=10)
        return server.post(key, path, body)
    return server.post(key, path, body, weather=f"units={units}")


# --- no whole answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weather",
    ["drop=before_headers", "drop=before_headers; reset=1", "drop=in_headers", "drop=in_headers; reset=1",
     "drop=in_body", "drop=in_body; reset=1", "drop=in_body; chunked=1", "length=long", "garbage=1", "huge_head=1",
     "drop=in_body; encoding=gzip", "drop=in_body; body=binary", "drop=in_body; status=422; units=2"],
)  # fmt: skip
def test_an_answer_that_is_not_whole_costs_nothing_and_is_not_shown(
    shared_server: Server, books: Books, weather: str
) -> None:
    name, key = books.account(CREDITS)
    response = shared_server.post(key, weather=weather)
    assert response.status_code == 502
    assert response.json()["error"]["type"] == "upstream_broken"
    assert_charged(books, name, 0)


@pytest.mark.parametrize("weather", ["drop=in_body", "drop=in_body; reset=1", "drop=in_body; chunked=1", "length=long"])
@pytest.mark.parametrize("body", ["size_bytes=300000", "size_bytes=3000000"])
def test_a_large_answer_that_is_cut_is_never_passed_off_as_whole(
    shared_server: Server, books: Books, weather: str, body: str
) -> None:
    name, key = books.account(CREDITS)
    answer = raw_http.exchange(shared_server.url, raw_http.request_bytes(key, x_fal_sandbox=f"{weather}; {body}"))
    assert not answer.whole
    until(lambda: books.calls(name)[0].state == "released", what="the hold is released")
    assert_charged(books, name, 0)


def test_an_answer_longer_than_it_says_costs_what_fal_says_and_spoils_no_other(
    shared_server: Server, books: Books
) -> None:
    """By HTTP its first bytes are a whole answer; the rest must not be taken for the next call's."""
    name, key = books.account(CREDITS)
    assert shared_server.post(key, weather="length=short").status_code == 200
    assert_charged(books, name, MEGAPIXEL)
    for _ in range(3):
        assert "images" in shared_server.post(key).json()


def test_an_unreachable_fal_costs_nothing(tmp_path: Path) -> None:
    with Server.started(tmp_path, f"http://127.0.0.1:{free_port()}") as server:
        name, key = server.books.account(CREDITS)
        response = server.post(key)
        assert (response.status_code, response.json()["error"]["type"]) == (502, "upstream_unreachable")
        assert_charged(server.books, name, 0)
        response = server.post("", headers={"Authorization": f"Key {key}"})
        assert (response.status_code, response.json()["error"]["type"]) == (502, "upstream_unreachable")


@pytest.mark.parametrize("weather", ["hold_until=never", "slow_head=0.2", "chunked=1; chunk_delay_s=0.4"])
def test_a_fal_that_takes_too_long_costs_nothing(strict_server: Server, weather: str) -> None:
    name, key = strict_server.books.account(CREDITS)
    response = strict_server.post(key, weather=weather)
    assert (response.status_code, response.json()["error"]["type"]) == (504, "upstream_timeout")
    assert_charged(strict_server.books, name, 0)


# --- a caller who hangs up --------------------------------------------------------------------------------------


def hang_up(sock: socket.socket, *, reset: bool) -> None:
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("reset", [False, True])
def test_a_hang_up_before_the_answer_changes_nothing(
    shared_server: Server, fal: Fal, books: Books, reset: bool
) -> None:
    name, key = books.account(CREDITS)
    sock = raw_http.connect(shared_server.url)
    sock.sendall(raw_http.request_bytes(key, x_fal_sandbox=f"hold_until=hang-up-of-{name}"))
    until(lambda: fal.calls(f"hang-up-of-{name}", last=50), what="fal has the call")
    hang_up(sock, reset=reset)
    fal.release(f"hang-up-of-{name}")
    until(lambda: books.calls(name)[0].state == "settled", what="the call is settled")
    assert_charged(books, name, MEGAPIXEL)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("size_bytes", "read_bytes"), [(300_000, 1), (20_000_000, 1), (20_000_000, 5_000_000)])
def test_a_hang_up_in_the_middle_of_an_answer_changes_nothing(
    shared_server: Server, books: Books, size_bytes: int, read_bytes: int, reset: bool
) -> None:
    name, key = books.account(CREDITS)
    sock = raw_http.connect(shared_server.url)
    sock.sendall(raw_http.request_bytes(key, x_fal_sandbox=f"size_bytes={size_bytes}"))
    while read_bytes > 0:
        read_bytes -= len(sock.recv(min(read_bytes, 65536)))
    hang_up(sock, reset=reset)
    until(lambda: books.calls(name)[0].state == "settled", what="the call is settled")
    assert_charged(books, name, MEGAPIXEL)


def test_hundreds_of_hang_ups_leave_nothing_behind(shared_server: Server, fal: Fal, books: Books) -> None:
    """No lease, no thread, no socket, no hold."""
    gate = own("hang-ups")
    name, key = books.account(300 * 27)
    (worker,) = psutil.Process(shared_server.process.popen.pid).children()
    fal.release(gate)
    shared_server.post(key, weather="size_bytes=300000")
    threads, port = worker.num_threads(), int(shared_server.url.rpartition(":")[2])
    weathers = ("size_bytes=300000", f"hold_until={gate}", "size_bytes=300000; chunked=1", "body=binary")
    for number in range(299):
        sock = raw_http.connect(shared_server.url)
        sock.sendall(raw_http.request_bytes(key, x_fal_sandbox=weathers[number % 4]))
        if number % 3 == 0:
            sock.recv(1)
        hang_up(sock, reset=number % 2 == 0)
    until(lambda: [call.state for call in books.calls(name)] == ["settled"] * 300, what="all calls are settled")
    until(lambda: in_flight(shared_server) == 0, what="no lease is left")
    assert books.standing(name) == (300 * 27_000 - 300 * MEGAPIXEL, 0)
    assert worker.num_threads() <= threads + 10  # the event loop's own pool may have grown to its size
    until(
        lambda: [at for at in worker.net_connections("tcp") if at.laddr.port == port and at.raddr] == [],
        what="no socket is left",
    )
    assert shared_server.books.verify().problems == []


def in_flight(server: Server) -> int:
    text = requests.get(f"{server.url}/metrics", timeout=10).text
    (line,) = [line for line in text.splitlines() if line.startswith("abhiapi_in_flight ")]
    return int(Decimal(line.split()[1]))


# --- more than was held, other prices, many at once -------------------------------------------------------------


def test_a_charge_above_its_hold_is_charged_in_full_and_the_next_call_is_refused(
    shared_server: Server, fal: Fal, books: Books
) -> None:
    name, key = books.account(30)
    response = shared_server.post(key, weather="units_factor=3")
    assert billing(response)["balance_remaining"] == Decimal("-48.75")
    assert books.standing(name) == (30_000 - 3 * MEGAPIXEL, 0)
    refused = shared_server.post(key, body={"prompt": f"after the debt of {name}"})
    assert refused.status_code == 402
    assert "-48.75" in refused.json()["message"]
    assert fal.calls(f"after the debt of {name}", last=50) == []


def test_the_price_at_admission_counts(shared_server: Server, fal: Fal, books: Books) -> None:
    gate = own("price-change")
    name, key = books.account(CREDITS)
    path = "/fal-ai/flux-realism"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(shared_server.post, key, path, weather=f"units=2; hold_until={gate}")
        until(lambda: books.standing(name)[1], what="the call is admitted")
        books.write(
            lambda tx: prices.set_own(
                tx, "fal-ai/flux-realism", unit=None, unit_price_usd=Decimal("0.5"), margin=None, hold_micros=None,
                now_ms=books.clock(),
            )
        )  # fmt: skip
        assert requests.get(f"{shared_server.url}/v1/prices", timeout=10).ok
        fal.release(gate)
        assert billing(running.result())["credits_used"] == Decimal("73.5")  # 2 x 0.035 USD and 5 percent
    assert books.calls(name)[0].unit_price_usd == "0.03675"
    after = shared_server.post(key, path, weather="units=2")
    assert billing(after)["credits_used"] == 1000
    assert (books.calls(name)[0].unit_price_usd, books.calls(name)[0].held_micros) == ("0.5", 500_000)


def test_fifty_at_once_with_credit_for_five(shared_server: Server, fal: Fal, books: Books) -> None:
    name, key = books.account(5 * KLING_MICROS // 1000)
    body = {"prompt": f"fifty at once by {name}", "duration": "5"}
    with ThreadPoolExecutor(50) as pool:
        calls = [pool.submit(shared_server.post, key, KLING, body, weather=f"hold_until={name}") for _ in range(50)]
        until(lambda: sum(call.done() for call in calls) >= 45, what="those without credit are refused")
        assert books.standing(name) == (5 * KLING_MICROS, 5 * KLING_MICROS)
        fal.release(name)
        statuses = sorted(call.result().status_code for call in calls)
    assert statuses == [200] * 5 + [402] * 45
    assert len(fal.calls(f"fifty at once by {name}", last=200)) == 5
    assert books.standing(name) == (0, 0)
    assert len(books.calls(name)) == 5


def test_hundreds_of_calls_without_credit_never_reach_fal(shared_server: Server, fal: Fal, books: Books) -> None:
    name, key = books.account(27)
    assert shared_server.post(key, body={"prompt": f"exhausted {name}"}).status_code == 200
    seen = fal.total()

    def call_many(paths: list[str]) -> set[int]:
        with requests.Session() as session:
            session.headers["x-api-key"] = key
            return {
                session.post(shared_server.url + path, json={"prompt": f"exhausted {name}"}, timeout=30).status_code
                for path in paths
            }

    paths = ["/fal-ai/flux/dev", "/fal-ai/flux/dev/stream", KLING, UPSCALER] * 10
    with ThreadPoolExecutor(10) as pool:
        assert set().union(*pool.map(call_many, [paths] * 10)) == {402}
    assert len(fal.calls(f"exhausted {name}")) == 1
    assert fal.total() == seen
    assert len(books.calls(name)) == 1
