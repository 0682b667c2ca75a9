"""Prices as rows: the operator's own prices, and every price that a call was ever admitted under.

What a price *is* lives in `pricing`; this module only reads and writes. Both tables are appended to, never changed.
"""

from __future__ import annotations

from decimal import Decimal

from sqlalchemy import bindparam, func, insert, select

from abhiapi import tables
from abhiapi.db import Tx
from abhiapi.errors import BadRequest
from abhiapi.ids import time_text
from abhiapi.money import Micros
from abhiapi.pricing import MODEL_ID, OwnPrice, Price, decimal_text

_o = tables.own_prices.c
_v = tables.price_versions.c
_NEWEST = select(func.max(_o.own_price_id)).group_by(_o.model)
_OWN = (
    select(_o.own_price_id, _o.model, _o.unit, _o.unit_price_usd, _o.margin, _o.hold_micros, _o.created_at)
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


def own_prices(tx: Tx) -> tuple[int, list[OwnPrice]]:
    """The operator's own prices, one a model, and the number of the newest (0: there are none)."""
    newest, prices = 0, []
    for own_price_id, model, unit, unit_price, margin, hold, created_at in tx.all(_OWN):
        newest = max(newest, own_price_id)
        prices.append(
            OwnPrice(
                model=model,
                unit=unit,
                unit_price_usd=None if unit_price is None else Decimal(unit_price),
                margin=None if margin is None else Decimal(margin),
                hold_micros=hold,
                updated_at=time_text(created_at) or "",
            )
        )
    return newest, prices


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
    tx.run(
        _SET,
        model=model,
        unit=unit,
        unit_price_usd=None if unit_price_usd is None else decimal_text(unit_price_usd),
        margin=None if margin is None else decimal_text(margin),
        hold_micros=hold_micros,
        created_at=now_ms,
    )


def check_model(text: str) -> str:
    """The model that an operator's text names. Raises `BadRequest` for what no call could ever name."""
    model = text.strip("/")
    if model.endswith("/stream"):
        model = model.removesuffix("/stream")
        raise BadRequest(f"the price of a model covers its /stream: set it for {model}")
    if not MODEL_ID.fullmatch(model) or {".", ".."} & set(model.split("/")):
        raise BadRequest(f"{text!r} is no model: write its path at fal.run, such as fal-ai/flux/dev")
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
