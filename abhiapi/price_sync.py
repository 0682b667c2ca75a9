"""What an answer of fal's pricing API changes here. Pure: the prices known, fal's answer, and the rows to append.

A price that makes no sense is refused and the old one kept, model by model; an answer that makes little sense as a
whole (`BadPriceAnswer`) changes nothing at all. Nothing that fal answers makes a call free: a placeholder, a zero or
a missing price is no price to sell by (docs/decisions/0014).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from abhiapi.errors import BadPriceAnswer
from abhiapi.estimates import decimal_text
from abhiapi.price_terms import (
    MODEL_ID,
    MODEL_LENGTH_MAX,
    UNIT_LENGTH_MAX,
    UNIT_PRICE_MAX,
    FalPrice,
    PriceRule,
    Standing,
    shown,
)

TIMES_MAX = 100  # a price that rose to more than so many times the old one, or fell below a hundredth, needs a word
# fal's pages and API show such a price per second of a GPU for models that are really sold by the second of video or
# by the picture (fal-protocol 8.3). The least price per compute second that is known to be charged is 0.0008.
PLACEHOLDER_BELOW = Decimal("0.0005")
FRACTION_DIGITS_MAX = 20
NO_MODEL = "its name is no model's"


@dataclass(frozen=True, slots=True)
class Quote:
    """One entry of fal's answer, as it came."""

    model: str
    unit: str
    unit_price: Decimal
    currency: str


@dataclass(frozen=True, slots=True)
class Answer:
    """All that fal said: the models it lists, and what it said of their prices."""

    listed: Sequence[str]
    quotes: Mapping[str, Quote]


@dataclass(frozen=True, slots=True)
class Change:
    """One model in the summary; ``why`` where something was not taken over as it came."""

    model: str
    unit: str | None
    before_usd: Decimal | None
    after_usd: Decimal | None
    why: str | None = None


@dataclass(slots=True)
class Plan:
    """What follows from an answer. ``words`` are the rows to append, only for models of which something changed."""

    listed: int = 0
    priced: int = 0
    new: list[Change] = field(default_factory=list)
    changed: list[Change] = field(default_factory=list)
    gone: list[Change] = field(default_factory=list)
    refused: list[Change] = field(default_factory=list)
    placeholder: list[Change] = field(default_factory=list)
    unpriced: list[Change] = field(default_factory=list)
    words: list[FalPrice] = field(default_factory=list)


def plan(
    known: Iterable[FalPrice],
    rules: Iterable[PriceRule],
    answer: Answer,
    *,
    source: str,
    force: bool = False,
) -> Plan:
    """What to append and what to tell. Raises `BadPriceAnswer` where the answer as a whole is not to be trusted."""
    before = {word.model: word for word in known}
    shipped = {rule.model: rule.fal_unit_price_usd for rule in rules}
    made = Plan(listed=len(answer.listed))
    for model in sorted(answer.listed):
        _judge(made, before.get(model), shipped.get(model), model, answer.quotes.get(model), source, force)
    listed = frozenset(answer.listed)
    for model, word in sorted(before.items()):
        if model not in listed and word.standing != "gone":
            made.gone.append(Change(model, word.unit, word.usable_usd, None, "fal does not list it any more"))
            made.words.append(FalPrice(model, word.unit, word.usable_usd, "gone", source, ""))
    _refuse_partial(made, before, listed, answer)
    return made


def problem_of(quote: Quote) -> str | None:
    """Why a price cannot be used; None where it can."""
    price = quote.unit_price
    if quote.currency.upper() != "USD":
        return f"its price is in {shown(quote.currency)!r}, not in USD"
    if not price.is_finite():
        return "its price is no number"
    if price < 0:
        return f"its price is negative: {shown(str(price))}"
    if price > UNIT_PRICE_MAX:
        return f"its price is larger than {UNIT_PRICE_MAX} USD a unit"
    exponent = price.as_tuple().exponent
    if isinstance(exponent, int) and -exponent > FRACTION_DIGITS_MAX:
        return "its price has more digits than any price"
    if len(quote.unit) > UNIT_LENGTH_MAX:
        return f"its unit has more than {UNIT_LENGTH_MAX} characters"
    if not quote.unit.strip() or not quote.unit.isprintable():
        return "its unit is no name"
    return _name_problem(quote.model)


