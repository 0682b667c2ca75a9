"""Figures and times as the pages write them: template filters, pure."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from abhiapi import ids, money


def credits(micros: int) -> str:
    """Credits, exact, with thousands apart: ``4,973.75``."""
    return _grouped(money.credits_text(micros))


def usd(micros: int) -> str:
    """Dollars, exact, at least two decimals: ``$4.97375``, ``-$0.50``."""
    text = _grouped(money.usd_text(abs(micros)))
    whole, _, fraction = text.partition(".")
    return f"{'-' if micros < 0 else ''}${whole}.{fraction.ljust(2, '0')}"


def nano_usd(nanos: int) -> str:
    """Dollars to the nano-dollar that fal's costs are kept in: ``$0.025``."""
    text = _grouped(money.nanos_usd_text(abs(nanos)))
    whole, _, fraction = text.partition(".")
    return f"{'-' if nanos < 0 else ''}${whole}.{fraction.ljust(2, '0')}"


def amount(number: str, unit: str) -> str:
    """So many of a unit that fal names in the plural: ``1 megapixel``, ``2.5 seconds``, ``3 x 1000 tokens``."""
    if unit[:1].isdigit():
        return f"{number} x {unit}"
    return f"{number} {unit.removesuffix('s') if number == '1' else unit}"


def count(number: int) -> str:
    return f"{number:,}"


def when(at_ms: int | None, otherwise: str = "never") -> Markup:
    """A time to the minute in UTC, exact where one asks for it."""
    exact = ids.time_text(at_ms)
    if exact is None or at_ms is None:
        return Markup("{}").format(otherwise)
    shown = datetime.fromtimestamp(at_ms // 1000, UTC).strftime("%Y-%m-%d %H:%M")
    return Markup('<time datetime="{}" title="{}">{}</time>').format(exact, exact, shown)


def month(at_ms: int) -> str:
    """The month of a time, as the statement is asked for: ``2026-11``."""
    return datetime.fromtimestamp(at_ms // 1000, UTC).strftime("%Y-%m")


def _grouped(text: str) -> str:
    sign = "-" if text.startswith("-") else ""
    whole, point, fraction = text.lstrip("-").partition(".")
    return f"{sign}{int(whole):,}{point}{fraction}"


FILTERS: dict[str, Callable[..., Any]] = {
    "credits": credits,
    "usd": usd,
    "nano_usd": nano_usd,
    "amount": amount,
    "count": count,
    "when": when,
    "month": month,
    "call_id": ids.call_text,
    "key_id": ids.key_text,
}
