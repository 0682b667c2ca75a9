"""Placeholder clips: small, silent, playable MP4 files (H.264 baseline) of any size, made without a codec library.

Pure. The trick is a picture that costs next to nothing to encode: the top row of macroblocks is sent as raw samples
(I_PCM), every row below repeats it (vertical intra prediction, no residual), and each following frame is the last one
moved by a few pixels (one motion vector for all). A key frame every second starts the colours where the motion left
them. References are to ITU-T H.264: 7.3 (syntax), 8.4.1.3 (motion prediction), 9.1 (Exp-Golomb codes), 9.2.1 (nC).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from functools import lru_cache

from abhiapi.sandbox.pictures import colours

CONTENT_TYPE = "video/mp4"
FPS = 24
SECONDS_MAX = 60  # a longer clip is served cut to this
SIDE_MAX = 4096

_SHIFT_PIXELS = 4  # how far the picture moves in a frame
_MACROBLOCK = 16
_LEVELS = ((3_600, 31), (8_192, 40), (36_864, 51))  # macroblocks of a frame -> level_idc (table A-1)
_PERIOD = 1_024  # pixels after which the colours repeat


def mp4(width: int, height: int, seconds: int, seed: str) -> Iterator[bytes]:
    """The bytes of the clip, in pieces."""
    frames = frame_count(seconds)
    still, moved = _Encoder(width, height, seed), _moved_frames(width, height)
    # Key frames are of one size: no sample is so small that it would need an emulation prevention byte.
    key_bytes = len(still.key_frame(0))
    sizes = [len(moved[at % FPS]) if at % FPS else key_bytes for at in range(frames)]
    yield _header(width, height, sizes)
    for at in range(frames):
        yield moved[at % FPS] if at % FPS else still.key_frame(at)


@lru_cache(maxsize=256)
def size_bytes(width: int, height: int, seconds: int) -> int:
    """How long the file is; its colours make no difference."""
    return sum(len(piece) for piece in mp4(width, height, seconds, ""))


def frame_count(seconds: int) -> int:
    return FPS * min(seconds, SECONDS_MAX)


# --- H.264 ------------------------------------------------------------------------------------------------------


def _ue(value: int) -> str:
    """Exp-Golomb code of an unsigned number, as a text of bits."""
    digits = f"{value + 1:b}"
    return "0" * (len(digits) - 1) + digits


def _se(value: int) -> str:
    return _ue(2 * value - 1 if value > 0 else -2 * value)


def _nal(kind: int, bits: str) -> bytes:
    """A NAL unit: one byte of type, the payload with its stop bit, and no byte pattern that looks like a start code."""
    bits += "1"
    bits += "0" * (-len(bits) % 8)
    payload = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return bytes([kind]) + re.sub(rb"\x00\x00(?=[\x00-\x03])", b"\x00\x00\x03", payload)


def _macroblocks(side: int) -> int:
    return -(-side // _MACROBLOCK)


def _sequence_parameters(width: int, height: int) -> bytes:
    across, down = _macroblocks(width), _macroblocks(height)
    level = next((level for most, level in _LEVELS if across * down <= most), 52)
    cut_right, cut_below = (across * _MACROBLOCK - width) // 2, (down * _MACROBLOCK - height) // 2
    bits = "".join((
        f"{66:08b}", "11000000", f"{level:08b}",  # constrained baseline
        _ue(0), _ue(4), _ue(2), _ue(1), "0",  # id; frame_num of 8 bits; output order = decoding order; 1 reference
        _ue(across - 1), _ue(down - 1), "1", "1",
        "1", _ue(0), _ue(cut_right), _ue(0), _ue(cut_below), "0",
    ))  # fmt: skip
    return _nal(0x67, bits)


def _picture_parameters() -> bytes:
    # CAVLC, one slice group, one reference, no weights, initial QP 26, deblocking controlled by the slice (off).
    return _nal(0x68, _ue(0) + _ue(0) + "00" + _ue(0) * 3 + "000" + _se(0) * 3 + "100")


class _Encoder:
    """Key frames of one clip."""

    def __init__(self, width: int, height: int, seed: str) -> None:
        self.across, self.down = _macroblocks(width), _macroblocks(height)
        luma, blue, red = zip(*_wheel(seed), strict=True)
        # Twice around, so that any start within one period can be cut out in one piece.
        repeats = 2 + self.across * _MACROBLOCK // _PERIOD
        self.luma, self.blue, self.red = (bytes(plane) * repeats for plane in (luma, blue[::2], red[::2]))
        self.below = self._rows_below()

    def key_frame(self, at: int) -> bytes:
        """The key frame shown as number ``at``, its colours moved on by the motion since the start."""
        start = at * _SHIFT_PIXELS % _PERIOD
        head = _ue(0) + _ue(7) + _ue(0) + "00000000" + _ue(0) + "00" + _se(0) + _ue(1)
        payload = [self._raw_block(head, start)]
        payload += [self._raw_block("", start + _MACROBLOCK * column) for column in range(1, self.across)]
        body = b"".join(payload)
        bits = f"{int.from_bytes(body, 'big'):0{8 * len(body)}b}" + self.below
        return _sample(_nal(0x65, bits))

    def _raw_block(self, head: str, start: int) -> bytes:
        """A macroblock of raw samples (I_PCM, mb_type 25), which are byte-aligned."""
        bits = head + _ue(25)
        bits += "0" * (-len(bits) % 8)
        half = start // 2
        return (
            int(bits, 2).to_bytes(len(bits) // 8, "big")
            + self.luma[start : start + 16] * 16
            + self.blue[half : half + 8] * 8
            + self.red[half : half + 8] * 8
        )

    def _rows_below(self) -> str:
        """Macroblocks that repeat the row above: I_16x16 vertical, chroma vertical, same QP, no coefficients."""
        same = _ue(1) + _ue(2) + _se(0)
        # Raw blocks count as 16 coefficients (9.2.1), so below them nC is 8 or 16: a code of 6 bits for "none".
        second = (same + "000011") * self.across if self.down > 1 else ""
        return second + (same + "1") * self.across * max(0, self.down - 2)


@lru_cache(maxsize=32)
def _moved_frames(width: int, height: int) -> tuple[bytes, ...]:
    """The frames between key frames: the last picture, moved. Index 0 is unused (a key frame stands there)."""
    blocks = _macroblocks(width) * _macroblocks(height)
    frames = [b""]
    for number in range(1, FPS):
        head = _ue(0) + _ue(5) + _ue(0) + f"{number:08b}" + "000" + _se(0) + _ue(1)
        # skip run 0, P_L0_16x16, the vector in quarter pixels, no residual; later blocks predict the same vector.
        first = _ue(0) + _ue(0) + _se(4 * _SHIFT_PIXELS) + _se(0) + _ue(0)
        frames.append(_sample(_nal(0x41, head + first + "1" * (5 * (blocks - 1)))))
    return tuple(frames)


def _wheel(seed: str) -> Iterator[tuple[int, int, int]]:
    """Luma and the two chroma samples along one period: from the first colour to the second and back."""
    start, end = colours(seed)
    for place in range(_PERIOD):
        step = min(place, _PERIOD - place) * 2
        red, green, blue = ((a * (_PERIOD - step) + b * step) // _PERIOD for a, b in zip(start, end, strict=True))
        yield (  # ITU-R BT.601, studio range, integers
            16 + (66 * red + 129 * green + 25 * blue) // 256,
            128 + (-38 * red - 74 * green + 112 * blue) // 256,
            128 + (112 * red - 94 * green - 18 * blue) // 256,
        )


def _sample(nal: bytes) -> bytes:
    return struct.pack(">I", len(nal)) + nal


# --- MP4 (ISO 14496-12, -15) ------------------------------------------------------------------------------------


def _box(kind: bytes, *parts: bytes) -> bytes:
    payload = b"".join(parts)
    return struct.pack(">I", 8 + len(payload)) + kind + payload


def _full(kind: bytes, flags: int, *parts: bytes) -> bytes:
    return _box(kind, struct.pack(">I", flags), *parts)


def _header(width: int, height: int, sizes: list[int]) -> bytes:
    """Everything before the samples: file type, index, and the head of the box that holds them."""
    kind = _box(b"ftyp", b"isom", struct.pack(">I", 512), b"isomiso2avc1mp41")
    index_bytes = len(_index(width, height, sizes, 0))
    index = _index(width, height, sizes, len(kind) + index_bytes + 8)
    return kind + index + struct.pack(">I", 8 + sum(sizes)) + b"mdat"


def _index(width: int, height: int, sizes: list[int], samples_at: int) -> bytes:
    ticks = len(sizes)  # the time scale is the frame rate, so a frame is one tick
    matrix = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    movie = _full(
        b"mvhd", 0, struct.pack(">IIIIIHxx8x", 0, 0, FPS, ticks, 0x10000, 0x100), matrix, bytes(24), b"\0\0\0\2"
    )
    track = _full(
        b"tkhd", 3, struct.pack(">IIIIIxxxxxxxxHHHxx", 0, 0, 1, 0, ticks, 0, 0, 0), matrix,
        struct.pack(">II", width << 16, height << 16),
    )  # fmt: skip
    media = _box(
        b"mdia",
        _full(b"mdhd", 0, struct.pack(">IIIIHH", 0, 0, FPS, ticks, 0x55C4, 0)),
        _full(b"hdlr", 0, bytes(4), b"vide", bytes(12), b"placeholder\0"),
        _box(
            b"minf",
            _full(b"vmhd", 1, bytes(8)),
            _box(b"dinf", _full(b"dref", 0, struct.pack(">I", 1), _full(b"url ", 1))),
            _sample_table(width, height, sizes, samples_at),
        ),
    )
    return _box(b"moov", movie, _box(b"trak", track, media))


def _sample_table(width: int, height: int, sizes: list[int], samples_at: int) -> bytes:
    sequence, picture = _sequence_parameters(width, height), _picture_parameters()
    configuration = _box(
        b"avcC", b"\x01", sequence[1:4], b"\xff\xe1", struct.pack(">H", len(sequence)), sequence, b"\x01",
        struct.pack(">H", len(picture)), picture,
    )  # fmt: skip
    entry = _box(
        b"avc1", struct.pack(">6xH16xHHIIxxxxH32xHh", 1, width, height, 0x480000, 0x480000, 1, 24, -1), configuration
    )
    count = len(sizes)
    keys = range(1, count + 1, FPS)
    return _box(
        b"stbl",
        _full(b"stsd", 0, struct.pack(">I", 1), entry),
        _full(b"stts", 0, struct.pack(">III", 1, count, 1)),
        _full(b"stss", 0, struct.pack(f">I{len(keys)}I", len(keys), *keys)),
        _full(b"stsc", 0, struct.pack(">IIII", 1, 1, count, 1)),
        _full(b"stsz", 0, struct.pack(f">II{count}I", 0, count, *sizes)),
        _full(b"stco", 0, struct.pack(">II", 1, samples_at)),
    )
