"""JSON passing as bytes: the splice changes nothing else, and the small copy says what the large document says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from abhiapi import jsonbytes

MEMBER = b'"_billing": {"credits_used": 12, "cost_usd": 0.012}'
BILLING = {"credits_used": 12, "cost_usd": Decimal("0.012")}
LONG = "\ue000 a long one"
STRING_MAX = 16  # in place of the real one, so that short examples reach what long texts do
SHORT_STRING = jsonbytes._TO_LONG_STRING.pattern.replace(b"{0,200}", b"{0,8}")

scalars = (
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.decimals(allow_nan=False, allow_infinity=False)
    | st.text() | st.text("abc\"\\/\n\u00e9\U0001f600\ud800{}[]:, ", min_size=8, max_size=40)
)  # fmt: skip
spaces = st.text(" \t\r\n", max_size=3)


def objects_of(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.text(max_size=40), inner, max_size=4)


values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | objects_of(inner), max_leaves=12)


@st.composite
def printed(draw: st.DrawFn, what: st.SearchStrategy[Any] = values) -> bytes:
    """A JSON document as somebody else would print it: any spacing, any escaping."""
    return (draw(spaces) + _print(draw, draw(what)) + draw(spaces)).encode()


def _print(draw: st.DrawFn, value: Any) -> str:
    def space() -> str:
        return draw(spaces)

    if isinstance(value, dict):
        members = [f"{_print(draw, name)}{space()}:{space()}{_print(draw, inner)}" for name, inner in value.items()]
        return "{" + space() + f"{space()},{space()}".join(members) + space() + "}"
    if isinstance(value, list):
        return "[" + space() + ",".join(space() + _print(draw, inner) + space() for inner in value) + "]"
    if isinstance(value, Decimal):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=draw(st.booleans())).encode().decode()
    except UnicodeEncodeError:  # lone surrogates exist as escapes only
        return json.dumps(value)


@st.composite
def cut(draw: st.DrawFn, document: bytes) -> list[bytes]:
    """A document in pieces as they might come over a network."""
    places = sorted(draw(st.lists(st.integers(0, len(document)), max_size=12)))
    return [document[start:end] for start, end in zip([0, *places], [*places, len(document)], strict=True)]


def parse(document: bytes) -> Any:
    return json.loads(document, parse_float=Decimal)


def splice(pieces: Iterable[bytes]) -> bytes:
    splicer = jsonbytes.Splicer()
    return b"".join([*map(splicer.feed, pieces), splicer.end(MEMBER)])


@contextmanager
def low_limits() -> Iterator[None]:
    """Strings that are long at 16 bytes, and may be short up to 8."""
    assert b"{0,8}" in SHORT_STRING
    with mock.patch.multiple(jsonbytes, STRING_MAX=STRING_MAX, _TO_LONG_STRING=re.compile(SHORT_STRING)):
        yield


def shrink(pieces: Iterable[bytes]) -> bytes:
    shrinker = jsonbytes.Shrinker()
    for piece in pieces:
        shrinker.feed(piece)
    return shrinker.end()


# --- the splice -------------------------------------------------------------------------------------------------


@given(printed(objects_of(values)), st.data())
def test_a_spliced_object_has_one_more_member_at_its_end_and_no_other_byte_changes(
    document: bytes, data: st.DataObject
) -> None:
    whole = jsonbytes.spliced(document, MEMBER)
    assert splice(data.draw(cut(document))) == whole
    assert whole.count(MEMBER) == document.count(MEMBER) + 1
    start = whole.rindex(MEMBER)
    before, after = whole[:start], whole[start + len(MEMBER) :]
    separator = b", " if parse(document) else b""
    assert before.endswith(separator)
    assert before[: len(before) - len(separator)] + after == document
    assert parse(whole) == parse(document) | {"_billing": BILLING}
    assert list(parse(whole))[-1] == "_billing" or "_billing" in parse(document)


@given(printed(scalars | st.lists(values)) | st.binary(), st.data())
@example(b"", None)
@example(b"}", None)
@example(b'  "}" ', None)
@example(b"\xef\xbb\xbf{}", None)
def test_what_is_no_object_passes_unchanged(document: bytes, data: st.DataObject | None) -> None:
    pieces = data.draw(cut(document)) if data else [document]
    if document.strip(b" \t\r\n").startswith(b"{"):
        document = b"[" + document
        pieces = [b"[", *pieces]
    assert splice(pieces) == document


@given(printed(objects_of(values)), st.data())
def test_no_more_than_the_closing_brace_is_held_back(document: bytes, data: st.DataObject) -> None:
    """A large answer flows; what is held back is a brace and the white space after it."""
    splicer, fed, sent = jsonbytes.Splicer(), b"", b""
    for piece in data.draw(cut(document)):
        fed += piece
        sent += splicer.feed(piece)
        assert re.fullmatch(rb"\}?[ \t\r\n]*", fed[len(sent) :])
        assert fed.startswith(sent)


def test_an_object_cut_short_is_not_closed() -> None:
    assert splice([b'{"images": [{"url": "x"']) == b'{"images": [{"url": "x"'


def test_endless_white_space_is_not_gathered() -> None:
    splicer = jsonbytes.Splicer()
    assert splicer.feed(b"{}") == b"{"
    sent = b"".join(splicer.feed(b" " * 1000) for _ in range(1000))
    assert len(sent) >= 1_000_000 - jsonbytes.TAIL_MAX
    assert len(sent + splicer.end(MEMBER)) == 1_000_001


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    [b"NaN", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}', b"", b" ", b"{", b'{"a":1,}', b"{'a':1}",
     b'{"a":1} x', b'{"a":\x01}', b'{"a":"\x01"}', b'{"a":"\xe9"}', b'"\\x"', b"\xef\xbb\xbf{}",
     '{"a":1}'.encode("utf-16"), b"[" * 100_000 + b"]" * 100_000, b'{"a":01}', b"1" * 10_000],
)  # fmt: skip
def test_what_is_not_json_is_refused_without_harm(document: bytes) -> None:
    assert not jsonbytes.is_json(document)
    assert jsonbytes.parse_object(document) is None
    with pytest.raises(ValueError, match=r"\w"):
        jsonbytes.parse(document)


def test_numbers_are_read_exactly() -> None:
    read = jsonbytes.parse(b'{"a": 8.439999999999998, "b": 1e300, "c": 12345678901234567890123, "d": 1.0}')
    assert read == {
        "a": Decimal("8.439999999999998"),
        "b": Decimal("1e300"),
        "c": 12345678901234567890123,
        "d": Decimal("1.0"),
    }


@pytest.mark.parametrize("document", [b"[]", b"1", b'"text"', b"null", b"true"])
def test_only_an_object_is_an_object(document: bytes) -> None:
    assert jsonbytes.is_json(document)
    assert jsonbytes.parse_object(document) is None


# --- the small copy ---------------------------------------------------------------------------------------------


def paired(document: bytes) -> Any:
    """A document's value with the members of each object as pairs, so that equal names do not hide one another."""
    return json.loads(document, parse_float=Decimal, object_pairs_hook=lambda pairs: ("object", pairs))


