"""`reconcile`: settles the jobs of fal's queue now, then holds our charges against fal's billing events."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeVar

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import json_option, usage_error
from abhiapi.commands.output import print_json, print_one, say, table
from abhiapi.errors import DatabaseUnavailable, PlatformError, Refused

if TYPE_CHECKING:
    from abhiapi.fal_bill import Compared, Drift
    from abhiapi.platform_api import PlatformApi
    from abhiapi.reconcile import Round
    from abhiapi.settings import Settings

T = TypeVar("T")
log = logging.getLogger("abhiapi")
PAUSES_S = (1, 2, 4, 8)

PATH, MEMBER, PAGE = "/models/billing-events", "billing_events", "10000"
COLUMNS = ("kind", "call_id", "fal_request_id", "model", "credits", "units", "fal_units", "fal_cost_usd")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@click.command()
@click.option(
    "--since", metavar="DAY", help="Compare from this day (UTC) on: 2026-11-01, or 30d; at most 89 days back."
)
@json_option
def reconcile(since: str | None, as_json: bool) -> None:
    """Settle the jobs of fal's queue, and compare charges with fal's bill.

    First, every open job at fal is looked at, and those that have completed are settled, as the server does every few
    seconds. Then fal's billing events are read from where the last comparison ended, and two days before that, or
    from --since on: each call gets what it really cost at fal; a charge that had to be computed without units is
    moved by an adjustment entry; a call whose cost was not known is settled; and what does not agree is listed as
    drift. A second run changes nothing, and a run that was killed is resumed. Safe beside the server.

    The kinds of drift: not_billed_by_fal (charged here, and fal has no bill of it), unexplained_event (fal's bill of
    something that no call of ours explains), units_differ, other_model, billed_twice, not_settled. Pending calls ended
    too lately for fal's bill; below_cost are calls that fal billed at more than was charged for them; losses are calls
    that fal billed and, by the terms of service, nobody here pays.

    Needs FAL_KEY, and for fal's bill an ADMIN key: FAL_ADMIN_KEY, or FAL_KEY if it is one. Exits with 1 when jobs
    could not be looked at or fal's bill could not be read, wholly or in part.

    \b
    Examples:
      abhiapi reconcile
      abhiapi reconcile --since 30d --json | jq '.drift[]'
    """
    first_ms = None if since is None else _day_ms(since)
    settings = session.settings()
    session.open_database()
    done = _settle_jobs(settings)
    compared, trouble = _patiently(lambda: _compare(settings, first_ms))
    if compared is not None:
        _note_drift(compared)
    shape = _shape(
        done, compared, len([row for row in session.read(library.reports.open_holds) if row.state == "unknown"])
    )
    if as_json:
        print_json(shape)
    else:
        drift = shape.pop("drift")
        print_one(shape | {"drift": None if drift is None else len(drift)}, as_json=False)
        if drift:
            click.echo("\n" + table(drift, COLUMNS))
    _tell(done, compared, trouble)


def _note_drift(compared: Compared) -> None:
    """An alert stands from a run that found drift to one that finds none: whoever runs this by a timer hears of it."""
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(compared.drift.items()))
    message = f"charges and fal's bill do not agree: {found}; see what `abhiapi reconcile` listed" if found else None
    now = session.now_ms()
    _patiently(lambda: session.write(lambda tx: library.alerts.retell(tx, "bill_drift", "fal", message, now_ms=now)))


def _patiently(step: Callable[[], T]) -> T:
    """A step that may be taken again, taken again while other processes keep the database to themselves."""
    for pause_s in PAUSES_S:
        try:
            return step()
        except DatabaseUnavailable as error:
            say(f"{error.message}: trying again")
            time.sleep(pause_s)
    return step()


def _settle_jobs(settings: Settings) -> Round:
    import gevent

    from abhiapi import reconcile as reconciler
    from abhiapi import runtime

    brief = _FirstOfItsKind()
    # The sockets to fal are gevent's own (`http_adapter`), so nothing has to be patched for them to wait side by side.
    rt = _patiently(lambda: runtime.start(settings))
    done = reconciler.Round()
    watcher = gevent.spawn(_watch, done)
    log.addFilter(brief)
    try:
        reconciler.run_once(rt, done)
    finally:
        watcher.kill()
        rt.close()
        log.removeFilter(brief)
    return done


def _compare(settings: Settings, since_ms: int | None) -> tuple[Compared | None, str | None]:
    """What the comparison found; or why fal's bill could not be read."""
    bill = library.fal_bill
    database = library.db.database_at(settings.database_url)
    credential = settings.fal_admin_key or settings.fal_key
    assert credential is not None
    api = library.platform_api.PlatformApi(settings.fal_api_url, credential)
    now = session.now_ms()
    reached = database.read(lambda tx: library.billing.reached_at(tx, bill.BOOKMARK))
    first, end = bill.span(reached, since_ms, now)
    progress = _Progress(now)
    try:
        return bill.compare(
            database, lambda since, until: _rows(api, since, until), since_ms=first, until_ms=end, now_ms=now,
            progress=progress,
        ), None  # fmt: skip
    except PlatformError as error:
        return None, error.message
    finally:
        progress.close()
        api.close()


