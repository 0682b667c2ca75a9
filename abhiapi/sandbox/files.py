"""The files behind the URLs in answers: which URL means which picture, clip or sound, and the bytes of it.

A URL says everything about its file (colours, size, words, length), so nothing is stored: `picture_url` writes what
`file_at` reads. Pure; the bytes come as an iterator.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from abhiapi.sandbox import clips, pictures
from abhiapi.sandbox.sizes import SIDE_MAX, Size

PREFIX = "/files/"
WORDS_MAX_LETTERS = 28

SOUND_TYPE = "audio/wav"
MESH_TYPE = "model/obj"
_SOUND_RATE = 8_000

_PATH = re.compile(
    r"/files/(?P<seed>[0-9a-f]{1,32})/"
    r"(?:(?P<width>\d{1,5})x(?P<height>\d{1,5})/(?:(?P<clip_s>\d{1,2})s/)?|(?P<sound_s>\d{1,2})s/)?"
    r"(?P<words>[a-z0-9-]{1,40})\.(?P<ending>png|mp4|wav|obj)"
)


@dataclass(frozen=True, slots=True)
class ServedFile:
    """``length`` is None where it is only known at the end."""

    content_type: str
    length: int | None
    pieces: Iterator[bytes]


def slug(text: str) -> str:
    """The first words of a prompt, as they may stand in a URL."""
    words = re.sub(r"[^a-z0-9]+", "-", text[:400].lower()).strip("-")
    if len(words) > WORDS_MAX_LETTERS:
        words = words[:WORDS_MAX_LETTERS].rpartition("-")[0] or words[:WORDS_MAX_LETTERS]
    return words or "output"


def picture_url(host: str, seed: str, size: Size, words: str) -> str:
    return f"http://{host}{PREFIX}{seed}/{size[0]}x{size[1]}/{words}.png"


def clip_url(host: str, seed: str, size: Size, seconds: int, words: str) -> str:
    return f"http://{host}{PREFIX}{seed}/{size[0]}x{size[1]}/{seconds}s/{words}.mp4"


def sound_url(host: str, seed: str, seconds: int, words: str) -> str:
    return f"http://{host}{PREFIX}{seed}/{seconds}s/{words}.wav"


def mesh_url(host: str, seed: str, words: str) -> str:
    return f"http://{host}{PREFIX}{seed}/{words}.obj"


def picture_size(url: str) -> Size | None:
    """Width and height of the picture at this URL, if it is one of ours (of whichever host)."""
    match = _PATH.search(url) if len(url) < 1_000 else None
    if match is None or match["ending"] != "png" or match["width"] is None:
        return None
    return int(match["width"]), int(match["height"])


def file_at(path: str) -> ServedFile | None:
    """What is served at this path, or None."""
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    width, height = int(match["width"] or 0), int(match["height"] or 0)
    seed, words = match["seed"], match["words"].replace("-", " ")
    match match["ending"]:
        case "png" if 1 <= width <= SIDE_MAX and 1 <= height <= SIDE_MAX and not match["clip_s"]:
            return ServedFile(pictures.CONTENT_TYPE, None, pictures.png(width, height, seed, words))
        case "mp4" if _is_clip(width, height, seconds := int(match["clip_s"] or 0)):
            pieces = clips.mp4(width, height, seconds, seed)
            return ServedFile(clips.CONTENT_TYPE, clips.size_bytes(width, height, seconds), pieces)
        case "wav" if match["sound_s"]:
            sound = _wav(int(match["sound_s"]), seed)
            return ServedFile(SOUND_TYPE, len(sound), iter((sound,)))
        case "obj" if not match["width"] and not match["sound_s"]:
            return ServedFile(MESH_TYPE, len(_TETRAHEDRON), iter((_TETRAHEDRON,)))
    return None


def _is_clip(width: int, height: int, seconds: int) -> bool:
    # Odd sides cannot be said in 4:2:0, and nothing here asks for them.
    return 2 <= width <= clips.SIDE_MAX and 2 <= height <= clips.SIDE_MAX and 1 <= seconds <= clips.SECONDS_MAX


def _wav(seconds: int, seed: str) -> bytes:
    """A quiet tone: 8-bit mono, its pitch from the seed."""
    pitch_hz = 220 + int(seed[:4], 16) % 220
    one_second = bytes(
        128 + round(24 * math.sin(2 * math.pi * pitch_hz * at / _SOUND_RATE)) for at in range(_SOUND_RATE)
    )
    samples = one_second * seconds
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, _SOUND_RATE, _SOUND_RATE, 1, 8)
    payload = b"WAVE" + layout + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(payload)) + payload


_TETRAHEDRON = b"v 1 1 1\nv -1 -1 1\nv -1 1 -1\nv 1 -1 -1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n"
