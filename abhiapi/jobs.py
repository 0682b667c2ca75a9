"""Queued calls as rows: a call becomes a job when fal accepts it, and is found again by fal's id for it.

Functions take an open transaction. A job's end is `calls.finish`, conditional like every end, so that of several
that see it complete one settles it.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy import and_, bindparam, insert, literal_column, null, or_, select, update

from abhiapi import calls, ledger, metering, tables
from abhiapi.db import Tx
from abhiapi.errors import Refused
from abhiapi.ids import call_text
from abhiapi.money import Micros

CANCEL_REQUESTED = "cancel_requested"

_c = tables.calls.c
_p = tables.price_versions.c
_e = tables.entries.c
_a = tables.accounts.c
# Literals, so that SQLite uses the partial indexes calls_one_job, calls_open and entries_one_charge.
_IS_QUEUED = _c.mode == literal_column("'queue'")
_IS_OPEN = _c.state.in_([literal_column(f"'{state}'") for state in calls.OPEN])
_IS_SENT = _c.state == literal_column("'sent'")

# Whoever took the submitting process for dead has left the hold to the operator: it knows better.
_IS_SUBMITTED = or_(
    _c.state == literal_column("'held'"),
    and_(
        _c.state == literal_column("'unknown'"),
        _c.reason == literal_column(f"'{metering.SUBMIT_UNKNOWN.reason}'"),
        _c.fal_request_id.is_(None),
    ),
)
_SEND = (
    update(tables.calls)
    .where(_c.call_id == bindparam("call"), _IS_SUBMITTED, _IS_QUEUED)
    .values(state="sent", fal_request_id=bindparam("request_id"), http_status=bindparam("status"), reason=null())
)
_NOTE = update(tables.calls).where(_c.call_id == bindparam("call"), _IS_SENT).values(reason=bindparam("why"))
_JOB = select(
    _c.call_id, _c.account_id, _c.key_id, _p.model, _c.held_micros, _c.fal_request_id, _c.state, _c.price_id,
    _c.created_at, _c.reason,
).join_from(tables.calls, tables.price_versions, _c.price_id == _p.price_id)  # fmt: skip
_FIND = _JOB.where(_c.fal_request_id == bindparam("request_id"), _IS_QUEUED, _c.account_id == bindparam("account"))
_BY_CALL = _JOB.where(_c.call_id == bindparam("call"), _IS_QUEUED)
_TAKEN = select(_c.call_id).where(_c.fal_request_id == bindparam("request_id"), _IS_QUEUED)
# Beyond an id, but by the index of open calls: both engines would rather read all ids, SQLite all calls for it.
_SENT = (
    _JOB.where(_IS_OPEN, _IS_SENT, _c.call_id + 0 > bindparam("after"))
    .order_by(_c.call_id + 0)
    .limit(bindparam("most"))
)
_PRICE = select(_p.unit, _p.unit_price_usd, _p.fal_unit_price_usd, _p.source).where(
    _p.price_id == bindparam("price_id")
)
_KEEP_INPUT = insert(tables.job_inputs).values(call_id=bindparam("call"), document=bindparam("input"))
_INPUT = select(tables.job_inputs.c.document).where(tables.job_inputs.c.call_id == bindparam("call"))
_OUTCOME = (
    select(_c.charged_micros, _e.balance_after_micros, _a.balance_micros, _c.state)
    .join_from(tables.calls, tables.accounts, _c.account_id == _a.account_id)
    .outerjoin(tables.entries, (_e.call_id == _c.call_id) & (_e.kind == literal_column("'charge'")))
    .where(_c.call_id == bindparam("call"))
)


@dataclass(frozen=True, slots=True)
class Job:
    """A queued call that fal accepted."""

    call: calls.OpenCall
    request_id: str
    state: str
    price_id: int
    created_at: int
    reason: str | None

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to find out at fal: it ended, or waits for the operator."""
        return self.state != "sent"


@dataclass(frozen=True, slots=True)
class RecordedPrice:
    """The price at submission, as it was written down then."""

    unit: str
    unit_price_usd: Decimal
    fal_unit_price_usd: Decimal | None
    source: str


def remember(tx: Tx, call: calls.OpenCall, request_id: str, *, http_status: int) -> None:
    """fal accepted a held call as this job. Raises `CallEnded`; `Refused` where the id is another call's already."""
    if tx.one(_TAKEN, request_id=request_id) is not None:
        raise Refused(f"fal's id for {call_text(call.call_id)} is another call's already")
    if tx.run(_SEND, call=call.call_id, request_id=request_id, status=http_status) != 1:
        raise calls.CallEnded(f"the hold of {call_text(call.call_id)} has already ended: nothing was changed")


def keep_input(tx: Tx, call_id: int, document: bytes) -> None:
    """Write down what a job asked for, until its hold ends (a trigger forgets it)."""
    tx.run(_KEEP_INPUT, call=call_id, input=document)


def input_of(tx: Tx, call_id: int) -> bytes | None:
    """What a job asked for, if that was short."""
    row = tx.one(_INPUT, call=call_id)
    return None if row is None else bytes(row[0])


def note_cancel(tx: Tx, job: Job) -> None:
    """fal took a wish to cancel. No end: a running job may still finish, and cost."""
    tx.run(_NOTE, call=job.call.call_id, why=CANCEL_REQUESTED)


def find(tx: Tx, account_id: int, request_id: str) -> Job | None:
    """An account's job by fal's id; None for an unknown one and for anybody else's."""
    row = tx.one(_FIND, request_id=request_id, account=account_id)
    return None if row is None else Job(calls.OpenCall(*row[:5]), *row[5:])


def by_call(tx: Tx, call_id: int) -> Job | None:
    """The job that a call became; None for a call that is none, or whose submit has not been answered."""
    row = tx.one(_BY_CALL, call=call_id)
    return None if row is None or row[5] is None else Job(calls.OpenCall(*row[:5]), *row[5:])


def sent_after(tx: Tx, call_id: int, *, most: int) -> list[Job]:
    """Jobs that fal works on, oldest first, beyond a call id."""
    return [Job(calls.OpenCall(*row[:5]), *row[5:]) for row in tx.all(_SENT, after=call_id, most=most)]


def recorded_price(tx: Tx, price_id: int) -> RecordedPrice:
    row = tx.one(_PRICE, price_id=price_id)
    assert row is not None
    unit, unit_price, fal_price, source = row
    return RecordedPrice(unit, Decimal(unit_price), Decimal(fal_price) if fal_price else None, source)


def outcome(tx: Tx, call_id: int) -> tuple[Micros, Micros, bool]:
    """What a job was charged, and the balance after that very charge; without a charge 0 and the balance now.

    And whether that is known: False where the operator will say what it cost.
    """
    row = tx.one(_OUTCOME, call=call_id)
    assert row is not None
    charged, after_charge, now, state = row
    return Micros(charged), Micros(now if after_charge is None else after_charge), state != "unknown"


def balance(tx: Tx, job: Job) -> Micros:
    return ledger.balance_micros(tx, job.call.account_id)
