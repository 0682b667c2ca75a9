"""Server-sent events as bytes that pass: where a piece may be cut, and what the last event said.

Pure. Nothing of a stream is kept but its last two events, without their long texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abhiapi import jsonbytes

_FIELD = b"data:"


def whole_until(data: bytes) -> int:
    """The length of what ends with a whole UTF-8 character.

    fal's JavaScript client decodes each piece by itself, so a character cut in two reaches it damaged (fal-protocol 4).
    """
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF8 else 1
            return len(data) - back if needed > back else len(data)
        if byte < 0x80:
            break
    return len(data)


class LastEvent:
    """The data of a stream's last event: of the models that stream, the complete output (fal-protocol 4)."""

    def __init__(self) -> None:
        self._last: bytes | None = None
        self._data: jsonbytes.Shrinker | None = None  # of the event that is on its way
        self._is_bad = False
        self._head = b""  # a line's beginning, until it shows which field it is
        self._is_data: bool | None = None
        self._after_cr = False

    def feed(self, piece: bytes) -> None:
        if self._after_cr and piece:
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        for line in piece.splitlines(keepends=True):
            text = line.rstrip(b"\r\n")
            self._take(text)
            if len(text) < len(line):
                self._end_line()
        if piece:
            self._after_cr = piece.endswith(b"\r")

    def answer(self) -> Mapping[str, Any] | None:
        """The last event's object, also where its end is missing; None where it is no JSON object."""
        self._end_line()
        self._end_event()
        return None if self._last is None else jsonbytes.parse_object(self._last)

    def _take(self, text: bytes) -> None:
        if self._is_data is None:
            self._head += text
            if len(self._head) < len(_FIELD):
                return
            self._is_data = self._head.startswith(_FIELD)
            text = self._head.removeprefix(_FIELD)
        if self._is_data and text:
            self._keep(text)

    def _keep(self, text: bytes) -> None:
        self._data = self._data or jsonbytes.Shrinker()
        try:
            if not self._is_bad:
                self._data.feed(text)
        except ValueError:
            self._is_bad = True

    def _end_line(self) -> None:
        if self._is_data:
            self._keep(b"\n")  # several lines of data are one text
        elif not self._head:
            self._end_event()
        self._head, self._is_data = b"", None

    def _end_event(self) -> None:
        if self._data is None:
            return
        try:
            self._last = None if self._is_bad else self._data.end()
        except ValueError:
            self._last = None
        self._data, self._is_bad = None, False
