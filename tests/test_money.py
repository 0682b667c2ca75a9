"""Amounts: what people type, what is printed, and the one rounding."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abhiapi import money
from abhiapi.errors import BadAmount
from abhiapi.money import MICROS_MAX, Micros, parse_amount, product_micros, product_nanos, to_micros

PROPERTY = settings(deadline=None, derandomize=True, max_examples=300)
MEGABYTE = 1_000_000
ANY_MICROS = st.integers(-MICROS_MAX, MICROS_MAX).filter(bool)
# Any Decimal that the rest of the program can multiply: at most 42 digits of units, 18 of price.
QUANTITIES = st.builds(
    lambda digits, places: Decimal(digits).scaleb(-places), st.integers(0, 10**15), st.integers(0, 27)
)
PRICES = st.builds(lambda digits, places: Decimal(digits).scaleb(-places), st.integers(0, 10**5), st.integers(0, 12))

TYPED = [
    # text, in dollars, may be negative, micros
    ("5000", False, False, 5_000_000),
    ("26.25", False, False, 26_250),
    ("0.001", False, False, 1),
    ("1.000000", False, False, 1_000),
    ("+3", False, False, 3_000),
    ("0000000000000000000000007", False, False, 7_000),
    ("1000000000000", False, False, MICROS_MAX),
    ("-2.5", False, True, -2_500),
    ("12", False, True, 12_000),
    ("0.000001", True, False, 1),
    ("1.5", True, False, 1_500_000),
    ("-0.25", True, True, -250_000),
    ("1000000000", True, False, MICROS_MAX),
]

REFUSED = [
    # text, in dollars, may be negative, what the message says
    ("abc", False, False, "'abc' is not an amount of credits"),
    ("", False, False, "'' is not an amount of credits"),
    ("-5", False, False, "the amount -5 is negative"),
    ("-5", True, False, "the amount -5 is negative"),
    ("0", False, False, "the amount is zero"),
    ("-0.000", False, True, "the amount is zero"),
    ("0" * MEGABYTE, False, False, "the amount is zero"),
    ("NaN", False, False, "'NaN' is not an amount"),
    ("sNaN", False, True, "'sNaN' is not an amount"),
    ("inf", False, False, "'inf' is not an amount"),
    ("-Infinity", False, True, "'-Infinity' is not an amount"),
    ("1e999", False, False, "'1e999' is not an amount"),
    ("1E3", False, False, "'1E3' is not an amount"),
    ("0.00001", False, False, "'0.00001' is finer than the ledger: an amount of credits has at most 3 decimals"),
    ("0.0000001", True, False, "at most 6 decimals"),
    ("0." + "0" * MEGABYTE + "1", False, False, "is finer than the ledger"),
    ("1000000000000.001", False, False, "is larger than a billion dollars"),
    ("-1000000000.000001", True, True, "is larger than a billion dollars"),
    ("9" * 16, False, False, "is larger than a billion dollars"),
    ("9" * MEGABYTE, False, False, "is larger than a billion dollars"),
    ("x" * MEGABYTE, False, False, "is not an amount"),
    ("0" * MEGABYTE + "x", False, False, "is not an amount"),
    ("1,5", False, False, "'1,5' is not an amount"),
    ("1_000", False, False, "'1_000' is not an amount"),
    ("0x10", False, False, "'0x10' is not an amount"),
    ("--5", False, True, "'--5' is not an amount"),
    ("5.", False, False, "'5.' is not an amount"),
    (".5", False, False, "'.5' is not an amount"),
    (" 5", False, False, "' 5' is not an amount"),
    ("5\n", False, False, "is not an amount"),
    ("5 USD", True, False, "'5 USD' is not an amount of USD"),
    ("\u0665", False, False, "is not an amount"),  # ARABIC-INDIC DIGIT FIVE, a digit to Python
    ("\uff15", False, False, "is not an amount"),  # FULLWIDTH DIGIT FIVE
    ("5\u00b2", False, False, "is not an amount"),
    ("\u22125", False, True, "is not an amount"),  # MINUS SIGN
    ("\x00", False, False, "is not an amount"),
    ("\ud800", False, False, "is not an amount"),
]


@pytest.mark.parametrize(("text", "usd", "signed", "micros"), TYPED)
def test_amounts_typed_are_read_exactly(text: str, usd: bool, signed: bool, micros: int) -> None:
    assert parse_amount(text, usd=usd, signed=signed) == micros


@pytest.mark.parametrize(("text", "usd", "signed", "says"), REFUSED, ids=[row[0][:12] for row in REFUSED])
def test_bad_amounts_are_refused_in_one_short_line(text: str, usd: bool, signed: bool, says: str) -> None:
    with pytest.raises(BadAmount) as refusal:
        parse_amount(text, usd=usd, signed=signed)
    assert says in refusal.value.message
    assert len(refusal.value.message) < 200
    assert refusal.value.message.isprintable()


@PROPERTY
@given(ANY_MICROS)
def test_printed_amounts_read_back_as_themselves(micros: Micros) -> None:
    assert parse_amount(money.credits_text(micros), signed=True) == micros
    assert parse_amount(money.usd_text(micros), usd=True, signed=True) == micros


@PROPERTY
@given(ANY_MICROS)
def test_printed_amounts_are_json_numbers_of_the_same_value(micros: Micros) -> None:
    assert json.loads(money.credits_text(micros), parse_float=Decimal) * 1_000 == micros
    assert json.loads(money.usd_text(micros), parse_float=Decimal) * 1_000_000 == micros
    assert json.loads(money.nanos_usd_text(micros), parse_float=Decimal) * 1_000_000_000 == micros
    assert money.credits(micros) * 1_000 == micros
    assert money.usd(micros) * 1_000_000 == micros
    assert "E" not in f"{money.credits(micros)}{money.usd(micros)}"


@PROPERTY
@given(st.text("0123456789.+-eE_, \u0665\uff15", max_size=24))
def test_any_text_is_an_amount_or_a_bad_amount(text: str) -> None:
    for usd in (False, True):
        try:
            micros = parse_amount(text, usd=usd, signed=True)
        except BadAmount:
            continue
        unit = money.MICROS_PER_USD if usd else money.MICROS_PER_CREDIT
        assert Fraction(micros, unit) == Fraction(text)


@pytest.mark.parametrize(
    ("micros", "credits", "usd"),
    [
        (0, "0", "0"),
        (12_000, "12", "0.012"),
        (26_250, "26.25", "0.02625"),
        (1, "0.001", "0.000001"),
        (-1, "-0.001", "-0.000001"),
        (-1_000, "-1", "-0.001"),
        (-999_999, "-999.999", "-0.999999"),
        (1_000_000, "1000", "1"),
        (MICROS_MAX, "1000000000000", "1000000000"),
    ],
)
def test_amounts_print_exactly_and_without_trailing_zeros(micros: int, credits: str, usd: str) -> None:
    assert money.credits_text(micros) == credits
    assert money.usd_text(micros) == usd
    assert str(money.credits(micros)) == credits
    assert str(money.usd(micros)) == usd


@pytest.mark.parametrize(("nanos", "text"), [(0, "0"), (1, "0.000000001"), (25_000_000, "0.025"), (-5, "-0.000000005")])
def test_nano_dollars_print_exactly(nanos: int, text: str) -> None:
    assert money.nanos_usd_text(nanos) == text


@pytest.mark.parametrize(
    ("usd", "micros"),
    [
        ("0", 0),
        ("-0", 0),
        ("0.000001", 1),
        ("0.0000001", 1),
        ("0.0000010000000000000000000000001", 2),
        ("-0.0000019", -1),
        ("1e-999999", 1),
        ("1000000000", MICROS_MAX),
        ("-1000000000", -MICROS_MAX),
    ],
)
def test_dollars_become_micros_rounded_up(usd: str, micros: int) -> None:
    assert to_micros(Decimal(usd)) == micros


@pytest.mark.parametrize(
    "usd", ["NaN", "sNaN", "Infinity", "-Infinity", "1000000000.0000001", "-1000000000.1", "1e999999", "-1e999999"]
)
def test_absurd_dollars_are_refused(usd: str) -> None:
    with pytest.raises(BadAmount):
        to_micros(Decimal(usd))


@pytest.mark.parametrize(
    ("quantity", "price"), [("1e999999", "1e999999"), ("NaN", "1"), ("sNaN", "1"), ("Infinity", "0"), ("1e10", "1")]
)
def test_absurd_products_are_refused(quantity: str, price: str) -> None:
    for product in (product_micros, product_nanos):
        with pytest.raises(BadAmount):
            product(Decimal(quantity), Decimal(price))


@PROPERTY
@given(QUANTITIES, PRICES)
def test_products_are_exact_and_rounded_up_once(quantity: Decimal, price: Decimal) -> None:
    usd = Fraction(quantity) * Fraction(price)
    if usd > money.USD_MAX:
        with pytest.raises(BadAmount):
            product_micros(quantity, price)
    else:
        assert product_micros(quantity, price) == ceil(usd * money.MICROS_PER_USD)
        assert product_nanos(quantity, price) == ceil(usd * money.NANOS_PER_USD)


def test_a_hundred_thousand_charges_sum_up_exactly() -> None:
    """Against integers alone; and the order of the charges, or a detour over the printed amounts, changes nothing."""
    chance = random.Random(2026)
    millionths = [chance.randrange(10**8) for _ in range(100_000)]
    price_nanos = 26_250_000
    charges = [product_micros(Decimal(units).scaleb(-6), Decimal(price_nanos).scaleb(-9)) for units in millionths]
    assert sum(charges) == sum(-(-units * price_nanos // 10**9) for units in millionths)
    total = sum(charges)
    chance.shuffle(charges)
    assert sum(parse_amount(money.credits_text(each)) for each in charges if each) == total
    assert parse_amount(money.credits_text(total)) == total
