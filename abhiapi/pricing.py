"""What a call may cost and what it did cost: price rules, the catalogue, `ceiling` and `charge`.

Pure: values in, values out; no clock, database or network. Prices are Decimals in USD per unit, made from strings.
fal's billable units are price-normalised (fal-protocol 8.2): units x unit price is the cost whatever the unit is
called, so our unit price is fal's times one plus the margin, and the unit's name is only ever shown. The formulas
in `estimates` serve for holds, and for charges only where fal sent no usable units.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal, localcontext
from importlib import resources
from typing import Any, TypeVar

from abhiapi.errors import BadAmount, PriceFileError, UnpricedModel
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
from abhiapi.money import EXACT, MICROS_MAX, Micros, credits_text, parse_amount, product_micros

__all__ = [
    "IMAGE_SIZES",
    "KINDS",
    "MODEL_ID",
    "Catalogue",
    "Ceiling",
    "Estimate",
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
    "shipped_rules",
    "shown",
    "units_from_answer",
]

# A price may not be larger than this: the product with any plausible units still fits the ledger.
UNIT_PRICE_MAX = Decimal(100_000)

_PRICE = re.compile(r"[0-9]{1,6}(\.[0-9]{1,12})?")
MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)+", re.ASCII)
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_TOML_NAMES: Mapping[type, str] = {str: "text", list: "list", dict: "table"}

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class PriceRule:
    """fal's price of one model as last seen: USD per unit, where it was read and when."""

    model: str
    unit: str
    fal_unit_price_usd: Decimal
    source: str
    seen: str
    estimate: Estimate
    hold_micros: Micros | None = None


@dataclass(frozen=True, slots=True)
class OwnPrice:
    """The operator's own price of a model: an absolute unit price, or a margin over fal's; optionally a fixed hold."""

    model: str
    unit: str | None
    unit_price_usd: Decimal | None
    margin: Decimal | None
    hold_micros: Micros | None
    updated_at: str


@dataclass(frozen=True, slots=True)
class Price:
    """The price a call is admitted under. ``unit_price_usd`` is what the customer pays per unit."""

    model: str
    unit: str
    unit_price_usd: Decimal
    fal_unit_price_usd: Decimal | None
    margin: Decimal | None
    hold_micros: Micros | None
    source: str
    updated_at: str
    estimate: Estimate

    def identity(self) -> tuple[str, str, str, str, str]:
        """What a recorded price version is told apart by (texts, so that 0.10 and 0.1 stay what they were)."""
        return (
            self.model,
            self.unit,
            decimal_text(self.unit_price_usd),
            "" if self.fal_unit_price_usd is None else decimal_text(self.fal_unit_price_usd),
            self.source,
        )


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What to hold before a call, and in words how that figure came about."""

    amount_micros: Micros
    basis: str


class Catalogue:
    """Every model that can be called, with its effective price. Immutable; a change makes a new one.

    An own margin over a price of fal's that is not known (any more) prices nothing: that model is left out, and
    named in ``unpriceable``, while all others go on being served.
    """

    def __init__(self, rules: Iterable[PriceRule], own: Iterable[OwnPrice], margin: Decimal) -> None:
        by_model = {rule.model: rule for rule in rules}
        prices = {model: _mirrored(rule, margin) for model, rule in by_model.items()}
        unpriceable = []
        for mine in own:
            price = _overridden(by_model.get(mine.model), mine, margin)
            if price is None:
                unpriceable.append(mine.model)
            else:
                prices[mine.model] = price
        self._prices = prices
        self.unpriceable = tuple(unpriceable)

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

    Parameters that fal would refuse are taken at their dearest; sizes and counts are clamped, so that an absurd
    ``num_images`` asks for an absurd hold (and gets 402), never for a negative or wrapped one.
    """
    if price.hold_micros is not None:
        return Ceiling(price.hold_micros, f"fixed hold of {credits_text(price.hold_micros)} credits for this model")
    units, words = units_ceiling(price.estimate, call_input)
    try:
        amount = product_micros(units, price.unit_price_usd)
    except BadAmount:
        amount = MICROS_MAX
    return Ceiling(amount, f"{words} = {decimal_text(units)} x {decimal_text(price.unit_price_usd)} USD ({price.unit})")


