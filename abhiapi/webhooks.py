"""Customers' webhooks as rows: a wish, then a payload, then a delivery; each step one conditional update.

    waiting -> due -> delivered | failed        (and back to due by the operator's word)

Functions take an open transaction. A row becomes ready to be worked on when its job ends: a trigger of the database
sees to that, in the transaction that ends the job, whoever ends it. Whoever works on a row first moves its
``next_attempt_at`` into the future (a lease), and may write the outcome only while that still stands there; so several
processes may work at once, and what a killed one left behind is taken up again when its lease is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import ColumnElement, and_, bindparam, case, exists, func, insert, literal_column, null, select, update

from abhiapi import calls, tables
from abhiapi.db import Row, Tx, position
from abhiapi.errors import NotFound, Refused
from abhiapi.ids import call_text

State = Literal["waiting", "due", "delivered", "failed"]
DELIVERED_KEPT_BYTES = 64 * 1024  # a larger payload is forgotten once it has been delivered: it fills the disk
KEPT_MS = 7 * 86_400_000  # how long a payload is kept after the end, for `webhooks resend`

_w = tables.webhooks.c
_a = tables.accounts.c
# Literals, so that SQLite uses the partial indexes webhooks_waiting and webhooks_due.
_IS_WAITING = _w.state == literal_column("'waiting'")
_IS_DUE = _w.state == literal_column("'due'")
_THIS = _w.call_id == bindparam("call")
_IS_LEASED = _w.next_attempt_at == bindparam("lease")

_WANT = insert(tables.webhooks).values(
    {name: bindparam(name) for name in ("call_id", "account_id", "url", "state", "attempts", "created_at")}
)
_STATE = select(_w.state).where(_THIS)
_ENDED = (
    select(_w.call_id, _w.next_attempt_at, _w.attempts)
    .where(_IS_WAITING, _w.next_attempt_at.is_not(None), _w.next_attempt_at <= bindparam("before"))
    .order_by(_w.next_attempt_at)
    .limit(bindparam("most"))
)
# From one account to the next by the index, however many webhooks each of them has.
_FIRST = select(func.min(_w.account_id).label("account_id")).where(_IS_DUE).cte("having", recursive=True)
_HAVING = _FIRST.union_all(
    select(
        select(func.min(_w.account_id))
        .where(_IS_DUE, _w.account_id > _FIRST.c.account_id)
        .correlate(_FIRST)
        .scalar_subquery()
    ).where(_FIRST.c.account_id.is_not(None))
)
_ACCOUNTS = select(_HAVING.c.account_id).where(
    exists().where(_IS_DUE, _w.account_id == _HAVING.c.account_id, _w.next_attempt_at <= bindparam("now"))
)
_DUE = (
    select(_w.call_id, _w.next_attempt_at, _w.attempts, func.length(_w.payload))
    .where(_IS_DUE, _w.account_id == bindparam("account"), _w.next_attempt_at <= bindparam("now"))
    .order_by(_w.next_attempt_at)
    .limit(bindparam("most"))
)
_LEASE = (
    update(tables.webhooks)
    .where(_THIS, _w.state == bindparam("in_state"), _w.next_attempt_at == bindparam("seen"))
    .values(next_attempt_at=bindparam("lease"), attempts=_w.attempts + 1)
)
_STORE = (
    update(tables.webhooks)
    .where(_THIS, _IS_WAITING)
    .values(state="due", payload=bindparam("body"), attempts=literal_column("0"), next_attempt_at=bindparam("at"))
)
_HURRY = update(tables.webhooks).where(_THIS, _IS_WAITING).values(next_attempt_at=bindparam("at"))
_PARCEL = (
    select(_w.url, _w.attempts, _w.payload, tables.calls.c.fal_request_id, _a.name)
    .join_from(tables.webhooks, tables.calls, _w.call_id == tables.calls.c.call_id)
    .join(tables.accounts, _w.account_id == _a.account_id)
    .where(_THIS)
)
_LATER = (
    update(tables.webhooks)
    .where(_THIS, _w.state == bindparam("in_state"), _IS_LEASED)
    .values(next_attempt_at=bindparam("at"), last_status=bindparam("http_status"), last_error=bindparam("why"))
)
_TO_DELIVERED: ColumnElement[bool] = bindparam("new_state") == literal_column("'delivered'")
_END = (
    update(tables.webhooks)
    .where(_THIS, _w.state == bindparam("in_state"), _IS_LEASED)
    .values(
        state=bindparam("new_state"),
        next_attempt_at=null(),
        last_status=bindparam("http_status"),
        last_error=bindparam("why"),
        ended_at=bindparam("at"),
        payload=case((and_(_TO_DELIVERED, func.length(_w.payload) > DELIVERED_KEPT_BYTES), null()), else_=_w.payload),
    )
)
_OLD = (
    select(_w.call_id)
    .where(_w.payload.is_not(None), _w.ended_at.is_not(None), _w.ended_at < bindparam("before"))
    .limit(bindparam("most"))
)
_QUERY: ColumnElement[str] = literal_column("'?'")
_DROP = (
    update(tables.webhooks)
    .where(_w.call_id.in_(_OLD))
    .values(payload=null(), url=func.substr(_w.url, 1, position(_w.url + _QUERY, _QUERY) - 1))
)
_RESEND = (
    update(tables.webhooks)
    .where(_THIS, _w.payload.is_not(None))
    .values(state="due", attempts=literal_column("0"), next_attempt_at=bindparam("at"), ended_at=null())
)
_COLUMNS = select(
    _w.call_id, _a.name, _w.url, _w.state, _w.attempts, _w.next_attempt_at, _w.last_status, _w.last_error,
    _w.created_at, _w.ended_at, _w.payload.is_not(None),
).join_from(tables.webhooks, tables.accounts, _w.account_id == _a.account_id)  # fmt: skip
_NEWEST = _COLUMNS.where(_w.call_id < bindparam("before")).order_by(_w.call_id.desc()).limit(bindparam("most"))
_LIST = {
    (False, False): _NEWEST,
    (True, False): _NEWEST.where(_w.account_id == bindparam("account")),
    (False, True): _NEWEST.where(_w.state == bindparam("in_state")),
    (True, True): _NEWEST.where(_w.account_id == bindparam("account"), _w.state == bindparam("in_state")),
}
_ONE = _COLUMNS.where(_THIS)


@dataclass(frozen=True, slots=True)
class Ready:
    """A row that may be worked on, as it was seen; ``size_bytes`` is its payload's."""

    call_id: int
    next_attempt_at: int
    attempts: int
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is delivered, and to whom. ``attempts`` counts this one."""

    url: str
    attempts: int
    payload: bytes
    request_id: str
    account: str


@dataclass(frozen=True, slots=True)
class WebhookRow:
    """A webhook as the operator reads of it."""

    call_id: int
    account: str
    url: str
    state: State
    attempts: int
    next_attempt_at: int | None
    last_status: int | None
    last_error: str | None
    created_at: int
    ended_at: int | None
    has_payload: int


def want(tx: Tx, call: calls.OpenCall, url: str, *, now_ms: int) -> None:
    """A customer wants to be told of a job's end; in the transaction that makes the call a job."""
    tx.run(
        _WANT, call_id=call.call_id, account_id=call.account_id, url=url, state="waiting", attempts=0, created_at=now_ms
    )


