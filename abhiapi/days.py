"""Days and months in UTC, as reports and limits count them: pure arithmetic on milliseconds since 1970."""

from __future__ import annotations

import re
from datetime import date, timedelta
from functools import lru_cache

MS_PER_DAY = 86_400_000
EPOCH = date(1970, 1, 1)
_MONTH = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])")


def day_number(day: date) -> int:
    return (day - EPOCH).days


@lru_cache(maxsize=512)
def _names(number: int) -> tuple[str, str]:
    text = (EPOCH + timedelta(days=number)).isoformat()
    return text, text[:7]


def periods(at_ms: int) -> tuple[str, str]:
    """The day and the month of a moment: ``2026-11-22``, ``2026-11``."""
    return _names(at_ms // MS_PER_DAY)


def month_of(number: int) -> str:
    """The month of a day by its number."""
    return _names(number)[1]


def parse_month(text: str) -> date:
    """The first day of a month written ``2026-11``. Raises ValueError saying what is expected."""
    match = _MONTH.fullmatch(text)
    if match is None or not 1970 <= int(match[1]) < 9999:
        raise ValueError(f"{text[:40]!r} is no month: write 2026-11")
    return date(int(match[1]), int(match[2]), 1)


def month_after(first: date) -> date:
    """The first day of the next month."""
    return (first.replace(day=28) + timedelta(days=4)).replace(day=1)


def start_ms(day: date) -> int:
    return day_number(day) * MS_PER_DAY
