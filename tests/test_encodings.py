"""Compressed bytes made plain as they come: whole, in bounded pieces, and never a cut one passed off as whole."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from abhiapi import encodings
from abhiapi.errors import UpstreamBroken

BOMB_BYTES = 64 * 1024 * 1024


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def deflated(data: bytes) -> bytes:
    return zlib.compress(data)


FORMATS: list[Callable[[bytes], bytes]] = [gzipped, deflated]
formats = st.sampled_from(FORMATS)


@st.composite
def cut(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """Bytes in pieces, none of them empty: an empty read is the end."""
    places = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=20)))
    pieces = [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]
    return [piece for piece in pieces if piece]


def reader(pieces: Iterable[bytes]) -> encodings.DecodingReader:
    source = iter(pieces)
    return encodings.DecodingReader(lambda: next(source, b""))


def read_all(pieces: Iterable[bytes]) -> list[bytes]:
    read1 = reader(pieces)
    return list(iter(read1, b""))


plain_bytes = st.binary(max_size=300) | st.builds(lambda part, times: part * times, st.binary(max_size=9), st.just(300))


@given(plain_bytes, formats, st.integers(1, 40), st.data())
def test_whatever_the_pieces_the_bytes_are_those_that_were_compressed(
    plain: bytes, compress: Callable[[bytes], bytes], piece_bytes: int, data: st.DataObject
) -> None:
    with mock.patch.object(encodings, "_PIECE_BYTES", piece_bytes):
        pieces = read_all(data.draw(cut(compress(plain))))
    assert b"".join(pieces) == plain
    assert all(len(piece) <= piece_bytes for piece in pieces)


@given(st.lists(plain_bytes, min_size=2, max_size=4), st.integers(1, 40), st.data())
def test_several_gzip_members_are_one_body(plain: list[bytes], piece_bytes: int, data: st.DataObject) -> None:
    compressed = b"".join(map(gzipped, plain))
    with mock.patch.object(encodings, "_PIECE_BYTES", piece_bytes):
        assert b"".join(read_all(data.draw(cut(compressed)))) == b"".join(plain)


@given(plain_bytes, formats, st.data())
def test_a_cut_body_is_never_whole(plain: bytes, compress: Callable[[bytes], bytes], data: st.DataObject) -> None:
    compressed = compress(plain)
    part = compressed[: data.draw(st.integers(1, len(compressed) - 1))]
    with pytest.raises(UpstreamBroken):
        read_all(data.draw(cut(part)))


@given(st.binary(min_size=1, max_size=300), formats, st.data())
@example(b"{}", gzipped, None)
def test_a_body_with_a_wrong_checksum_is_refused(
    plain: bytes, compress: Callable[[bytes], bytes], data: st.DataObject | None
) -> None:
    compressed = bytearray(compress(plain))
    trailer = -8 if compress is gzipped else -4
    compressed[trailer + (data.draw(st.integers(0, 3)) if data else 0)] ^= 1
    with pytest.raises(UpstreamBroken):
        read_all([bytes(compressed)])


@pytest.mark.parametrize("body", [b"plain text", b"\x1f\x8b", b"{}", gzipped(b"x") + b"rest", b"\x00" * 100])
def test_what_is_not_compressed_the_way_it_says_is_refused(body: bytes) -> None:
    with pytest.raises(UpstreamBroken):
        read_all([body])


def test_no_body_is_no_body() -> None:
    """An answer without a body (to HEAD, or 204) may still name its encoding."""
    assert read_all([]) == []


def test_the_end_is_told_again_when_asked_again() -> None:
    read1 = reader([gzipped(b"{}")])
    assert [read1(), read1(), read1()] == [b"{}", b"", b""]


@pytest.mark.parametrize("compress", FORMATS)
def test_a_bomb_comes_in_small_pieces(compress: Callable[[bytes], bytes]) -> None:
    read1 = reader([compress(b"\x00" * BOMB_BYTES)])
    total = 0
    while piece := read1():
        assert len(piece) <= 256 * 1024
        total += len(piece)
    assert total == BOMB_BYTES


def test_an_event_is_handed_out_before_the_next_is_compressed() -> None:
    packer = zlib.compressobj(wbits=31)
    first = packer.compress(b"data: 1\n\n") + packer.flush(zlib.Z_SYNC_FLUSH)
    asked = []

    def read1() -> bytes:
        asked.append(1)
        return first if len(asked) == 1 else packer.flush()

    assert encodings.DecodingReader(read1)() == b"data: 1\n\n"
    assert len(asked) == 1
