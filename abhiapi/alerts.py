"""Alerts: what the operator should hear of, once each time that it begins, as rows that outlive a restart.

A row stands until what it tells of is over; only then can the same thing be raised again (a crossing is told once).
Whoever raises one needs no network and no log: `alerting` announces the rows, off the path of any call. Functions take
an open transaction.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import bindparam, func, insert, literal_column, select, update

from abhiapi import tables
from abhiapi.db import Tx
from abhiapi.money import Micros, credits_text

# What may go wrong, and what it is about.
KINDS = {
    "low_balance": "an account's balance fell below its threshold",
    "fal_account": "fal refused the operator's credential or account (locked, or out of credit)",
    "below_cost": "a call on a model cost more at fal than it brought in",
    "billed_above_charge": "fal billed calls on a model at more than was charged for them (`reconcile`)",
    "unknown_hold": "calls on a model could not settle: the operator is asked (`holds list`)",
    "old_hold": "a hold has been open for more than a day",
    "parked_charge": "a charge could not be written, and its answer was withheld",
    "bill_drift": "the last `abhiapi reconcile` found charges and fal's bill at odds",
    "unexpected_proxy": "requests come through a reverse proxy, and ABHIAPI_TRUSTED_PROXIES is 0",
}
TRIES = 5  # of the webhook; the index alerts_to_deliver says so too

_t = tables.alerts.c
_a = tables.accounts.c
_STANDS = _t.cleared_at.is_(None)
_IS_STANDING = select(_t.alert_id).where(_t.kind == bindparam("of_kind"), _t.subject == bindparam("about"), _STANDS)
_RAISE = insert(tables.alerts).values(
    kind=bindparam("of_kind"),
    subject=bindparam("about"),
    message=bindparam("words"),
    raised_at=bindparam("now"),
    tries=0,
)
_CLEAR = (
    update(tables.alerts)
    .where(_t.kind == bindparam("of_kind"), _t.subject == bindparam("about"), _STANDS)
    .values(cleared_at=bindparam("now"))
)
_STANDING = select(tables.alerts).where(_STANDS).order_by(_t.alert_id)
_NEWEST = select(tables.alerts).order_by(_t.alert_id.desc()).limit(bindparam("most"))
_TO_ANNOUNCE = select(tables.alerts).where(_t.announced_at.is_(None)).order_by(_t.alert_id).limit(bindparam("most"))
_ANNOUNCE = (
    update(tables.alerts)
    .where(_t.alert_id == bindparam("alert"), _t.announced_at.is_(None))
    .values(announced_at=bindparam("now"))
)
_TO_DELIVER = (
    select(tables.alerts)
    .where(
        _t.delivered_at.is_(None),
        _t.tries < literal_column(str(TRIES)),
        _t.announced_at.is_not(None),
        _t.raised_at >= bindparam("since"),
    )
    .order_by(_t.alert_id)
    .limit(bindparam("most"))
)
_TRY = (
    update(tables.alerts)
    .where(_t.alert_id == bindparam("alert"), _t.tries == bindparam("seen"), _t.delivered_at.is_(None))
    .values(tries=_t.tries + 1)
)
_DELIVERED = update(tables.alerts).where(_t.alert_id == bindparam("alert")).values(delivered_at=bindparam("at"))
_THRESHOLD = (
    update(tables.accounts).where(_a.account_id == bindparam("account")).values(alert_below_micros=bindparam("below"))
)
_c = tables.calls.c
_p = tables.price_versions.c
_IS_OPEN = _c.state.in_([literal_column(f"'{state}'") for state in ("held", "sent", "unknown")])
_UNKNOWN_BY_MODEL = (
    select(_p.model, func.count(), func.min(_c.call_id))
    .join_from(tables.calls, tables.price_versions, _c.price_id == _p.price_id)
    .where(_IS_OPEN, _c.state == literal_column("'unknown'"))
    .group_by(_p.model)
)
_OLDEST_OPEN = select(func.min(_c.created_at)).where(_IS_OPEN)


@dataclass(frozen=True, slots=True)
class Alert:
    alert_id: int
    kind: str
    subject: str
    message: str
    raised_at: int
    cleared_at: int | None
    announced_at: int | None
    delivered_at: int | None
    tries: int


@dataclass(frozen=True, slots=True)
class OpenHolds:
    """What the open holds tell: those nobody could settle (model, how many, the oldest), and the oldest of all."""

    unknown: list[tuple[str, int, int]]
    oldest_at: int | None


def raise_(tx: Tx, kind: str, subject: str, message: str, *, now_ms: int) -> bool:
    """Raise an alert unless the same one stands already; whether it is new."""
    if tx.one(_IS_STANDING, of_kind=kind, about=subject) is not None:
        return False
    tx.run(_RAISE, of_kind=kind, about=subject, words=message, now=now_ms)
    return True


def clear(tx: Tx, kind: str, subject: str, *, now_ms: int) -> bool:
    """What an alert told of is over: the next time is a new one. Whether one stood."""
    return tx.run(_CLEAR, of_kind=kind, about=subject, now=now_ms) > 0


def balance_moved(
    tx: Tx, account: str, below_micros: int, before_micros: int, after_micros: int, *, now_ms: int
) -> None:
    """Raise or clear an account's low balance where it crosses the threshold, in the movement's own transaction."""
    if after_micros < below_micros <= before_micros:
        _raise_low(tx, account, below_micros, after_micros, now_ms=now_ms)
    elif before_micros < below_micros <= after_micros:
        clear(tx, "low_balance", account, now_ms=now_ms)


def set_threshold(
    tx: Tx, account_id: int, account: str, balance_micros: int, below_micros: Micros | None, *, now_ms: int
) -> None:
    """Tell the operator when the account's balance falls below this, now if it has already; None: never."""
    tx.run(_THRESHOLD, account=account_id, below=below_micros)
    if below_micros is not None and balance_micros < below_micros:
        _raise_low(tx, account, below_micros, balance_micros, now_ms=now_ms)
    else:
        clear(tx, "low_balance", account, now_ms=now_ms)


