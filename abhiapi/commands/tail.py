"""`tail`: calls as they happen."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import Text, json_option
from abhiapi.commands.output import print_json, say
from abhiapi.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from abhiapi.reports import CallRow

LOOK_MS = 500
WIDTHS = {
    "time": 12,
    "call_id": 18,
    "account": 12,
    "model": 30,
    "mode": 6,
    "state": 8,
    "status": 6,
    "credits": 10,
    "took": 8,
}
_COLOURS = {"settled": "green", "released": "yellow", "unknown": "red"}


@click.command()
@click.option("--account", metavar="ACCOUNT", type=Text(), help="Only this account: its name, or one of its keys.")
@click.option(
    "--model", metavar="MODEL", type=Text(), help="Only this model, or those below a path such as fal-ai/flux/*."
)
@click.option("--errors", is_flag=True, help="Only calls that ended without a charge, or whose cost is not known.")
@click.option("--last", type=click.IntRange(0, 1000), default=10, show_default=True, help="Calls to begin with.")
@json_option
def tail(account: str | None, model: str | None, errors: bool, last: int, as_json: bool) -> None:
    """Follow calls as they happen, until Ctrl-C.

    A call is a line when it is seen running, and one when it has ended; a quick one is seen only when it has. Reads the
    database: it needs no server, and may run beside one.

    \b
    Examples:
      abhiapi tail
      abhiapi tail --account acme --errors
      abhiapi tail --json | jq 'select(.credits > 100)'
    """
    try:
        name = None if account is None else session.read(lambda tx: session.account(tx, account)).name
        if not as_json:
            click.echo(_line({column: column.replace("_", " ").upper() for column in WIDTHS}), nl=True)
            sys.stdout.flush()
        for row in _rows(last):
            if (name is None or row.account == name) and _is_of(row, model) and (not errors or _is_error(row)):
                if as_json:
                    print_json(library.shapes.call(row, for_operator=True))
                else:
                    click.echo(click.style(_line(_cells(row)), fg=_colour(row)))
                sys.stdout.flush()
    except KeyboardInterrupt:
        pass  # that is how it is meant to end
    except BrokenPipeError:  # whoever read this has enough; Python would complain once more when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _rows(last: int) -> Iterator[CallRow]:
    """The newest calls, then what is news, for ever."""
    database = session.open_database()
    following = library.following.Following()
    yield from database.read(lambda tx: following.begin(tx, now_ms=session.now_ms(), last=last))
    is_told = False
    while True:
        time.sleep(LOOK_MS / 1000)
        try:
            yield from database.read(lambda tx: following.look(tx, now_ms=session.now_ms()))
            is_told = False
        except DatabaseUnavailable as error:  # it may come back: this is what one looks at when there is trouble
            if not is_told:
                say(f"{error.message}: looking again")
            is_told = True


def _is_of(row: CallRow, model: str | None) -> bool:
    return model is None or row.model == model or (model.endswith("/*") and row.model.startswith(model[:-1]))


def _is_error(row: CallRow) -> bool:
    return row.state in ("released", "unknown") or (row.status or 0) >= 400


def _colour(row: CallRow) -> str | None:
    return None if "NO_COLOR" in library.settings.environment() else _COLOURS.get(row.state)


def _cells(row: CallRow) -> dict[str, str]:
    shape = library.shapes.call(row)
    took_ms = None if row.finished_at is None else row.finished_at - row.created_at
    return {
        "time": (shape["finished_at"] or shape["created_at"])[11:23],
        "call_id": shape["call_id"],
        "account": row.account,
        "model": row.model,
        "mode": row.mode,
        "state": row.state,
        "status": "-" if row.status is None else str(row.status),
        "credits": f"{shape['credits']:f}" if row.finished_at else "-",
        "took": "-" if took_ms is None else f"{took_ms} ms",
    } | ({"took": row.reason} if row.reason else {})


def _line(cells: dict[str, str]) -> str:
    """Columns of a width of their own, since no row knows of those to come; what is longer moves the rest."""
    shown = ("".join(each if each.isprintable() else repr(each)[1:-1] for each in cells[column]) for column in WIDTHS)
    return "  ".join(text.ljust(width) for text, width in zip(shown, WIDTHS.values(), strict=True)).rstrip()
