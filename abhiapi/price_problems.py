"""Prices that need the operator: sold below cost, placeholders, holds that were too small, models without a price."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from abhiapi import costs, fal_prices, ids
from abhiapi.db import Tx
from abhiapi.money import credits_text
from abhiapi.price_terms import Price
from abhiapi.pricing import Catalogue, decimal_text

KINDS = ("below cost", "hold too small", "placeholder", "without a price")


@dataclass(frozen=True, slots=True)
class Problem:
    problem: str  # one of KINDS
    model: str
    price: Price | None
    what: str


def found(tx: Tx, catalogue: Catalogue) -> list[Problem]:
    """One row for each thing that needs the operator, the costliest kind first."""
    words = {word.model: word for word in fal_prices.newest(tx)}
    rows: list[Problem] = []
    for price in catalogue:
        fal_price = price.fal_unit_price_usd
        if fal_price is not None and price.unit_price_usd < fal_price:
            rows.append(Problem("below cost", price.model, price, "each unit is sold for less than fal takes"))
        if price.source != "operator" and "placeholder" in price.source:
            rows.append(Problem("placeholder", price.model, price, f"sold at a made-up price ({price.source})"))
    for model, call_id, held, charged in costs.over_hold(tx):
        if model in catalogue:
            what = f"{ids.call_text(call_id)} held {credits_text(held)} credits and cost {credits_text(charged)}"
            rows.append(Problem("hold too small", model, catalogue.price_of(model), what))
    for model, word in words.items():
        if word.standing == "placeholder" and model not in catalogue:
            what = f"fal says {_quoted(word.unit_price_usd)} per {word.unit}, which is no price: not sold"
            rows.append(Problem("placeholder", model, None, what))
        elif model not in catalogue and word.standing != "gone":
            rows.append(Problem("without a price", model, None, "fal lists it and names no usable price"))
    for model in catalogue.unpriceable:
        rows.append(Problem("without a price", model, None, "your margin has no price of fal's to stand on"))
    return sorted(rows, key=lambda row: (KINDS.index(row.problem), row.model))


def _quoted(price: Decimal | None) -> str:
    return "nothing" if price is None else f"{decimal_text(price)} USD"