def retell(tx: Tx, kind: str, subject: str, message: str | None, *, now_ms: int) -> None:
    """Make an alert say this; what it said before is over. None: nothing is wrong any more."""
    if message is None or all(found.message != message for found in standing(tx) if found.kind == kind):
        clear(tx, kind, subject, now_ms=now_ms)
    if message is not None:
        raise_(tx, kind, subject, message, now_ms=now_ms)


def _raise_low(tx: Tx, account: str, below_micros: int, balance_micros: int, *, now_ms: int) -> None:
    words = f"the balance of {account!r} is {credits_text(balance_micros)} credits, below {credits_text(below_micros)}"
    raise_(tx, "low_balance", account, words, now_ms=now_ms)


def standing(tx: Tx) -> list[Alert]:
    return [Alert(*row) for row in tx.all(_STANDING)]


def newest(tx: Tx, *, most: int) -> list[Alert]:
    """Alerts past and present, newest first."""
    return [Alert(*row) for row in tx.all(_NEWEST, most=most)]


def to_announce(tx: Tx, *, most: int) -> list[Alert]:
    return [Alert(*row) for row in tx.all(_TO_ANNOUNCE, most=most)]


def announce(tx: Tx, alert_id: int, *, now_ms: int) -> bool:
    """Claim the telling of an alert; False where another process was faster."""
    return tx.run(_ANNOUNCE, alert=alert_id, now=now_ms) == 1


def to_deliver(tx: Tx, *, since: int, most: int) -> list[Alert]:
    """Announced alerts that the webhook has not taken yet, and may still be given."""
    return [Alert(*row) for row in tx.all(_TO_DELIVER, since=since, most=most)]


def claim_try(tx: Tx, alert: Alert) -> bool:
    """Claim the next try of the webhook; False where another process was faster."""
    return tx.run(_TRY, alert=alert.alert_id, seen=alert.tries) == 1


def delivered(tx: Tx, alert_id: int, *, now_ms: int) -> None:
    """The webhook has taken it."""
    tx.run(_DELIVERED, alert=alert_id, at=now_ms)


def open_holds(tx: Tx) -> OpenHolds:
    rows = [(model, count, oldest) for model, count, oldest in tx.all(_UNKNOWN_BY_MODEL)]
    oldest_at = tx.one(_OLDEST_OPEN)
    return OpenHolds(rows, oldest_at[0] if oldest_at else None)
