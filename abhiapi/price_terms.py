"""The words that prices are made of: rules, fal's word, the operator's, what calls really cost, and the price itself.

Pure values. What follows from them is in `pricing`; the file they ship in is read by `price_file`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from abhiapi.estimates import Estimate, decimal_text
from abhiapi.money import Micros

# A price may not be larger than this: the product with any plausible units still fits the ledger.
UNIT_PRICE_MAX = Decimal(100_000)
_NOTHING = Micros(0)

_PRICE = re.compile(r"[0-9]{1,6}(\.[0-9]{1,12})?")
# Names are stored with every roll-up of theirs; fal's longest model ids have some 90 characters.
MODEL_LENGTH_MAX, UNIT_LENGTH_MAX = 200, 60
MODEL_ID = re.compile(rf"(?=.{{1,{MODEL_LENGTH_MAX}}}\Z)[\w.-]+(/[\w.-]+)+", re.ASCII)
PATTERN = re.compile(rf"(?=.{{1,{MODEL_LENGTH_MAX}}}\Z)([\w.-]+/)*\*", re.ASCII)

# priced: a price to sell by; placeholder: a number that is no price; unpriced: fal lists the model and names no usable
# price; gone: fal does not list the model any more, the price is the last there was.
Standing = Literal["priced", "placeholder", "unpriced", "gone"]


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
class FalPrice:
    """fal's own word on a model, from its pricing API. ``unit_price_usd`` is None where it named no usable one."""

    model: str
    unit: str
    unit_price_usd: Decimal | None
    standing: Standing
    source: str
    updated_at: str

    @property
    def usable_usd(self) -> Decimal | None:
        """The price to sell by: a placeholder is none, and a model that is gone keeps its last."""
        return self.unit_price_usd if self.standing in ("priced", "gone") else None


@dataclass(frozen=True, slots=True)
class Costs:
    """What calls of a model were really charged here: how many, 99 of 100 of them at most, and the dearest.

    raised_percent: what its formula's holds are multiplied by, since a charge passed one lately.
    """

    calls: int = 0
    p99_micros: Micros = _NOTHING
    largest_micros: Micros = _NOTHING
    raised_percent: int = 100


NO_COSTS = Costs()


@dataclass(frozen=True, slots=True)
class OwnPrice:
    """The operator's own price of a model, or of all that a pattern such as ``fal-ai/veo3/*`` names.

    An absolute unit price, or a margin over fal's; optionally a fixed hold.
    """

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
    hold_is_guess: bool = False  # the fixed hold is nobody's word: what calls really cost takes its place
    costs: Costs = NO_COSTS

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


def parse_price(text: str) -> Decimal:
    """USD per unit or a margin from text. Raises ValueError for what is negative, not plain, or absurd."""
    if not _PRICE.fullmatch(text):
        raise ValueError(f"{shown(text)!r} is not a plain non-negative decimal")
    value = Decimal(text)
    if value > UNIT_PRICE_MAX:
        raise ValueError(f"{text} is larger than {UNIT_PRICE_MAX} USD")
    return value


def shown(text: str) -> str:
    """Text from outside, short enough for a message, and all of it to be seen."""
    text = text if len(text) <= 120 else text[:117] + "..."
    return text if text.isprintable() else "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
