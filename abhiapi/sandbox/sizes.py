"""How large the pictures and clips come out that an input asks for. Pure; whole numbers only.

Presets and limits are those of fal's toolkit (image/image.py; fal-protocol 9.1, seen 2026-11-22).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from math import isqrt
from typing import Any

from abhiapi.pricing import Estimate

Size = tuple[int, int]

IMAGE_SIZES: Mapping[str, Size] = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
SIDE_MAX = 14_142

_SQUARE = (1024, 1024)
_LANDSCAPE_DEFAULT = ("flux/", "flux-1/", "flux-lora", "flux-realism", "flux-pro", "flux-2", "qwen-image")
_SHORT_SIDES = {"4k": 2160, "2k": 1440}
_SQUARE_SIDES = {"0.5k": 512, "1k": 1024, "2k": 2048, "4k": 4096}


def image_size(endpoint_id: str, estimate: Estimate, call_input: Mapping[str, Any]) -> Size:
    """Width and height of the pictures that an image model makes."""
    wanted = call_input.get("image_size", estimate.defaults.get("image_size"))
    if isinstance(wanted, Mapping):
        return _side(wanted.get("width"), 512), _side(wanted.get("height"), 512)  # the toolkit's own defaults
    if isinstance(wanted, str):
        pair = re.fullmatch(r"(\d{1,5})x(\d{1,5})", wanted)
        if pair:
            return _side(int(pair[1]), 1024), _side(int(pair[2]), 1024)
        if wanted in IMAGE_SIZES:
            return IMAGE_SIZES[wanted]
    if "width" in call_input and "height" in call_input:
        return _side(call_input["width"], 1024), _side(call_input["height"], 1024)
    ratio = _ratio(call_input.get("aspect_ratio"))
    if ratio is not None:
        resolution = str(call_input.get("resolution", estimate.defaults.get("resolution", "1K"))).lower()
        return _shaped(_SQUARE_SIDES.get(resolution, 1024) ** 2, *ratio)
    return IMAGE_SIZES["landscape_4_3"] if any(part in endpoint_id for part in _LANDSCAPE_DEFAULT) else _SQUARE


def video_size(estimate: Estimate, call_input: Mapping[str, Any]) -> Size:
    """Width and height of a clip: the area of its resolution at 16:9, in the shape asked for."""
    resolution = str(call_input.get("resolution", estimate.defaults.get("resolution", "720p"))).lower()
    digits = re.fullmatch(r"(\d{3,4})p", resolution)
    short = _SHORT_SIDES.get(resolution) or (min(int(digits[1]), 2160) if digits else 720)
    ratio = _ratio(call_input.get("aspect_ratio")) or (16, 9)
    return _shaped(short * short * 16 // 9, *ratio)


def clip_seconds(call_input: Mapping[str, Any], estimate: Estimate, default_seconds: int) -> int:
    """Whole seconds of the clip that the input asks for; the default where that is left to the model."""
    for wanted in (call_input.get("duration"), estimate.defaults.get("duration")):
        match = re.match(r"\d{1,4}", str(wanted).strip()) if isinstance(wanted, str | int | Decimal) else None
        if match and not isinstance(wanted, bool) and int(match[0]) > 0:
            return min(int(match[0]), 60)
    return default_seconds


def scaled(size: Size, factor: Any, default: int) -> Size:
    """What an upscaler makes of a picture."""
    by = factor if _is_number(factor) and 1 <= factor <= 16 else default
    return min(int(size[0] * by), SIDE_MAX), min(int(size[1] * by), SIDE_MAX)


def _side(given: Any, otherwise: int) -> int:
    if isinstance(given, str) and re.fullmatch(r"\d{1,6}", given):
        given = int(given)
    return int(given) if _is_number(given) and 1 <= given <= SIDE_MAX else otherwise


def _is_number(given: Any) -> bool:
    """Whether it can be compared: NaN cannot, and a boolean is no number here."""
    if isinstance(given, Decimal):
        return given.is_finite()
    return isinstance(given, int) and not isinstance(given, bool)


def _ratio(given: Any) -> tuple[int, int] | None:
    match = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", given) if isinstance(given, str) else None
    return (int(match[1]), int(match[2])) if match else None


def _shaped(area: int, across: int, down: int) -> Size:
    """Even sides of about this area and this shape, never more than the area."""
    return isqrt(area * across // down) // 2 * 2, isqrt(area * down // across) // 2 * 2