def model(document: bytes) -> Any:
    """What the small copy should say: long texts are true, and long names are one name."""
    text = document.decode()

    def short(match: re.Match[str]) -> str:
        return match[0] if len(match[1].encode()) < STRING_MAX else f'"{LONG}"'

    marked = re.sub(r'"((?:[^"\\]|\\.)*)"', short, text)
    return _without_marks(paired(marked.encode()))


def _without_marks(value: Any) -> Any:
    if isinstance(value, tuple):
        pairs = [("(a long name)" if name == LONG else name, inner) for name, inner in value[1]]
        return ("object", [(name, _without_marks(inner)) for name, inner in pairs])
    if isinstance(value, list):
        return [_without_marks(inner) for inner in value]
    return True if value == LONG else value


@given(printed(), st.data())
def test_the_small_copy_has_the_structure_of_the_document(document: bytes, data: st.DataObject) -> None:
    with low_limits():
        copy = shrink(data.draw(cut(document)))
    assert paired(copy) == model(document)


@given(printed(), st.data())
def test_the_small_copy_is_json_exactly_when_the_document_is(document: bytes, data: st.DataObject) -> None:
    """Whatever is broken, outside of a long text or inside it."""
    broken = bytearray(document)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(broken)))
        broken[place : place + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"", b'"', b"\\", b"u", b"{", b"}", b":", b",", b"\x00", b"\xff", b"\n", b"1", b"NaN"])
        )
    document = bytes(broken)
    with low_limits():
        try:
            is_json = jsonbytes.is_json(shrink(data.draw(cut(document))))
        except ValueError:
            is_json = False
    assert is_json == jsonbytes.is_json(document)


def test_the_small_copy_of_a_large_document_is_small() -> None:
    piece = b"iVBORw0KGgo" * 6000
    shrinker = jsonbytes.Shrinker()
    shrinker.feed(b'{"image": {"content": "data:image/png;base64,')
    for _ in range(200):
        shrinker.feed(piece)
    shrinker.feed(b'", "width": 1024}}')
    assert shrinker.end() == b'{"image": {"content": true, "width": 1024}}'


def test_a_document_of_too_many_short_values_is_not_read() -> None:
    with pytest.raises(ValueError, match="more values than can be read"):
        shrink(b"1," * 50 for _ in range(100_000))


def test_a_long_name_is_no_longer_a_parameters_name() -> None:
    name = b'"' + b"n" * 5000 + b'"'
    assert shrink([b"{", name[:100], name[100:], b"  ", b':1,"num_images":2}']) == (
        b'{  "(a long name)":1,"num_images":2}'
    )
