"""Our books against fal's bill: every billing event of a span of time taken in, and what then does not agree.

`compare` goes through fal's events day by day, a few hundred to a transaction, and remembers how far it has come, so
that a run that was killed is resumed by the next one, and a second run changes nothing. Nothing grows with the number
of events. The pages come from `platform_api`; the rows are `billing`'s.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, Decimal
from functools import partial
from itertools import islice
from typing import Any, Literal

from abhiapi import alerts, billing
from abhiapi.billing import BilledCall, Effect, Event
from abhiapi.db import Database, Tx
from abhiapi.ids import call_text
from abhiapi.money import Micros, product_nanos
from abhiapi.pricing import MODEL_ID, decimal_text

BOOKMARK = "fal's billing events"
LOOKED_AT = "calls held against fal's billing events"  # of which the drift has been listed
BELOW_COST = "billed_above_charge"  # the kind of alert
DAY_MS = 86_400_000
OVERLAP_MS = 2 * DAY_MS  # looked at again each time: events arrive late
REACH_MS = 89 * DAY_MS  # as far back as fal tells (fal-protocol 8.5)
LAG_MS = 600_000  # a call that ended this lately may have its event still to come
BATCH = 200  # events to a transaction: other writers wait for it
DRIFT_MAX = 1_000  # listed; all are counted
UNREADABLE_MAX = 20
RECENT_MAX = 10_000  # events of this run that are remembered, to tell a second bill from a correction of the first
COST_MAX_NANO_USD = 10**15  # no single request costs a million dollars

DriftKind = Literal[
    "not_billed_by_fal", "unexplained_event", "units_differ", "other_model", "billed_twice", "not_settled"
]
Rows = Callable[[int, int], Iterable[Mapping[str, Any]]]  # fal's rows from and to (exclusive) a time, milliseconds

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,100}")
_UNITS = re.compile(r"[0-9]{1,12}(\.[0-9]{1,30})?")


@dataclass(frozen=True, slots=True)
class Drift:
    """One thing in which fal's bill and our books do not agree."""

    kind: DriftKind
    call_id: int | None
    fal_request_id: str | None
    model: str
    charged_micros: Micros | None
    units: str | None
    billed_units: str | None
    fal_cost_nano_usd: int | None


@dataclass(slots=True)
class Compared:
    """What a comparison did and found.

    ``losses`` are calls that fal billed and, by our own terms, nobody paid; ``below_cost`` counts by model the calls
    that fal billed at more than was charged for them: its price has risen since the last `prices sync`.
    """

    events: int = 0
    settled: int = 0
    adjusted: int = 0
    costed: int = 0
    pending: int = 0
    left_out: int = 0  # rows that could not be read
    unreadable: list[str] = field(default_factory=list)  # why, of the first few
    losses: int = 0
    loss_nano_usd: int = 0
    below_cost: Counter[str] = field(default_factory=Counter)
    drift: Counter[str] = field(default_factory=Counter)
    listed: list[Drift] = field(default_factory=list)
    recent: dict[str, Event] = field(default_factory=dict)  # by fal's request id, the oldest first

    def add(self, one: Drift) -> None:
        self.drift[one.kind] += 1
        if len(self.listed) < DRIFT_MAX:
            self.listed.append(one)


def span(reached_at: int | None, since_ms: int | None, now_ms: int) -> tuple[int, int]:
    """From when to when to compare: since a given time, else since the last time and a little before."""
    if since_ms is None:
        if reached_at is None or reached_at > now_ms + billing.SKEW_MS:  # the latter by a clock that was wrong
            since_ms = now_ms - REACH_MS
        else:
            since_ms = reached_at - OVERLAP_MS
    return max(since_ms, now_ms - REACH_MS), now_ms + billing.SKEW_MS


