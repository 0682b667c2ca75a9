"""fal's bill beside our calls: each billing event finds its call, tells what it cost, and corrects what was computed.

Functions take an open transaction. An event that is seen again changes nothing. The past is never edited: a charge
that had to be computed without units is moved by an adjustment entry, once (contract 3.5; fal-protocol 8.5). A call
whose cost was not known is settled. Whose call an event belongs to is decided by fal's request id; where fal's answer
was lost before it named one, by model and time: a call that was given back then takes fal's cost, and nobody is
charged; a job whose submit got no answer is settled where exactly one call and exactly one event fit each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from sqlalchemy import bindparam, delete, func, insert, literal_column, or_, select, update

from abhiapi import calls, ledger, spending, tables
from abhiapi.calls import OpenCall
from abhiapi.db import Row, Tx
from abhiapi.errors import BadAmount
from abhiapi.metering import ABSURD_MICROS, Verdict
from abhiapi.money import Micros, product_micros
from abhiapi.pricing import decimal_text

SKEW_MS = 300_000  # how far fal's clock and ours may be apart
LOST_MS = 86_400_000  # no call runs longer: an event belongs to a call that began at most this long before it
FITTING_MAX = 50

_c = tables.calls.c
_p = tables.price_versions.c
_u = tables.unexplained_events.c
_b = tables.bookmarks.c

Effect = Literal["seen", "costed", "adjusted", "settled", "unsettled", "running", "unexplained"]

_COLUMNS = (
    _c.call_id, _c.account_id, _c.key_id, _p.model, _c.held_micros, _c.state, _c.usage_source, _c.charged_micros,
    _c.refunded_micros, _c.adjusted_micros, _c.units, _c.billed_units, _c.fal_cost_nano_usd, _c.finished_at,
    _p.unit_price_usd, _c.fal_request_id, _c.created_at, spending.LIMIT_OF_CALL,
)  # fmt: skip
_CALLS = select(*_COLUMNS).join_from(tables.calls, tables.price_versions, _c.price_id == _p.price_id)
_BY_REQUEST = _CALLS.where(_c.fal_request_id == bindparam("request_id")).order_by(_c.call_id).limit(1)
_BETWEEN = _CALLS.where(_c.call_id >= bindparam("first"), _c.call_id < bindparam("end")).order_by(_c.call_id)
_ANY_BETWEEN = _BETWEEN.limit(1)
_FITTING = _BETWEEN.where(
    _p.model == bindparam("of_model"),
    _c.fal_request_id.is_(None),
    _c.state.in_([literal_column("'released'"), literal_column("'unknown'")]),
    or_(_c.finished_at.is_(None), _c.finished_at >= bindparam("not_over_before")),  # None: a job may wait for hours
).limit(FITTING_MAX)
_RUNNING = _BETWEEN.where(
    _p.model == bindparam("of_model"), _c.fal_request_id.is_(None), _c.state == literal_column("'held'")
).limit(1)
_NOTE = (
    update(tables.calls)
    .where(_c.call_id == bindparam("call"))
    .values(
        billed_units=bindparam("units"),
        fal_cost_nano_usd=bindparam("cost"),
        fal_request_id=func.coalesce(_c.fal_request_id, bindparam("request_id")),
    )
)
_ADJUST = (
    update(tables.calls)
    .where(
        _c.call_id == bindparam("call"),
        _c.adjusted_micros == bindparam("before"),
        _c.state == literal_column("'settled'"),
    )
    .values(adjusted_micros=bindparam("after"), usage_source="events")
)
_KEEP = insert(tables.unexplained_events).values({column.name: bindparam(column.name) for column in _u})
_KEPT = select(_u.seen_at).where(_u.request_id == bindparam("of_request"))
_FORGET = delete(tables.unexplained_events).where(_u.request_id == bindparam("of_request"))
_UNEXPLAINED = (
    select(_u.request_id, _u.model, _u.units, _u.cost_nano_usd, _u.happened_at)
    .where(_u.request_id > bindparam("after"))
    .order_by(_u.request_id)
    .limit(bindparam("most"))
)
_RIVALS = select(func.count()).where(
    _u.model == bindparam("of_model"),
    _u.happened_at >= bindparam("since"),
    _u.happened_at < bindparam("until"),
)
_REACHED = select(_b.reached_at).where(_b.name == bindparam("of_name"))
_MOVE = update(tables.bookmarks).where(_b.name == bindparam("of_name")).values(reached_at=bindparam("at"))
_PLACE = insert(tables.bookmarks).values(name=bindparam("of_name"), reached_at=bindparam("at"))


@dataclass(frozen=True, slots=True)
class Event:
    """One row of fal's bill. ``units`` are fal's output units; the cost is in nano-USD; the time is by fal's clock."""

    request_id: str
    model: str
    units: Decimal
    cost_nano_usd: int
    happened_at: int


