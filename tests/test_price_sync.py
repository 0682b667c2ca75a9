"""Taking fal's prices over: what an answer changes, what is refused, and that nothing ever makes a call free."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abhiapi import pricing
from abhiapi.errors import BadPriceAnswer, UnpricedModel
from abhiapi.estimates import Estimate
from abhiapi.money import MICROS_MAX, Micros
from abhiapi.price_sync import Answer, Plan, Quote, is_placeholder, plan, problem_of
from abhiapi.price_terms import Standing
from abhiapi.pricing import Catalogue, Costs, FalPrice, OwnPrice, PriceRule

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)
SOURCE = "fal api"
FLUX, KLING, ODD = "fal-ai/flux/dev", "fal-ai/kling-video/v2.1/pro/image-to-video", "acme/odd"
RULES = pricing.shipped_rules()
MARGIN = Decimal("0.05")


def quote(model: str, price: str, unit: str = "images", currency: str = "USD") -> Quote:
    return Quote(model, unit, Decimal(price), currency)


def answer(*quotes: Quote, listed: tuple[str, ...] = ()) -> Answer:
    return Answer([*(one.model for one in quotes), *listed], {one.model: one for one in quotes})


def planned(known: list[FalPrice], said: Answer, *, force: bool = False) -> Plan:
    return plan(known, RULES, said, source=SOURCE, force=force)


def after(known: list[FalPrice], made: Plan) -> list[FalPrice]:
    """The words on each model once a plan is written down."""
    return list({word.model: word for word in [*known, *made.words]}.values())


def word(model: str, price: str | None, unit: str = "images", standing: Standing = "priced") -> FalPrice:
    return FalPrice(model, unit, None if price is None else Decimal(price), standing, SOURCE, "2026-11-22")


def catalogue(known: list[FalPrice], *mine: OwnPrice, rules: tuple[PriceRule, ...] = RULES) -> Catalogue:
    return Catalogue(rules, mine, MARGIN, synced=known)


def own(model: str, *, price: str | None = None, margin: str | None = None, hold: int | None = None) -> OwnPrice:
    return OwnPrice(
        model,
        None if price is None else "images",
        None if price is None else Decimal(price),
        None if margin is None else Decimal(margin),
        None if hold is None else Micros(hold),
        "2026-11-22",
    )


def test_every_model_of_fals_gets_fals_price_and_our_margin() -> None:
    made = planned([], answer(quote("acme/new", "0.04"), quote(FLUX, "0.03", "megapixels")))
    prices = catalogue(made.words)
    assert prices.price_of("acme/new").unit_price_usd == Decimal("0.042")
    assert prices.price_of(FLUX).unit_price_usd == Decimal("0.0315")
    assert prices.price_of(FLUX).estimate.kind == "megapixels"  # the shipped formula stays
    assert [change.model for change in made.new] == ["acme/new"]
    assert [(change.before_usd, change.after_usd) for change in made.changed] == [(Decimal("0.025"), Decimal("0.03"))]


def test_only_changes_are_written_down() -> None:
    said = answer(quote("acme/new", "0.04"), quote(FLUX, "0.025", "megapixels"))
    first = planned([], said)
    assert len(first.words) == 2
    second = planned(first.words, said)
    assert (second.words, second.new, second.changed) == ([], [], [])
    third = planned(first.words, answer(quote("acme/new", "0.05"), quote(FLUX, "0.025", "megapixels")))
    assert [one.model for one in third.words] == ["acme/new"]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (quote(ODD, "-0.01"), "negative"),
        (quote(ODD, "NaN"), "no number"),
        (quote(ODD, "Infinity"), "no number"),
        (quote(ODD, "100001"), "larger than"),
        (quote(ODD, "1e-30"), "digits"),
        (quote(ODD, "0.04", currency="EUR"), "not in USD"),
        (quote(ODD, "0.04", unit=" "), "unit"),
        (quote(ODD, "0.04", unit="x" * 61), "its unit has more than 60 characters"),
        (quote("no-model", "0.04"), "no model"),
    ],
)
def test_a_price_that_makes_no_sense_is_refused_and_the_old_one_stays(bad: Quote, why: str) -> None:
    """failures.md 20: a malformed price never becomes a price of nothing."""
    good = [quote(FLUX, "0.025", "megapixels"), quote("acme/new", "0.04")]
    assert why in (problem_of(bad) or "")
    known = [word(ODD, "0.5"), word("no-model", "0.5")]
    made = planned(known, answer(*good, bad, listed=("no-model", ODD)))
    assert why in next(change.why or "" for change in made.refused if change.model == bad.model)
    assert catalogue(after(known, made)).price_of(bad.model).fal_unit_price_usd == Decimal("0.5")
    fresh = planned([], answer(*good, bad))
    with pytest.raises(UnpricedModel):
        catalogue(fresh.words).price_of(bad.model)


def test_names_that_are_too_long_are_refused_and_the_others_taken() -> None:
    """They would stand in every row of a roll-up; and in the log they are cut."""
    longest, longer = "acme/" + "n" * 195, "acme/" + "n" * 196
    said = answer(
        quote(longest, "0.04"),
        quote("acme/unit", "0.04", unit="u" * 61),
        quote("acme/new", "0.04", unit="u" * 60),
        listed=(longer, "acme/" + "x" * 5000),
    )
    made = planned([], said)
    assert sorted(change.why or "" for change in made.refused) == [
        "its name has more than 200 characters",
        "its name has more than 200 characters",
        "its unit has more than 60 characters",
    ]
    assert max(len(change.model) for change in made.refused) <= 120
    assert {one.model for one in made.words if one.standing == "priced"} == {longest, "acme/new"}
    assert all(len(one.model) <= 200 for one in made.words)


@pytest.mark.parametrize("price", ["4.01", "0.00039"])
def test_a_price_that_changed_more_than_a_hundred_times_needs_a_word(price: str) -> None:
    known = [word("acme/new", "0.04"), word(FLUX, "0.025", "megapixels")]
    said = answer(quote("acme/new", price), quote(FLUX, "0.026", "megapixels"))
    made = planned(known, said)
    assert [change.model for change in made.refused] == ["acme/new"]
    assert "100 times" in (made.refused[0].why or "")
    assert catalogue(after(known, made)).price_of("acme/new").fal_unit_price_usd == Decimal("0.04")
    assert catalogue(after(known, made)).price_of(FLUX).fal_unit_price_usd == Decimal("0.026")
    forced = planned(known, said, force=True)
    assert forced.refused == []
    assert catalogue(after(known, forced)).price_of("acme/new").fal_unit_price_usd == Decimal(price)


@pytest.mark.parametrize("price", ["4", "0.0004"])
def test_a_price_that_changed_a_hundred_times_exactly_is_taken(price: str) -> None:
    made = planned([word("acme/new", "0.04")], answer(quote("acme/new", price)))
    assert (made.refused, len(made.words)) == ([], 1)


@pytest.mark.parametrize(
    ("unit", "price", "is_one"),
    [
        ("compute seconds", "0.00017", True),
        ("compute second", "0.00007", True),
        ("Compute Seconds", "0.0004999", True),
        ("compute seconds", "0.0005", False),
        ("compute seconds", "0.00111", False),
        ("images", "0", True),
        ("1000 tokens", "0.00017", False),
    ],
)
def test_placeholders_are_recognised(unit: str, price: str, is_one: bool) -> None:
    assert is_placeholder(unit, Decimal(price)) is is_one


def test_a_placeholder_is_no_price_to_sell_by() -> None:
    """fal-protocol 8.3: a tenth of a cent for a clip that costs half a dollar (contract 3.5: never free)."""
    said = answer(quote(FLUX, "0.025", "megapixels"), quote(KLING, "0.00017", "compute seconds"), quote(ODD, "0"))
    made = planned([], said)
    assert [change.model for change in made.placeholder] == [ODD, KLING]
    prices = catalogue(made.words)
    assert prices.price_of(KLING).fal_unit_price_usd == Decimal("0.098")  # the shipped price goes on
    with pytest.raises(UnpricedModel):
        prices.price_of(ODD)
    assert catalogue(made.words, own(ODD, price="0.3")).price_of(ODD).unit_price_usd == Decimal("0.3")
    assert catalogue(made.words, own(ODD, margin="0.3")).unpriceable == (ODD,)


def test_a_placeholder_does_not_replace_a_price() -> None:
    known = [word(ODD, "0.01"), word(FLUX, "0.025", "megapixels")]
    said = answer(quote(ODD, "0.0002", "compute seconds"), quote(FLUX, "0.025", "megapixels"))
    made = planned(known, said)
    assert [change.model for change in made.refused] == [ODD]
    assert catalogue(after(known, made)).price_of(ODD).fal_unit_price_usd == Decimal("0.01")
    back = planned([word(ODD, "0.0002", "compute seconds", "placeholder")], answer(quote(ODD, "0.5")))
    assert (back.refused, [change.model for change in back.new]) == ([], [ODD])  # from no price to one is no jump


def test_a_model_that_is_gone_keeps_its_last_price() -> None:
    known = [word(ODD, "0.01"), word(FLUX, "0.025", "megapixels"), word("acme/new", "0.04")]
    made = planned(known, answer(quote(FLUX, "0.025", "megapixels"), quote("acme/new", "0.04")))
    assert [change.model for change in made.gone] == [ODD]
    gone = after(known, made)
    assert catalogue(gone).price_of(ODD).fal_unit_price_usd == Decimal("0.01")
    assert planned(gone, answer(quote(FLUX, "0.025", "megapixels"), quote("acme/new", "0.04"))).words == []
    back = planned(gone, answer(*(quote(one.model, str(one.unit_price_usd), one.unit) for one in known)))
    assert [one.standing for one in back.words] == ["priced"]
    far = planned(gone, answer(quote(ODD, "9"), quote(FLUX, "0.025", "megapixels"), quote("acme/new", "0.04")))
    assert [change.model for change in far.refused] == [ODD]  # what it last cost is remembered


def test_a_model_without_a_price_is_refused_by_name_and_keeps_the_last_one() -> None:
    known = [word(ODD, "0.01"), word(FLUX, "0.025", "megapixels")]
    made = planned(known, answer(quote(FLUX, "0.025", "megapixels"), listed=(ODD, "acme/never")))
    assert [change.model for change in made.refused] == [ODD]
    assert [change.model for change in made.unpriced] == ["acme/never"]
    prices = catalogue(after(known, made))
    assert ODD in prices
    assert "acme/never" not in prices


@pytest.mark.parametrize(
    "said",
    [
        answer(),
        answer(listed=("acme/a", "acme/b", "acme/c", "acme/d")),
        answer(quote("acme/a", "0.04")),
        answer(quote("acme/a", "0.04"), listed=("acme/b", "acme/c", "acme/d")),
        answer(quote("acme/a", "0.04"), *(quote(f"acme/{name}", "0.04", currency="EUR") for name in "bcd")),
    ],
    ids=["empty", "no prices", "few models", "few prices", "another currency"],
)
def test_a_partial_answer_changes_nothing_at_all(said: Answer) -> None:
    """failures.md 20: an answer cut short is no change of prices."""
    with pytest.raises(BadPriceAnswer, match="stay"):
        planned([word(f"acme/{name}", "0.04") for name in "abcd"], said)


MODELS = st.sampled_from(["acme/a", "acme/b", "acme/c", FLUX, KLING])
PRICES = st.one_of(
    st.decimals(allow_nan=True, allow_infinity=True),
    st.decimals(min_value=0, max_value=1, places=8),
    st.sampled_from([Decimal(0), Decimal("-0"), Decimal("0.00017"), Decimal("1e-12"), Decimal("1e400")]),
)
QUOTES = st.builds(
    Quote, MODELS, st.sampled_from(["images", "compute seconds", "", "seconds"]), PRICES,
    st.sampled_from(["USD", "usd", "EUR"]),
)  # fmt: skip
KNOWN = st.dictionaries(MODELS, st.decimals(min_value=Decimal("0.000001"), max_value=100, places=6), max_size=5)


@PROPERTY
@given(KNOWN, st.lists(QUOTES, max_size=5), st.lists(MODELS, unique=True))
def test_nothing_that_fal_answers_makes_a_model_free_or_loses_its_price(
    known: dict[str, Decimal], quotes: list[Quote], listed: list[str]
) -> None:
    """Whatever comes: a model sold before is sold on, at a price above zero within a hundred times the old one."""
    before = [word(model, str(price)) for model, price in known.items()]
    names = sorted({*listed, *(one.model for one in quotes)})
    try:
        made = planned(before, Answer(names, {one.model: one for one in quotes}))
    except BadPriceAnswer:
        return
    prices = catalogue(after(before, made))
    assert all(price.unit_price_usd > 0 for price in prices)
    for model, price in known.items():
        now = prices.price_of(model).fal_unit_price_usd
        assert now is not None
        assert price <= now * 100
        assert now <= price * 100


def test_the_most_specific_own_price_wins() -> None:
    known = [word("acme/video/a", "1"), word("acme/video/b", "1"), word("acme/other", "1"), word("beta/x", "1")]
    prices = catalogue(
        known, own("acme/*", margin="0.1"), own("acme/video/*", margin="0.2"), own("acme/video/b", margin="0.3"),
        own("*", margin="0.4"), rules=(),
    )  # fmt: skip
    sold = {price.model: price.unit_price_usd for price in prices}
    assert sold == {
        "acme/video/a": Decimal("1.2"),
        "acme/video/b": Decimal("1.3"),
        "acme/other": Decimal("1.1"),
        "beta/x": Decimal("1.4"),
    }


def test_a_pattern_prices_no_model_that_is_not_known() -> None:
    prices = catalogue([word("acme/a", "1")], own("acme/*", price="0.5"), rules=())
    assert [price.model for price in prices] == ["acme/a"]
    assert prices.unpriceable == ()


def test_the_api_wins_where_it_counts_other_units_than_the_shipped_formula() -> None:
    """A price a thousandth of the shipped one is a price of another unit: no charge is computed by the formula, and
    no hold gets smaller than it was."""
    shipped = catalogue([]).price_of(FLUX)
    price = catalogue([word(FLUX, "0.000025", "kilopixels")]).price_of(FLUX)
    asked = {"image_size": "square_hd", "num_images": 2}
    assert price.unit_price_usd == Decimal("0.00002625")
    assert pricing.ceiling(price, asked).amount_micros == pricing.ceiling(shipped, asked).amount_micros
    assert pricing.units_from_answer(price.estimate, {}, {"images": [{"width": 1024, "height": 768}]}) is None
    near = catalogue([word(FLUX, "0.03", "megapixels")]).price_of(FLUX)
    assert pricing.units_from_answer(near.estimate, {}, {"images": [{"width": 1024, "height": 768}]}) == 1


def test_a_model_known_by_its_unit_alone_computes_no_charge() -> None:
    for unit in ("images", "seconds", "megapixels", "1000 characters", "videos", "compute seconds", "whatever"):
        price = catalogue([word("acme/new", "0.04", unit)]).price_of("acme/new")
        full = {"images": [{"width": 1, "height": 1}], "video": {"duration": 1}}
        assert pricing.units_from_answer(price.estimate, {"text": "x", "duration": 5}, full) is None
        assert pricing.ceiling(price, {}).amount_micros > 0


# --- holds ------------------------------------------------------------------------------------------------------

DEFAULT = Micros(100_000)


def held(
    costs: Costs,
    *,
    unit: str = "whatever",
    rules: tuple[PriceRule, ...] = (),
    given: dict[str, Any] | None = None,
    model: str = "acme/new",
    hold: int | None = None,
) -> tuple[int, str]:
    synced = [] if rules else [word(model, "0.04", unit)]
    mine = [] if hold is None else [own(model, margin="0.05", hold=hold)]
    prices = Catalogue(rules, mine, MARGIN, synced=synced, costs={model: costs}, default_hold_micros=DEFAULT)
    found = pricing.ceiling(prices.price_of(model), given or {})
    return found.amount_micros, found.basis


def test_a_model_of_which_nothing_is_known_holds_the_configured_default() -> None:
    assert held(Costs()) == (100_000, "100 credits, a guess until 100 calls of this model have been charged")


def test_the_dearest_call_seen_raises_the_next_hold() -> None:
    """failures.md 9."""
    amount, basis = held(Costs(3, Micros(40_000), Micros(252_000)))
    assert (amount, basis) == (252_000, "the dearest of 3 calls of this model: up to 252 credits")


def test_what_99_of_100_calls_cost_takes_the_place_of_a_guess_once_enough_are_seen() -> None:
    """failures.md 9 and 78."""
    costs = Costs(100, Micros(3_170), Micros(252_000))
    assert held(costs) == (3_170, "99 of 100 calls of this model cost up to 3.17 credits (100 calls seen)")
    assert held(costs, unit="seconds")[0] == 3_170
    assert held(Costs(99, Micros(3_170), Micros(3_170)))[0] == 100_000


def test_a_formula_is_raised_by_what_passed_it_and_not_by_other_calls() -> None:
    rules = (PriceRule(FLUX, "megapixels", Decimal("0.025"), "P", "2026-11-22", Estimate("megapixels")),)
    small, large = {"num_images": 1}, {"num_images": 4}
    many = Costs(1000, Micros(500_000), Micros(900_000))
    asked = {"image_size": "square"}
    assert held(many, rules=rules, model=FLUX, given=asked | small)[0] == 26_250
    raised = Costs(1000, Micros(0), Micros(0), raised_percent=130)
    assert held(raised, rules=rules, model=FLUX, given=asked | large)[0] == 136_500
    assert "raised to 130 %" in held(raised, rules=rules, model=FLUX)[1]


def test_the_operators_own_hold_stands_whatever_calls_cost() -> None:
    assert held(Costs(1000, Micros(1), Micros(10**9), 500), hold=7_000) == (
        7_000, "fixed hold of 7 credits for this model",
    )  # fmt: skip


def test_a_raise_never_passes_the_largest_amount_there_is() -> None:
    rules = (PriceRule(FLUX, "megapixels", Decimal(99_999), "P", "2026-11-22", Estimate("megapixels")),)
    given = {"num_images": 10_000}
    assert held(Costs(1, Micros(1), Micros(1), 1000), rules=rules, model=FLUX, given=given)[0] == MICROS_MAX


def test_replayed_usage_is_exact_to_the_nano_dollar() -> None:
    assert pricing.replayed_usd(25_000_001, Decimal("0.05")) == Decimal("0.02625000105")
    assert pricing.replayed_usd(0, Decimal("0.05")) == 0
