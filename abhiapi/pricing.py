"""What a call may cost and what it did cost: the catalogue, `ceiling` and `charge`.

Pure: values in, values out; no clock, database or network. Prices are Decimals in USD per unit, made from strings.
fal's billable units are price-normalised (fal-protocol 8.2): units x unit price is the cost whatever the unit is
called, so our unit price is fal's times one plus the margin, and the unit's name is only ever shown. The formulas
in `estimates` serve for holds, and for charges only where fal sent no usable units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from decimal import Decimal, localcontext
from functools import lru_cache

from abhiapi.errors import BadAmount, UnpricedModel
from abhiapi.estimates import (
    IMAGE_SIZES,
    KINDS,
    Estimate,
    Json,
    Kind,
    Rate,
    decimal_text,
    units_ceiling,
    units_from_answer,
)
from abhiapi.money import EXACT, MICROS_MAX, Micros, credits_text, product_micros
from abhiapi.price_file import load_rules, shipped_rules
from abhiapi.price_terms import (
    MODEL_ID,
    NO_COSTS,
    PATTERN,
    Ceiling,
    Costs,
    FalPrice,
    OwnPrice,
    Price,
    PriceRule,
    parse_price,
    shown,
)

__all__ = [
    "IMAGE_SIZES",
    "KINDS",
    "MODEL_ID",
    "NO_COSTS",
    "PATTERN",
    "Catalogue",
    "Ceiling",
    "Costs",
    "Estimate",
    "FalPrice",
    "Json",
    "Kind",
    "OwnPrice",
    "Price",
    "PriceRule",
    "Rate",
    "ceiling",
    "charge",
    "decimal_text",
    "load_rules",
    "parse_price",
    "plain",
    "shipped_rules",
    "shown",
    "units_from_answer",
]

COSTS_ENOUGH = 100  # charged calls of a model after which their 99th percentile takes the place of a guess
DEFAULT_HOLD_MICROS = Micros(100_000)
# fal's price of a unit and the one a formula was written for may differ this much and still mean the same unit: a
# promotion is a quarter, a price for a thousand instead of one is a thousandth.
SAME_SCALE_TIMES = 5
_RAISE_FULL_PERCENT = 100


class Catalogue:
    """Every model that can be called, with its effective price. Immutable; a change makes a new one.

    The shipped rules, over them what fal's own API said (`synced`), over that the operator's prices: a model's own
    before those of a pattern, a longer pattern before a shorter. An own margin over a price of fal's that is not
    known (any more) prices nothing: that model is left out, and named in ``unpriceable``, while all others go on
    being served. A pattern prices only models that are known.
    """

    def __init__(
        self,
        rules: Iterable[PriceRule],
        own: Iterable[OwnPrice],
        margin: Decimal,
        *,
        synced: Iterable[FalPrice] = (),
        costs: Mapping[str, Costs] | None = None,
        default_hold_micros: Micros = DEFAULT_HOLD_MICROS,
    ) -> None:
        by_model = {rule.model: rule for rule in rules}
        for word in synced:
            rule = _overlaid(by_model.get(word.model), word, default_hold_micros)
            if rule is not None:
                by_model[word.model] = rule
        exact, patterns = _by_name(own)
        prices: dict[str, Price] = {}
        unpriceable = []
        for model in by_model.keys() | exact.keys():
            rule = by_model.get(model)
            mine = exact.get(model) or _first_match(patterns, model)
            if mine is None:
                price = None if rule is None else _mirrored(rule, margin)
            else:
                price = _overridden(rule, replace(mine, model=model), margin)
            if price is None:
                unpriceable.append(model)
            elif costs and model in costs:
                prices[model] = replace(price, costs=costs[model])
            else:
                prices[model] = price
        self._prices = prices
        self.unpriceable = tuple(sorted(unpriceable))

    def price_of(self, model: str) -> Price:
        """The price of a model (a full endpoint id). Raises `UnpricedModel`: an unknown price is never free."""
        price = self._prices.get(model)
        if price is None:
            raise UnpricedModel(
                f"{shown(model)!r} has no price here, so it is not forwarded. "
                "Check the model's path; GET /v1/prices lists every model served."
            )
        return price

    def __iter__(self) -> Iterator[Price]:
        return iter(sorted(self._prices.values(), key=lambda price: price.model))

    def __len__(self) -> int:
        return len(self._prices)

    def __contains__(self, model: str) -> bool:
        return model in self._prices


def ceiling(price: Price, call_input: Json) -> Ceiling:
    """The most this call should cost: what to hold before fal hears of it. Never raises for bad input.

    The operator's fixed hold; else the model's own formula, raised where a charge passed one lately; else, where the
    parameters do not tell, what 99 of 100 calls of the model cost here; else a guess. Parameters that fal would
    refuse are taken at their dearest; sizes and counts are clamped, so that an absurd ``num_images`` asks for an
    absurd hold (and gets 402), never for a negative or wrapped one.
    """
    costs, fixed = price.costs, price.hold_micros
    if fixed is not None and not price.hold_is_guess:
        return Ceiling(fixed, f"fixed hold of {credits_text(fixed)} credits for this model")
    units, words = units_ceiling(price.estimate, call_input)
    try:
        amount = product_micros(units, price.unit_price_usd)
    except BadAmount:
        amount = MICROS_MAX
    if fixed is not None:
        amount = max(fixed, amount) if price.estimate.is_guess else fixed
        words = f"{credits_text(amount)} credits, a guess until {COSTS_ENOUGH} calls of this model have been charged"
        return _guessed(Ceiling(amount, words), costs)
    basis = f"{words} = {decimal_text(units)} x {decimal_text(price.unit_price_usd)} USD ({price.unit})"
    if price.estimate.is_guess:
        return _guessed(Ceiling(amount, basis), costs)
    if costs.raised_percent > _RAISE_FULL_PERCENT and amount < MICROS_MAX:
        amount = Micros(min(MICROS_MAX, -(-amount * costs.raised_percent // 100)))
        basis += f", raised to {costs.raised_percent} % since calls cost more lately"
    if price.estimate.kind in ("none", "output_megapixels") and costs.p99_micros > amount:
        return Ceiling(costs.p99_micros, _p99_words(costs))
    return Ceiling(amount, basis)


def charge(price: Price, units: Decimal) -> Micros:
    """What ``units`` cost the customer: units x unit price, rounded up to a whole micro. Raises `BadAmount`."""
    if units.is_nan() or units < 0:
        raise BadAmount("units are no number of zero or more")
    return product_micros(units, price.unit_price_usd)


def replayed_usd(fal_cost_nano_usd: int, margin: Decimal) -> Decimal:
    """What usage of this cost at fal would have been sold for under a margin, exactly."""
    with localcontext(EXACT):
        return Decimal(fal_cost_nano_usd).scaleb(-9) * (1 + margin)


def plain(value: Decimal) -> Decimal:
    """The same number without an exponent or trailing zeros, as people read it."""
    return Decimal(decimal_text(value))


def _guessed(guess: Ceiling, costs: Costs) -> Ceiling:
    """A hold that no parameter tells: what calls really cost as soon as enough have been seen."""
    if costs.calls >= COSTS_ENOUGH:
        return Ceiling(costs.p99_micros, _p99_words(costs))
    if costs.largest_micros > guess.amount_micros:
        calls = f"{costs.calls} call{'' if costs.calls == 1 else 's'}"
        words = f"the dearest of {calls} of this model: up to {credits_text(costs.largest_micros)} credits"
        return Ceiling(costs.largest_micros, words)
    return guess


def _p99_words(costs: Costs) -> str:
    amount = credits_text(costs.p99_micros)
    return f"99 of 100 calls of this model cost up to {amount} credits ({costs.calls} calls seen)"


def _by_name(own: Iterable[OwnPrice]) -> tuple[dict[str, OwnPrice], list[OwnPrice]]:
    """Own prices of single models, and those of patterns, the most specific first."""
    exact, patterns = {}, []
    for mine in own:
        if mine.model.endswith("*"):
            patterns.append(mine)
        else:
            exact[mine.model] = mine
    return exact, sorted(patterns, key=lambda mine: len(mine.model), reverse=True)


def _first_match(patterns: Iterable[OwnPrice], model: str) -> OwnPrice | None:
    return next((mine for mine in patterns if model.startswith(mine.model[:-1])), None)


def _overlaid(rule: PriceRule | None, word: FalPrice, default_hold_micros: Micros) -> PriceRule | None:
    """A rule with fal's own price in it: the API wins. None where neither knows a price.

    The formula stays while fal's unit is worth about what the rule's was. Where it is not, the formula counts other
    units than fal does: it is scaled so that a hold is no smaller than before, and computes no charge any more.
    """
    price = word.usable_usd
    if price is None:
        return rule
    if rule is None:
        estimate = estimate_by_unit(word.unit)
        hold = default_hold_micros if estimate is None else None
        unknown = estimate or _TWO_UNITS
        return PriceRule(word.model, word.unit, price, word.source, word.updated_at, unknown, hold)
    before, estimate = rule.fal_unit_price_usd, rule.estimate
    if not price <= before * SAME_SCALE_TIMES or not before <= price * SAME_SCALE_TIMES:
        estimate = replace(estimate, is_guess=True)
        if 0 < price < before:
            estimate = _scaled(estimate, before, price)
    return replace(
        rule,
        unit=word.unit,
        fal_unit_price_usd=price,
        source=word.source,
        seen=word.updated_at,
        estimate=estimate,
    )


def _scaled(estimate: Estimate, before: Decimal, now: Decimal) -> Estimate:
    with localcontext(EXACT):
        times = before / now
        rates = tuple(Rate(rate.units * times, rate.when) for rate in estimate.rates)
        return replace(estimate, rates=rates, surcharge=estimate.surcharge * times)


def _with_margin(fal_price: Decimal, margin: Decimal) -> Decimal:
    return EXACT.multiply(fal_price, EXACT.add(1, margin))


def _mirrored(rule: PriceRule, margin: Decimal) -> Price:
    return Price(
        model=rule.model,
        unit=rule.unit,
        unit_price_usd=_with_margin(rule.fal_unit_price_usd, margin),
        fal_unit_price_usd=rule.fal_unit_price_usd,
        margin=margin,
        hold_micros=rule.hold_micros,
        source=rule.source,
        updated_at=rule.seen,
        estimate=rule.estimate,
        hold_is_guess=rule.hold_micros is not None,
    )


def _overridden(rule: PriceRule | None, mine: OwnPrice, margin: Decimal) -> Price | None:
    """The operator's word over fal's: what it leaves open comes from the rule. None for a margin over nothing."""
    fal_price = rule.fal_unit_price_usd if rule else None
    own_margin = mine.margin
    if mine.unit_price_usd is not None:
        unit_price = mine.unit_price_usd
    elif fal_price is None:
        return None
    else:
        own_margin = margin if mine.margin is None else mine.margin
        unit_price = _with_margin(fal_price, own_margin)
    unit = mine.unit or (rule.unit if rule else "units")
    hold = mine.hold_micros if mine.hold_micros is not None else (rule.hold_micros if rule else None)
    return Price(
        model=mine.model,
        unit=unit,
        unit_price_usd=unit_price,
        fal_unit_price_usd=fal_price,
        margin=own_margin,
        hold_micros=hold,
        source="operator",
        updated_at=mine.updated_at,
        estimate=rule.estimate if rule else (estimate_by_unit(unit) or _FOUR_UNITS),
        hold_is_guess=mine.hold_micros is None and hold is not None,
    )


_TWO_UNITS = Estimate(kind="none", maximum=Decimal(2), is_guess=True)  # where that is more than the default hold
_FOUR_UNITS = Estimate(kind="none", maximum=Decimal(4), is_guess=True)


@lru_cache(maxsize=1024)
def estimate_by_unit(unit: str) -> Estimate | None:
    """A hold for a model of which only the unit's name is known; None where the name says nothing.

    Never used to compute a charge: fal's units are price-normalised, and the name is free text (fal-protocol 8.3).
    """
    name = unit.lower().strip()
    match name.removesuffix("s"):
        case "megapixel":
            return Estimate(kind="none", maximum=Decimal(4), is_guess=True)
        case "second":
            return Estimate(kind="none", maximum=Decimal(15), is_guess=True)
        case "compute second":
            return Estimate(kind="none", maximum=Decimal(60), is_guess=True)
        case "image":  # the dearest resolution of those that are known costs twice the plain one
            return Estimate(kind="none", maximum=Decimal(2), is_guess=True)
        case "1000 character":
            return Estimate(kind="characters", maximum=Decimal(5), is_guess=True)
        case _:
            return None
