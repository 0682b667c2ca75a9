"""Spending as people see it: the pace, the layers of the chart, figures and times in words."""

from __future__ import annotations

from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abhiapi.money import Micros
from abhiapi.spent import DAYS_LEFT_MAX, OTHERS, Spent, days_left, stacked, total_micros
from abhiapi.web.pages import charts, words

TODAY = date(2026, 11, 22)
AMOUNTS = st.integers(0, 10**12)
ROWS = st.lists(
    st.builds(
        lambda back, model, micros: Spent(TODAY - timedelta(days=back), f"m{model}", 1, Micros(micros)),
        st.integers(0, 40),
        st.integers(0, 9),
        AMOUNTS,
    ),
    max_size=60,
)


def spent(back: int, micros: int, model: str = "m") -> Spent:
    return Spent(TODAY - timedelta(days=back), model, 1, Micros(micros))


@pytest.mark.parametrize(
    ("available", "rows", "days"),
    [
        (1000, [], None),
        (1000, [spent(7, 500)], None),  # a week ago: not in the last seven days
        (1000, [spent(0, 0)], None),
        (1000, [spent(0, 100)], 10),  # began today: judged by today
        (1000, [spent(1, 100), spent(0, 100)], 10),
        (700, [spent(6, 700)], 7),
        (99, [spent(0, 100)], 0),
        (0, [spent(0, 1)], 0),
        (-500, [spent(0, 1)], 0),  # a debt lasts no days
        (10**15, [spent(0, 1)], DAYS_LEFT_MAX),
    ],
)
def test_days_left_at_the_pace_of_the_last_week(available: int, rows: list[Spent], days: int | None) -> None:
    assert days_left(Micros(available), rows, today=TODAY) == days


@given(ROWS, st.integers(1, 7))
def test_the_stacks_hold_every_micro_that_was_spent(rows: list[Spent], models_max: int) -> None:
    since = TODAY - timedelta(days=29)
    stacks = stacked(rows, since=since, until=TODAY, models_max=models_max)
    assert sum(day.total_micros for day in stacks.days) == total_micros(rows, since=since, until=TODAY)
    assert [day.day for day in stacks.days] == [since + timedelta(days=number) for number in range(30)]
    assert len(stacks.models) <= models_max
    assert all(len(day.amounts_micros) == len(stacks.models) for day in stacks.days)


def test_the_models_that_cost_most_are_named_and_the_rest_are_one() -> None:
    rows = [spent(0, micros, model) for model, micros in (("a", 1), ("b", 9), ("c", 5), ("d", 2))]
    stacks = stacked(rows, since=TODAY, until=TODAY, models_max=3)
    assert stacks.models == ("b", "c", OTHERS)
    assert stacks.days[0].amounts_micros == (9, 5, 3)


@given(ROWS)
def test_bars_stand_on_each_other_within_the_picture(rows: list[Spent]) -> None:
    stacks = stacked(rows, since=TODAY - timedelta(days=29), until=TODAY, models_max=6)
    chart = charts.stacked_bars(stacks, words.credits)
    assert chart.top_micros >= stacks.highest_micros
    for bar in chart.bars:
        assert 0 <= bar.x < bar.x + bar.width <= chart.width
        assert 0 <= bar.y <= chart.height
        assert bar.height >= 1
    for below, above in zip(chart.bars, chart.bars[1:], strict=False):
        if below.x == above.x:
            assert above.y + above.height <= below.y + 1  # a hair for those too small to see


@pytest.mark.parametrize(
    ("micros", "top"), [(0, 1000), (1, 1000), (1000, 1000), (1001, 1200), (26_250, 30_000), (8_000_001, 10_000_000)]
)
def test_scales_end_at_round_numbers(micros: int, top: int) -> None:
    assert charts.nice_ceiling(Micros(micros)) == top


@pytest.mark.parametrize(
    ("micros", "credits", "usd"),
    [
        (0, "0", "$0.00"),
        (26_250, "26.25", "$0.02625"),
        (4_973_750, "4,973.75", "$4.97375"),
        (1_234_567_890, "1,234,567.89", "$1,234.56789"),
        (-500_000, "-500", "-$0.50"),
        (-1_000_000_001, "-1,000,000.001", "-$1,000.000001"),
    ],
)
def test_amounts_are_exact_and_readable(micros: int, credits: str, usd: str) -> None:
    assert (words.credits(micros), words.usd(micros)) == (credits, usd)


def test_times_are_exact_for_machines_and_short_for_people() -> None:
    assert words.when(1_795_000_000_123) == (
        '<time datetime="2026-11-18T11:06:40.123Z" title="2026-11-18T11:06:40.123Z">2026-11-18 11:06</time>'
    )
    assert words.when(None) == "never"
