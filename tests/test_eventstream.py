"""Server-sent events as bytes that pass: no character is cut, and the last event is known however it was cut."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abhiapi.eventstream import LastEvent, whole_until
from tests.scripted import in_pieces


@given(st.text(max_size=12), st.integers(0, 60))
def test_text_is_cut_between_characters_and_as_late_as_can_be(text: str, size: int) -> None:
    data = text.encode()[:size]
    at = whole_until(data)
    whole = data[:at].decode()
    assert whole == data.decode(errors="ignore")
    assert text.startswith(whole)


@pytest.mark.parametrize("data", [b"\xff", b"\x80\x80\x80\x80", b"caf\xe9 ", b"", b"a"])
def test_what_is_no_utf8_is_not_held_back(data: bytes) -> None:
    assert whole_until(data) == len(data)


def answer(stream: bytes, size: int) -> Any:
    last = LastEvent()
    for piece in in_pieces(stream, size):
        last.feed(piece)
    return last.answer()


STREAMS = [
    (b'data: {"n":1}\n\ndata: {"n":2}\n\n', {"n": 2}),
    (b'data:{"n":2}\n\n', {"n": 2}),
    (b'data: {"n":1}\r\n\r\ndata: {"n":2}\r\n\r\n', {"n": 2}),
    (b'data: {"n":1}\r\rdata: {"n":2}\r\r', {"n": 2}),
    (b'data: {"n":1}\n\ndata: {"n":2}', {"n": 2}),
    (b'data: {"n":1}\n\ndata: {"n":2}\n', {"n": 2}),
    (b'data: {"n":1}\r\n\ndata: {"n":2}\r\n\n', {"n": 2}),
    (b'data: {"n":1}\r\n\n\r\ndata: {"n":2}\n\r\n', {"n": 2}),
    (b'data: {"n":\ndata: 2}\n\n', {"n": 2}),
    (b'data: {"n":\r\ndata: 2}\r\n\r\n', {"n": 2}),
    (b'event: x\nid: 1\ndata: {"n":2}\n\n: ping\n\nid: 7\n\n', {"n": 2}),
    (b'data: {"n":2}\n\ndat: {"n":3}\n\ndataset: {"n":4}\n\n', {"n": 2}),
    (b'data: {"n":1}\n\ndata: no\n\n', None),
    (b'data: {"n":1}\n\ndata: "text"\n\n', None),
    (b'data: {"n":1}\n\ndata: {"t":"\x01"}\n\n', None),
    (b'data: {"n":1}\n\ndata: \xff\n\n', None),
    (b": nothing\n\n", None),
    (b"", None),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("stream", "expected"), STREAMS)
def test_the_last_event_is_known(stream: bytes, size: int, expected: Any) -> None:
    assert answer(stream, size) == (None if expected is None else {"n": Decimal(2)})


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=300) | st.integers(0, 10**6), max_size=5), st.data())
def test_of_a_large_event_what_counts_is_kept(answered: dict[str, Any], data: st.DataObject) -> None:
    wanted = {**answered, "images": [{"url": "data:" + "x" * 100_000, "width": 1024}]}
    stream = b"data: {}\n\ndata: " + json.dumps(wanted, ensure_ascii=False).encode() + b"\n\n"
    kept = answer(stream, data.draw(st.integers(1_000, 50_000)))
    assert kept["images"][0]["width"] == 1024
    assert len(str(kept)) < 10_000