def _name_problem(model: str) -> str | None:
    if len(model) > MODEL_LENGTH_MAX:
        return f"its name has more than {MODEL_LENGTH_MAX} characters"
    return None if MODEL_ID.fullmatch(model) else NO_MODEL


def is_placeholder(unit: str, unit_price_usd: Decimal) -> bool:
    """Whether a price says nothing about what fal charges: nothing at all, or next to nothing by the compute second."""
    return unit_price_usd == 0 or ("compute" in unit.lower() and unit_price_usd < PLACEHOLDER_BELOW)


def is_jump(before_usd: Decimal, after_usd: Decimal) -> bool:
    """Whether a price changed more than any price does, up or down."""
    return after_usd > before_usd * TIMES_MAX or before_usd > after_usd * TIMES_MAX


def _judge(
    made: Plan,
    old: FalPrice | None,
    shipped_usd: Decimal | None,
    model: str,
    quote: Quote | None,
    source: str,
    force: bool,
) -> None:
    bad_name = _name_problem(model)
    if bad_name is not None:  # no call can name it, so that no row is needed to say that it has no price
        made.refused.append(Change(shown(model), None, None, None, bad_name))
        return
    usable = None if old is None else old.usable_usd
    problem = None if quote is None else problem_of(quote)
    if quote is None or problem is not None:
        if problem is not None:
            made.refused.append(Change(model, None, usable, None, problem))
        elif usable is not None:
            made.refused.append(Change(model, None, usable, None, "fal names no price any more: the last one is kept"))
        if usable is None:
            made.unpriced.append(Change(model, None, None, None, problem or "fal names no price"))
            _append(made, old, FalPrice(model, "", None, "unpriced", source, ""))
        return
    after, unit = quote.unit_price, quote.unit.strip()
    change = Change(model, unit, usable if usable is not None else shipped_usd, after)
    if is_placeholder(unit, after):
        made.placeholder.append(change)
        if usable is not None and not force:
            made.refused.append(Change(model, unit, usable, after, "a placeholder: the price before it is kept"))
        else:
            _append(made, old, FalPrice(model, unit, after, "placeholder", source, ""))
        return
    made.priced += 1
    if usable is not None and is_jump(usable, after) and not force:
        times = f"{decimal_text(usable)} to {decimal_text(after)} USD"
        made.refused.append(Change(model, unit, usable, after, f"it changed more than {TIMES_MAX} times: {times}"))
        return
    if _append(made, old, FalPrice(model, unit, after, "priced", source, "")):
        if change.before_usd is None:
            made.new.append(change)
        elif change.before_usd != after or old is not None:
            made.changed.append(change)


def _append(made: Plan, old: FalPrice | None, word: FalPrice) -> bool:
    """Whether the word says something new; then it is to be written down."""
    if old is not None and _content(old) == _content(word):
        return False
    made.words.append(word)
    return True


def _content(word: FalPrice) -> tuple[str, Decimal | None, Standing, str]:
    return word.unit, word.unit_price_usd, word.standing, word.source


def _refuse_partial(made: Plan, before: Mapping[str, FalPrice], listed: frozenset[str], answer: Answer) -> None:
    """Raises `BadPriceAnswer`: what lacks half of what was there is an answer cut short, not a change of prices."""
    if not answer.listed or not made.priced:
        raise BadPriceAnswer("fal's answer holds no usable price at all: the old prices stay")
    there = [word for word in before.values() if word.usable_usd is not None and word.standing == "priced"]
    seen = sum(1 for word in there if word.model in listed)
    if 2 * seen < len(there):
        raise BadPriceAnswer(
            f"fal's answer lists only {seen} of the {len(there)} models that had a price: the old prices stay"
        )
    bad = sum(1 for quote in answer.quotes.values() if problem_of(quote) is not None)
    unnamed = sum(1 for word in there if word.model in listed and word.model not in answer.quotes)
    if 2 * bad > len(answer.quotes) or 2 * unnamed > len(there):
        raise BadPriceAnswer(
            f"of fal's prices {bad} make no sense and {unnamed} are missing: the old prices stay"
            + (f" ({made.refused[0].model}: {made.refused[0].why})" if made.refused else "")
        )
