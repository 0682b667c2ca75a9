"""How a call's charge came about, in words. Pure: sentences from the call's row; what is multiplied is checked.

What fal says about the operator's account is never told here, and what a call costs at fal is not either.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal, InvalidOperation

from abhiapi import money
from abhiapi.errors import BadAmount
from abhiapi.reports import CallRow
from abhiapi.web.pages.words import amount, credits, usd

_STANDS = {
    "held": "The call is running. Its hold ends with it: as a charge, or given back.",
    "sent": "fal has taken the job. It is charged once, when it is complete; until then the hold stands.",
    "unknown": (
        "What this call cost is not known yet, so nothing was charged and the hold stands, until fal's bill or the"
        " operator tells."
    ),
}
_FREE = {
    "fal_5xx": "fal failed (an error of the 500s), which it never bills",
    "error_without_units": "fal refused the request without charging for it",
    "operator": "the operator gave the hold back",
}


def of_call(row: CallRow, unit: str, billed_units: str | None) -> list[str]:
    """Sentences, in the order in which it happened."""
    return list(_sentences(row, unit, billed_units))


def net_micros(row: CallRow) -> int:
    """What a call cost in the end."""
    return row.charged_micros + row.adjusted_micros - row.refunded_micros


def _sentences(row: CallRow, unit: str, billed_units: str | None) -> Iterator[str]:
    yield f"Before fal was asked, {credits(row.held_micros)} credits were held: the most the call was thought to cost."
    if row.state in _STANDS:
        yield _STANDS[row.state]
        return
    if row.state == "released":
        why = f": {_FREE[row.reason]}" if row.reason in _FREE else ""
        yield f"Nothing was charged and the whole hold was given back{why}."
        return
    yield _units(row, unit)
    yield from _beside_the_hold(row)
    if row.adjusted_micros:
        moved = "raised" if row.adjusted_micros > 0 else "lowered"
        told = f" of {amount(billed_units, unit)}" if billed_units else ""
        yield f"fal's bill{told} came later and {moved} the charge by {credits(abs(row.adjusted_micros))} credits."
    if row.refunded_micros:
        yield f"{credits(row.refunded_micros)} credits were refunded."


def _units(row: CallRow, unit: str) -> str:
    """Where the units came from, and the multiplication, where it comes to what was charged."""
    if row.usage_source == "operator":
        return f"The operator settled the call at {credits(row.charged_micros)} credits."
    computed = row.usage_source == "catalogue" or bool(row.adjusted_micros)  # only computed charges are adjusted
    if computed:
        source = "fal named no units, so they were computed from the request and the answer"
    elif row.usage_source == "events":
        source = "The units come from fal's bill"
    else:
        source = "fal named the units"
    product = _product(row)
    if product is None:
        return f"{source}; {credits(row.charged_micros)} credits were charged."
    micros, exact = product
    if micros == 0:
        return f"{source}: {amount(row.units or '0', unit)}, so the call was free."
    rounded = "" if exact == money.usd(micros) else ", rounded up to a millionth of a dollar"
    price = f"${row.unit_price_usd} for each, the price when the call began"
    used = amount(row.units or "0", unit)
    return f"{source}: {used}, at {price}: {usd(micros)}{rounded}, which is {credits(micros)} credits."


def _product(row: CallRow) -> tuple[int, Decimal] | None:
    """Units x price in micros, and exactly; None unless it comes to the charge."""
    try:
        units, price = Decimal(row.units or ""), Decimal(row.unit_price_usd)
        micros = money.product_micros(units, price)
    except (InvalidOperation, BadAmount):
        return None
    return (micros, money.EXACT.multiply(units, price)) if micros == row.charged_micros else None


def _beside_the_hold(row: CallRow) -> Iterator[str]:
    rest = row.held_micros - row.charged_micros
    if rest > 0:
        yield f"The rest of the hold, {credits(rest)} credits, was given back."
    elif rest < 0:
        yield f"That is {credits(-rest)} credits more than was held: a charge above its hold is charged in full."