def state_of(tx: Tx, call_id: int) -> State | None:
    """A webhook's state; None where none is wanted."""
    row = tx.one(_STATE, call=call_id)
    return None if row is None else row[0]


def ended(tx: Tx, *, before: int, most: int) -> list[Ready]:
    """Webhooks without a payload whose job ended at that time or before, oldest first."""
    return [Ready(*row) for row in tx.all(_ENDED, before=before, most=most)]


def accounts(tx: Tx, *, now_ms: int) -> list[int]:
    """The accounts that have webhooks to be delivered now."""
    return [row[0] for row in tx.all(_ACCOUNTS, now=now_ms)]


def due(tx: Tx, account_id: int, *, now_ms: int, most: int) -> list[Ready]:
    """An account's webhooks to be delivered now, oldest first."""
    return [Ready(*row) for row in tx.all(_DUE, account=account_id, now=now_ms, most=most)]


def lease(tx: Tx, ready: Ready, state: State, *, until: int) -> bool:
    """Take a row for oneself until then; False where somebody else was faster."""
    return tx.run(_LEASE, call=ready.call_id, in_state=state, seen=ready.next_attempt_at, lease=until) == 1


def store(tx: Tx, call_id: int, payload: bytes, *, now_ms: int) -> bool:
    """Give a waiting webhook its payload; False where it has one already: the first one counts."""
    return tx.run(_STORE, call=call_id, body=payload, at=now_ms) == 1