def charge(price: Price, units: Decimal) -> Micros:
    """What ``units`` cost the customer: units x unit price, rounded up to a whole micro. Raises `BadAmount`."""
    if units.is_nan() or units < 0:
        raise BadAmount("units are no number of zero or more")
    return product_micros(units, price.unit_price_usd)


def load_rules(text: str) -> tuple[PriceRule, ...]:
    """Price rules of a catalogue file (TOML; see prices.toml). Raises `PriceFileError` naming every problem."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PriceFileError(f"the price file is not TOML: {error}") from error
    problems: list[str] = []
    whole = _Table("the file", document, problems)
    rules: dict[str, PriceRule] = {}
    for row in whole.tables("model"):
        for rule in _parse_rules(row):
            if rule.model in rules:
                problems.append(f"{rule.model}: listed twice")
            rules[rule.model] = rule
    whole.close()
    if problems or not rules:
        raise PriceFileError("bad price file: " + ("; ".join(problems) or "it lists no model"))
    return tuple(rules.values())


def shipped_rules() -> tuple[PriceRule, ...]:
    """The catalogue that comes with this version of the program."""
    return load_rules(resources.files("abhiapi").joinpath("prices.toml").read_text("utf-8"))


def parse_price(text: str) -> Decimal:
    """USD per unit or a margin from text. Raises ValueError for what is negative, not plain, or absurd."""
    if not _PRICE.fullmatch(text):
        raise ValueError(f"{shown(text)!r} is not a plain non-negative decimal")
    value = Decimal(text)
    if value > UNIT_PRICE_MAX:
        raise ValueError(f"{text} is larger than {UNIT_PRICE_MAX} USD")
    return value


def shown(text: str) -> str:
    """Text from outside, short enough for a message."""
    return text if len(text) <= 120 else text[:117] + "..."


def _mirrored(rule: PriceRule, margin: Decimal) -> Price:
    with localcontext(EXACT):
        unit_price = rule.fal_unit_price_usd * (1 + margin)
    return Price(
        model=rule.model,
        unit=rule.unit,
        unit_price_usd=unit_price,
        fal_unit_price_usd=rule.fal_unit_price_usd,
        margin=margin,
        hold_micros=rule.hold_micros,
        source=rule.source,
        updated_at=rule.seen,
        estimate=rule.estimate,
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
        with localcontext(EXACT):
            unit_price = fal_price * (1 + own_margin)
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
        estimate=rule.estimate if rule else _estimate_by_unit(unit),
    )


def _estimate_by_unit(unit: str) -> Estimate:
    """A hold for a model of which only the unit's name is known. Never used to compute a charge: see `kind`."""
    maxima = {"megapixels": Decimal(4), "seconds": Decimal(15), "compute seconds": Decimal(60)}
    return Estimate(kind="none", maximum=maxima.get(unit, Decimal(4)))


class _Table:
    """A table of a price file, read field by field. Problems are gathered, not raised, so that all are told."""

    def __init__(self, name: str, content: Mapping[str, Any], problems: list[str]) -> None:
        self.name = name
        self._left = dict(content)
        self.problems = problems

    def problem(self, text: str) -> None:
        self.problems.append(f"{self.name}: {text}")

    def has(self, field: str) -> bool:
        return field in self._left

    def take(self, field: str, kind: type[_T], otherwise: _T) -> _T:
        """The field's value; ``otherwise`` where it is missing or, with a problem noted, of another type."""
        value = self._left.pop(field, otherwise)
        if isinstance(value, kind):
            return value
        self.problem(f"{field} is no {_TOML_NAMES[kind]}")
        return otherwise

    def text(self, field: str) -> str:
        found = self.has(field)
        value = self.take(field, str, "")
        if not found:
            self.problem(f"{field} is missing")
        return value

    def price(self, field: str, otherwise: str) -> Decimal:
        """A plain decimal; zero, with a problem noted, where it is none."""
        try:
            return parse_price(self.take(field, str, otherwise))
        except ValueError as error:
            self.problem(f"{field}: {error}")
            return Decimal(0)

    def scalars(self, field: str) -> Mapping[str, str | bool]:
        """A table of parameters: texts and booleans, numbers written as texts."""
        values = self.take(field, dict, {})
        for name, value in values.items():
            if not isinstance(value, str | bool):
                self.problem(f"{field}.{name} is neither a text nor a boolean")
        return values

    def tables(self, field: str) -> list[_Table]:
        rows = self.take(field, list, [])
        if not all(isinstance(row, dict) for row in rows):
            self.problem(f"{field} is no list of tables")
            return []
        return [_Table(f"{self.name}, {field} {number}", row, self.problems) for number, row in enumerate(rows, 1)]

    def close(self) -> None:
        """To be called last: what nobody took is a typing error."""
        for field in self._left:
            self.problem(f"unknown field {field}")