@dataclass(frozen=True, slots=True)
class BilledCall:
    """A call as far as fal's bill concerns it."""

    call: OpenCall
    state: str
    usage_source: str | None
    charged_micros: Micros
    refunded_micros: Micros
    adjusted_micros: int
    units: str | None
    billed_units: str | None
    fal_cost_nano_usd: int | None
    finished_at: int | None
    unit_price_usd: str
    fal_request_id: str | None
    admitted_at: int
    limit_id: int | None  # its key's spending limit

    @property
    def net_micros(self) -> int:
        """What the customer has paid for it by now, refunds left aside."""
        return self.charged_micros + self.adjusted_micros


def apply(tx: Tx, event: Event, *, now_ms: int) -> Effect:
    """Take one event into the books; what it changed."""
    found = _by_request(tx, event.request_id)
    if found is None:
        return _keep(tx, event, now_ms)
    effect = _explain(tx, found, event, now_ms)
    if effect == "unsettled":
        _keep(tx, event, now_ms)  # until the operator has ended the hold: then it tells fal's cost
    elif effect != "running":
        tx.run(_FORGET, of_request=event.request_id)
    return effect


def attribute(tx: Tx, event: Event, *, now_ms: int) -> Effect:
    """Explain an event by a call whose answer was lost, so that fal's id for it was never seen.

    The oldest released call of that model whose time fits takes fal's cost; nobody is charged by it. Where there is
    none, a job whose submit got no answer is settled if it is the only call that fits, and this the only event that
    fits it. A call that is still running may be the one: the event waits for it.
    """
    bounds = {"first": _first_id(event.happened_at - LOST_MS), "end": _first_id(event.happened_at + SKEW_MS)}
    if tx.one(_RUNNING, of_model=event.model, **bounds) is not None:
        return "running"
    rows = tx.all(_FITTING, of_model=event.model, not_over_before=event.happened_at - SKEW_MS, **bounds)
    fitting = [_billed_call(row) for row in rows]
    found = next((one for one in fitting if one.state == "released"), None)
    if found is None and len(fitting) == 1 and _is_only_event(tx, fitting[0]):
        found = fitting[0]
    if found is None:
        return "unexplained"
    effect = _explain(tx, found, event, now_ms)
    if effect != "unsettled":
        tx.run(_FORGET, of_request=event.request_id)
    return effect


def _is_only_event(tx: Tx, found: BilledCall) -> bool:
    """Whether no more than one event that nothing explains could be this call's."""
    since = found.admitted_at - SKEW_MS
    row = tx.one(_RIVALS, of_model=found.call.model, since=since, until=found.admitted_at + LOST_MS)
    return row is not None and row[0] == 1


def unexplained(tx: Tx, *, after: str, most: int) -> list[Event]:
    """Events that no call explains, by request id, beyond one of them."""
    return [
        Event(request_id, model, Decimal(units), cost, happened_at)
        for request_id, model, units, cost, happened_at in tx.all(_UNEXPLAINED, after=after, most=most)
    ]


def created_between(tx: Tx, since_ms: int, until_ms: int) -> Iterator[BilledCall]:
    """The calls admitted in a span of time, oldest first, in bounded memory."""
    return map(_billed_call, tx.each(_BETWEEN, first=_first_id(since_ms), end=_first_id(until_ms)))


def has_calls_between(tx: Tx, since_ms: int, until_ms: int) -> bool:
    """Whether any call was admitted in a span of time."""
    return tx.one(_ANY_BETWEEN, first=_first_id(since_ms), end=_first_id(until_ms)) is not None


def reached_at(tx: Tx, name: str) -> int | None:
    """Up to when something has been done: milliseconds, None before the first time."""
    row = tx.one(_REACHED, of_name=name)
    return None if row is None else int(row[0])