def _rows(api: PlatformApi, since_ms: int, until_ms: int) -> Iterator[Mapping[str, Any]]:
    """fal's billing events of a span of time, page by page (fal-protocol 8.5)."""
    query = [("start", _iso(since_ms)), ("end", _iso(until_ms)), ("limit", PAGE)]
    for page in api.pages(PATH, query, MEMBER):
        yield from page


def _shape(done: Round, compared: Compared | None, unknown: int) -> dict[str, Any]:
    return {
        "settled": done.settled + (compared.settled if compared else 0),
        "released": done.released,
        "adjusted": compared.adjusted if compared else 0,
        "drift": None if compared is None else [_drift(one) for one in compared.listed],
        "unknown": unknown,
        "open": done.looked_at - done.ended,
        "failed": done.failed,
        "events": compared.events if compared else None,
        "unreadable": compared.left_out if compared else None,
        "pending": compared.pending if compared else None,
        "below_cost": sum(compared.below_cost.values()) if compared else None,
        "losses": compared.losses if compared else None,
        "loss_usd": None if compared is None else Decimal(library.money.nanos_usd_text(compared.loss_nano_usd)),
    }


def _drift(one: Drift) -> dict[str, Any]:
    cost = one.fal_cost_nano_usd
    return {
        "kind": one.kind,
        "call_id": None if one.call_id is None else library.ids.call_text(one.call_id),
        "fal_request_id": one.fal_request_id,
        "model": one.model,
        "credits": None if one.charged_micros is None else library.money.credits(one.charged_micros),
        "units": one.units,
        "fal_units": one.billed_units,
        "fal_cost_usd": None if cost is None else Decimal(library.money.nanos_usd_text(cost)),
    }


def _tell(done: Round, compared: Compared | None, trouble: str | None) -> None:
    """What the numbers do not say. Raises `Refused` where something could not be done."""
    if compared:
        for model, count in sorted(compared.below_cost.items()):
            say(f"fal billed {count} calls on {model} at more than was charged for them: run `abhiapi prices sync`")
        for why in compared.unreadable:
            say(f"a row of fal's bill was left out: {why}")
        total = sum(compared.drift.values())
        if total > len(compared.listed):
            say(f"{total} things do not agree; the first {len(compared.listed)} are listed")
    problems = []
    if done.failed:
        problems.append(f"{done.failed} jobs could not be looked at: fal or the database was in trouble, run it again")
    if compared and compared.left_out:
        problems.append(f"{compared.left_out} rows of fal's bill could not be read and were left out")
    if trouble:
        problems.append(f"fal's bill could not be read: {trouble}. It takes an ADMIN key of fal's: set FAL_ADMIN_KEY")
    if problems:
        raise Refused("; ".join(problems))


def _watch(done: Round) -> None:
    """Say how far it is: after a second, then every five."""
    import gevent

    gevent.sleep(1)
    while True:
        looked = done.looked_at + done.failed
        say(f"{looked} jobs looked at, {done.ended} of them ended, {done.failed} failed")
        gevent.sleep(5)


class _Progress:
    """How far the comparison is, on stderr, where it takes over a second."""

    def __init__(self, started_ms: int) -> None:
        self._told_ms = started_ms
        self._is_open = False

    def __call__(self, events: int, reached_ms: int) -> None:
        now = session.now_ms()
        if now - self._told_ms >= 1000:
            self._told_ms = now
            is_terminal = sys.stderr.isatty()
            line = f"{events} of fal's billing events compared, up to {_iso(reached_ms)[:10]}"
            click.echo(f"\r{line}" if is_terminal else line, err=True, nl=not is_terminal)
            self._is_open = is_terminal

    def close(self) -> None:
        if self._is_open:
            click.echo(err=True)


def _day_ms(text: str) -> int:
    try:
        day = library.reports.parse_day(text)
    except ValueError as error:
        raise usage_error("--since", error) from error
    return int(library.days.day_number(day)) * 86_400_000


def _iso(at_ms: int) -> str:
    return (EPOCH + timedelta(milliseconds=at_ms)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _FirstOfItsKind(logging.Filter):
    """What may be said of each of five thousand jobs is said of the first."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        is_first = record.msg not in self._said
        self._said.add(record.msg)
        return is_first