def _parse_rules(row: _Table) -> list[PriceRule]:
    """One rule for each of the models that an entry names."""
    models = [row.text("id")] if row.has("id") or not row.has("ids") else row.take("ids", list, [])
    row.name = str(models[0]) if models else row.name
    for model in models:
        if not (isinstance(model, str) and MODEL_ID.fullmatch(model)):
            row.problem(f"{shown(str(model))!r} is no model id")
    unit, source, seen = row.text("unit"), row.text("source"), row.text("seen")
    try:
        date.fromisoformat(seen)
    except ValueError:
        row.problem(f"seen {seen!r} is no date such as 2026-09-05")
    unit_price = row.price("unit_price_usd", "")
    hold = _parse_hold(row)
    estimate = _parse_estimate(row, needs_maximum=hold is None)
    row.close()
    return [PriceRule(str(model), unit, unit_price, source, seen, estimate, hold) for model in models]


def _parse_hold(row: _Table) -> Micros | None:
    if not row.has("hold_credits"):
        return None
    try:
        return parse_amount(row.take("hold_credits", str, ""))
    except BadAmount as error:
        row.problem(f"hold_credits: {error}")
        return None


def _parse_estimate(row: _Table, *, needs_maximum: bool) -> Estimate:
    table = _Table(row.name + ", estimate", row.take("estimate", dict, {}), row.problems)
    kind = table.text("kind")
    if kind not in KINDS:
        table.problem(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if needs_maximum and kind not in ("images", "fixed") and not table.has("maximum"):
        table.problem(f"kind {kind} needs a maximum")  # else an `auto` would hold for one second or megapixel
    if kind == "tokens" and not table.has("size_by_resolution"):
        table.problem("kind tokens needs size_by_resolution")
    estimate = Estimate(
        kind=kind,  # type: ignore[arg-type]  # one of KINDS, or a problem was noted and nothing is returned
        rates=tuple(_parse_rate(rate) for rate in table.tables("rates")) or (Rate(Decimal(1)),),
        defaults=table.scalars("defaults"),
        maximum=table.price("maximum", "1"),
        count_param=table.take("count_param", str, "num_images"),
        size_by_resolution=_parse_sizes(table),
        batch_param=table.take("batch_param", str, "") or None,
        text_param=table.take("text_param", str, "text"),
        surcharge=table.price("surcharge", "0"),
        open_params=tuple(map(str, table.take("open_params", list, []))),
    )
    table.close()
    return estimate


def _parse_rate(table: _Table) -> Rate:
    rate = Rate(table.price("units", ""), table.scalars("when"))
    table.close()
    return rate


def _parse_sizes(table: _Table) -> Mapping[str, int]:
    """Pixels of a frame by resolution, from texts such as ``1280x720``."""
    sizes = {}
    for resolution, text in table.scalars("size_by_resolution").items():
        match = _SIZE.fullmatch(str(text))
        if match is None:
            table.problem(f"size_by_resolution.{resolution} is no size such as 1280x720")
        else:
            sizes[resolution.lower()] = int(match[1]) * int(match[2])
    return sizes
