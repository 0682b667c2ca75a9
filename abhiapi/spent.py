"""What has been spent, by day and model, as people want to see it: the pace, and the layers of a chart. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from abhiapi.money import Micros

OTHERS = "other models"
PACE_DAYS = 7
DAYS_LEFT_MAX = 3650


@dataclass(frozen=True, slots=True)
class Spent:
    """What the calls of a model that ended on a day were charged, less refunds."""

    day: date
    model: str
    calls: int
    micros: Micros


@dataclass(frozen=True, slots=True)
class DayStack:
    """One day of a chart: an amount for each of the chart's models, in their order."""

    day: date
    amounts_micros: tuple[Micros, ...]

    @property
    def total_micros(self) -> Micros:
        return Micros(sum(self.amounts_micros))


@dataclass(frozen=True, slots=True)
class Stacks:
    models: tuple[str, ...]
    days: tuple[DayStack, ...]

    @property
    def highest_micros(self) -> Micros:
        return max((day.total_micros for day in self.days), default=Micros(0))


def total_micros(rows: Iterable[Spent], *, since: date, until: date) -> Micros:
    return Micros(sum(row.micros for row in rows if since <= row.day <= until))


def stacked(rows: Sequence[Spent], *, since: date, until: date, models_max: int) -> Stacks:
    """Every day from ``since`` to ``until``, the models that cost most first, the rest of them as one."""
    by_model: Counter[str] = Counter()
    amounts: Counter[tuple[date, str]] = Counter()
    for row in rows:
        if row.micros and since <= row.day <= until:
            by_model[row.model] += row.micros
    ranked = sorted(by_model, key=lambda model: (-by_model[model], model))
    named = ranked if len(ranked) <= models_max else ranked[: models_max - 1]
    models = tuple(named) if len(named) == len(ranked) else (*named, OTHERS)
    for row in rows:
        amounts[row.day, row.model if row.model in named else OTHERS] += row.micros
    days = [since + timedelta(days=number) for number in range((until - since).days + 1)]
    return Stacks(models, tuple(DayStack(day, tuple(Micros(amounts[day, model]) for model in models)) for day in days))


def days_left(available_micros: Micros, rows: Sequence[Spent], *, today: date) -> int | None:
    """How many days the credit lasts if spending goes on as in the last week; None if nothing was spent in it.

    Somebody who began to spend three days ago is judged by three days.
    """
    since = today - timedelta(days=PACE_DAYS - 1)
    spending = [row for row in rows if row.micros and since <= row.day <= today]
    if not spending:
        return None
    days = (today - min(row.day for row in spending)).days + 1
    spent_micros = sum(row.micros for row in spending)
    return min(DAYS_LEFT_MAX, max(0, available_micros) * days // spent_micros)