def reach(tx: Tx, name: str, at_ms: int) -> None:
    if tx.run(_MOVE, of_name=name, at=at_ms) == 0:
        tx.run(_PLACE, of_name=name, at=at_ms)


def _by_request(tx: Tx, request_id: str) -> BilledCall | None:
    row = tx.one(_BY_REQUEST, request_id=request_id)
    return None if row is None else _billed_call(row)


def _explain(tx: Tx, found: BilledCall, event: Event, now_ms: int) -> Effect:
    """The one table of what an event means for its call."""
    if found.state in ("held", "sent"):
        return "running"  # it ends by itself, by fal's own answer; the event comes again
    if found.state == "unknown":
        return _settle(tx, found, event, now_ms)
    if found.billed_units == decimal_text(event.units) and found.fal_cost_nano_usd == event.cost_nano_usd:
        return "seen"
    _note(tx, found, event)
    if found.state == "settled" and found.usage_source in ("catalogue", "events") and found.call.model == event.model:
        return _adjust(tx, found, event, now_ms)
    return "costed"


def _settle(tx: Tx, found: BilledCall, event: Event, now_ms: int) -> Effect:
    """A call whose cost nobody knew: fal's units tell, unless they are of another model or absurd."""
    amount = _charge(found, event)
    if amount is None or found.call.model != event.model:
        return "unsettled"
    units = decimal_text(event.units)
    verdict = Verdict("settled", amount, units, None, event.cost_nano_usd, "settled_by_event")
    calls.finish(tx, found.call, verdict, now_ms=now_ms, fal_request_id=event.request_id, usage_source="events")
    tx.run(_NOTE, call=found.call.call_id, units=units, cost=event.cost_nano_usd, request_id=event.request_id)
    return "settled"


def _note(tx: Tx, found: BilledCall, event: Event) -> None:
    """fal's true cost beside the call, and in the roll-up of the day on which it ended."""
    assert found.finished_at is not None
    more = event.cost_nano_usd - (found.fal_cost_nano_usd or 0)
    tx.run(
        _NOTE,
        call=found.call.call_id,
        units=decimal_text(event.units),
        cost=event.cost_nano_usd,
        request_id=event.request_id,
    )
    calls.count_usage(tx, found.call, found.finished_at, calls=0, charged_micros=Micros(0), fal_cost_nano_usd=more)


def _adjust(tx: Tx, found: BilledCall, event: Event, now_ms: int) -> Effect:
    """Move a computed charge to what fal's units come to, by one entry. What was refunded is not taken again."""
    right = _charge(found, event)
    if right is None:
        return "costed"
    right = Micros(max(right, found.refunded_micros))
    more = right - found.net_micros
    assert found.finished_at is not None
    moved = tx.run(_ADJUST, call=found.call.call_id, before=found.adjusted_micros, after=found.adjusted_micros + more)
    assert moved == 1
    if more == 0:
        return "costed"
    ledger.adjust(
        tx,
        found.call.account_id,
        Micros(-more),
        note=f"fal billed {decimal_text(event.units)} units; the charge was computed without them",
        now_ms=now_ms,
        call_id=found.call.call_id,
    )
    calls.count_usage(tx, found.call, found.finished_at, calls=0, charged_micros=Micros(more), fal_cost_nano_usd=0)
    if found.limit_id is not None:
        spending.correct(tx, found.limit_id, found.admitted_at, more)
    return "adjusted"


def _charge(found: BilledCall, event: Event) -> Micros | None:
    """What fal's units cost the customer at the price of admission; None where that is absurd."""
    try:
        amount = product_micros(event.units, Decimal(found.unit_price_usd))
    except BadAmount:
        return None
    return None if amount > ABSURD_MICROS else amount


def _keep(tx: Tx, event: Event, now_ms: int) -> Effect:
    if tx.one(_KEPT, of_request=event.request_id) is None:
        tx.run(
            _KEEP,
            request_id=event.request_id,
            model=event.model,
            units=decimal_text(event.units),
            cost_nano_usd=event.cost_nano_usd,
            happened_at=event.happened_at,
            seen_at=now_ms,
        )
    return "unexplained"


def _first_id(at_ms: int) -> int:
    """The smallest id of a call admitted at ``at_ms`` or later: ids sort by time (`ids.CallIds`)."""
    return max(0, at_ms) << 20


def _billed_call(row: Row) -> BilledCall:
    return BilledCall(OpenCall(*row[:5]), *row[5:])