def hurry(tx: Tx, call_id: int) -> None:
    """Have a waiting webhook's payload made from fal's result at once."""
    tx.run(_HURRY, call=call_id, at=0)


def parcel(tx: Tx, call_id: int) -> Parcel | None:
    """What a leased row delivers; None where it has no payload any more."""
    row = tx.one(_PARCEL, call=call_id)
    return None if row is None or row[2] is None else Parcel(*row)


def later(
    tx: Tx, call_id: int, state: State, *, lease: int, at: int, http_status: int | None = None, why: str | None = None
) -> bool:
    """An attempt failed and is repeated; False where the lease was over and somebody else is at it."""
    changed = tx.run(_LATER, call=call_id, in_state=state, lease=lease, at=at, http_status=http_status, why=why)
    return changed == 1


def end(
    tx: Tx,
    call_id: int,
    state: State,
    new_state: State,
    *,
    lease: int,
    now_ms: int,
    http_status: int | None = None,
    why: str | None = None,
) -> bool:
    """The end of a leased row; False where the lease was over and somebody else is at it."""
    changed = tx.run(
        _END,
        call=call_id,
        in_state=state,
        new_state=new_state,
        lease=lease,
        at=now_ms,
        http_status=http_status,
        why=why,
    )
    return changed == 1


def drop_old(tx: Tx, *, now_ms: int, most: int) -> int:
    """Forget payloads some days after the end, and the query of the URL with them; how many."""
    return tx.run(_DROP, before=now_ms - KEPT_MS, most=most)


def newest(
    tx: Tx, *, account_id: int | None, state: State | None, most: int, before: int = 2**63 - 1
) -> list[WebhookRow]:
    """The newest first; ``before``: the last call of the page before."""
    named = {"account": account_id, "in_state": state, "most": most, "before": before}
    given = {name: value for name, value in named.items() if value is not None}
    rows = tx.all(_LIST[account_id is not None, state is not None], **given)
    return [_row(row) for row in rows]


def one(tx: Tx, call_id: int) -> WebhookRow | None:
    row = tx.one(_ONE, call=call_id)
    return None if row is None else _row(row)


def resend(tx: Tx, call_id: int, *, now_ms: int) -> WebhookRow:
    """Deliver once more, from the first attempt on. Raises `NotFound`, `Refused`."""
    row = one(tx, call_id)
    if row is None:
        raise NotFound(
            f"no webhook was asked for with {call_text(call_id)}: `abhiapi webhooks list` shows those there are"
        )
    if row.state == "waiting":
        raise Refused(f"the job of {call_text(call_id)} has not ended yet: its webhook is sent by itself when it has")
    if tx.run(_RESEND, call=call_id, at=now_ms) != 1:
        days = KEPT_MS // 86_400_000
        raise Refused(
            f"the payload of {call_text(call_id)} is gone: it is kept for {days} days after the end, a delivered one "
            f"of more than {DELIVERED_KEPT_BYTES // 1024} KiB not at all"
        )
    found = one(tx, call_id)
    assert found is not None
    return found


def _row(row: Row) -> WebhookRow:
    return WebhookRow(*row)
