"""How a model's input, or fal's answer, turns into billable units: the formulas behind holds.

Pure and without money: `pricing` multiplies the units by a price. `units_ceiling` must never be below what fal bills
for a valid input and never raises, whatever JSON it is given; `units_from_answer` says None rather than guess.
Inputs come from `json.loads(..., parse_float=Decimal)`: there are no floats in here, and one would count as unsaid.
fal's own facts are in fal-protocol 9.1, seen 2026-11-22, unless noted otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from typing import Any, Literal

from abhiapi.money import EXACT

Json = Mapping[str, Any]
Kind = Literal["images", "megapixels", "seconds", "tokens", "characters", "fixed", "output_megapixels", "none"]
KINDS: tuple[Kind, ...] = (
    "images",
    "megapixels",
    "seconds",
    "tokens",
    "characters",
    "fixed",
    "output_megapixels",
    "none",
)

# fal toolkit, image/image.py: width x height of the image_size presets.
IMAGE_SIZES: Mapping[str, tuple[int, int]] = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
SIDE_MAX = 14_142  # the toolkit refuses longer sides
SIDE_ANSWERED_MAX = 100_000  # an upscaler's output may be longer; beyond this the answer is nonsense
LEAST = Decimal("0.000001")  # a smaller count, size or duration is no parameter of any model
COUNT_MAX = 10_000  # a hold is asked for at most this many images or seconds; fal refuses such input anyway
COUNT_UNREADABLE = Decimal(4)  # images held where the count is not one; 4 is fal's usual limit
PIXELS_PER_MEGAPIXEL = 1_000_000
FRAMES_PER_SECOND = 24  # of the models billed by video tokens
PIXELS_PER_TOKEN = 1024

# Texts that fal's clients may send for a number: pydantic takes blanks around it, a plus sign and underscores.
_NUMBER = re.compile(r"\+?([0-9][0-9_]{0,29}(?:\.[0-9]{0,29})?)")


@dataclass(frozen=True, slots=True)
class Rate:
    """Units per image, second or call for the calls whose parameters equal ``when``; an empty ``when`` fits all.

    In ``when`` the text ``*`` stands for any value that says something, and the empty text for none.
    """

    units: Decimal
    when: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Estimate:
    """How a model's input (or answer) turns into units.

    kind: ``images`` and ``megapixels`` count pictures, ``seconds`` a duration, ``tokens`` thousands of video tokens,
    ``characters`` thousands of characters, ``fixed`` one a call, ``output_megapixels`` an upscaler's output, ``none``
    cannot be computed. rates: the first that fits counts; none fitting, the largest (for a hold). defaults: what fal
    assumes for parameters that the input leaves out. maximum: megapixels, seconds, thousands of characters or units
    where the input does not say (``auto``, or a value that fal will refuse), for holds only. count_param: how many
    pictures; batch_param: how many at most of each. size_by_resolution: the most pixels of one frame. surcharge:
    units added once a call. open_params: parameters which, when given, decide the duration in fal's own way.
    is_guess: no formula of this very model, only what its unit suggests: for holds, never for a charge.
    """

    kind: Kind
    rates: tuple[Rate, ...] = (Rate(Decimal(1)),)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    maximum: Decimal = Decimal(1)
    count_param: str = "num_images"
    size_by_resolution: Mapping[str, int] = field(default_factory=dict)
    batch_param: str | None = None
    text_param: str = "text"
    surcharge: Decimal = Decimal(0)
    open_params: tuple[str, ...] = ()
    is_guess: bool = False


def units_ceiling(estimate: Estimate, call_input: Json) -> tuple[Decimal, str]:
    """The most units that fal should bill for this input, and in words what they stand for."""
    with localcontext(EXACT):
        quantity, words = _quantity_ceiling(estimate, call_input)
        fitting = _fitting_rate(estimate, call_input)
        rate = max(each.units for each in estimate.rates) if fitting is None else fitting
        return rate * quantity + estimate.surcharge, words


def units_from_answer(estimate: Estimate, call_input: Json, answer: Json | None) -> Decimal | None:
    """Units of a finished call computed from fal's answer and the request, or None where that cannot be known.

    Used only when fal sent no usable ``x-fal-billable-units``. Megapixels are rounded to the nearest whole one, at
    least 1, for each picture: plain rounding up contradicts fal's recorded charges.
    """
    rate = None if estimate.is_guess else _fitting_rate(estimate, call_input)
    if rate is None:
        return None
    with localcontext(EXACT):
        quantity = _quantity_answered(estimate, call_input, answer or {})
        return None if quantity is None else rate * quantity + estimate.surcharge


def decimal_text(value: Decimal) -> str:
    """A Decimal as a plain number without exponent or trailing zeros."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _quantity_ceiling(estimate: Estimate, call_input: Json) -> tuple[Decimal, str]:
    """What the rate is multiplied by: pictures, megapixels, seconds, thousands of tokens or characters, or 1."""
    match estimate.kind:
        case "fixed":
            return Decimal(1), "one call"
        case "images":
            count = _count_ceiling(estimate, call_input)
            return count, _plural(count, "image")
        case "megapixels":
            count = _count_ceiling(estimate, call_input)
            pixels = _pixels(estimate, call_input)
            each = estimate.maximum if pixels is None else _megapixels_up(pixels)
            return each * count, f"{_plural(count, 'image')} of up to {decimal_text(each)} MP"
        case "seconds":
            seconds = _seconds_ceiling(estimate, call_input)
            return seconds, f"{decimal_text(seconds)} s"
        case "tokens":
            seconds = _seconds_ceiling(estimate, call_input)
            resolution = _plain_text(_given(estimate, call_input, "resolution"))
            largest = max(estimate.size_by_resolution.values())
            pixels = estimate.size_by_resolution.get(resolution, largest)
            return _kilotokens(pixels, seconds), f"{decimal_text(seconds)} s of video tokens"
        case "characters":
            text = call_input.get(estimate.text_param)
            # Rounded up: whether fal bills a started thousand in full is not known.
            thousands = estimate.maximum if not isinstance(text, str) else Decimal(max(1, -(-len(text) // 1000)))
            return thousands, f"up to {decimal_text(thousands * 1000)} characters"
        case _:
            return estimate.maximum * _count_ceiling(estimate, call_input), "the most to be expected"


def _quantity_answered(estimate: Estimate, call_input: Json, answer: Json) -> Decimal | None:
    """The same quantity of a finished call, or None where neither the answer nor the request says it for sure."""
    match estimate.kind:
        case "fixed":
            return Decimal(1)
        case "images":
            # A batch may come out smaller than asked for: then only the answer counts.
            asked = None if estimate.batch_param else _count(_given(estimate, call_input, estimate.count_param, 1))
            return Decimal(len(pictures)) if (pictures := _pictures(answer)) else asked
        case "megapixels" | "output_megapixels":
            return _megapixels_answered(estimate, call_input, answer)
        case "seconds":
            return _seconds_answered(estimate, call_input, answer)
        case "tokens":
            # The table of resolutions holds the largest shape of each; only the answer knows the real one.
            pixels = _area(answer.get("video"))
            seconds = _seconds_answered(estimate, call_input, answer)
            return None if pixels is None or seconds is None else _kilotokens(pixels, seconds)
        case "characters":
            text = call_input.get(estimate.text_param)
            return Decimal(len(text)) / 1000 if isinstance(text, str) else None
        case _:
            return None


def _fitting_rate(estimate: Estimate, call_input: Json) -> Decimal | None:
    """Units per image, second or call of the first rate whose parameters fit, or None."""
    for rate in estimate.rates:
        if all(_fits(_given(estimate, call_input, name), wanted) for name, wanted in rate.when.items()):
            return rate.units
    return None


def _fits(given: Any, wanted: Any) -> bool:
    """Parameters as fal's clients send them: query strings say ``true`` and ``4`` where JSON says true and 4."""
    if wanted == "":
        return not given
    if wanted == "*":
        return bool(given)
    return _plain_text(given) == str(wanted).lower()


def _plain_text(given: Any) -> str:
    """A parameter as lower-case text; empty for what no parameter of ours is (tables, lists, absurd numbers)."""
    if isinstance(given, int) and abs(given) > COUNT_MAX:  # printing a huge integer is refused by Python
        return ""
    return str(given).lower() if isinstance(given, str | int | Decimal) else ""


def _given(estimate: Estimate, call_input: Json, name: str, otherwise: Any = None) -> Any:
    return call_input.get(name, estimate.defaults.get(name, otherwise))


def _count_ceiling(estimate: Estimate, call_input: Json) -> Decimal:
    number = _count(_given(estimate, call_input, estimate.count_param, 1)) or COUNT_UNREADABLE
    if estimate.batch_param is None:
        return number
    return number * (_count(_given(estimate, call_input, estimate.batch_param, 1)) or COUNT_UNREADABLE)


def _count(given: Any) -> Decimal | None:
    number = _positive(given, COUNT_MAX)
    return number if number is not None and number == number.to_integral_value() else None


def _pixels(estimate: Estimate, call_input: Json) -> int | None:
    """Width x height that the input asks for, or None where it does not say or asks for what fal refuses."""
    size = _given(estimate, call_input, "image_size")
    if isinstance(size, str):
        known = IMAGE_SIZES.get(size)
        return known[0] * known[1] if known else None
    return _area(size, SIDE_MAX)


def _area(thing: Any, side_max: int = SIDE_ANSWERED_MAX) -> int | None:
    """Pixels of anything with a width and a height; None without them."""
    if not isinstance(thing, Mapping):
        return None
    width, height = (_positive(thing.get(side), side_max) for side in ("width", "height"))
    return None if width is None or height is None else int(width) * int(height)


def _kilotokens(pixels: int, seconds: Decimal) -> Decimal:
    """Thousands of video tokens: pixels x frames / 1024, where n seconds have 24n + 1 frames.

    The one frame more is in fal's recorded charge (fal-protocol 8.2): 4 s of 640 x 640 were 38.8, 97 frames.
    """
    return pixels * (FRAMES_PER_SECOND * seconds + 1) / (PIXELS_PER_TOKEN * 1000)


def _seconds(estimate: Estimate, call_input: Json) -> Decimal | None:
    """The duration that the input asks for; None where it leaves that to fal."""
    if any(call_input.get(name) for name in estimate.open_params):
        return None
    given = _given(estimate, call_input, "duration")
    return _positive(given.strip().removesuffix("s") if isinstance(given, str) else given, COUNT_MAX)


def _seconds_answered(estimate: Estimate, call_input: Json, answer: Json) -> Decimal | None:
    """The duration asked for, which is what fal bills (a file of sora-2 is longer), else that of the answer's file."""
    asked = _seconds(estimate, call_input)
    video = answer.get("video")
    if asked is None and isinstance(video, Mapping):
        return _positive(video.get("duration"), COUNT_MAX)
    return asked


def _seconds_ceiling(estimate: Estimate, call_input: Json) -> Decimal:
    """Seconds to hold for: at least one, since no model makes less, whatever somebody asks for."""
    seconds = _seconds(estimate, call_input)
    return estimate.maximum if seconds is None else max(seconds, Decimal(1))


def _positive(given: Any, most: int) -> Decimal | None:
    """A number of at least `LEAST`, at most ``most``; None for anything else (texts of digits count)."""
    if isinstance(given, str):
        match = _NUMBER.fullmatch(given.strip())
        given = Decimal(match[1]) if match else None
    if isinstance(given, bool) or not isinstance(given, int | Decimal):
        return None
    if isinstance(given, Decimal) and not given.is_finite():
        return None
    return Decimal(min(given, most)) if given >= LEAST else None


def _pictures(answer: Json) -> list[Any]:
    images = answer.get("images")
    if isinstance(images, list):
        return images
    image = answer.get("image")
    return [image] if isinstance(image, Mapping) else []


def _megapixels_answered(estimate: Estimate, call_input: Json, answer: Json) -> Decimal | None:
    """Whole megapixels of every picture of the answer; sizes that it leaves null come from the request."""
    asked = None if estimate.kind == "output_megapixels" else _pixels(estimate, call_input)
    total = 0
    for picture in _pictures(answer):
        pixels = _area(picture) or asked
        if pixels is None:
            return None
        total += max(1, (pixels + PIXELS_PER_MEGAPIXEL // 2) // PIXELS_PER_MEGAPIXEL)
    return Decimal(total) if total else None


def _megapixels_up(pixels: int) -> Decimal:
    return Decimal(max(1, -(-pixels // PIXELS_PER_MEGAPIXEL)))


def _plural(count: Decimal, noun: str) -> str:
    return f"{decimal_text(count)} {noun}{'' if count == 1 else 's'}"
