"""The price list as people look at it: kinds of models with their ranges, and a page of the models that were asked for.

Pure: a catalogue and words in, rows out. All figures are our prices, exact, in USD and in credits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal

from abhiapi.money import EXACT
from abhiapi.pricing import Price, decimal_text

PAGE_ROWS = 25
QUERY_CHARS_MAX = 100
RANGES_MAX = 3  # of one kind: fal sells some kinds by several units


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    unit: str
    usd: str
    credits: str


@dataclass(frozen=True, slots=True)
class Page:
    """Part of the models found; pages count from 1."""

    query: str
    rows: tuple[Row, ...]
    found: int
    number: int
    pages: int

    @property
    def first(self) -> int:
        return (self.number - 1) * PAGE_ROWS + 1 if self.rows else 0

    @property
    def last(self) -> int:
        return self.first + len(self.rows) - 1 if self.rows else 0


@dataclass(frozen=True, slots=True)
class Range:
    """What the models of a kind cost that are sold by one unit, from the cheapest to the dearest."""

    unit: str
    usd: str
    credits: str


@dataclass(frozen=True, slots=True)
class Kind:
    name: str
    models: str
    search: str
    count: int
    ranges: tuple[Range, ...]


# The kinds of the reference page: name, what they are called, what finds them, and which models they are.
_KINDS = (
    ("Image Generation", "Flux, SDXL, etc.", "megapixel", r"(?!.*upscal)", "megapixel"),
    ("Seedance Video", "seedance models", "seedance", r".*seedance", None),
    ("Veo Video", "veo models", "veo", r".*/veo\d", None),
    ("Sora Video", "sora models", "sora", r".*/sora-", None),
    ("Kling Video", "kling-video models", "kling-video", r".*kling-video", None),
    ("Upscaling", "creative-upscaler, etc.", "upscale", r".*upscale", None),
)


def kinds(prices: Iterable[Price]) -> list[Kind]:
    """The kinds that this catalogue has any model of."""
    listed = list(prices)
    made = []
    for name, called, search, pattern, unit in _KINDS:
        of_kind = [p for p in listed if re.match(pattern, p.model) and unit in (None, unit_name(p.unit))]
        if of_kind:
            made.append(Kind(name, called, search, len(of_kind), tuple(_ranges(of_kind))))
    return made


def page(prices: Iterable[Price], query: str, number: int) -> Page:
    """A page of the models whose name or unit has every word of the query; the nearest page where there is none."""
    query = " ".join(query[:QUERY_CHARS_MAX].split())
    words = query.lower().split()
    found = [p for p in prices if all(word in f"{p.model} {p.unit}".lower() for word in words)]
    pages = max(1, -(-len(found) // PAGE_ROWS))
    number = min(max(number, 1), pages)
    rows = found[(number - 1) * PAGE_ROWS : number * PAGE_ROWS]
    return Page(query, tuple(_row(price) for price in rows), len(found), number, pages)


def unit_name(unit: str) -> str:
    """One of a unit: `megapixels` are sold by the megapixel, `1000 tokens` by the 1000 tokens."""
    return unit if unit[:1].isdigit() else unit.removesuffix("s")


def _row(price: Price) -> Row:
    usd = price.unit_price_usd
    return Row(price.model, unit_name(price.unit), decimal_text(usd), _credits(usd))


def _ranges(prices: list[Price]) -> Iterator[Range]:
    by_unit: dict[str, list[Decimal]] = {}
    for price in prices:
        by_unit.setdefault(unit_name(price.unit), []).append(price.unit_price_usd)
    common = sorted(by_unit.items(), key=lambda item: (-len(item[1]), item[0]))
    for unit, amounts in common[:RANGES_MAX]:
        low, high = min(amounts), max(amounts)
        yield Range(
            unit, _span(f"${decimal_text(low)}", f"${decimal_text(high)}"), _span(_credits(low), _credits(high))
        )


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low} \N{EN DASH} {high}"


def _credits(usd: Decimal) -> str:
    return decimal_text(EXACT.multiply(usd, Decimal(1000)))
