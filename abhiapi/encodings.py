"""Undoing gzip, deflate and brotli as bytes arrive. Calls are asked for in plain bytes; the platform API is not."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import brotli

from abhiapi.errors import UpstreamBroken

DECODABLE = frozenset(("gzip", "x-gzip", "deflate"))
_PIECE_BYTES = 256 * 1024  # what one read makes of compressed bytes at most, so that a bomb stays small in memory


class DecodingReader:
    """Reads compressed bytes from ``read1`` and hands out plain ones. Raises `UpstreamBroken` for a cut or bad body."""

    def __init__(self, read1: Callable[[], bytes]) -> None:
        self._read1 = read1
        self._decoder = zlib.decompressobj(wbits=47)  # gzip or zlib, whichever the head says
        self._compressed = b""
        self._started = False

    def __call__(self) -> bytes:
        """The next plain bytes; b"" at the whole end."""
        while True:
            if not self._compressed:
                self._compressed = self._read1()
                if not self._compressed:
                    if self._started and not self._decoder.eof:
                        raise UpstreamBroken("fal's compressed answer was cut before its end")
                    return b""
            plain = self._decode()
            if plain:
                return plain

    def _decode(self) -> bytes:
        if self._decoder.eof:  # another gzip member follows
            self._decoder = zlib.decompressobj(wbits=47)
        self._started = True
        try:
            plain = self._decoder.decompress(self._compressed, _PIECE_BYTES)
        except zlib.error as error:
            raise UpstreamBroken("fal's answer is not compressed the way it says") from error
        # At a member's end `unconsumed_tail` may still hold what is in `unused_data`: the same bytes twice.
        self._compressed = self._decoder.unused_data if self._decoder.eof else self._decoder.unconsumed_tail
        return plain


class BrotliReader:
    """The same for brotli, which fal's platform API may answer in."""

    def __init__(self, read1: Callable[[], bytes]) -> None:
        self._read1 = read1
        self._decoder = brotli.Decompressor()
        self._started = False

    def __call__(self) -> bytes:
        """The next plain bytes; b"" at the whole end."""
        while True:
            compressed = b""
            if self._decoder.can_accept_more_data():
                compressed = self._read1()
                if not compressed:
                    if self._started and not self._decoder.is_finished():
                        raise UpstreamBroken("fal's compressed answer was cut before its end")
                    return b""
            self._started = True
            try:
                plain: bytes = self._decoder.process(compressed, output_buffer_limit=_PIECE_BYTES)
            except brotli.error as error:
                raise UpstreamBroken("fal's answer is not compressed the way it says") from error
            if plain:
                return plain
