"""What fal's answer means for the hold: charge it, release it, or leave it to the operator (contract 3.5).

Pure. `verdict` is one decision over the status, fal's ``x-fal-billable-units`` and, where that is missing, the
answer itself. It never guesses: an outcome that cannot be computed is a state (``unknown``), not a number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from abhiapi import pricing
from abhiapi.errors import BadAmount
from abhiapi.money import MICROS_PER_USD, Micros, product_nanos

UNITS_HEADER = "x-fal-billable-units"

End = Literal["settled", "released", "unknown"]
UsageSource = Literal["fal", "catalogue"]

# fal writes free-form decimals such as 1, 38.8 or 8.439999999999998 (fal-protocol 8.2). Signs, exponents, NaN and
# numbers of absurd length are not plain, and so never become money.
_PLAIN_UNITS = re.compile(r"[0-9]{1,12}(\.[0-9]{1,30})?")

# No single call costs a hundred thousand dollars: units that say so are a fault, and the operator is asked.
ABSURD_MICROS = 100_000 * MICROS_PER_USD

# fal's word on the operator's own credential or account: never the customer's to pay or to read.
OPERATOR_STATUSES = frozenset((401, 402, 403))


_NOTHING = Micros(0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a call's hold ends. ``charge_micros`` is 0 unless ``end`` is settled.

    units: as received from fal, or as computed, or what fal sent in vain (for the operator); None where there were
    none. fal_cost_nano_usd: units x fal's unit price, None where either is not known. reason: a word for the
    operator where the end is not an ordinary charge.
    """

    end: End
    charge_micros: Micros = _NOTHING
    units: str | None = None
    usage_source: UsageSource | None = None
    fal_cost_nano_usd: int | None = None
    reason: str | None = None


def is_concurrency_refusal(status: int, error_type: str | None, needs_retry: str | None) -> bool:
    """Whether fal works on too many calls of the operator's account already (fal-protocol 7.3)."""
    return status == 429 and (error_type == "concurrent_requests_limit" or needs_retry in ("1", "true"))


def released(reason: str, *, units: str | None = None) -> Verdict:
    return Verdict("released", units=units, reason=reason)


# A job was sent to fal's queue and its answer never seen: it may run, under an id that nobody knows.
SUBMIT_UNKNOWN = Verdict("unknown", reason="submit_outcome_unknown")


def parse_units(values: Sequence[str]) -> Decimal | None:
    """The units of a reply's ``x-fal-billable-units`` headers; None unless there is exactly one, plain and whole."""
    if len(values) != 1 or not _PLAIN_UNITS.fullmatch(values[0]):
        return None
    return Decimal(values[0])


def needs_answer(status: int, unit_headers: Sequence[str]) -> bool:
    """Whether the verdict will have to read the answer's body, because fal did not say the units."""
    return 200 <= status < 300 and parse_units(unit_headers) is None


def verdict(
    price: pricing.Price,
    status: int,
    unit_headers: Sequence[str],
    call_input: Mapping[str, Any],
    answer: Mapping[str, Any] | None,
) -> Verdict:
    """How the hold of a call ends that fal answered, wholly, with ``status``. ``answer`` is None if not JSON."""
    raw = shown_units(unit_headers)
    if status >= 500:
        return released("fal_5xx", units=raw)  # fal never bills those, whatever the header says
    if status in OPERATOR_STATUSES:
        return released("fal_refused_operator", units=raw)
    if not (200 <= status < 300 or 400 <= status < 500):
        return released("not_billable_status", units=raw)
    units = parse_units(unit_headers)
    if units is not None:
        return _settled(price, units, raw, "fal")
    if status >= 400:
        return released("error_without_units", units=raw)
    computed = pricing.units_from_answer(price.estimate, call_input, answer)
    why = "bad_units" if unit_headers else "no_units"
    if computed is None:
        return Verdict("unknown", units=raw, reason=why)
    return _settled(price, computed, pricing.decimal_text(computed), "catalogue", reason=why)


def shown_units(unit_headers: Sequence[str]) -> str | None:
    """What fal sent as units, kept for the operator, bounded in length."""
    return pricing.shown(", ".join(unit_headers)) if unit_headers else None


def _settled(
    price: pricing.Price, units: Decimal, text: str | None, source: UsageSource, reason: str | None = None
) -> Verdict:
    try:
        amount = pricing.charge(price, units)
        cost = None if price.fal_unit_price_usd is None else product_nanos(units, price.fal_unit_price_usd)
    except BadAmount:  # the charge, or under a price of the operator's own only fal's cost, is beyond the ledger
        return Verdict("unknown", units=text, reason="absurd_units")
    if amount > ABSURD_MICROS:
        return Verdict("unknown", units=text, reason="absurd_units")
    return Verdict("settled", amount, text, source, cost, reason)
