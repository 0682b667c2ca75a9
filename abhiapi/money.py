"""Money: integers of micros, Decimals from strings, and the one rounding function.

1 USD = 1_000_000 micros; 1 credit = 0.001 USD = 1_000 micros. No float is made or taken here. Everything that
turns a quantity into money goes through `to_micros`, which rounds up.
"""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Context, Decimal, localcontext
from typing import NewType

from abhiapi.errors import BadAmount

Micros = NewType("Micros", int)

MICROS_PER_USD = 1_000_000
MICROS_PER_CREDIT = 1_000
NANOS_PER_USD = 1_000_000_000
NANOS_PER_MICRO = 1_000

# The largest amount of one movement: a billion dollars. Sums of many still fit a signed 64-bit column.
USD_MAX = 1_000_000_000
MICROS_MAX = Micros(USD_MAX * MICROS_PER_USD)

# Wide enough that no product of a quantity (at most 42 digits) and a price is ever rounded on the way. No traps: an
# overflow becomes an infinity, which `to_micros` refuses like every other absurd amount.
EXACT = Context(prec=120, traps=[])

_AMOUNT = re.compile(r"(?P<sign>[+-]?)(?P<whole>[0-9]+)(?:\.(?P<fraction>[0-9]+))?")
_DIGITS_MAX = 15  # more than these before the point are above a billion dollars in any unit


def to_micros(usd: Decimal) -> Micros:
    """Micros of an amount in USD, rounded up to a whole micro: the only rounding of money there is.

    Raises `BadAmount` for what is not finite or passes `MICROS_MAX` in size.
    """
    return Micros(_rounded_up(usd, MICROS_PER_USD))


def product_micros(quantity: Decimal, unit_price_usd: Decimal) -> Micros:
    """quantity x price per unit, in micros, multiplied exactly and rounded up once. Raises `BadAmount`."""
    with localcontext(EXACT):
        usd = quantity * unit_price_usd
    return to_micros(usd)


def product_nanos(quantity: Decimal, unit_price_usd: Decimal) -> int:
    """quantity x price per unit in nano-USD (fal's own book-keeping unit), rounded up once. Raises `BadAmount`."""
    with localcontext(EXACT):
        usd = quantity * unit_price_usd
    return _rounded_up(usd, NANOS_PER_USD)


def parse_amount(text: str, *, usd: bool = False, signed: bool = False) -> Micros:
    """Micros of an amount typed by a person: credits, or dollars with ``usd``.

    Plain decimals only (``12``, ``26.25``), at most three decimals for credits and six for dollars, above zero
    unless ``signed``, never zero. Raises `BadAmount` naming what is wrong.
    """
    unit, decimals, micros_per_unit = ("USD", 6, MICROS_PER_USD) if usd else ("credits", 3, MICROS_PER_CREDIT)
    shown = text if len(text) <= 40 else text[:37] + "..."
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise BadAmount(f"{shown!r} is not an amount of {unit}: write a plain number such as 5000 or 26.25")
    fraction = (match["fraction"] or "").rstrip("0")
    if len(fraction) > decimals:
        raise BadAmount(f"{shown!r} is finer than the ledger: an amount of {unit} has at most {decimals} decimals")
    whole = match["whole"].lstrip("0")
    if len(whole) > _DIGITS_MAX:  # before `int`, which is slow with, or refuses, thousands of digits
        raise BadAmount(f"the amount {shown} {unit} is larger than a billion dollars")
    micros = int(whole or "0") * micros_per_unit + int(fraction.ljust(decimals, "0"))
    if micros == 0:
        raise BadAmount(f"the amount is zero: write a number of {unit} other than 0")
    if match["sign"] == "-":
        if not signed:
            raise BadAmount(f"the amount {shown} is negative: write a number of {unit} above 0")
        micros = -micros
    if abs(micros) > MICROS_MAX:
        raise BadAmount(f"the amount {shown} {unit} is larger than a billion dollars")
    return Micros(micros)


def credits_text(micros: int) -> str:
    """Credits as a plain number, exact, without trailing zeros: ``12``, ``26.25``, ``-0.001``. Also valid JSON."""
    return _fixed(micros, 3)


def usd_text(micros: int) -> str:
    """US dollars as a plain number, exact, without trailing zeros: ``0.012``. Also valid JSON."""
    return _fixed(micros, 6)


def nanos_usd_text(nanos: int) -> str:
    """US dollars of an amount in nano-USD, exact, without trailing zeros."""
    return _fixed(nanos, 9)


def margin_percent_text(earned_nanos: int, cost_nanos: int) -> str | None:
    """What is left of what was earned, in percent with two decimals, rounded down; None where nothing was earned."""
    if earned_nanos <= 0:
        return None
    return _fixed((earned_nanos - cost_nanos) * 10_000 // earned_nanos, 2)


def credits(micros: int) -> Decimal:
    """Credits as an exact Decimal without an exponent, which the JSON encoder prints as a number."""
    return Decimal(credits_text(micros))


def usd(micros: int) -> Decimal:
    """US dollars as an exact Decimal without an exponent."""
    return Decimal(usd_text(micros))


def _rounded_up(usd: Decimal, per_usd: int) -> int:
    if not usd.is_finite():
        raise BadAmount("the amount is not a finite number")
    if not -USD_MAX <= usd <= USD_MAX:
        raise BadAmount("the amount is larger than a billion dollars")
    with localcontext(EXACT):
        return int((usd * per_usd).to_integral_value(rounding=ROUND_CEILING))


def _fixed(value: int, places: int) -> str:
    sign = "-" if value < 0 else ""
    whole, fraction = divmod(abs(value), 10**places)
    if not fraction:
        return f"{sign}{whole}"
    return f"{sign}{whole}.{str(fraction).zfill(places).rstrip('0')}"
