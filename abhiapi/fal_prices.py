"""fal's own prices as rows: what its API said of a model, appended where it changed, so that each can be explained."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from functools import cache

from sqlalchemy import bindparam, func, insert, select

from abhiapi import tables
from abhiapi.db import Tx
from abhiapi.estimates import decimal_text
from abhiapi.ids import time_text
from abhiapi.price_terms import FalPrice

_f = tables.fal_prices.c
_NEWEST = (
    select(_f.model, _f.unit, _f.unit_price_usd, _f.standing, _f.source, _f.seen_at)
    .where(_f.fal_price_id.in_(select(func.max(_f.fal_price_id)).group_by(_f.model)))
    .order_by(_f.model)
)
_APPEND = insert(tables.fal_prices).values(
    {name: bindparam(name) for name in "model unit unit_price_usd standing source seen_at".split()}
)


def newest(tx: Tx) -> list[FalPrice]:
    """The last word on each model."""
    told = cache(time_text)  # most words were said in one answer
    return [
        FalPrice(model, unit, None if price is None else Decimal(price), standing, source, told(seen_at) or "")
        for model, unit, price, standing, source, seen_at in tx.all(_NEWEST)
    ]


def append(tx: Tx, words: Iterable[FalPrice], *, now_ms: int) -> None:
    for word in words:
        price = word.unit_price_usd
        tx.run(
            _APPEND,
            model=word.model,
            unit=word.unit,
            unit_price_usd=None if price is None else decimal_text(price),
            standing=word.standing,
            source=word.source,
            seen_at=now_ms,
        )
