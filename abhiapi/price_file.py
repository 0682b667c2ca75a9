"""The file of prices that ships with the program (prices.toml), read strictly: all problems named, none repaired."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from functools import cache
from importlib import resources
from typing import Any, TypeVar

from abhiapi.errors import BadAmount, PriceFileError
from abhiapi.estimates import KINDS, Estimate, Rate
from abhiapi.money import Micros, parse_amount
from abhiapi.price_terms import MODEL_ID, UNIT_LENGTH_MAX, PriceRule, parse_price, shown

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_TOML_NAMES: Mapping[type, str] = {str: "text", list: "list", dict: "table"}

_T = TypeVar("_T")


def load_rules(text: str) -> tuple[PriceRule, ...]:
    """Price rules of a catalogue file (TOML; see prices.toml). Raises `PriceFileError` naming every problem."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PriceFileError(f"the price file is not TOML: {error}") from error
    problems: list[str] = []
    whole = _Table("the file", document, problems)
    rules: dict[str, PriceRule] = {}
    for row in whole.tables("model"):
        for rule in _parse_rules(row):
            if rule.model in rules:
                problems.append(f"{rule.model}: listed twice")
            rules[rule.model] = rule
    whole.close()
    if problems or not rules:
        raise PriceFileError("bad price file: " + ("; ".join(problems) or "it lists no model"))
    return tuple(rules.values())


@cache
def shipped_rules() -> tuple[PriceRule, ...]:
    """The catalogue that comes with this version of the program."""
    return load_rules(resources.files("abhiapi").joinpath("prices.toml").read_text("utf-8"))


class _Table:
    """A table of a price file, read field by field. Problems are gathered, not raised, so that all are told."""

    def __init__(self, name: str, content: Mapping[str, Any], problems: list[str]) -> None:
        self.name = name
        self._left = dict(content)
        self.problems = problems

    def problem(self, text: str) -> None:
        self.problems.append(f"{self.name}: {text}")

    def has(self, field: str) -> bool:
        return field in self._left

    def take(self, field: str, kind: type[_T], otherwise: _T) -> _T:
        """The field's value; ``otherwise`` where it is missing or, with a problem noted, of another type."""
        value = self._left.pop(field, otherwise)
        if isinstance(value, kind):
            return value
        self.problem(f"{field} is no {_TOML_NAMES[kind]}")
        return otherwise

    def text(self, field: str) -> str:
        found = self.has(field)
        value = self.take(field, str, "")
        if not found:
            self.problem(f"{field} is missing")
        return value

    def price(self, field: str, otherwise: str) -> Decimal:
        """A plain decimal; zero, with a problem noted, where it is none."""
        try:
            return parse_price(self.take(field, str, otherwise))
        except ValueError as error:
            self.problem(f"{field}: {error}")
            return Decimal(0)

    def scalars(self, field: str) -> Mapping[str, str | bool]:
        """A table of parameters: texts and booleans, numbers written as texts."""
        values = self.take(field, dict, {})
        for name, value in values.items():
            if not isinstance(value, str | bool):
                self.problem(f"{field}.{name} is neither a text nor a boolean")
        return values

    def tables(self, field: str) -> list[_Table]:
        rows = self.take(field, list, [])
        if not all(isinstance(row, dict) for row in rows):
            self.problem(f"{field} is no list of tables")
            return []
        return [_Table(f"{self.name}, {field} {number}", row, self.problems) for number, row in enumerate(rows, 1)]

    def close(self) -> None:
        """To be called last: what nobody took is a typing error."""
        for field in self._left:
            self.problem(f"unknown field {field}")


def _parse_rules(row: _Table) -> list[PriceRule]:
    """One rule for each of the models that an entry names."""
    models = [row.text("id")] if row.has("id") or not row.has("ids") else row.take("ids", list, [])
    row.name = str(models[0]) if models else row.name
    for model in models:
        if not (isinstance(model, str) and MODEL_ID.fullmatch(model)):
            row.problem(f"{shown(str(model))!r} is no model id")
    unit, source, seen = row.text("unit"), row.text("source"), row.text("seen")
    if len(unit) > UNIT_LENGTH_MAX:
        row.problem(f"unit has more than {UNIT_LENGTH_MAX} characters")
    try:
        date.fromisoformat(seen)
    except ValueError:
        row.problem(f"seen {seen!r} is no date such as 2026-09-05")
    unit_price = row.price("unit_price_usd", "")
    hold = _parse_hold(row)
    estimate = _parse_estimate(row, needs_maximum=hold is None)
    row.close()
    return [PriceRule(str(model), unit, unit_price, source, seen, estimate, hold) for model in models]


def _parse_hold(row: _Table) -> Micros | None:
    if not row.has("hold_credits"):
        return None
    try:
        return parse_amount(row.take("hold_credits", str, ""))
    except BadAmount as error:
        row.problem(f"hold_credits: {error}")
        return None


def _parse_estimate(row: _Table, *, needs_maximum: bool) -> Estimate:
    table = _Table(row.name + ", estimate", row.take("estimate", dict, {}), row.problems)
    kind = table.text("kind")
    if kind not in KINDS:
        table.problem(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if needs_maximum and kind not in ("images", "fixed") and not table.has("maximum"):
        table.problem(f"kind {kind} needs a maximum")  # else an `auto` would hold for one second or megapixel
    if kind == "tokens" and not table.has("size_by_resolution"):
        table.problem("kind tokens needs size_by_resolution")
    estimate = Estimate(
        kind=kind,  # type: ignore[arg-type]  # one of KINDS, or a problem was noted and nothing is returned
        rates=tuple(_parse_rate(rate) for rate in table.tables("rates")) or (Rate(Decimal(1)),),
        defaults=table.scalars("defaults"),
        maximum=table.price("maximum", "1"),
        count_param=table.take("count_param", str, "num_images"),
        size_by_resolution=_parse_sizes(table),
        batch_param=table.take("batch_param", str, "") or None,
        text_param=table.take("text_param", str, "text"),
        surcharge=table.price("surcharge", "0"),
        open_params=tuple(map(str, table.take("open_params", list, []))),
    )
    table.close()
    return estimate


def _parse_rate(table: _Table) -> Rate:
    rate = Rate(table.price("units", ""), table.scalars("when"))
    table.close()
    return rate


def _parse_sizes(table: _Table) -> Mapping[str, int]:
    """Pixels of a frame by resolution, from texts such as ``1280x720``."""
    sizes = {}
    for resolution, text in table.scalars("size_by_resolution").items():
        match = _SIZE.fullmatch(str(text))
        if match is None:
            table.problem(f"size_by_resolution.{resolution} is no size such as 1280x720")
        else:
            sizes[resolution.lower()] = int(match[1]) * int(match[2])
    return sizes
