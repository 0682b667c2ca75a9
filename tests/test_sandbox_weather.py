"""The weather of the fal simulator, over real sockets: answers that go wrong in every way it knows; and its records."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import pytest
import requests

from abhiapi.sandbox import app, create_sandbox, replies
from abhiapi.sandbox.weather import BODY_KINDS, KEYS, SIZE_MAX_BYTES
from tests.sandbox_client import CAT, FLUX, KLING, RULES, TIMEOUT_S, Fal, sim, simulator_url, wsgi_call

__all__ = ["sim", "simulator_url"]  # fixtures


# --- weather that HTTP allows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "detail", "header"),
    [
        (500, "Internal server error", ("x-fal-error-type", "internal_error")),
        (502, "Runner returned an incomplete response", ("x-fal-error-type", "runner_incomplete_response")),
        (503, "No runner could be scheduled", ("x-fal-error-type", "runner_scheduling_failure")),
        (504, "Request timed out", ("x-fal-error-type", "request_timeout")),
        (429, "Concurrent requests limit reached", ("x-fal-needs-retry", "1")),
        (401, "invalid key credentials", None),
        (404, f"Path {FLUX} not found", ("x-fal-billable-units", "0")),
        (405, "Method Not Allowed", None),
        (307, "Redirected", ("location", f"/redirected{FLUX}")),
        (418, "I'm a Teapot", None),
        (598, "Internal server error", None),
    ],
)
def test_statuses_come_with_fals_bodies(sim: Fal, status: int, detail: str, header: tuple[str, str] | None) -> None:
    reply = sim.post(FLUX, CAT, f"status={status}")
    assert reply.status_code == status
    assert reply.json()["detail"].lower() == detail.lower()
    if header is not None:
        assert reply.headers[header[0]].endswith(header[1])
    assert sim.bill()["billed"] == []


def test_locked_account_speaks_of_the_balance(sim: Fal) -> None:
    assert "Top up your balance" in sim.post(FLUX, CAT, "status=403").json()["detail"]


@pytest.mark.parametrize(
    ("weather", "sent", "billed"),
    [
        ("units=7.5", ["7.5"], ["7.5"]),
        ("units=0", ["0"], ["0"]),
        ("units_factor=3", ["3"], ["3"]),
        ("units=-5", ["-5"], ["1"]),
        ("units=NaN", ["NaN"], ["1"]),
        ("units=1e309", ["1e309"], ["1"]),
        ("units=1,5", ["1,5"], ["1"]),
        ("units=", [""], ["1"]),
        ("units=none", [], ["1"]),
        ("units=twice", ["1", "1"], ["1"]),
        ("status=422", [], []),
        ("status=422; units=2", ["2"], ["2"]),
        ("status=422; units=0", ["0"], []),
        ("status=401; units=2", ["2"], []),
        ("status=500; units=2", ["2"], []),
        ("status=202; units=2", ["2"], ["2"]),
        ("status=204", ["1"], ["1"]),
    ],
)
def test_units_weather_sends_what_it_says_and_bills_what_is_true(
    sim: Fal, weather: str, sent: list[str], billed: list[str]
) -> None:
    reply = sim.post(FLUX, CAT, weather)
    assert reply.raw.headers.getlist("x-fal-billable-units") == sent
    bill = sim.bill()
    assert [one["units"] for one in bill["billed"]] == billed
    assert bill["cost_nano_usd"] == sum(Decimal(units) * 25_000_000 for units in billed)
    assert bill["calls"] == len(billed)


@pytest.mark.parametrize("kind", BODY_KINDS)
def test_odd_bodies_arrive_as_they_are(sim: Fal, kind: str) -> None:
    reply = sim.post(FLUX, CAT, f"body={kind}")
    assert reply.status_code == 200
    assert int(reply.headers["content-length"]) == len(reply.content)
    is_object = kind in ("object", "nested", "whitespace", "escaped", "billing", "latin1")
    assert (json_object(reply.content) is not None) is is_object
    assert ("x-fal-request-id" in reply.headers) is (kind != "html")
    zipped = sim.post(FLUX, CAT, f"body={kind}; encoding=gzip")
    assert zipped.headers["content-encoding"] == "gzip"
    assert zipped.content == reply.content


def test_sized_bodies_are_objects_of_exactly_that_size(sim: Fal) -> None:
    for size in (64, 300_000, 5_000_001):
        reply = sim.post(FLUX, CAT, f"size_bytes={size}")
        assert len(reply.content) == size == int(reply.headers["content-length"])
        assert list(reply.json()) == ["image"]
    zipped = sim.post(FLUX, CAT, "size_bytes=5000001; encoding=gzip")
    assert (zipped.headers["transfer-encoding"], zipped.content) == ("chunked", reply.content)


def test_largest_sized_body_is_made_in_slices() -> None:
    reply = replies.sized(200, SIZE_MAX_BYTES)
    assert reply.length == SIZE_MAX_BYTES
    pieces = iter(reply.body)
    assert max(len(next(pieces)) for _ in range(100)) <= replies.SLICE_BYTES


def test_echo_tells_what_arrived(sim: Fal) -> None:
    body = bytes(range(256)) * 8_000
    reply = sim.post(FLUX, data=body, headers={"x-fal-sandbox": "echo=1"})
    assert reply.json() == {"sha256": hashlib.sha256(body).hexdigest(), "length": len(body)}


def test_delay_is_waited(sim: Fal) -> None:
    assert sim.post(FLUX, CAT, "delay_s=0.2").elapsed.total_seconds() >= 0.2


def test_held_call_waits_for_its_name_and_no_other(sim: Fal) -> None:
    done = threading.Event()
    replies: list[requests.Response] = []

    def call() -> None:
        headers = {"Authorization": "Key k", "x-fal-sandbox": "hold_until=go"}
        replies.append(requests.post(sim.url + FLUX, json=CAT, headers=headers, timeout=TIMEOUT_S))
        done.set()

    thread = threading.Thread(target=call)
    thread.start()
    assert len(sim.calls("?at_least=1&timeout_s=10")) == 1
    sim.session.post(sim.url + "/_sandbox/release", json={"name": "other"}, timeout=TIMEOUT_S)
    assert sim.post(FLUX, CAT).status_code == 200  # others go on meanwhile
    assert not done.is_set()
    assert sim.get("/_sandbox/calls").json()["waiting"] == 1
    sim.session.post(sim.url + "/_sandbox/release", json={"name": "go"}, timeout=TIMEOUT_S)
    assert done.wait(TIMEOUT_S)
    thread.join()
    assert replies[0].status_code == 200
    assert sim.post(FLUX, CAT, "hold_until=go").status_code == 200  # once released, always open


def test_call_that_nobody_releases_fails_after_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "HOLD_MAX_S", 0.01)
    sandbox = create_sandbox(RULES.values())
    status, _, answer = wsgi_call(sandbox, FLUX, json.dumps(CAT).encode(), HTTP_X_FAL_SANDBOX="hold_until=never")
    assert status.startswith("500")
    assert b"never" in answer
    assert (sandbox.gates.waiting, sandbox.bill.calls) == (0, 0)


def test_ordered_weather_is_taken_in_order_by_the_calls_it_fits(sim: Fal) -> None:
    sim.order({"status": 503, "match": FLUX}, {"units": "9"}, {"status": 422, "units": 2})
    assert sim.post(KLING, {"prompt": "p"}).headers["x-fal-billable-units"] == "9"
    assert sim.post(FLUX, CAT, "status=500").status_code == 500  # its own weather: takes none of these
    assert requests.post(sim.url + FLUX, json=CAT, timeout=TIMEOUT_S).status_code == 401  # nor does a refused call
    assert [sim.post(FLUX, CAT).status_code for _ in range(3)] == [503, 422, 200]
    assert sim.get("/_sandbox/weather").json() == []


def test_unknown_weather_is_400_and_named(sim: Fal) -> None:
    reply = sim.post(FLUX, CAT, "statsu=500; delay_s=1; hail=1; body=soup; units_factor=-1; reset=1")
    assert reply.status_code == 400
    for word in ("statsu", "hail", "soup", "units_factor", "reset", *KEYS):
        assert word in reply.json()["detail"]
    for wrong in ({"hail": 1}, {"status": 99}, {"status": True}, {"units": "a\r\nb"}, [1], {"match": 5}):
        assert sim.order(wrong).status_code == 400  # type: ignore[arg-type]
    assert sim.get("/_sandbox/weather").json() == []


# --- weather that HTTP does not allow -----------------------------------------------------------------------------


def test_drop_before_headers_sends_nothing(sim: Fal) -> None:
    assert sim.raw("drop=before_headers") == (b"", False)


def test_drop_in_headers_ends_within_the_head(sim: Fal) -> None:
    received, _ = sim.raw("drop=in_headers")
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\n\r\n" not in received


@pytest.mark.parametrize("more", ["", "; chunked=1", "; encoding=gzip", "; size_bytes=1000000; encoding=gzip"])
def test_drop_in_body_sends_a_part(sim: Fal, more: str) -> None:
    received, _ = sim.raw("drop=in_body" + more)
    head, _, body = received.partition(b"\r\n\r\n")
    announced = re.search(rb"content-length: (\d+)", head)
    assert len(body) > 0
    assert len(body) < int(announced[1]) if announced else not body.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("place", ["before_headers", "in_headers", "in_body"])
def test_drop_by_reset_resets(sim: Fal, place: str) -> None:
    assert sim.raw(f"drop={place}; reset=1")[1] is True


def test_dropped_calls_are_billed_as_undelivered(sim: Fal) -> None:
    with pytest.raises(requests.ConnectionError):
        sim.post(FLUX, CAT, "drop=before_headers")
    assert [(one["units"], one["delivered"]) for one in sim.bill()["billed"]] == [("1", False)]


def test_short_length_leaves_bytes_on_an_open_connection(sim: Fal) -> None:
    received, _ = sim.raw("length=short")
    head, _, body = received.partition(b"\r\n\r\n")
    assert int(re.search(rb"content-length: (\d+)", head)[1]) == len(body) - 7  # type: ignore[index]
    json.loads(body)


def test_long_length_ends_before_its_end(sim: Fal) -> None:
    received, _ = sim.raw("length=long")
    head, _, body = received.partition(b"\r\n\r\n")
    assert int(re.search(rb"content-length: (\d+)", head)[1]) == len(body) + 7  # type: ignore[index]
    json.loads(body)


def test_chunked_answer_comes_in_chunks_and_is_whole(sim: Fal) -> None:
    plain = sim.post(FLUX, CAT)
    chunked = sim.post(FLUX, CAT, "chunked=1; chunk_delay_s=0.001")
    assert chunked.headers["transfer-encoding"] == "chunked"
    assert "content-length" not in chunked.headers
    assert chunked.content == plain.content
    received, _ = sim.raw("chunked=1")
    assert received.count(b"\r\n") > 20


def test_slow_head_is_a_good_answer_in_single_bytes(sim: Fal) -> None:
    reply = sim.post(FLUX, CAT, "slow_head=0")
    assert reply.status_code == 200
    assert reply.json()["prompt"] == "a cat"


def test_garbage_is_no_http(sim: Fal) -> None:
    received, _ = sim.raw("garbage=1")
    assert received
    assert not received.startswith(b"HTTP/")


def test_huge_head_is_a_megabyte(sim: Fal) -> None:
    received, _ = sim.raw("huge_head=1")
    assert len(received.partition(b"\r\n\r\n")[0]) > 1_000_000
    with pytest.raises(requests.ConnectionError):
        sim.post(FLUX, CAT, "huge_head=1")


@pytest.mark.parametrize("weather", ["chunked=1", "length=short", "slow_head=0", ""])
def test_connection_serves_the_next_call_after(sim: Fal, weather: str) -> None:
    """Weather that does not end the connection leaves it usable, so that pools meet what such servers do to them."""
    body = b'{"prompt":"a cat"}'
    head = f"POST {FLUX} HTTP/1.1\r\nHost: h\r\nAuthorization: Key k\r\nContent-Length: {len(body)}\r\n"
    with sim.connect() as client:
        client.sendall(f"{head}x-fal-sandbox: {weather}\r\n\r\n".encode() + body)
        client.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)
        received = b""
        while piece := client.recv(65536):
            received += piece
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 2


# --- records ------------------------------------------------------------------------------------------------------


def test_calls_are_recorded_as_they_came(sim: Fal) -> None:
    body = b'{ "prompt" : "a \\u00fc cat" }'
    sim.post(f"{FLUX}?a=1&b=%20", data=body, headers={"X-Fal-Tags": "a=b", "Content-Type": "application/json"})
    sim.post(FLUX, data=b"\xff" * 10)
    sim.post(FLUX, data=b" " * 70_000)
    first, binary, long = sim.calls()
    assert (first["method"], first["path"], first["query"]) == ("POST", FLUX, "a=1&b=%20")
    assert ["X-Fal-Tags", "a=b"] in first["headers"]
    assert ["Authorization", "Key id:secret"] in first["headers"]
    assert (first["body"], first["body_length"]) == (body.decode(), len(body))
    assert first["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert (binary["body"], binary["body_length"]) == (None, 10)
    assert (long["body"], long["body_length"]) == (None, 70_000)
    assert [one["body_length"] for one in sim.calls("?last=1")] == [70_000]


def test_call_cut_off_in_its_body_is_recorded_and_not_billed(sim: Fal) -> None:
    with sim.connect() as client:
        client.sendall(
            f"POST {FLUX} HTTP/1.1\r\nHost: h\r\nAuthorization: Key k\r\nContent-Length: 99\r\n\r\n{{".encode()
        )
    (call,) = sim.calls("?at_least=1&timeout_s=10")
    assert (call["complete"], call["body_length"]) == (False, 0)
    assert sim.bill()["billed"] == []


def test_records_can_be_cleared(sim: Fal) -> None:
    sim.post(FLUX, CAT)
    assert len(sim.calls()) == 1
    for page in ("calls", "bill"):
        sim.session.delete(f"{sim.url}/_sandbox/{page}", timeout=TIMEOUT_S)
    assert sim.calls() == []
    assert sim.bill() == {"calls": 0, "billed": [], "cost_nano_usd": 0}


def test_parallel_calls_are_all_billed_once(sim: Fal) -> None:
    def call() -> None:
        for _ in range(10):
            requests.post(sim.url + FLUX, json=CAT, headers={"Authorization": "Key k"}, timeout=TIMEOUT_S)

    threads = [threading.Thread(target=call) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bill = sim.bill()
    assert bill["calls"] == len({one["request_id"] for one in bill["billed"]}) == 100
    assert bill["cost_nano_usd"] == 100 * 25_000_000


def test_page_names_every_weather_and_what_is_not_imitated(sim: Fal) -> None:
    page = sim.get("/_sandbox/")
    assert sim.get("/").text == page.text
    assert page.headers["content-type"].startswith("text/plain")
    assert "does not imitate" in page.text
    for key in (*KEYS, "fal-ai/flux/dev"):
        assert key in page.text


def test_calls_are_found_by_any_text_in_them(sim: Fal) -> None:
    sim.post(FLUX + "?told=in-the-query", {"prompt": "told in the body"}, weather="body=told-in-a-header")
    sim.post(FLUX, {"prompt": "another"})
    for text in ("told in the body", "in-the-query", "x-fal-sandbox: body=told", FLUX):
        assert sim.calls(f"?contains={quote(text)}")[0]["query"] == "told=in-the-query"
    assert [call["query"] for call in sim.calls(f"?last=1&contains={FLUX}")] == [""]
    assert sim.calls("?contains=nowhere") == sim.calls("?last=0") == []


def test_control_refuses_what_it_does_not_know(sim: Fal) -> None:
    assert sim.get("/_sandbox/nothing").status_code == 404
    assert sim.session.put(sim.url + "/_sandbox/bill", timeout=TIMEOUT_S).status_code == 405
    assert sim.get("/_sandbox/calls?last=-1").status_code == 400
    assert sim.session.post(sim.url + "/_sandbox/release", data=b"{", timeout=TIMEOUT_S).status_code == 400


def json_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object that a body is, or None."""
    try:
        value = json.loads(body.decode("latin-1"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
