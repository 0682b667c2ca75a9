"""Calls: a row for each request to fal, and the one table of how its state may move.

A call's hold is taken by `admit` and ended by `finish`, each inside the caller's transaction; every move is a
conditional UPDATE whose row count is looked at, so of two that race one wins and the other is told (`CallEnded`).

    held ----> settled | released | unknown        (sync and stream)
    held ----> sent ----> settled | released | unknown      (queue)
    unknown -> settled | released                  (the operator, or fal's billing events)
    unknown -> sent                                (a submit whose process lives after all, and has fal's id)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import ColumnElement, bindparam, func, insert, literal_column, select, update

from abhiapi import costs, ledger, spending, tables
from abhiapi.days import MS_PER_DAY, month_of
from abhiapi.db import RollUp, Tx
from abhiapi.errors import NotFound, Refused
from abhiapi.ids import call_text
from abhiapi.metering import Verdict
from abhiapi.money import Micros, credits_text

Mode = Literal["sync", "stream", "queue"]
State = Literal["held", "sent", "unknown", "settled", "released"]

MOVES: Mapping[State, frozenset[State]] = {
    "held": frozenset(("sent", "unknown", "settled", "released")),
    "sent": frozenset(("unknown", "settled", "released")),
    "unknown": frozenset(("sent", "settled", "released")),
    "settled": frozenset(),
    "released": frozenset(),
}
OPEN: tuple[State, ...] = ("held", "sent", "unknown")
BatchOp = Callable[[Tx], int]
OVERDUE, PROCESS_DIED = "overdue", "process_died"
SWEPT = frozenset((OVERDUE, PROCESS_DIED))  # why the sweep gives a hold back

_c = tables.calls.c
_p = tables.price_versions.c

_ADMITTED = (
    "call_id account_id key_id price_id process_id mode"
    " state held_micros deadline_at created_at charged_micros refunded_micros adjusted_micros"
).split()
_ADMIT = insert(tables.calls).values({name: bindparam(name) for name in _ADMITTED})


_SEEN = ("http_status", "units", "fal_request_id", "fal_cost_nano_usd")


def _in(*states: State) -> ColumnElement[bool]:
    """The states as literals: SQLite uses a partial index only where its condition stands in the query as it is."""
    return _c.state.in_([literal_column(f"'{state}'") for state in states])


def _sources(target: State) -> tuple[State, ...]:
    return tuple(state for state, targets in MOVES.items() if target in targets)


_FINISH = {
    target: update(tables.calls)
    .where(_c.call_id == bindparam("call"), _in(*_sources(target)))
    .values({name: bindparam(name) for name in "state charged_micros usage_source reason finished_at".split()})
    # What was seen of fal's answer when the outcome was unknown stays, unless the end knows better.
    .values({name: func.coalesce(bindparam(name), _c[name]) for name in _SEEN})
    .returning(_c.created_at, spending.LIMIT_OF_CALL)
    for target in ("settled", "released", "unknown")
}
_FIGURES = ("calls", "charged_micros", "fal_cost_nano_usd")
_ROLL_UPS = {table.name: table for table in (tables.usage_daily, tables.usage_monthly, tables.usage_totals)}
_ROLLED_BY = {name: tuple(column.name for column in table.primary_key) for name, table in _ROLL_UPS.items()}
_MOVE = {
    name: update(table)
    .where(*(column == bindparam(f"of_{column.name}") for column in table.primary_key))
    .values({figure: table.c[figure] + bindparam(f"more_{figure}") for figure in _FIGURES})
    for name, table in _ROLL_UPS.items()
}
_BEGIN = {
    name: insert(table).values(
        {name: bindparam(f"of_{name}") for name in _ROLLED_BY[name]}
        | {figure: bindparam(f"more_{figure}") for figure in _FIGURES}
    )
    for name, table in _ROLL_UPS.items()
}
_ROLLED = {name: RollUp(_MOVE[name], _BEGIN[name]) for name in _ROLL_UPS}
_OPEN_CALL = (
    select(_c.call_id, _c.account_id, _c.key_id, _p.model, _c.held_micros, _c.state, _c.reason)
    .join_from(tables.calls, tables.price_versions, _c.price_id == _p.price_id)
    .where(_c.call_id == bindparam("call"))
)
_REFUND = (
    update(tables.calls)
    .where(
        _c.call_id == bindparam("call"),
        _c.charged_micros - _c.refunded_micros >= bindparam("amount"),
        _c.charged_micros + _c.adjusted_micros - _c.refunded_micros >= bindparam("amount"),
    )
    .values(refunded_micros=_c.refunded_micros + bindparam("amount"))
)
_CHARGED = (
    select(
        _c.account_id, _c.key_id, _p.model, _c.charged_micros, _c.refunded_micros, _c.finished_at, _c.created_at,
        _c.adjusted_micros, spending.LIMIT_OF_CALL, _c.reason,
    )
    .join_from(tables.calls, tables.price_versions, _c.price_id == _p.price_id)
    .where(_c.call_id == bindparam("call"))
)  # fmt: skip
_OVERDUE = (
    select(_c.call_id, _c.account_id, _c.key_id, _p.model, _c.held_micros)
    .join_from(tables.calls, tables.price_versions, _c.price_id == _p.price_id)
    .where(_in(*OPEN), _c.state == "held", _c.deadline_at < bindparam("now"), _c.process_id == bindparam("process"))
    .limit(bindparam("most"))
)
_OF_PROCESS = (
    select(_c.call_id, _c.account_id, _c.key_id, _p.model, _c.held_micros)
    .join_from(tables.calls, tables.price_versions, _c.price_id == _p.price_id)
    .where(_in(*OPEN), _c.state == "held", _c.process_id == bindparam("process"))
    .limit(bindparam("most"))
)
_MODE = select(_c.mode).where(_c.call_id == bindparam("call"))
_HOLDING = (
    select(_c.process_id, tables.processes.c.pid)
    .join_from(tables.calls, tables.processes, _c.process_id == tables.processes.c.process_id)
    .where(_in(*OPEN), _c.state == "held")
    .distinct()
)


class CallEnded(Refused):
    """The call's hold had already ended: somebody else was faster, and nothing was changed."""

    type = "call_ended"


