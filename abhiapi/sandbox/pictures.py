"""Placeholder pictures: valid PNGs of any size, drawn row by row from a seed and a few words.

Pure and in bounded memory: `png` yields strips, and only one strip is held at a time, so the largest picture fal's
toolkit allows (14142 x 14142) costs time but no space. A palette picture is what makes that possible without a
picture library: every row of a diagonal gradient is a slice of the same line of palette indices.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator

from abhiapi.sandbox.letters import GLYPH_HEIGHT, GLYPH_WIDTH, text_rows

CONTENT_TYPE = "image/png"
STRIP_BYTES = 64 * 1024

_GRADIENT_COLOURS = 254
_SHADE, _INK = 254, 255  # palette indices of the band behind the words, and of the words


def png(width: int, height: int, seed: str, words: str = "") -> Iterator[bytes]:
    """The bytes of a ``width`` x ``height`` PNG, in pieces: colours from ``seed``, ``words`` in its lower left."""
    yield b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
    yield _chunk(b"PLTE", _palette(seed))
    packer = zlib.compressobj(1)
    strip = bytearray()
    for row in _rows(width, height, words):
        strip += b"\0"  # filter type: none
        strip += row
        if len(strip) >= STRIP_BYTES:
            packed = packer.compress(bytes(strip))
            strip.clear()
            yield _chunk(b"IDAT", packed) if packed else b""
    yield _chunk(b"IDAT", packer.compress(bytes(strip)) + packer.flush())
    yield _chunk(b"IEND", b"")


def colours(seed: str) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Two RGB colours that go from one corner to the other: mid-bright, so that white words stay readable."""
    digest = hashlib.sha256(seed.encode()).digest()
    one, other = digest[0:3], digest[3:6]
    return (
        (one[0] // 2 + 30, one[1] // 2 + 30, one[2] // 2 + 30),
        (other[0] // 2 + 90, other[1] // 2 + 90, other[2] // 2 + 90),
    )


def _palette(seed: str) -> bytes:
    start, end = colours(seed)
    last = _GRADIENT_COLOURS - 1
    gradient = [
        bytes((a * (last - step) + b * step) // last for a, b in zip(start, end, strict=True))
        for step in range(_GRADIENT_COLOURS)
    ]
    return b"".join(gradient) + bytes((24, 24, 28)) + bytes((255, 255, 255))


def _rows(width: int, height: int, words: str) -> Iterator[bytes]:
    diagonal = width + height
    line = bytes(place * (_GRADIENT_COLOURS - 1) // diagonal for place in range(diagonal))
    overlay = _overlay(width, height, words)
    first_row_of_overlay = height - len(overlay)
    for y in range(height):
        row = line[y : y + width]
        if overlay and y >= first_row_of_overlay:
            band = overlay[y - first_row_of_overlay]
            row = band + row[len(band) :]
        yield row


def _overlay(width: int, height: int, words: str) -> list[bytes]:
    """Rows of the band with the words, to be laid over the lower left; empty where they would not fit."""
    cell = GLYPH_WIDTH + 1
    scale = min(width // (cell * (len(words) + 2)), height // (3 * GLYPH_HEIGHT), 12)
    if not words or scale < 1:
        return []
    blank = bytes([_SHADE]) * (cell * scale * (len(words) + 1))
    rows = [blank] * (2 * scale)
    for bits in text_rows(words):
        pixels = bytes(_INK if bit else _SHADE for bit in bits for _ in range(scale))
        margin = (len(blank) - len(pixels)) // 2
        edge = bytes([_SHADE]) * margin
        rows += [edge + pixels + edge] * scale
    return rows + [blank] * (2 * scale)


def _chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))
