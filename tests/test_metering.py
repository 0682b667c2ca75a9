"""Verdicts: a row for every class of status, units as fal sends them and as it should never send them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abhiapi import pricing
from abhiapi.estimates import Estimate
from abhiapi.metering import Verdict, needs_answer, parse_units, released, shown_units, verdict
from abhiapi.money import parse_amount

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)

FLUX = pricing.Price(
    model="fal-ai/flux/dev",
    unit="megapixels",
    unit_price_usd=Decimal("0.02625"),
    fal_unit_price_usd=Decimal("0.025"),
    margin=Decimal("0.05"),
    hold_micros=None,
    source="P",
    updated_at="2026-04-16",
    estimate=Estimate(kind="megapixels", maximum=Decimal(4), defaults={"image_size": "landscape_4_3"}),
)
UPSCALER = pricing.Price(
    model="fal-ai/creative-upscaler",
    unit="compute seconds",
    unit_price_usd=Decimal("0.0011655"),
    fal_unit_price_usd=None,
    margin=None,
    hold_micros=parse_amount("100"),
    source="operator",
    updated_at="2026-11-22",
    estimate=Estimate(kind="none"),
)
FREE_OF_CHARGE = pricing.Price(
    model="fal-ai/gift",
    unit="images",
    unit_price_usd=Decimal(0),
    fal_unit_price_usd=Decimal(100_000),
    margin=None,
    hold_micros=None,
    source="operator",
    updated_at="2026-11-22",
    estimate=Estimate(kind="none"),
)
IMAGES: dict[str, Any] = {"images": [{"url": "https://v3b.fal.media/x.jpg", "width": 1024, "height": 768}]}

# What is not exactly one plain non-negative decimal: never money, never a crash.
BAD_UNITS = [
    ["-5"],
    ["+5"],
    ["NaN"],
    ["nan"],
    ["Infinity"],
    ["1e309"],
    ["1e3"],
    ["1" * 40],
    ["1" * 13],
    ["0." + "1" * 31],
    ["1,5"],
    ["1, 1"],
    [""],
    [" "],
    [" 1"],
    ["1 "],
    ["1\n"],
    ["1."],
    [".5"],
    ["0x1"],
    ["1_0"],
    ["\u0665"],
    ["\u00b2"],
    ["one"],
    ["null"],
    ["1" * 1_000_000],
    ["1", "1"],
    ["1", "2"],
    ["", ""],
]

STATUSES = [
    # status, end with units 2, end without units
    (100, "released not_billable_status", "released not_billable_status"),
    (199, "released not_billable_status", "released not_billable_status"),
    (200, "settled 52500", "settled 26250 catalogue no_units"),
    (201, "settled 52500", "settled 26250 catalogue no_units"),
    (299, "settled 52500", "settled 26250 catalogue no_units"),
    (300, "released not_billable_status", "released not_billable_status"),
    (307, "released not_billable_status", "released not_billable_status"),
    (399, "released not_billable_status", "released not_billable_status"),
    (400, "settled 52500", "released error_without_units"),
    (401, "released fal_refused_operator", "released fal_refused_operator"),
    (402, "released fal_refused_operator", "released fal_refused_operator"),
    (403, "released fal_refused_operator", "released fal_refused_operator"),
    (404, "settled 52500", "released error_without_units"),
    (422, "settled 52500", "released error_without_units"),
    (429, "settled 52500", "released error_without_units"),
    (499, "settled 52500", "released error_without_units"),
    (500, "released fal_5xx", "released fal_5xx"),
    (503, "released fal_5xx", "released fal_5xx"),
    (504, "released fal_5xx", "released fal_5xx"),
    (599, "released fal_5xx", "released fal_5xx"),
]


def told(end: Verdict) -> str:
    parts = [end.end]
    if end.end == "settled":
        parts.append(str(end.charge_micros))
    if end.usage_source == "catalogue":
        parts.append("catalogue")
    if end.reason:
        parts.append(end.reason)
    return " ".join(parts)


@pytest.mark.parametrize(("status", "with_units", "without_units"), STATUSES)
def test_every_class_of_status_ends_the_hold_as_the_contract_says(
    status: int, with_units: str, without_units: str
) -> None:
    assert told(verdict(FLUX, status, ["2"], {}, IMAGES)) == with_units
    assert told(verdict(FLUX, status, [], {}, IMAGES)) == without_units


@pytest.mark.parametrize("status", [200, 400, 422])
@pytest.mark.parametrize("zero", ["0", "0.0", "000", "0.00000000"])
def test_explicit_zero_units_charge_exactly_nothing(status: int, zero: str) -> None:
    end = verdict(FLUX, status, [zero], {}, None)
    assert end == Verdict("settled", 0, zero, "fal", 0, None)


@pytest.mark.parametrize("units", BAD_UNITS, ids=lambda units: repr(units)[:24])
def test_bad_units_are_never_money(units: list[str]) -> None:
    """A success is computed by the catalogue and marked, or kept for the operator; an error charges nothing."""
    assert parse_units(units) is None
    computed = verdict(FLUX, 200, units, {}, IMAGES)
    assert (computed.end, computed.charge_micros, computed.usage_source) == ("settled", 26_250, "catalogue")
    assert (computed.units, computed.reason) == ("1", "bad_units")
    kept = verdict(UPSCALER, 200, units, {}, IMAGES)
    assert (kept.end, kept.charge_micros, kept.reason) == ("unknown", 0, "bad_units")
    assert kept.units is not None
    assert len(kept.units) <= 120
    assert told(verdict(FLUX, 422, units, {}, None)) == "released error_without_units"
    assert told(verdict(FLUX, 502, units, {}, None)) == "released fal_5xx"


@pytest.mark.parametrize(
    ("text", "units"),
    [("1", "1"), ("1.0", "1"), ("38.8", "38.8"), ("0.02", "0.02"), ("8.439999999999998", "8.439999999999998")],
)
def test_recorded_units_are_read_exactly(text: str, units: str) -> None:
    assert parse_units([text]) == Decimal(units)
    assert verdict(FLUX, 200, [text], {}, None).units == text


def test_the_charge_is_units_times_our_price_and_the_cost_units_times_fals() -> None:
    end = verdict(FLUX, 200, ["8.439999999999998"], {}, None)
    assert end.charge_micros == 221_550  # 0.22154999999999994750 USD
    assert end.fal_cost_nano_usd == 211_000_000  # 0.21099999999999995 USD
    assert (end.usage_source, end.reason) == ("fal", None)


def test_the_cost_is_unknown_where_fals_price_is() -> None:
    end = verdict(UPSCALER, 200, ["10"], {}, None)
    assert (end.charge_micros, end.fal_cost_nano_usd) == (11_655, None)


@pytest.mark.parametrize("price", [FLUX, FREE_OF_CHARGE])
def test_units_beyond_the_ledger_are_left_to_the_operator(price: pricing.Price) -> None:
    """Also where only fal's cost is beyond it: the operator's own price may be nothing."""
    end = verdict(price, 200, ["999999999999.9"], {}, None)
    assert end == Verdict("unknown", units="999999999999.9", reason="absurd_units")


@pytest.mark.parametrize(
    ("status", "units", "needed"),
    [
        (200, [], True),
        (200, ["-5"], True),
        (299, ["1", "1"], True),
        (200, ["0"], False),
        (199, [], False),
        (300, [], False),
        (422, [], False),
        (500, [], False),
    ],
)
def test_the_answer_is_read_only_for_a_success_without_units(status: int, units: list[str], needed: bool) -> None:
    assert needs_answer(status, units) is needed


def test_a_release_keeps_what_fal_sent_in_vain() -> None:
    assert verdict(FLUX, 500, ["7"], {}, None) == released("fal_5xx", units="7")
    assert verdict(FLUX, 500, [], {}, None) == Verdict("released", units=None, reason="fal_5xx")
    assert shown_units(["1", "2"]) == "1, 2"
    assert shown_units([]) is None


@PROPERTY
@given(
    price=st.sampled_from([FLUX, UPSCALER, FREE_OF_CHARGE]),
    status=st.integers(100, 599),
    units=st.lists(st.one_of(st.text("0123456789.+-eE,NaN ", max_size=50), st.text(max_size=4)), max_size=3),
)
def test_no_header_makes_a_negative_or_unfounded_charge(price: pricing.Price, status: int, units: list[str]) -> None:
    end = verdict(price, status, units, {}, None)
    assert end.charge_micros >= 0
    if end.end == "settled":
        assert parse_units(units) is not None  # without an answer the catalogue of these prices computes nothing
        assert end.charge_micros == pricing.charge(price, Decimal(units[0]))
        assert end.fal_cost_nano_usd is None or end.fal_cost_nano_usd < 2**63
    else:
        assert end.charge_micros == 0
        assert end.reason is not None


def test_units_that_no_call_can_cost_are_left_to_the_operator() -> None:
    """A fault upstream must not become a debt of millions; a hundred thousand dollars is still charged in full."""
    flux = pricing.Catalogue(pricing.shipped_rules(), (), Decimal("0.05")).price_of("fal-ai/flux/dev")
    assert verdict(flux, 200, ["3800000"], {}, None).end == "settled"
    assert verdict(flux, 200, ["30000000000"], {}, None) == Verdict(
        "unknown", units="30000000000", reason="absurd_units"
    )
