"""Charts as SVG, computed here: shapes as attributes and classes only, no style and no script. Whole numbers only.

The picture stretches to its place, so texts (its scale, its days) stand beside it in the page, not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from abhiapi.money import Micros
from abhiapi.spent import Stacks

SLOT, GAP = 20, 5  # of a bar, in the picture's own units
HEIGHT = 1000


@dataclass(frozen=True, slots=True)
class Bar:
    x: int
    y: int
    width: int
    height: int
    series: int  # which model; its colour by class
    title: str


@dataclass(frozen=True, slots=True)
class Chart:
    width: int
    height: int
    bars: tuple[Bar, ...]
    top_micros: Micros  # what its upper edge stands for


def stacked_bars(stacks: Stacks, write: Callable[[int], str]) -> Chart:
    """A bar for each day, a piece of it for each model. ``write`` prints micros."""
    top = nice_ceiling(stacks.highest_micros)
    bars = []
    for number, day in enumerate(stacks.days):
        below = 0
        for series, micros in enumerate(day.amounts_micros):
            if micros <= 0:
                continue
            upper, lower = (HEIGHT * (below + micros)) // top, (HEIGHT * below) // top
            title = f"{day.day.isoformat()}: {stacks.models[series]}, {write(micros)} credits"
            bars.append(Bar(number * SLOT, HEIGHT - upper, SLOT - GAP, max(upper - lower, 1), series, title))
            below += micros
    return Chart(len(stacks.days) * SLOT - GAP, HEIGHT, tuple(bars), top)


def nice_ceiling(micros: Micros) -> Micros:
    """What a scale ends at: the next round number above, at least one credit."""
    step = 100
    while True:
        for factor in (10, 12, 15, 20, 25, 30, 40, 50, 60, 80):
            if micros <= step * factor:
                return Micros(step * factor)
        step *= 10