def compare(
    database: Database,
    rows: Rows,
    *,
    since_ms: int,
    until_ms: int,
    now_ms: int,
    lag_ms: int = LAG_MS,
    progress: Callable[[int, int], None] = lambda events, reached_ms: None,
) -> Compared:
    """Take fal's events from ``since_ms`` to ``until_ms`` into the books, then list what does not agree.

    ``progress`` hears of the events so far and of the time reached. Raises what ``rows`` raises; what was taken in
    until then stays. The marks move only where no call before ``since_ms`` was left out, so that a look at the last
    days leaves nothing out for ever.
    """
    done = Compared()
    is_whole, listed_ms = database.read(partial(_unlisted, since_ms=since_ms, now_ms=now_ms))
    at = since_ms
    while at < until_ms:
        end = min(at + DAY_MS, until_ms)
        stream = iter(rows(at, end))
        while batch := list(islice(stream, BATCH)):
            events = [event for event in _read(done, batch) if not _is_second(done, event)]
            _count(done, database.write(partial(_take, batch=events, now_ms=now_ms)))
            done.events += len(batch)
            progress(done.events, end)
        if is_whole:
            database.write(partial(_reach, name=BOOKMARK, at_ms=min(end, now_ms)))
        at = end
    _explain_the_rest(done, database, now_ms)
    database.read(partial(_find_drift, done=done, since_ms=listed_ms, now_ms=now_ms, lag_ms=lag_ms))
    database.write(partial(_alert, below_cost=done.below_cost, now_ms=now_ms))
    if is_whole:
        database.write(partial(_reach, name=LOOKED_AT, at_ms=now_ms))
    return done


def parse_event(row: Mapping[str, Any]) -> Event:
    """One row of fal's billing events (fal-protocol 8.5), numbers as int or Decimal. Raises ValueError naming it."""
    request_id, model = row.get("request_id"), row.get("endpoint_id")
    if not isinstance(request_id, str) or not _REQUEST_ID.fullmatch(request_id):
        raise ValueError("an event has no request_id")
    if not isinstance(model, str) or not MODEL_ID.fullmatch(model):
        raise ValueError(f"the event of {request_id} has no endpoint_id")
    units = _number(row.get("output_units"))
    cost = _number(row.get("cost_estimate_nano_usd"))
    if cost is None and (total := _number(row.get("cost_total"))) is not None:
        cost = Decimal(product_nanos(total, Decimal(1)))
    if units is None or cost is None or cost > COST_MAX_NANO_USD:
        raise ValueError(f"the event of {request_id} has no units or cost that could be believed")
    happened_at = parse_time(row.get("timestamp"))
    if happened_at is None:
        raise ValueError(f"the event of {request_id} has no timestamp")
    return Event(request_id, model, units, int(cost.to_integral_value(rounding=ROUND_CEILING)), happened_at)


def parse_time(value: object) -> int | None:
    """Milliseconds of an ISO 8601 time, taken as UTC where it does not say; None for what is none."""
    if not isinstance(value, str):
        return None
    try:
        at = datetime.fromisoformat(value)
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    except (ValueError, OverflowError):
        return None


def _number(value: object) -> Decimal | None:
    """A plain number of zero or more, as it was printed; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | Decimal | str):
        return None
    text = f"{value:f}" if isinstance(value, Decimal) and value.is_finite() else str(value)
    return Decimal(text) if len(text) <= 60 and _UNITS.fullmatch(text) else None


def _read(done: Compared, rows: Iterable[Mapping[str, Any]]) -> Iterable[Event]:
    for row in rows:
        try:
            yield parse_event(row)
        except ValueError as error:
            done.left_out += 1
            if len(done.unreadable) < UNREADABLE_MAX:
                done.unreadable.append(str(error))


def _take(tx: Tx, *, batch: list[Event], now_ms: int) -> Counter[Effect]:
    return Counter(billing.apply(tx, event, now_ms=now_ms) for event in batch)


def _is_second(done: Compared, event: Event) -> bool:
    """Whether this run has seen another bill of the same request: the first stands, or each run would move a charge
    to the one and back to the other. A bill that takes the place of an earlier one comes alone, and counts."""
    first = done.recent.setdefault(event.request_id, event)
    if len(done.recent) > RECENT_MAX:
        del done.recent[next(iter(done.recent))]
    if (first.units, first.cost_nano_usd) == (event.units, event.cost_nano_usd):
        return False
    done.add(_drift_of_event(event, "billed_twice"))
    return True


def _unlisted(tx: Tx, *, since_ms: int, now_ms: int) -> tuple[bool, int]:
    """Whether all calls before a time were compared; and from when on their drift is still to be listed: what a run
    that broke off took in, it did not list."""
    oldest = now_ms - REACH_MS
    reached = max(oldest, billing.reached_at(tx, BOOKMARK) or 0)
    if reached < since_ms and billing.has_calls_between(tx, reached, since_ms):
        return False, since_ms
    return True, min(since_ms, max(oldest, (billing.reached_at(tx, LOOKED_AT) or 0) - OVERLAP_MS))


def _reach(tx: Tx, *, name: str, at_ms: int) -> None:
    if at_ms > (billing.reached_at(tx, name) or 0):
        billing.reach(tx, name, at_ms)


def _count(done: Compared, effects: Counter[Effect]) -> None:
    done.settled += effects["settled"]
    done.adjusted += effects["adjusted"]
    done.costed += effects["costed"]
    done.pending += effects["running"]


def _explain_the_rest(done: Compared, database: Database, now_ms: int) -> None:
    """Look again at events that had no call: it may have ended since; or its answer was lost."""
    after = ""
    while page := database.read(partial(billing.unexplained, after=after, most=BATCH)):
        for event in page:
            effect = database.write(partial(_explained, event=event, now_ms=now_ms))
            _count(done, Counter((effect,)))
            if effect in ("unexplained", "unsettled"):
                done.add(_drift_of_event(event, "unexplained_event" if effect == "unexplained" else "not_settled"))
        after = page[-1].request_id


def _explained(tx: Tx, *, event: Event, now_ms: int) -> Effect:
    effect = billing.apply(tx, event, now_ms=now_ms)
    return billing.attribute(tx, event, now_ms=now_ms) if effect == "unexplained" else effect


def _find_drift(tx: Tx, *, done: Compared, since_ms: int, now_ms: int, lag_ms: int) -> None:
    """The calls of the span that do not agree with fal's bill, and those that fal billed and nobody paid."""
    for found in billing.created_between(tx, since_ms, now_ms + 1):
        kind = _disagrees(found, now_ms - lag_ms)
        if kind == "pending":
            done.pending += 1
        elif kind is not None:
            done.add(_drift_of(found, kind))
        if found.state == "released" and found.billed_units is not None:
            done.losses += 1
            done.loss_nano_usd += found.fal_cost_nano_usd or 0
        elif _is_below_cost(found):
            done.below_cost[found.call.model] += 1