@dataclass(frozen=True, slots=True)
class OpenCall:
    """What is needed to end a call's hold."""

    call_id: int
    account_id: int
    key_id: int
    model: str
    held_micros: Micros


@dataclass(frozen=True, slots=True)
class Admission:
    """A call on its way in: who pays, what for, and how long its hold may stand."""

    call: OpenCall
    price_id: int
    process_id: int
    mode: Mode
    deadline_at: int
    created_at: int


def admit(tx: Tx, admission: Admission) -> None:
    """Hold the credit and write the call. Raises what `ledger.hold` raises, with nothing written."""
    call = admission.call
    row = {
        "call_id": call.call_id,
        "account_id": call.account_id,
        "key_id": call.key_id,
        "price_id": admission.price_id,
        "process_id": admission.process_id,
        "mode": admission.mode,
        "state": "held",
        "held_micros": call.held_micros,
        "deadline_at": admission.deadline_at,
        "created_at": admission.created_at,
        "charged_micros": 0,
        "refunded_micros": 0,
        "adjusted_micros": 0,
    }
    now = admission.created_at
    ledger.hold(tx, call.account_id, call.held_micros, key_id=call.key_id, now_ms=now, call=(_ADMIT, row))


def finish(
    tx: Tx,
    call: OpenCall,
    verdict: Verdict,
    *,
    now_ms: int,
    http_status: int | None = None,
    fal_request_id: str | None = None,
    usage_source: str | None = None,
) -> Micros:
    """End a call's hold by its verdict, once; the account's balance afterwards.

    ``unknown`` is no end: the hold stands and the operator is asked. Raises `CallEnded` when the hold had already
    ended. ``usage_source`` overrides the verdict's (the operator's word).
    """
    end = {
        "call": call.call_id,
        "state": verdict.end,
        "charged_micros": verdict.charge_micros,
        "http_status": http_status,
        "units": verdict.units,
        "usage_source": usage_source or verdict.usage_source,
        "fal_request_id": fal_request_id,
        "fal_cost_nano_usd": verdict.fal_cost_nano_usd,
        "reason": verdict.reason,
        "finished_at": None if verdict.end == "unknown" else now_ms,
    }
    ended = tx.one_and((_FINISH[verdict.end], end), (ledger.HEAD, {"account": call.account_id}))
    if ended is None:
        raise CallEnded(f"the hold of {call_text(call.call_id)} has already ended: nothing was changed")
    admitted_at, limit_id, *of_head = ended
    head = ledger.Head(*of_head)
    if verdict.end == "unknown":
        return head.balance_micros
    if limit_id is not None:
        spending.correct(tx, limit_id, admitted_at, verdict.charge_micros - call.held_micros)
    count_usage(
        tx, call, now_ms, calls=1, charged_micros=verdict.charge_micros, fal_cost_nano_usd=verdict.fal_cost_nano_usd
    )
    costs.note(tx, call.model, call.call_id, verdict.charge_micros, held_micros=call.held_micros, now_ms=now_ms)
    return ledger.charge(
        tx, call.account_id, call.call_id, verdict.charge_micros,
        head=head, held_micros=call.held_micros, now_ms=now_ms,
    )  # fmt: skip


