"""JSON as bytes on their way through: adding one member to an object, and reading a large document in little memory.

Nothing here parses and prints a body again: `Splicer` inserts before the last closing brace and changes no other
byte; `Shrinker` makes a small copy for reading (long strings left out) while the original passes.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

_SPACE = b" \t\r\n"
TAIL_MAX = 64 * 1024  # white space after the last brace: more than this and the document is passed on as it is

STRING_MAX = 1024  # longer texts say nothing about a price
EXPONENT_MAX = 324  # beyond that a double, and so fal, reads zero or infinity
SHRUNK_MAX = 512 * 1024  # a document that is still larger without its long texts is not read

_PLAIN = re.compile(rb'[^"\\\x00-\x1f]*')
# Up to the next string that is long, holds an escape, or is cut; in C, since Python's share is paid for each match.
_TO_LONG_STRING = re.compile(rb'(?:[^"]++|"[^"\\\x00-\x1f]{0,200}+")*+')
_ESCAPES = re.compile(rb'(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))++')
_LONG_NAME = b'"(a long name)"'
_LONG_TEXT = b"true"  # no text at all, so that nobody counts its characters or reads it as a parameter


class Splicer:
    """Adds one last member to a JSON object that passes in pieces, holding back no more than its closing brace.

    What is not an object (or never closes) passes unchanged. The member is asked for at the end only, so it can tell
    of what happened meanwhile.
    """

    def __init__(self) -> None:
        self._is_object: bool | None = None
        self._has_member = False
        self._tail = b""  # from the last brace on, while nothing but white space follows it

    def feed(self, piece: bytes) -> bytes:
        """What may be sent on after ``piece`` arrived."""
        if self._is_object is None:
            start = (self._tail + piece).lstrip(_SPACE)
            if start:
                self._is_object = start.startswith(b"{")
        if not self._is_object:
            ready, self._tail = self._tail + piece, b""
            return ready
        held = self._tail + piece
        text = held.rstrip(_SPACE)
        if not text.endswith(b"}") or len(held) - len(text) > TAIL_MAX:
            ready, self._tail = held, b""
        else:
            ready, self._tail = held[: len(text) - 1], held[len(text) - 1 :]
        if not self._has_member:
            # Whatever stands after the opening brace and is not white space is a member.
            self._has_member = ready.strip(_SPACE) not in (b"", b"{")
        return ready

    def end(self, member: bytes) -> bytes:
        """The rest of the document, with ``member`` (``"name": value``) added if it is an object."""
        if not self._tail.startswith(b"}"):
            return self._tail
        return (b", " if self._has_member else b"") + member + self._tail


def spliced(document: bytes, member: bytes) -> bytes:
    """A whole JSON object with one more member at its end; anything else unchanged."""
    splicer = Splicer()
    return splicer.feed(document) + splicer.end(member)


_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:,]', re.DOTALL)


def with_strings(document: bytes, replace: Callable[[str, str], str | None]) -> bytes:
    """A JSON object in which ``replace(name, value)`` gives new values of top-level strings (None: as it is).

    No other byte changes. What is not a JSON object comes back unchanged.
    """
    if parse_object(document) is None:
        return document
    pieces, done, depth = [], 0, 0
    name, expects_value = "", False
    for found in _STRUCTURE.finditer(document):
        token = found[0]
        if token in b"{[":
            depth += 1
        elif token in b"}]":
            depth -= 1
        elif depth != 1 or token == b",":
            expects_value = False
        elif token == b":":
            expects_value = True
        elif not expects_value:
            name = json.loads(token)
        else:
            new = replace(name, json.loads(token))
            if new is not None:
                pieces += [document[done : found.start()], json.dumps(new).encode()]
                done = found.end()
    return b"".join([*pieces, document[done:]])


def is_json(document: bytes) -> bool:
    """Whether bytes are a JSON document of any kind."""
    try:
        parse(document)
    except ValueError:
        return False
    return True


def parse(document: bytes) -> Any:
    """The value of a JSON document, numbers with a fraction as Decimals. Raises ValueError saying what is wrong.

    Strict where Python is lenient: UTF-8 only, no NaN or Infinity.
    """
    try:
        return _DECODER.decode(document.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_object(document: bytes) -> Mapping[str, Any] | None:
    """The value of a JSON object, or None for anything else, malformed documents included."""
    try:
        value = parse(document)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _fraction(text: str) -> Decimal:
    """A number with a fraction or exponent. What a double would call zero or infinite is that here too: a Decimal of
    two hundred million digits is no number that anybody meant."""
    number = Decimal(text)
    if number and number.adjusted() < -EXPONENT_MAX:
        return Decimal(0)
    return number if number.adjusted() <= EXPONENT_MAX else Decimal("Infinity").copy_sign(number)


_DECODER = json.JSONDecoder(parse_float=_fraction, parse_constant=_refuse)


class Shrinker:
    """A copy of a JSON document without its long texts, made while the document passes in pieces.

    The copy has the same structure, and is well-formed exactly when the document is. `end` gives it; `feed` and
    `end` raise ValueError for what is not JSON, or for more than `SHRUNK_MAX` bytes of short values.
    """

    def __init__(self) -> None:
        self._out = bytearray()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._rest = b""  # an escape that the last piece cut
        self._string_start: int | None = None  # where in the copy the string began that we are in
        self._leaving_out = False
        self._left_out = False  # a long string has just ended: whether it was a name or a text is still to be seen

    def feed(self, piece: bytes) -> None:
        self._decoder.decode(piece)
        data, at = self._rest + piece, 0
        self._rest = b""
        while at < len(data):
            at = self._outside(data, at) if self._string_start is None else self._inside(data, at)
            if len(self._out) > SHRUNK_MAX:
                raise ValueError("it holds more values than can be read")

    def end(self) -> bytes:
        self._decoder.decode(b"", True)
        if self._string_start is not None:
            raise ValueError("it ends inside a string")
        if self._left_out:
            self._out += _LONG_TEXT
        return bytes(self._out)

    def _outside(self, data: bytes, at: int) -> int:
        found = _TO_LONG_STRING.match(data, at)
        end = found.end() if found else at
        if self._left_out and (follows := data[at : end + 1].lstrip(_SPACE)):
            self._out += _LONG_NAME if follows.startswith(b":") else _LONG_TEXT
            self._left_out = False
        self._out += data[at:end]
        if end < len(data):
            self._string_start = len(self._out)
            self._out += b'"'
            end += 1
        return end

    def _inside(self, data: bytes, at: int) -> int:
        found = _PLAIN.match(data, at)
        end = found.end() if found else at
        self._keep(data[at:end])
        if end == len(data):
            return end
        if data[end] == 0x22:
            return self._close_string(end)
        escape = _ESCAPES.match(data, end)
        if escape is None:
            if data[end] == 0x5C and len(data) - end < 6:
                self._rest = data[end:]  # may go on in the next piece
                return len(data)
            raise ValueError("it has a control character or a bad escape in a string")
        self._keep(escape[0])
        return escape.end()

    def _keep(self, text: bytes) -> None:
        start = self._string_start or 0
        if not self._leaving_out and len(self._out) - start + len(text) > STRING_MAX:
            self._leaving_out = True
            del self._out[start:]
        if not self._leaving_out:
            self._out += text

    def _close_string(self, at: int) -> int:
        if not self._leaving_out:
            self._out += b'"'
        self._left_out, self._leaving_out, self._string_start = self._leaving_out, False, None
        return at + 1
