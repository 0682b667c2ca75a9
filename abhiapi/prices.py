"""Prices as rows: the operator's own, every price that a call was ever admitted under, and the catalogue of the moment.

What a price *is* lives in `pricing`; this module only reads and writes. All tables are appended to, never changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal

from sqlalchemy import bindparam, func, insert, select

from abhiapi import costs, fal_prices, tables
from abhiapi.db import Tx
from abhiapi.errors import BadRequest
from abhiapi.ids import time_text
from abhiapi.money import Micros
from abhiapi.pricing import MODEL_ID, PATTERN, Catalogue, OwnPrice, Price, PriceRule, decimal_text
from abhiapi.settings import Settings

# The newest rows of all that a catalogue is made of: (own price, fal's price, raised hold).
Version = tuple[int, int, int]

_o = tables.own_prices.c
_v = tables.price_versions.c
NEWEST_ROWS = (
    select(func.max(_o.own_price_id)).scalar_subquery(),
    select(func.max(tables.fal_prices.c.fal_price_id)).scalar_subquery(),
    select(func.max(tables.hold_raises.c.raise_id)).scalar_subquery(),
)
_CURRENT = select(*NEWEST_ROWS)
_NEWEST = select(func.max(_o.own_price_id)).group_by(_o.model)
_OWN = (
    select(_o.model, _o.unit, _o.unit_price_usd, _o.margin, _o.hold_micros, _o.created_at)
    .where(_o.own_price_id.in_(_NEWEST))
    .order_by(_o.model)
)
_SET = insert(tables.own_prices).values(
    {name: bindparam(name) for name in ["model", "unit", "unit_price_usd", "margin", "hold_micros", "created_at"]}
)
_VERSION = select(_v.price_id).where(
    _v.model == bindparam("of_model"),
    _v.unit == bindparam("in_unit"),
    _v.unit_price_usd == bindparam("price"),
    _v.fal_unit_price_usd == bindparam("fal_price"),
    _v.source == bindparam("from_source"),
)
_RECORD = insert(tables.price_versions).values(
    {name: bindparam(name) for name in "model unit unit_price_usd fal_unit_price_usd source first_used_at".split()}
)


def version(tx: Tx) -> Version:
    """Tells whether a catalogue is up to date."""
    return version_from(tx.one(_CURRENT) or ())


def version_from(row: Iterable[int | None]) -> Version:
    own, fal, raised = (number or 0 for number in row)
    return own, fal, raised


def catalogue(tx: Tx, rules: Iterable[PriceRule], settings: Settings, *, now_ms: int) -> Catalogue:
    """The prices in force: what ships with the program, fal's own word over it, the operator's over both."""
    return Catalogue(
        rules,
        own_prices(tx),
        settings.margin,
        synced=fal_prices.newest(tx),
        costs=costs.of_models(tx, now_ms=now_ms) if settings.learn_holds else None,
        default_hold_micros=settings.default_hold_micros,
    )


def own_prices(tx: Tx) -> list[OwnPrice]:
    """The operator's own prices, one a model or pattern; those taken back are left out."""
    return [
        OwnPrice(
            model=model,
            unit=unit,
            unit_price_usd=None if unit_price is None else Decimal(unit_price),
            margin=None if margin is None else Decimal(margin),
            hold_micros=hold,
            updated_at=time_text(created_at) or "",
        )
        for model, unit, unit_price, margin, hold, created_at in tx.all(_OWN)
        if not (unit_price is None and margin is None and hold is None)
    ]


def set_own(
    tx: Tx,
    model: str,
    *,
    unit: str | None,
    unit_price_usd: Decimal | None,
    margin: Decimal | None,
    hold_micros: Micros | None,
    now_ms: int,
) -> None:
    """A new own price of a model or pattern. All of them None: the one before is taken back."""
    tx.run(
        _SET,
        model=model,
        unit=unit,
        unit_price_usd=None if unit_price_usd is None else decimal_text(unit_price_usd),
        margin=None if margin is None else decimal_text(margin),
        hold_micros=hold_micros,
        created_at=now_ms,
    )


def check_model(text: str, *, or_pattern: bool = False) -> str:
    """The model, or pattern, that an operator's text names. Raises `BadRequest` for what no call could ever name."""
    model = text.strip("/")
    if or_pattern and PATTERN.fullmatch(model) and not {".", ".."} & set(model.split("/")):
        return model
    if model.endswith("/stream"):
        model = model.removesuffix("/stream")
        raise BadRequest(f"the price of a model covers its /stream: set it for {model}")
    if not MODEL_ID.fullmatch(model) or {".", ".."} & set(model.split("/")):
        pattern = ", or a pattern such as fal-ai/kling-video/*" if or_pattern else ""
        raise BadRequest(f"{text!r} is no model: write its path at fal.run, such as fal-ai/flux/dev{pattern}")
    return model


def version_of(tx: Tx, price: Price, *, now_ms: int) -> int:
    """The number of a price as recorded; recorded now if no call was admitted under it before."""
    model, unit, unit_price, fal_price, source = price.identity()
    row = tx.one(_VERSION, of_model=model, in_unit=unit, price=unit_price, fal_price=fal_price, from_source=source)
    if row is not None:
        return int(row[0])
    return tx.insert(
        _RECORD,
        model=model,
        unit=unit,
        unit_price_usd=unit_price,
        fal_unit_price_usd=fal_price,
        source=source,
        first_used_at=now_ms,
    )
