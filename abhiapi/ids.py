"""Identifiers as people and programs see them: call, key and entry ids. Pure, but for the chance it is given."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from datetime import UTC, datetime

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: nothing that looks like something else
_DIGITS = 13  # covers 65 bits
CHANCE_BITS = 20

NowMs = Callable[[], int]


class CallIds:
    """Makes call ids: milliseconds x 2^20 + chance, each larger than the one before, so that they sort by time."""

    def __init__(self, chance: Callable[[int], int] = secrets.randbits) -> None:
        self._chance = chance
        self._last = 0

    def new(self, now_ms: int) -> int:
        self._last = max(self._last + 1, (now_ms << CHANCE_BITS) + self._chance(CHANCE_BITS))
        return self._last


def call_text(call_id: int) -> str:
    digits = []
    for _ in range(_DIGITS):
        call_id, digit = divmod(call_id, 32)
        digits.append(_ALPHABET[digit])
    return "call_" + "".join(reversed(digits))


def parse_call(text: str) -> int | None:
    """The number of a call id, or None if it is none."""
    match = re.fullmatch(rf"call_([{_ALPHABET}]{{{_DIGITS}}})", text)
    if match is None:
        return None
    number = 0
    for character in match[1]:
        number = number * 32 + _ALPHABET.index(character)
    return number if number < 2**63 else None


def key_text(key_id: int) -> str:
    return f"key_{key_id}"


def parse_key_id(text: str) -> int | None:
    match = re.fullmatch(r"key_([1-9]\d{0,17})", text)
    return int(match[1]) if match else None


def entry_text(account_id: int, seq: int) -> str:
    return f"entry_{account_id}_{seq}"


def time_text(at_ms: int | None) -> str | None:
    """A stored time as ISO 8601 in UTC with milliseconds."""
    if at_ms is None:
        return None
    seconds, milliseconds = divmod(at_ms, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{milliseconds:03d}Z"
