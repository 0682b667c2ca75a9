"""How fal's answers are parsed: geventhttpclient's parser (llhttp, in C, strict), with every header line as it came.

Bytes in, values out; knows no socket.
"""

from __future__ import annotations

from geventhttpclient.response import HTTPParseError, HTTPResponse

__all__ = ["HEAD_BYTES_MAX", "HTTPParseError", "Headers", "Parser"]

HEAD_BYTES_MAX = 64 * 1024  # fal limits all response headers together to 16 KB (fal-protocol 2.2)

Headers = list[tuple[str, str]]


class Parser(HTTPResponse):
    """An answer as it is parsed: keeps every header line, in order and spelling."""

    def __init__(self, method: str) -> None:
        super().__init__(method=method)
        self.lines: Headers = []
        self.dirty = False

    def take(self) -> bytes:
        taken = bytes(self._body_buffer)
        self._body_buffer.clear()
        return taken

    def parse(self, data: bytes) -> None:
        """Raises HTTPParseError for what HTTP does not allow. Bytes after a whole answer make the connection dirty."""
        try:
            self.feed(data)
        except HTTPParseError:
            if not self.is_whole:
                raise
            self.dirty = True

    def head_bytes(self) -> int:
        """The size of the head; while it is not complete, more than any may have."""
        if not self.has_head:
            return HEAD_BYTES_MAX + 1
        return sum(len(name) + len(value) + 4 for name, value in self.lines)

    @property
    def is_whole(self) -> bool:
        return self.message_complete and self.get_code() >= 200

    @property
    def has_head(self) -> bool:
        return self.headers_complete and self.get_code() >= 200

    def _on_message_begin(self) -> None:
        if self.is_whole:
            raise HTTPParseError("more than one answer")
        self.lines.clear()
        super()._on_message_begin()

    def _flush_header(self) -> None:
        if self._current_header_field is not None:
            # llhttp leaves the blanks behind a value, which are none of it (RFC 9110, 5.5): "1 " is one unit.
            self.lines.append((self._current_header_field, (self._current_header_value or "").rstrip(" \t")))
            self._current_header_field = self._current_header_value = None
