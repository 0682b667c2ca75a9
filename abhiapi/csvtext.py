"""Comma-separated values as RFC 4180 has them, safe for spreadsheets: no text in them becomes a formula."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n")


def line(values: Sequence[Any]) -> str:
    """A record with its line break. A text that a spreadsheet would run gets an apostrophe before it."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerow([_cell(value) for value in values])
    return out.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, int):
        return str(value)
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULAS) else text
