"""Undoing gzip and deflate as bytes arrive. fal is asked for plain bytes; this is for the day it sends others."""

from __future__ import annotations

import zlib
from collections.abc import Callable

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
