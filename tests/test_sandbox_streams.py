"""The simulator's `/stream`: partial outputs and the complete one last, and what goes wrong on their way."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
import requests

from tests.sandbox_client import CAT, FLUX, KLING, TIMEOUT_S, Fal, sim, simulator_url

__all__ = ["sim", "simulator_url"]  # fixtures

STREAM = FLUX + "/stream"


def shown(text: bytes) -> list[Any]:
    """The events' data, by the rules of server-sent events: one ends with a blank line."""
    events = [event for event in text.decode().split("\n\n") if event]
    lines = [[line for line in event.split("\n") if not line.startswith(":")] for event in events]
    return [json.loads("\n".join(line.removeprefix("data: ") for line in event)) for event in lines]


def test_partial_outputs_come_first_and_the_whole_one_last(sim: Fal) -> None:
    reply = sim.post(STREAM, CAT)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-fal-billable-units"] == "1"
    events = shown(reply.content)
    assert len(events) == 4
    assert all(len(event["images"]) == 1 for event in events)
    plain = sim.post(FLUX, CAT).json()
    assert events[-1].keys() == plain.keys()
    assert [event["images"][0]["width"] for event in events] == [128, 128, 128, 1024]
    assert sim.get(events[0]["images"][0]["url"]).content.startswith(b"\x89PNG")
    assert [billed["units"] for billed in sim.bill()["billed"]] == ["1", "1"]


@pytest.mark.parametrize(
    ("path", "call_input", "weather", "status"),
    [
        (KLING + "/stream", CAT, "", 404),
        ("/fal-ai/unknown/stream", CAT, "", 404),
        (STREAM, {"image_size": "square"}, "", 422),
        (STREAM, CAT, "status=500", 500),
    ],
)
def test_what_goes_wrong_before_the_stream_is_a_plain_answer(
    sim: Fal, path: str, call_input: Any, weather: str, status: int
) -> None:
    reply = sim.post(path, call_input, weather)
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/json"
    assert sim.bill()["billed"] == []


def test_weather_of_a_stream(sim: Fal) -> None:
    assert len(shown(sim.post(STREAM, CAT, "events=1").content)) == 1
    assert len(shown(sim.post(STREAM, CAT, "events=9; event_delay_s=0.001").content)) == 9
    assert "x-fal-billable-units" not in sim.post(STREAM, CAT, "units=none").headers
    pinged = sim.post(STREAM, CAT, "pings=1").content
    assert pinged.count(b": ping ") == 4
    assert shown(pinged)[-1]["prompt"] == "a cat"
    unended = sim.post(STREAM, CAT, "unended=1").content
    assert unended.endswith(b"}")
    assert shown(unended)[-1]["images"][0]["width"] == 1024
    assert {call["units"] for call in sim.bill()["billed"]} == {"1"}


def test_a_cut_stream_is_billed_and_not_whole(sim: Fal) -> None:
    reply = sim.post(STREAM, CAT, stream=True, headers={"x-fal-sandbox": "cut_after=2"})
    got: list[bytes] = []
    with pytest.raises(requests.RequestException):
        got.extend(reply.iter_content(None))
    assert len(shown(b"".join(got))) == 2
    (billed,) = sim.bill()["billed"]
    assert (Decimal(billed["units"]), billed["delivered"]) == (1, False)


def test_an_event_waits_for_its_gate_and_may_be_split_inside_a_character(sim: Fal) -> None:
    weather = {"x-fal-sandbox": "events=2; event_gate=sandbox-gate; split=1"}
    with sim.post(STREAM, {"prompt": "é"}, stream=True, headers=weather) as reply:
        pieces = reply.iter_content(None)
        first, second = next(pieces), next(pieces)
        with pytest.raises(UnicodeDecodeError):
            first.decode()
        assert shown(first + second)[0]["prompt"] == "é"
        sim.session.post(f"{sim.url}/_sandbox/release", json={"name": "sandbox-gate-1"}, timeout=TIMEOUT_S)
        assert shown(b"".join(pieces))[-1]["images"][0]["width"] == 1024
