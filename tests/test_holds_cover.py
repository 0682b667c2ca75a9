"""Across all models of the simulator: no charge passes its hold by more than rounding, whatever a caller asks for."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abhiapi import metering, pricing
from abhiapi.pricing import Catalogue, FalPrice, PriceRule
from abhiapi.sandbox import create_sandbox
from tests.sandbox_client import wsgi_call

RULES = pricing.shipped_rules()
SANDBOX = create_sandbox(RULES)
SHIPPED = Catalogue(RULES, (), Decimal("0.05"))
SYNCED = Catalogue(
    RULES, (), Decimal("0.05"),
    synced=[FalPrice(rule.model, rule.unit, rule.fal_unit_price_usd, "priced", "fal api", "") for rule in RULES],
)  # fmt: skip
# The same prices, with nothing known of a model but its name and unit: what `prices sync` alone would give.
NAMES_ONLY = Catalogue(
    (), (), Decimal("0.05"),
    synced=[FalPrice(rule.model, rule.unit, rule.fal_unit_price_usd, "priced", "fal api", "") for rule in RULES],
)  # fmt: skip
ROUNDING_MICROS = 1

SIDES = st.one_of(st.integers(64, 4096), st.sampled_from([512, 1024, 2048]))
SIZES = st.one_of(
    st.sampled_from([*pricing.IMAGE_SIZES, "auto"]), st.fixed_dictionaries({"width": SIDES, "height": SIDES})
)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "num_images": st.one_of(st.integers(1, 4), st.sampled_from(["2", "4"])),
    "max_images": st.integers(1, 6),
    "image_size": SIZES,
    "aspect_ratio": st.sampled_from(["1:1", "16:9", "9:16", "21:9", "4:3"]),
    "duration": st.sampled_from([*range(1, 16), *map(str, range(1, 16)), "4s", "6s", "8s", "auto", 20]),
    "generate_audio": st.booleans(),
    "enable_web_search": st.booleans(),
    "quality": st.sampled_from(["low", "medium", "high"]),
    "rendering_speed": st.sampled_from(["TURBO", "BALANCED", "QUALITY"]),
    "style": st.sampled_from(["realistic_image", "vector_illustration", "any"]),
    "scale": st.sampled_from([1, 2, 4]),
    "upscale_factor": st.sampled_from([1, 2, 4]),
    "voice_ids": st.lists(st.just("v"), max_size=2),
}
TEXTS = st.text("ab \u00e9\U0001f600", min_size=1, max_size=30).flatmap(
    lambda text: st.integers(1, 300).map(lambda times: text * times)
)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[PriceRule, dict[str, Any]]:
    rule = draw(st.sampled_from(RULES))
    told = rule.estimate.defaults.keys() | {name for rate in rule.estimate.rates for name in rate.when}
    names = sorted(OPTIONS.keys() & (told | {"num_images", "image_size", "duration", "aspect_ratio", "scale"}))
    wanted = {name: draw(OPTIONS[name]) for name in draw(st.lists(st.sampled_from(names), unique=True))}
    # fal refuses a resolution that the model does not have; the simulator would bill any.
    rated = {str(rate.when["resolution"]) for rate in rule.estimate.rates if "resolution" in rate.when}
    if resolutions := sorted(rated | rule.estimate.size_by_resolution.keys()):
        wanted |= draw(st.sampled_from([{}, *({"resolution": name} for name in resolutions)]))
    return rule, wanted | {name: draw(TEXTS) for name in ("prompt", "text", rule.estimate.text_param)}


def billed(rule: PriceRule, call_input: dict[str, Any]) -> Decimal | None:
    """The units of the simulator's answer; None where it refuses the input. What it asks for by name is given."""
    for _ in range(5):
        status, headers, body = wsgi_call(SANDBOX, f"/{rule.model}", json.dumps(call_input).encode())
        if not status.startswith("422"):
            break
        missing = [problem["loc"][-1] for problem in json.loads(body)["detail"] if problem["type"] == "missing"]
        if not missing:
            return None
        for name in missing:
            several = str(name).endswith("_urls")
            call_input[name] = ["https://example.com/a.png"] if several else "https://example.com/a.png"
    assert status.startswith("200"), (rule.model, call_input, body)
    return metering.parse_units([headers["x-fal-billable-units"]])


@pytest.mark.parametrize("catalogue", [SHIPPED, SYNCED], ids=["shipped", "synced"])
def test_no_charge_passes_its_hold_by_more_than_rounding(catalogue: Catalogue) -> None:
    served: set[str] = set()

    @settings(deadline=None, derandomize=True, max_examples=350, database=None)
    @given(inputs())
    def holds_cover(call: tuple[PriceRule, dict[str, Any]]) -> None:
        rule, call_input = call
        units = billed(rule, call_input)
        if units is None:
            return
        served.add(rule.model)
        price = catalogue.price_of(rule.model)
        held = pricing.ceiling(price, call_input).amount_micros
        assert pricing.charge(price, units) <= held + ROUNDING_MICROS, (rule.model, call_input, units)

    holds_cover()
    assert 4 * len(served) > len(RULES)  # called with input that they take; which ones, the loaded sources decide too


def test_models_known_by_name_only_are_held_for_by_their_unit() -> None:
    """Not all of these holds cover their charge: tokens and units of fal's own making say nothing about how many of
    them a call makes. The first costs correct the guess, and none of them ever computes a charge."""
    over = set()
    for rule in RULES:
        price = NAMES_ONLY.price_of(rule.model)
        call_input: dict[str, Any] = {"prompt": "a cat", "text": "a cat", rule.estimate.text_param: "a cat"}
        units = billed(rule, call_input)
        assert units is not None
        assert price.estimate.is_guess
        if pricing.charge(price, units) > pricing.ceiling(price, call_input).amount_micros + ROUNDING_MICROS:
            over.add(rule.estimate.kind)
    assert over <= {"tokens", "none"}


def test_a_guess_is_corrected_by_the_first_cost() -> None:
    """failures.md 9 and 78, for every unit that fal has a name for."""
    for unit in sorted({rule.unit for rule in RULES}):
        word = FalPrice("acme/x", unit, Decimal("0.5"), "priced", "fal api", "")
        charge = pricing.charge(Catalogue((), (), Decimal(0), synced=[word]).price_of("acme/x"), Decimal(1000))
        learned = pricing.Costs(1, charge, charge)
        after = Catalogue((), (), Decimal(0), synced=[word], costs={"acme/x": learned}).price_of("acme/x")
        assert pricing.ceiling(after, {}).amount_micros == charge
