"""Server-sent events of the models that stream (fal-protocol 4): partial outputs, and the complete one last.

Which models do is `Model.streams`. `events` is pure; `paced` sends them as the weather has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from time import monotonic_ns
from typing import Any

import gevent

from abhiapi.sandbox import files
from abhiapi.sandbox.answers import Answer, Request
from abhiapi.sandbox.records import Gates
from abhiapi.sandbox.replies import Reply
from abhiapi.sandbox.transport import Hangup
from abhiapi.sandbox.weather import Weather

SUFFIX = "/stream"
CONTENT_TYPE = "text/event-stream; charset=utf-8"
GATE_MAX_S = 60
_PREVIEW_PART = 8  # of the picture's sides
_SIDE_MIN = 16


def events(request: Request, whole: Answer, count: int) -> list[bytes]:
    """The data of each event; the last is the whole answer."""
    partial = _words if request.model.shape == "text" else _preview
    shown = [partial(request, whole, number, count) for number in range(1, count)]
    return [json.dumps(one, separators=(",", ":"), ensure_ascii=False).encode() for one in (*shown, whole)]


def reply(status: int, data: list[bytes], wanted: Weather, gates: Gates) -> Reply:
    return Reply(status, CONTENT_TYPE, paced(data, wanted, gates), None)


def paced(data: list[bytes], wanted: Weather, gates: Gates) -> Iterator[bytes]:
    """Each event when it is due, in one piece or, split, in two. Raises `Hangup` where the stream is to break."""
    for number, one in enumerate(data, 1):
        if number > 1 and wanted.event_delay_s:
            gevent.sleep(float(wanted.event_delay_s))
        if number > 1 and wanted.event_gate is not None:
            gates.wait(f"{wanted.event_gate}-{number - 1}", GATE_MAX_S)
        if wanted.cut_after is not None and number > wanted.cut_after:
            raise Hangup
        ping = b": ping %d\n" % monotonic_ns() if wanted.pings else b""
        end = b"" if wanted.unended and number == len(data) else b"\n\n"
        event = ping + b"data: " + one + end
        at = _inside_a_character(event) if wanted.split else len(event)
        yield event[:at]
        if event[at:]:
            gevent.sleep(0.01)  # so that the second half does not travel with the first
            yield event[at:]


def _inside_a_character(event: bytes) -> int:
    """Behind the first byte of the first character of several; in the middle where there is none."""
    return next((at + 1 for at, byte in enumerate(event) if byte >= 0xC0), len(event) // 2)


def _words(request: Request, whole: Answer, number: int, count: int) -> Answer:
    words = str(whole["output"]).split(" ")
    told = " ".join(words[: len(words) * number // count])
    return {**whole, "output": told, "text": told, "partial": True}


def _preview(request: Request, whole: Answer, number: int, count: int) -> dict[str, Any]:
    """The pictures, small, as they might look by now."""
    words, seed = files.slug(request.prompt), f"{request.fingerprint[:14]}{number % 256:02x}"
    shown = []
    for picture in whole["images"]:
        sides = (picture["width"], picture["height"])
        size = max(_SIDE_MIN, sides[0] // _PREVIEW_PART), max(_SIDE_MIN, sides[1] // _PREVIEW_PART)
        url = files.picture_url(request.host, seed, size, words)
        shown.append({**picture, "url": url, "width": size[0], "height": size[1]})
    return {"images": shown, "seed": request.seed, "prompt": request.prompt}
