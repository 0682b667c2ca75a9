"""Holds and computed charges: the formulas one by one, and what must be true of them for any JSON."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abhiapi import estimates, jsonbytes, pricing
from abhiapi.errors import BadAmount, UnpricedModel
from abhiapi.estimates import Estimate, Rate
from abhiapi.money import MICROS_MAX, Micros
from abhiapi.pricing import Catalogue, OwnPrice, Price, PriceRule

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)
MARGIN = Decimal("0.05")
SHIPPED = Catalogue(pricing.shipped_rules(), (), MARGIN)
SHIPPED_PRICES = list(SHIPPED)

MEGAPIXELS = Estimate(kind="megapixels", maximum=Decimal(4), defaults={"image_size": "landscape_4_3"})
OUTPUT = Estimate(kind="output_megapixels", maximum=Decimal(17))
SECONDS = Estimate(
    kind="seconds",
    maximum=Decimal(15),
    defaults={"duration": "5", "generate_audio": True},
    rates=(
        Rate(Decimal("0.5"), {"generate_audio": False}),
        Rate(Decimal("1.5"), {"generate_audio": True, "voice_ids": "*"}),
        Rate(Decimal(1), {"generate_audio": True, "elements": ""}),
    ),
    surcharge=Decimal("0.25"),
    open_params=("multi_prompt",),
)
TOKENS = Estimate(
    kind="tokens",
    maximum=Decimal(15),
    defaults={"resolution": "720p"},
    size_by_resolution={"480p": 640 * 640, "720p": 1280 * 720},
)
BATCHES = Estimate(kind="images", batch_param="max_images", rates=(Rate(Decimal(2)),))
TEXT = Estimate(kind="characters", maximum=Decimal(5))
UNKNOWN = Estimate(kind="none", maximum=Decimal(3))

HELD: list[tuple[Estimate, dict[str, Any], str]] = [
    # estimate, input, units held
    (MEGAPIXELS, {}, "1"),
    (MEGAPIXELS, {"image_size": "square_hd"}, "2"),  # 1.05 million pixels: rounded up, though fal bills 1
    (MEGAPIXELS, {"image_size": "portrait_16_9", "num_images": 3}, "3"),
    (MEGAPIXELS, {"image_size": {"width": 1536, "height": 1024}}, "2"),
    (MEGAPIXELS, {"image_size": {"width": "1536", "height": " +1_024 "}, "num_images": "4"}, "8"),
    (MEGAPIXELS, {"image_size": {"width": 14142, "height": 14142}}, "200"),
    (MEGAPIXELS, {"image_size": {"width": 10**30, "height": 1}}, "1"),
    (MEGAPIXELS, {"image_size": {"width": 1}}, "4"),
    (MEGAPIXELS, {"image_size": "auto"}, "4"),
    (MEGAPIXELS, {"image_size": None, "width": 1, "height": 1}, "4"),
    (MEGAPIXELS, {"num_images": 18446744073686646784}, "10000"),
    (MEGAPIXELS, {"num_images": -1}, "4"),
    (MEGAPIXELS, {"num_images": Decimal("2.5")}, "4"),
    (MEGAPIXELS, {"num_images": "many"}, "4"),
    (MEGAPIXELS, {"num_images": None}, "4"),
    (MEGAPIXELS, {"num_images": True}, "4"),
    (OUTPUT, {"upscale_factor": 4}, "17"),
    (SECONDS, {}, "5.25"),
    (SECONDS, {"generate_audio": False}, "2.75"),
    (SECONDS, {"generate_audio": "false", "duration": "10"}, "5.25"),
    (SECONDS, {"generate_audio": 0}, "7.75"),  # to fal this may well be false; to us it says nothing
    (SECONDS, {"generate_audio": None}, "7.75"),
    (SECONDS, {"voice_ids": ["a"]}, "7.75"),
    (SECONDS, {"voice_ids": []}, "5.25"),
    (SECONDS, {"elements": [{"voice_id": "a"}]}, "7.75"),
    (SECONDS, {"duration": "8s"}, "8.25"),
    (SECONDS, {"duration": Decimal("2.5")}, "2.75"),
    (SECONDS, {"duration": "auto"}, "15.25"),
    (SECONDS, {"duration": "0"}, "15.25"),
    (SECONDS, {"duration": Decimal("NaN")}, "15.25"),
    (SECONDS, {"duration": 10**4000}, "10000.25"),
    (SECONDS, {"multi_prompt": [{"prompt": "a", "duration": "15"}]}, "15.25"),
    (SECONDS, {"multi_prompt": []}, "5.25"),
    (TOKENS, {"duration": "4", "resolution": "480p"}, "38.8"),  # recorded (fal-protocol 8.2)
    (TOKENS, {"duration": "4", "resolution": "480P"}, "38.8"),
    (TOKENS, {"duration": 4}, "87.3"),
    (TOKENS, {"duration": 4, "resolution": "8k"}, "87.3"),
    (TOKENS, {"resolution": ["480p"]}, "324.9"),
    (BATCHES, {}, "2"),
    (BATCHES, {"num_images": 2, "max_images": 6}, "24"),
    (BATCHES, {"num_images": "2", "max_images": "x"}, "16"),
    (TEXT, {"text": ""}, "1"),
    (TEXT, {"text": "x" * 1000}, "1"),
    (TEXT, {"text": "\u00e9" * 1001}, "2"),
    (TEXT, {"text": 7}, "5"),
    (UNKNOWN, {}, "3"),
    (UNKNOWN, {"num_images": 2}, "6"),
    (Estimate(kind="fixed", rates=(Rate(Decimal(1), {"duration": "6"}), Rate(Decimal(2)))), {"duration": 6}, "1"),
    (Estimate(kind="fixed", rates=(Rate(Decimal(1), {"duration": "6"}), Rate(Decimal(2)))), {"duration": 9}, "2"),
    (Estimate(kind="fixed", rates=(Rate(Decimal(2), {"mode": "1"}), Rate(Decimal(1)))), {"mode": True}, "1"),
    (Estimate(kind="fixed", rates=(Rate(Decimal(2), {"mode": "1"}), Rate(Decimal(1)))), {"mode": 10**5000}, "1"),
]

ANSWERED: list[tuple[Estimate, dict[str, Any], Any, str | None]] = [
    # estimate, input, fal's answer, units computed (None: cannot be known)
    (MEGAPIXELS, {}, {"images": [{"width": 1024, "height": 768}]}, "1"),
    (MEGAPIXELS, {}, {"images": [{"width": 1376, "height": 768}]}, "1"),  # recorded: 1.057 million pixels bill as 1
    (MEGAPIXELS, {}, {"images": [{"width": 1038, "height": 1010}]}, "1"),
    (MEGAPIXELS, {}, {"images": [{"width": 1536, "height": 1024}]}, "2"),
    (MEGAPIXELS, {}, {"images": [{"width": 64, "height": 64}] * 4}, "4"),
    (MEGAPIXELS, {}, {"images": [{"width": None, "height": None}]}, "1"),
    (MEGAPIXELS, {"image_size": {"width": 2048, "height": 1024}}, {"images": [{"url": "x"}] * 2}, "4"),
    (MEGAPIXELS, {"image_size": "auto"}, {"images": [{"width": None, "height": None}]}, None),
    (MEGAPIXELS, {"image_size": "auto"}, {"images": ["x"]}, None),
    (MEGAPIXELS, {}, {"images": []}, None),
    (MEGAPIXELS, {}, {"images": None}, None),
    (MEGAPIXELS, {}, None, None),
    (OUTPUT, {}, {"image": {"width": 4096, "height": 4096}}, "17"),
    (OUTPUT, {}, {"image": {"width": 20_000, "height": 10_000}}, "200"),
    (OUTPUT, {"image_size": "square"}, {"image": {"url": "x"}}, None),
    (OUTPUT, {}, {"image": "https://v3b.fal.media/x.png"}, None),
    (BATCHES, {"num_images": 2, "max_images": 6}, {"images": [{}] * 5}, "10"),
    (BATCHES, {"num_images": 2}, {}, None),
    (Estimate(kind="images"), {"num_images": 3}, {}, "3"),
    (Estimate(kind="images"), {"num_images": "three"}, {}, None),
    (SECONDS, {"duration": "10"}, {"video": {"duration": Decimal("10.04")}}, "10.25"),
    (SECONDS, {"duration": "auto"}, {"video": {"duration": Decimal("6.5")}}, "6.75"),
    (SECONDS, {"duration": "auto"}, {"video": {"url": "x"}}, None),
    (SECONDS, {"duration": "auto"}, {"video": "x"}, None),
    (SECONDS, {"duration": "auto"}, {}, None),
    (SECONDS, {"elements": [1]}, {}, None),
    (TOKENS, {"duration": "4"}, {"video": {"width": 640, "height": 640}}, "38.8"),
    (TOKENS, {"duration": "4"}, {"video": {"url": "x"}, "seed": 1}, None),
    (TOKENS, {"duration": "auto"}, {"video": {"width": 640, "height": 640}}, None),
    (TEXT, {"text": "x" * 1234}, {"audio": {}}, "1.234"),
    (TEXT, {}, {}, None),
    (Estimate(kind="fixed"), {}, None, "1"),
    (UNKNOWN, {}, {"images": [{"width": 1, "height": 1}]}, None),
]


@pytest.mark.parametrize(("estimate", "call_input", "units"), HELD)
def test_a_hold_counts_units_at_their_dearest(estimate: Estimate, call_input: dict[str, Any], units: str) -> None:
    assert estimates.units_ceiling(estimate, call_input)[0] == Decimal(units)


@pytest.mark.parametrize(("estimate", "call_input", "answer", "units"), ANSWERED)
def test_units_are_computed_from_the_answer_or_not_at_all(
    estimate: Estimate, call_input: dict[str, Any], answer: Any, units: str | None
) -> None:
    computed = pricing.units_from_answer(estimate, call_input, answer)
    assert computed == (None if units is None else Decimal(units))


def price_of(estimate: Estimate, unit_price: str = "0.1", hold: Micros | None = None) -> Price:
    rule = PriceRule("fal-ai/x", "things", Decimal(unit_price), "P", "2026-11-22", estimate, hold)
    return Catalogue([rule], (), MARGIN).price_of("fal-ai/x")


def test_the_basis_of_a_hold_is_told_in_words() -> None:
    told = [
        (price_of(MEGAPIXELS), {"num_images": 2}, "2 images of up to 1 MP = 2 x 0.105 USD (things)"),
        (price_of(BATCHES), {}, "1 image = 2 x 0.105 USD (things)"),
        (price_of(SECONDS), {"duration": "8s"}, "8 s = 8.25 x 0.105 USD (things)"),
        (price_of(TEXT), {"text": "x" * 1500}, "up to 2000 characters = 2 x 0.105 USD (things)"),
        (price_of(UNKNOWN), {}, "the most to be expected = 3 x 0.105 USD (things)"),
        (
            price_of(UNKNOWN, hold=Micros(26_250)),
            {},
            "26.25 credits, a guess until 100 calls of this model have been charged",
        ),
        (price_of(Estimate(kind="fixed")), {}, "one call = 1 x 0.105 USD (things)"),
        (price_of(TOKENS), {"duration": 4}, "4 s of video tokens = 87.3 x 0.105 USD (things)"),
    ]
    assert [pricing.ceiling(price, call_input).basis for price, call_input, _ in told] == [basis for *_, basis in told]


def test_a_fixed_hold_stands_even_if_it_is_nothing() -> None:
    assert pricing.ceiling(price_of(UNKNOWN, hold=Micros(0)), {}).amount_micros == 0


def test_an_absurd_hold_is_the_largest_amount_there_is() -> None:
    assert pricing.ceiling(price_of(UNKNOWN, "100000"), {"num_images": 10_000}).amount_micros == MICROS_MAX


@pytest.mark.parametrize("units", ["-1", "-0.0000001", "NaN", "-NaN", "sNaN", "Infinity", "-Infinity", "1e999999"])
def test_units_that_are_no_quantity_are_no_charge(units: str) -> None:
    with pytest.raises(BadAmount):
        pricing.charge(price_of(UNKNOWN), Decimal(units))


@pytest.mark.parametrize(
    ("text", "value"), [("0", "0"), ("0.05", "0.05"), ("100000", "100000"), ("0.000000000001", "0.000000000001")]
)
def test_prices_are_read_exactly(text: str, value: str) -> None:
    assert pricing.parse_price(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "+1",
        "1e3",
        "NaN",
        "inf",
        ".5",
        "5.",
        "1,5",
        " 1",
        "100000.1",
        "999999",
        "1" * 7,
        "0." + "1" * 13,
        "\u0665",
    ],
)
def test_bad_prices_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"decimal|larger"):
        pricing.parse_price(text)


@pytest.mark.parametrize(
    ("value", "text"), [("0.10", "0.1"), ("1E+3", "1000"), ("26.250", "26.25"), ("0.0", "0"), ("12", "12")]
)
def test_decimals_print_plainly(value: str, text: str) -> None:
    assert pricing.decimal_text(Decimal(value)) == text


def test_long_text_from_outside_is_cut() -> None:
    assert pricing.shown("x" * 120) == "x" * 120
    assert pricing.shown("x" * 121) == "x" * 117 + "..."


# --- the catalogue and the operator's own prices ----------------------------------------------------------------


def own(**fields: Any) -> OwnPrice:
    given = {"model": "fal-ai/flux/dev", "unit": None, "unit_price_usd": None, "margin": None, "hold_micros": None}
    return OwnPrice(**{**given, "updated_at": "2026-11-22T00:00:00Z", **fields})


def test_the_mirrored_price_is_fals_with_the_margin() -> None:
    price = SHIPPED.price_of("fal-ai/flux/dev")
    assert (price.unit_price_usd, price.fal_unit_price_usd, price.margin) == (
        Decimal("0.02625"),
        Decimal("0.025"),
        MARGIN,
    )
    assert price.identity() == ("fal-ai/flux/dev", "megapixels", "0.02625", "0.025", "P, L")


def test_the_operators_price_stands_over_fals() -> None:
    mine = own(unit="images", unit_price_usd=Decimal("0.5"), hold_micros=Micros(7))
    price = Catalogue(pricing.shipped_rules(), [mine], MARGIN).price_of("fal-ai/flux/dev")
    assert (price.unit, price.unit_price_usd, price.hold_micros, price.margin) == ("images", Decimal("0.5"), 7, None)
    assert (price.source, price.updated_at) == ("operator", "2026-11-22T00:00:00Z")
    assert price.fal_unit_price_usd == Decimal("0.025")
    assert price.estimate.kind == "megapixels"


@pytest.mark.parametrize(("margin", "unit_price"), [(Decimal("0.2"), "0.03"), (Decimal(0), "0.025"), (None, "0.02625")])
def test_the_operators_margin_stands_over_the_general_one(margin: Decimal | None, unit_price: str) -> None:
    price = Catalogue(pricing.shipped_rules(), [own(margin=margin)], MARGIN).price_of("fal-ai/flux/dev")
    assert price.unit_price_usd == Decimal(unit_price)
    assert price.margin == (MARGIN if margin is None else margin)


def test_a_hold_of_the_catalogue_survives_the_operators_price() -> None:
    mine = own(model="fal-ai/creative-upscaler", unit_price_usd=Decimal(1))
    price = Catalogue(pricing.shipped_rules(), [mine], MARGIN).price_of("fal-ai/creative-upscaler")
    assert price.hold_micros == 100_000


@pytest.mark.parametrize(
    ("unit", "held_micros"), [("megapixels", 4), ("seconds", 15), ("compute seconds", 60), ("jobs", 4), (None, 4)]
)
def test_a_model_that_only_the_operator_prices_is_held_by_its_unit(unit: str | None, held_micros: int) -> None:
    mine = own(model="acme/new", unit=unit, unit_price_usd=Decimal("0.000001"))
    price = Catalogue((), [mine], MARGIN).price_of("acme/new")
    assert pricing.ceiling(price, {}).amount_micros == held_micros
    assert pricing.ceiling(price, {"num_images": 3}).amount_micros == held_micros * 3
    assert pricing.units_from_answer(price.estimate, {}, {"images": [{}]}) is None
    assert price.identity() == ("acme/new", unit or "units", "0.000001", "", "operator")


def test_a_margin_over_an_unknown_price_prices_nothing_and_harms_no_other_model() -> None:
    """As after an upgrade whose price file has dropped a model that the operator had set a margin for."""
    mine = [own(model="acme/gone", margin=Decimal("0.1")), own(model="acme/mine", unit_price_usd=Decimal("0.01"))]
    catalogue = Catalogue((), mine, MARGIN)
    assert catalogue.unpriceable == ("acme/gone",)
    assert [price.model for price in catalogue] == ["acme/mine"]


def test_an_unknown_model_is_never_free() -> None:
    assert "fal-ai/unknown" not in SHIPPED
    with pytest.raises(UnpricedModel, match="'fal-ai/unknown' has no price here"):
        SHIPPED.price_of("fal-ai/unknown")
    with pytest.raises(UnpricedModel) as refusal:
        SHIPPED.price_of("x" * 1_000_000)
    assert len(refusal.value.message) < 400


def test_the_catalogue_is_listed_by_model() -> None:
    models = [price.model for price in SHIPPED]
    assert models == sorted(models)
    assert len(SHIPPED) == len(set(models)) == len(models)


# --- whatever the JSON ------------------------------------------------------------------------------------------

PARAMS = sorted(
    {name for price in SHIPPED_PRICES for rate in price.estimate.rates for name in rate.when}
    | {name for price in SHIPPED_PRICES for name in (*price.estimate.defaults, *price.estimate.open_params)}
    | {"num_images", "max_images", "text", "prompt", "width", "height", "images", "image", "video"}
)
TRICKY: list[Any] = [
    18446744073686646784,
    -18446744073686646784,
    10**4000,
    "NaN",
    "-Infinity",
    "1e999999",
    "9" * 40,
    "auto",
    "\u0665",
    "\ud800",
    "5s",
    "*",
    Decimal("NaN"),
    Decimal("sNaN"),
    Decimal("-Infinity"),
    Decimal("1e999999"),
    Decimal("1e-999999"),
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.decimals(),
    st.text(max_size=5),
    st.sampled_from(TRICKY),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(PARAMS), inner, max_size=3)),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from(PARAMS), JUNK, max_size=6)


@PROPERTY
@given(price=st.sampled_from(SHIPPED_PRICES), call_input=OBJECTS, answer=st.one_of(st.none(), OBJECTS))
def test_no_json_makes_a_hold_negative_or_raise(price: Price, call_input: Any, answer: Any) -> None:
    assert 0 < pricing.ceiling(price, call_input).amount_micros <= MICROS_MAX
    computed = pricing.units_from_answer(price.estimate, call_input, answer)
    assert computed is None or (computed.is_finite() and computed >= 0)


def test_no_depth_of_nesting_is_walked() -> None:
    nested: Any = "x"
    for level in range(50_000):
        nested = {"width": nested, "height": 1} if level % 2 else [nested]
    call_input = dict.fromkeys(PARAMS, nested)
    for price in SHIPPED_PRICES:
        assert pricing.ceiling(price, call_input).amount_micros > 0
        assert pricing.units_from_answer(price.estimate, call_input, call_input) in (None, 1)


UNITS = st.decimals(min_value=0, max_value=10**6, allow_nan=False, allow_infinity=False, places=12)


@PROPERTY
@given(price=st.sampled_from(SHIPPED_PRICES), one=UNITS, other=UNITS)
def test_charges_are_never_negative_and_grow_with_the_units(price: Price, one: Decimal, other: Decimal) -> None:
    fewer, more = sorted((one, other))
    assert 0 <= pricing.charge(price, fewer) <= pricing.charge(price, more)
    assert pricing.charge(price, fewer + more) <= pricing.charge(price, fewer) + pricing.charge(price, more)
    assert pricing.charge(price, Decimal(0)) == 0


@pytest.mark.parametrize("duration", ["1e-2000000", "1e-9", "0.0001", "0", "-5", "1e-200000000", "1e200000000"])
def test_no_duration_makes_a_call_cheap_or_an_estimate_long(duration: str) -> None:
    """Found in review: a tiny duration held nothing, and printing it in full took all memory."""
    price = SHIPPED.price_of("fal-ai/kling-video/v2/master/text-to-video")
    asked = jsonbytes.parse(b'{"duration": %s}' % duration.encode())
    held = pricing.ceiling(price, asked)
    assert held.amount_micros >= price.unit_price_usd * 1_000_000
    assert len(held.basis) < 200


def test_a_plain_number_has_no_exponent_and_no_trailing_zeros() -> None:
    assert [str(pricing.plain(Decimal(text))) for text in ("1E+3", "0.10", "5.000")] == ["1000", "0.1", "5"]


def test_a_formula_that_cannot_see_the_units_holds_what_calls_have_cost() -> None:
    """The size of what an upscaler makes: where 99 of 100 calls cost more than the formula says, that is held."""
    catalogue = pricing.Catalogue(pricing.shipped_rules(), [], Decimal("0.05"))
    known = next(price for price in catalogue if price.estimate.kind == "output_megapixels" and not price.hold_micros)
    plain = pricing.ceiling(known, {})
    dear = Micros(plain.amount_micros + 1)
    learned = pricing.ceiling(replace(known, costs=pricing.Costs(100, dear, dear)), {})
    assert (learned.amount_micros, "99 of 100" in learned.basis) == (dear, True)
    cheap = pricing.ceiling(replace(known, costs=pricing.Costs(100, Micros(1), Micros(1))), {})
    assert cheap.amount_micros == plain.amount_micros


def test_a_price_far_above_the_rules_is_held_for_whole_and_a_guess() -> None:
    """fal counts larger units now: the hold is the formula at the new price, and a charge is never computed from it."""
    (rule, *_) = pricing.shipped_rules()
    dearer = rule.fal_unit_price_usd * 1000
    word = pricing.FalPrice(rule.model, rule.unit, dearer, "priced", "fal api", "")
    before = pricing.Catalogue((rule,), (), Decimal(0)).price_of(rule.model)
    after = pricing.Catalogue((rule,), (), Decimal(0), synced=[word]).price_of(rule.model)
    assert after.estimate.is_guess
    assert pricing.ceiling(after, {}).amount_micros == 1000 * pricing.ceiling(before, {}).amount_micros
