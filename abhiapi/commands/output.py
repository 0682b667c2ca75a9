"""How commands speak: JSON or plain tables on stdout, messages on stderr, and failures as one line.

Amounts come as exact Decimals and are printed without exponents. Nothing that could steer a terminal, and no whole
key, gets through to one.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import click

from abhiapi import csvtext
from abhiapi.errors import AbhiError, SettingsError
from abhiapi.redaction import masked

Json = Mapping[str, Any]

_TIME = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)\.\d{3}Z")
_GAP = "  "
_FLEXIBLE = ("note", "ref", "model", "account", "name", "reason")  # cut on a narrow terminal, in this order
_HEADINGS = {"unit_price_usd": "price usd", "fal_unit_price_usd": "fal usd"}
_FLEXIBLE_LEAST = 12


class Failure(click.ClickException):
    """An expected failure: one line that says why."""

    exit_code = 1

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines

    def show(self, file: Any = None) -> None:
        for line in self.lines:
            click.echo(f"error: {masked(' '.join(line.split()))}", err=True, file=file)


class SettingsFailure(Failure):
    """A line for every bad setting."""

    exit_code = 2


class Program(click.Group):
    """The top of the command line: turns every expected error of the library into a line. Bugs keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SettingsError as error:
            raise SettingsFailure(*error.problems) from error
        except AbhiError as error:
            raise Failure(error.message) from error
        except click.UsageError as error:  # what was typed may be a key
            raise click.UsageError(masked(error.format_message()), error.ctx) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which an operator meets them."""
        return list(self.commands)


def say(message: str) -> None:
    """A message for the person at the terminal."""
    click.echo(masked(message), err=True)


def print_json(value: Any) -> None:
    """One line of JSON, numbers exact."""
    print_json_lines([value])


def print_json_lines(values: Iterable[Any]) -> None:
    """A line of JSON for each value, as they come."""
    import simplejson  # not at the top, for the sake of a quick --help

    for value in values:
        sys.stdout.write(simplejson.dumps(value, use_decimal=True) + "\n")


def print_csv(rows: Iterable[Json], columns: Sequence[str]) -> None:
    """Comma-separated values with a heading, a row at a time."""
    sys.stdout.write(csvtext.line(columns))
    for row in rows:
        sys.stdout.write(csvtext.line([row[column] for column in columns]))


def print_one(shape: Json, *, as_json: bool) -> None:
    """One thing: a line for each of its fields."""
    if as_json:
        print_json(shape)
        return
    width = max(map(len, shape))
    for field, value in shape.items():
        click.echo(f"{field:<{width}}{_GAP}{_cell(value)}")


def print_rows(
    rows: Sequence[Json], columns: Sequence[str], *, as_json: bool, none: str, envelope: Json | None = None
) -> None:
    """Many things: a JSON array (or the envelope around it), else a table of some columns, or the message ``none``."""
    if as_json:
        print_json(list(rows) if envelope is None else envelope)
    elif not rows:
        say(none)
    else:
        click.echo(table(rows, columns, width=shutil.get_terminal_size().columns if sys.stdout.isatty() else None))


def table(rows: Sequence[Json], columns: Sequence[str], *, width: int | None = None) -> str:
    """Plain text in aligned columns, numbers to the right. ``width``: texts are cut to fit, if need be."""
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    headings = [_HEADINGS.get(column, column.replace("_", " ")).upper() for column in columns]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    if width is not None:
        _narrow(widths, columns, width)
    right = [_is_numeric([row[column] for row in rows]) for column in columns]
    lines = []
    for line in [headings, *cells]:
        texts = (_cut(text, wide) for text, wide in zip(line, widths, strict=True))
        aligned = (
            text.rjust(wide) if number else text.ljust(wide)
            for text, wide, number in zip(texts, widths, right, strict=True)
        )
        lines.append(_GAP.join(aligned).rstrip())
    return "\n".join(lines)


def _narrow(widths: list[int], columns: Sequence[str], width: int) -> None:
    """Take what is too much from the columns that can spare it."""
    for column in _FLEXIBLE:
        excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
        if excess > 0 and column in columns:
            at = columns.index(column)
            widths[at] = max(min(widths[at], _FLEXIBLE_LEAST), widths[at] - excess)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _cell(value: Any) -> str:
    """A value as one line of text; what came from outside cannot move the cursor or change colours."""
    if value is None:
        return "-"
    text = _plain(value)
    match = _TIME.fullmatch(text)
    if match:
        return f"{match[1]} {match[2]}"
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def _is_numeric(values: Sequence[Any]) -> bool:
    """Whether a column holds numbers, and nothing else but gaps."""
    kinds = {type(value) for value in values if value is not None}
    return bool(kinds) and kinds <= {int, Decimal}
