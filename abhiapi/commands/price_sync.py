"""`prices sync` and `prices diff`: fal's own prices, taken over or only looked at."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import force_option, json_option
from abhiapi.commands.output import print_json, say, table
from abhiapi.errors import Refused, SettingsError

if TYPE_CHECKING:
    from abhiapi.price_sync import Answer, Change, Plan
    from abhiapi.settings import Settings
    from abhiapi.sync import Progress

KINDS = ("new", "changed", "gone", "refused", "placeholder", "unpriced")
COLUMNS = ("what", "model", "unit", "before_usd", "after_usd", "why")


@click.command("sync")
@force_option("Accept prices that changed more than 100 times, and placeholders in the place of prices.")
@json_option
def sync_prices(force: bool, as_json: bool) -> None:
    """Take over fal's own prices of all its models.

    Asks fal's platform API for every model and every price. Prices are appended, never overwritten: what a call was
    charged by can always be told. A bad or partial answer changes nothing (exit 1). A single price that makes no
    sense, or that changed more than 100 times, is refused and named, and the old one stays (exit 1, the others are
    taken over). A server does the same once a day (ABHIAPI_PRICES_SYNC_S).

    \b
    Examples:
      abhiapi prices sync
      abhiapi prices sync --json | jq '.changed[].model'
    """
    settings, answer = _asked()
    made = session.write(
        lambda tx: library.sync.applied(
            tx,
            answer,
            library.pricing.shipped_rules(),
            now_ms=session.now_ms(),
            interval_s=settings.prices_sync_s,
            force=force,
        )
    )
    _print(made, as_json=as_json)
    if made.refused:
        raise Refused(f"{len(made.refused)} prices were refused, the ones before them stay: look at them, then --force")


@click.command("diff")
@json_option
def diff_prices(as_json: bool) -> None:
    """Show what `prices sync` would change. Nothing is written.

    \b
    Examples:
      abhiapi prices diff
    """
    _, answer = _asked()
    made = session.read(lambda tx: library.sync.planned(tx, answer, library.pricing.shipped_rules()))
    _print(made, as_json=as_json)


def _asked() -> tuple[Settings, Answer]:
    """fal's whole answer, with progress on stderr. Raises `PlatformError`."""
    settings = session.settings()
    if settings.fal_key is None:
        raise SettingsError(["FAL_KEY is not set: fal tells prices to whoever has a key only"])
    session.open_database()  # whatever is wrong with it is said before fal is asked
    api = library.platform_api.PlatformApi(settings.fal_api_url, settings.fal_key)
    try:
        with _progress() as progress:
            return settings, library.sync.fetched(api, progress)
    finally:
        api.close()


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal; a line at the end of each stage elsewhere."""
    if not sys.stderr.isatty():

        def lines(done: int, of: int) -> None:
            if done == of:
                say(f"asked fal for the prices of {of} models")

        yield lines
        return
    with click.progressbar(length=1, label="fal's prices", file=sys.stderr, show_pos=True) as bar:

        def draw(done: int, of: int) -> None:
            bar.length = max(of, 1)
            bar.update(done - bar.pos)

        yield draw


def _print(made: Plan, *, as_json: bool) -> None:
    changes: dict[str, list[dict[str, Any]]] = {kind: [_shape(one) for one in getattr(made, kind)] for kind in KINDS}
    if as_json:
        print_json({"listed": made.listed, "priced": made.priced, "written": len(made.words), **changes})
        return
    rows = [{"what": kind, **one} for kind in KINDS for one in changes[kind]]
    if rows:
        click.echo(table(rows, COLUMNS))
    counts = ", ".join(f"{len(changes[kind])} {kind}" for kind in KINDS)
    click.echo(f"{made.listed} models at fal, {made.priced} with a price: {counts}")


def _shape(change: Change) -> dict[str, Any]:
    plain = library.pricing.plain
    return {
        "model": change.model,
        "unit": change.unit,
        "before_usd": None if change.before_usd is None else plain(change.before_usd),
        "after_usd": None if change.after_usd is None else plain(change.after_usd),
        "why": change.why,
    }
