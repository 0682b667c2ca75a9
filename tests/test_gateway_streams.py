"""Event streams through the pipeline, over a real database and a scripted fal: what passes, and how the hold ends."""

from __future__ import annotations

import gzip
import json
from itertools import count

import pytest

from abhiapi import gateway
from tests.scripted import FLUX, PICTURE, UNITS, House, answer, in_pieces
from tests.test_gateway import MEGAPIXEL

STREAM = ("content-type", "text/event-stream; charset=utf-8")


@pytest.mark.parametrize("extra", [(), (("content-length", "11"),)])
@pytest.mark.parametrize(("end", "separator"), [(b"\n\n", b""), (b"\n", b""), (b"", b"\n"), (b"\r\n\r\n", b"")])
def test_an_event_stream_ends_with_one_comment(
    house: House, end: bytes, separator: bytes, extra: tuple[tuple[str, str], ...]
) -> None:
    house.fal.answer = answer([b"data: {}\n\n", b"data: 1" + end], STREAM, UNITS, *extra)
    reply = house.call(FLUX + "/stream")
    received = b"".join(reply.body)
    reply.body.close()
    assert received.startswith(b"data: {}\n\ndata: 1" + end + separator + b": _billing {")
    assert received.endswith(b"}\n")
    assert ("X-Accel-Buffering", "no") in reply.headers
    assert "content-length" not in {name.lower() for name, _ in reply.headers}
    assert (house.last().mode, house.last().charged_micros) == ("stream", MEGAPIXEL)


def test_a_compressed_event_stream_is_made_plain_before_its_comment(house: House) -> None:
    packed = gzip.compress(b"data: {}\n\n")
    house.fal.answer = answer([packed[:9], packed[9:]], STREAM, UNITS, ("content-encoding", "gzip"))
    reply = house.call(FLUX + "/stream")
    assert b"".join(reply.body).startswith(b"data: {}\n\n: _billing {")
    reply.body.close()
    assert "content-encoding" not in {name.lower() for name, _ in reply.headers}


def test_a_stream_in_an_encoding_that_we_do_not_know_is_left_alone(house: House) -> None:
    house.fal.answer = answer([b"\x8b\x01\x02"], STREAM, UNITS, ("content-encoding", "br"))
    reply = house.call(FLUX + "/stream")
    assert b"".join(reply.body) == b"\x8b\x01\x02"
    reply.body.close()
    assert ("content-encoding", "br") in reply.headers


def test_an_error_that_comes_as_a_stream_is_told_in_our_words(house: House) -> None:
    house.fal.answer = answer([b"data: no\n\n"], STREAM, status=500)
    reply = house.call(FLUX + "/stream")
    assert (reply.status, json.loads(reply.body)["error"]["type"]) == (502, "upstream_error")


def test_no_character_of_a_stream_is_cut_in_two(house: House) -> None:
    """fal's JavaScript client decodes each piece by itself (fal-protocol 4); the bytes are fal's all the same."""
    stream = 'data: {"prompt":"caf\u00e9 \U0001f600"}\n\n'.encode()
    house.fal.answer = answer(in_pieces(stream, 1), STREAM, UNITS)
    reply = house.call(FLUX + "/stream")
    pieces = [piece for piece in reply.body if piece]
    reply.body.close()
    assert b"".join(pieces).startswith(stream + b": _billing {")
    assert "".join(piece.decode() for piece in pieces).startswith(stream.decode())


def test_a_stream_that_ends_inside_a_character_is_passed_whole(house: House) -> None:
    house.fal.answer = answer([b"data: caf\xc3"], STREAM, UNITS)
    reply = house.call(FLUX + "/stream")
    assert b"".join(reply.body).startswith(b"data: caf\xc3\n: _billing {")
    reply.body.close()


@pytest.mark.parametrize("size", [5, 100_000])
def test_a_stream_without_units_is_computed_from_its_last_event(house: House, size: int) -> None:
    """Of the models that stream the last event is the complete output (fal-protocol 4)."""
    stream = b'data: {"images":[]}\n\ndata: ' + PICTURE + b"\n\n"
    house.fal.answer = answer(in_pieces(stream, size), STREAM)
    reply = house.call(FLUX + "/stream")
    b"".join(reply.body)
    reply.body.close()
    last = house.last()
    assert (last.state, last.charged_micros, last.usage_source) == ("settled", MEGAPIXEL, "catalogue")


@pytest.mark.engines
def test_a_stream_without_units_or_output_is_the_operators(house: House) -> None:
    house.fal.answer = answer([b'data: {"type":"error"}\n\n'], STREAM)
    reply = house.call(FLUX + "/stream")
    b"".join(reply.body)
    reply.body.close()
    assert (house.last().state, house.last().reason) == ("unknown", "no_units")


@pytest.mark.engines
@pytest.mark.parametrize(("headers", "end"), [((UNITS,), "settled"), ((), "unknown")])
def test_an_abandoned_stream_without_end_is_dropped(
    house: House, monkeypatch: pytest.MonkeyPatch, headers: tuple[tuple[str, str], ...], end: str
) -> None:
    """Row 14 of B2: fal is read on after the hang-up, within a bound; its head says what the call costs."""
    of_fal = answer([b"data: {}\n\n"] * 1000, STREAM, *headers)
    house.fal.answer = of_fal
    reply = house.call(FLUX + "/stream")
    pieces = iter(reply.body)
    assert [next(pieces), next(pieces)] == [b"", b"data: {}\n\n"]
    passing = count()
    monkeypatch.setattr(gateway, "monotonic", lambda: 100.0 * next(passing))
    reply.body.close()
    assert 900 < len(of_fal._raw.pieces) < 998
    assert of_fal._raw.closed
    assert house.at_once() == 0
    assert (house.last().state, house.last().charged_micros) == (end, MEGAPIXEL if end == "settled" else 0)
