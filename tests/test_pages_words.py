"""Charges, ages and addresses as the pages put them into words: pure functions, tried by tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from abhiapi import reports
from abhiapi.money import Micros
from abhiapi.web.pages import cells, story, words


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"usage_source": "events"}, "The units come from fal's bill: 1 megapixel"),
        ({"usage_source": "events", "adjusted_micros": 26_250}, "fal's bill of 2 megapixels came later and raised the"
         " charge by 26.25 credits"),
        ({"usage_source": "events", "adjusted_micros": -6_250}, "lowered the charge by 6.25 credits"),
        ({"usage_source": "operator", "units": None}, "The operator settled the call at 26.25 credits"),
        ({"units": "1,5"}, "fal named the units; 26.25 credits were charged"),
        ({"units": "7"}, "fal named the units; 26.25 credits were charged"),
        ({"units": "0.99999", "charged_micros": 26_250}, "the price when the call began: $0.02625, rounded up to a"
         " millionth of a dollar, which is 26.25 credits"),
        ({"state": "unknown", "finished_at": None, "charged_micros": 0}, "is not known yet, so nothing was charged"),
        ({"state": "held", "finished_at": None, "charged_micros": 0}, "The call is running"),
        ({"state": "released", "charged_micros": 0, "reason": "fal_refused_operator"}, "hold was given back."),
    ],
)  # fmt: skip
def test_every_way_to_a_charge_has_its_words(changed: dict[str, Any], said: str) -> None:
    """A multiplication is shown only where it comes to the charge; what fal says to the operator never is."""
    row = reports.CallRow(
        1, "ann", 1, "fal-ai/flux/dev", "sync", "settled", 200, Micros(26_250), Micros(26_250), Micros(0), Micros(0),
        "1", "0.02625", "fal", "request", 25_000_000, None, 1, 2,
    )  # fmt: skip
    told = " ".join(story.of_call(replace(row, **changed), "megapixels", "2"))
    assert said in told


@pytest.mark.parametrize(
    ("milliseconds", "shown"),
    [(0, "0 s"), (-5, "0 s"), (59_999, "59 s"), (61_000, "1 min 1 s"), (3_600_000, "1 h"), (90_061_000, "1 d 1 h")],
)
def test_an_age_is_told_in_its_two_largest_units(milliseconds: int, shown: str) -> None:
    assert cells.age(milliseconds) == shown


def test_of_an_address_the_host_is_shown() -> None:
    assert cells.host_of("https://user:secret@example.com:8443/path?token=x") == "example.com"
    assert cells.host_of("https://[broken") == "?"


@pytest.mark.parametrize(
    ("number", "unit", "shown"),
    [("1", "megapixels", "1 megapixel"), ("0.5", "seconds", "0.5 seconds"), ("3", "1000 tokens", "3 x 1000 tokens")],
)
def test_an_amount_names_its_unit(number: str, unit: str, shown: str) -> None:
    assert words.amount(number, unit) == shown