def refund(tx: Tx, call_id: int, amount_micros: Micros | None, *, now_ms: int) -> ledger.Entry:
    """Give back a call's charge, wholly or in part, never more than was charged. Raises `NotFound`, `Refused`."""
    row = tx.one(_CHARGED, call=call_id)
    if row is None:
        raise NotFound(f"no call has the id {call_text(call_id)}")
    account_id, key_id, model, charged, refunded, finished_at, admitted_at, adjusted, limit_id, _reason = row
    refundable = min(charged, charged + adjusted)  # what a correction added is given back by `adjust`
    amount = Micros(refundable - refunded) if amount_micros is None else amount_micros
    if amount <= 0 or tx.run(_REFUND, call=call_id, amount=amount) != 1:
        raise Refused(
            f"{call_text(call_id)} was charged {credits_text(refundable)} credits, of which {credits_text(refunded)} "
            f"are already refunded: {f'{credits_text(amount)} cannot be refunded' if amount > 0 else 'nothing is left'}"
        )
    call = OpenCall(call_id, account_id, key_id, model, Micros(0))
    count_usage(tx, call, finished_at, calls=0, charged_micros=Micros(-amount), fal_cost_nano_usd=0)
    if limit_id is not None:
        spending.correct(tx, limit_id, admitted_at, -amount)
    return ledger.append(tx, account_id, "refund", amount, now_ms=now_ms, call_id=call_id)


def ended_as(tx: Tx, call_id: int) -> tuple[Micros, Micros, str | None]:
    """What an ended call was charged, its account's balance now, and why it ended so."""
    row = tx.one(_CHARGED, call=call_id)
    if row is None:
        raise NotFound(f"no call has the id {call_text(call_id)}")
    return Micros(row[3]), ledger.balance_micros(tx, row[0]), row[-1]


def open_call(tx: Tx, call_id: int) -> OpenCall:
    """An open call by its id, for the operator's word on it. Raises `NotFound`, `CallEnded`."""
    row = tx.one(_OPEN_CALL, call=call_id)
    if row is None:
        raise NotFound(f"no call has the id {call_text(call_id)}")
    if row[5] not in OPEN:
        raise CallEnded(f"the hold of {call_text(call_id)} has already ended as {row[5]}: nothing was changed")
    return OpenCall(*row[:5])


def overdue(tx: Tx, process_id: int, *, now_ms: int, most: int) -> list[OpenCall]:
    """Held calls of a process past their deadline, by its own clock: no answer can come any more."""
    return _open_calls(tx.all(_OVERDUE, process=process_id, now=now_ms, most=most))


def of_process(tx: Tx, process_id: int, *, most: int) -> list[OpenCall]:
    """Held calls of a process, to be ended when it is gone."""
    return _open_calls(tx.all(_OF_PROCESS, process=process_id, most=most))


def is_queued(tx: Tx, call_id: int) -> bool:
    """Whether a call is a job of fal's queue. The call must exist."""
    row = tx.one(_MODE, call=call_id)
    if row is None:
        raise AssertionError(f"call {call_id} is gone")
    return bool(row[0] == "queue")


def holding_processes(tx: Tx) -> list[tuple[int, int]]:
    """Processes that have held calls: (number, pid)."""
    return [(row[0], row[1]) for row in tx.all(_HOLDING)]


def _open_calls(rows: Iterable[tuple[object, ...]]) -> list[OpenCall]:
    return [OpenCall(*row) for row in rows]  # type: ignore[arg-type]


def count_usage(
    tx: Tx, call: OpenCall, finished_at: int, *, calls: int, charged_micros: Micros, fal_cost_nano_usd: int | None
) -> None:
    """Roll a movement up into the day and month in which its call ended, so that reports never read the calls."""
    day = finished_at // MS_PER_DAY
    row = {
        "account_id": call.account_id,
        "key_id": call.key_id,
        "model": call.model,
        "day": day,
        "month": month_of(day),
    }
    figures = zip(_FIGURES, (calls, charged_micros, fal_cost_nano_usd or 0), strict=True)
    more = {f"more_{name}": figure for name, figure in figures}
    for table, columns in _ROLLED_BY.items():
        tx.add_up(_ROLLED[table], of={f"of_{name}": row[name] for name in columns}, more=more)