def _is_below_cost(found: BilledCall) -> bool:
    """Whether a customer was charged less than fal's own bill of the call comes to."""
    if found.state != "settled" or found.usage_source == "operator" or found.billed_units is None:
        return False
    return (found.fal_cost_nano_usd or 0) > found.net_micros * 1000


def _alert(tx: Tx, *, below_cost: Mapping[str, int], now_ms: int) -> None:
    """Tell of the models that lose money by fal's bill, and of no others any more."""
    for model, count in below_cost.items():
        words = f"fal billed {count} calls on {model} at more than was charged for them: run `abhiapi prices sync`"
        alerts.raise_(tx, BELOW_COST, model, words, now_ms=now_ms)
    for alert in alerts.standing(tx):
        if alert.kind == BELOW_COST and alert.subject not in below_cost:
            alerts.clear(tx, BELOW_COST, alert.subject, now_ms=now_ms)


def _disagrees(found: BilledCall, expected_before_ms: int) -> DriftKind | Literal["pending"] | None:
    """In what a call and fal's bill of it do not agree; `pending` for one that ended after ``expected_before_ms``."""
    if found.state != "settled" or found.usage_source == "operator":
        return None
    if found.billed_units is None:
        if not found.net_micros:
            return None
        return "pending" if found.finished_at is None or found.finished_at > expected_before_ms else "not_billed_by_fal"
    if found.usage_source == "catalogue":
        return "other_model"  # else the event would have moved it
    if found.usage_source == "fal" and found.units and Decimal(found.units) != Decimal(found.billed_units):
        return "units_differ"
    return None


def _drift_of(found: BilledCall, kind: DriftKind) -> Drift:
    return Drift(
        kind,
        found.call.call_id,
        found.fal_request_id,
        found.call.model,
        Micros(found.net_micros),
        found.units,
        found.billed_units,
        found.fal_cost_nano_usd,
    )


def _drift_of_event(event: Event, kind: DriftKind) -> Drift:
    units = decimal_text(event.units)
    return Drift(kind, None, event.request_id, event.model, None, None, units, event.cost_nano_usd)


def describe(one: Drift) -> str:
    """A drift in a sentence."""
    call = "" if one.call_id is None else call_text(one.call_id)
    return {
        "not_billed_by_fal": f"{call} was charged, and fal has no bill of it",
        "unexplained_event": f"fal billed {one.model} for {one.fal_request_id}, which no call of ours explains",
        "units_differ": f"{call} was charged for {one.units} units, fal billed {one.billed_units}",
        "other_model": f"{call} was billed by fal as another model: its computed charge was left as it is",
        "billed_twice": f"fal billed {one.fal_request_id} twice with other figures: the first stands",
        "not_settled": f"fal's bill of {one.fal_request_id} is absurd or of another model: the hold stands",
    }[one.kind]
