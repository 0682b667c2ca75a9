"""What a simulated call is billed: units from what was made, by the rates of the model's price rule.

Pure. Deliberately not `abhiapi.estimates`: that computes from requests and answers what fal probably bills, this
knows what was made. So a test that leaves the units header out compares two computations, not one with itself.
Roundings are fal's as recorded (fal-protocol 8.2 and 9.1, seen 2026-11-22).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Any

from abhiapi.money import EXACT
from abhiapi.pricing import Estimate, PriceRule

MEGAPIXEL = 1_000_000
TOKEN_PIXELS, TOKEN_FPS = 1_024, 24


@dataclass(frozen=True, slots=True)
class Work:
    """What one call made. ``compute_ms`` is what it would have kept a GPU busy."""

    pictures: tuple[tuple[int, int], ...] = ()
    seconds: int = 0
    frame: tuple[int, int] = (0, 0)
    characters: int = 0
    compute_ms: int = 0


def billed_units(rule: PriceRule, call_input: Mapping[str, Any], work: Work) -> Decimal:
    estimate = rule.estimate
    with localcontext(EXACT):
        return _rate(estimate, call_input) * _quantity(rule, work) + estimate.surcharge


def _quantity(rule: PriceRule, work: Work) -> Decimal:
    estimate = rule.estimate
    match estimate.kind:
        case "images":
            return Decimal(max(1, len(work.pictures)))
        case "megapixels" | "output_megapixels":
            return Decimal(sum(_megapixels(width * height) for width, height in work.pictures) or 1)
        case "seconds":
            return Decimal(max(1, work.seconds))
        case "tokens":
            frames = TOKEN_FPS * work.seconds + 1
            return Decimal(work.frame[0] * work.frame[1] * frames) / (TOKEN_PIXELS * 1_000)
        case "characters":
            return Decimal(work.characters) / 1_000
        case "fixed":
            return Decimal(1)
        case _ if "compute" in rule.unit:
            return Decimal(work.compute_ms) / 1_000
        case _:  # units of fal's own making: some part of the most there can be, the same for the same input
            part = Decimal(500 + work.compute_ms % 500) / 1_000
            return part * estimate.maximum * max(1, len(work.pictures))


def _megapixels(pixels: int) -> int:
    """To the nearest whole one, at least 1: 1024 x 1024 and even 1376 x 768 were billed as one."""
    return max(1, (pixels + MEGAPIXEL // 2) // MEGAPIXEL)


def _rate(estimate: Estimate, call_input: Mapping[str, Any]) -> Decimal:
    """Units for one of the quantity: the first rate whose parameters fit, or the dearest."""
    for rate in estimate.rates:
        if all(_fits(call_input.get(name, estimate.defaults.get(name)), wanted) for name, wanted in rate.when.items()):
            return rate.units
    return max(rate.units for rate in estimate.rates)


def _fits(given: Any, wanted: Any) -> bool:
    if wanted in ("", "*"):
        return bool(given) is (wanted == "*")
    if isinstance(given, bool) and not isinstance(wanted, bool):
        return False
    return isinstance(given, str | int | Decimal) and str(given).lower() == str(wanted).lower()
