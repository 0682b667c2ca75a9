"""What calls of a model were really charged, so that the next hold fits: counted when a call ends, never by a scan.

A histogram a model, whose bounds grow by about a quarter: a percentile read from it is at most that much too high. And
a raise where charges pass what the model's formula had held. Estimates only: no charge is ever made from these.
"""

from __future__ import annotations

from bisect import bisect_left

from sqlalchemy import bindparam, func, insert, select, update

from abhiapi import tables
from abhiapi.db import RollUp, Row, Tx
from abhiapi.ids import CHANCE_BITS
from abhiapi.money import MICROS_MAX, Micros
from abhiapi.price_terms import Costs

RAISE_LASTS_MS = 7 * 86_400_000  # a bill that was a fault does not weigh on a model for ever
RAISE_MAX_PERCENT = 1000
_RAISE_STEP = 5
_PERCENTILE = 99
_AGED_CALLS = 10_000  # beyond this many calls the older ones count half, and half again, from day to day
_TENTHS = (100, 126, 159, 200, 252, 317, 399, 502, 631, 795)  # ten steps to a factor of ten
BOUNDS = sorted({-(-step * 10**power // 100) for power in range(16) for step in _TENTHS if step * 10**power >= 100})

_o = tables.observed_costs.c
_r = tables.hold_raises.c
_c = tables.calls.c
_COUNT = (
    update(tables.observed_costs)
    .where(_o.model == bindparam("of_model"), _o.up_to_micros == bindparam("bound"))
    .values(
        calls=_o.calls + bindparam("more"), over_hold=_o.over_hold + bindparam("over"), last_call_id=bindparam("call")
    )
)
_FIRST = insert(tables.observed_costs).values(
    model=bindparam("of_model"),
    up_to_micros=bindparam("bound"),
    calls=bindparam("more"),
    over_hold=bindparam("over"),
    last_call_id=bindparam("call"),
)
_COUNTED = RollUp(_COUNT, _FIRST)
_ALL = select(_o.model, _o.up_to_micros, _o.calls).order_by(_o.model, _o.up_to_micros)
_RAISED = (
    select(_r.percent, _r.created_at)
    .where(_r.model == bindparam("of_model"))
    .order_by(_r.raise_id.desc())
    .limit(bindparam("most"))
)
_RAISE = insert(tables.hold_raises).values({name: bindparam(name) for name in ("model", "percent", "created_at")})
_NEWEST_RAISES = select(_r.model, _r.percent, _r.created_at).where(
    _r.raise_id.in_(select(func.max(_r.raise_id)).group_by(_r.model))
)
_TOTALS = select(_o.model, func.sum(_o.calls)).group_by(_o.model)
_HALVE = (
    update(tables.observed_costs)
    .where(_o.model == bindparam("of_model"))
    .values(calls=(_o.calls + 1) // 2, over_hold=(_o.over_hold + 1) // 2)
)
_SHARE = select(func.sum(_o.calls), func.sum(_o.over_hold)).where(_o.model == bindparam("of_model"))
_l = select(_o.model, func.max(_o.last_call_id).label("call_id")).group_by(_o.model).subquery("last").c
# The two figures as expressions: as a join PostgreSQL may read all calls for it.
_LAST = select(
    _l.model, _l.call_id,
    *(select(_c[name]).where(_c.call_id == _l.call_id).scalar_subquery() for name in ("held_micros", "charged_micros")),
).order_by(_l.model)  # fmt: skip


def note(tx: Tx, model: str, call_id: int, charged_micros: Micros, *, held_micros: Micros, now_ms: int) -> None:
    """Count a charge; where more than one in a hundred passes its hold, raise the holds of the calls to come."""
    if charged_micros <= 0:
        return
    bound, over = bound_of(charged_micros), int(charged_micros > held_micros + 1)  # more than rounding
    of = {"of_model": model, "bound": bound}
    tx.add_up(_COUNTED, of=of, more={"more": 1, "over": over}, last={"call": call_id})
    if over and held_micros > 0:
        tx.write_sums()
        if _is_frequent(tx, model):
            _raise(tx, model, call_id, charged_micros, held_micros, now_ms)


def bound_of(amount_micros: Micros) -> int:
    """The upper bound of the charges that are counted together with this one."""
    place = bisect_left(BOUNDS, amount_micros)
    return BOUNDS[place] if place < len(BOUNDS) else MICROS_MAX


def of_models(tx: Tx, *, now_ms: int) -> dict[str, Costs]:
    """What is known of every model that was ever charged here."""
    raised = {model: percent for model, percent, created_at in tx.all(_NEWEST_RAISES) if _lasts(created_at, now_ms)}
    found: dict[str, Costs] = {}
    counts: dict[str, list[Row]] = {}
    for row in tx.all(_ALL):
        counts.setdefault(row[0], []).append(row)
    for model, rows in counts.items():
        calls = sum(row[2] for row in rows)
        largest = Micros(rows[-1][1])
        found[model] = Costs(calls, _percentile(rows, calls), largest, raised.get(model, 100))
    return found


def age(tx: Tx) -> None:
    """Let old calls fade where there are many: to be called about once a day."""
    for model, calls in tx.all(_TOTALS):
        if calls > _AGED_CALLS:
            tx.run(_HALVE, of_model=model)


def over_hold(tx: Tx) -> list[tuple[str, int, Micros, Micros]]:
    """Models whose last charge passed its hold: (model, call, held, charged)."""
    return [
        (model, call_id, Micros(held), Micros(charged))
        for model, call_id, held, charged in tx.all(_LAST)
        if charged > held + 1
    ]


def _percentile(rows: list[Row], calls: int) -> Micros:
    rank, seen = -(-_PERCENTILE * calls // 100), 0
    for _, up_to_micros, count in rows:
        seen += count
        if seen >= rank:
            return Micros(up_to_micros)
    return Micros(rows[-1][1])


def _is_frequent(tx: Tx, model: str) -> bool:
    """Whether the holds of a model fit fewer than 99 of 100 of its calls."""
    calls, over = tx.one(_SHARE, of_model=model) or (0, 0)
    return bool(over * 100 > calls)


def _raise(tx: Tx, model: str, call_id: int, charged_micros: int, held_micros: int, now_ms: int) -> None:
    """A hold that was already raised is raised further; one from before the last raise says no more than that did."""
    row = tx.one(_RAISED, of_model=model, most=1)
    percent, since = row if row is not None and _lasts(row[1], now_ms) else (100, 0)
    held_at = percent if call_id >> CHANCE_BITS > since else 100
    needed = -(-held_at * charged_micros // held_micros)
    needed = min(RAISE_MAX_PERCENT, -(-needed // _RAISE_STEP) * _RAISE_STEP)
    if needed > percent:
        tx.run(_RAISE, model=model, percent=needed, created_at=now_ms)


def _lasts(created_at: int, now_ms: int) -> bool:
    return now_ms - created_at < RAISE_LASTS_MS
