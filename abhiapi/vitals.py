"""How the books stand, in a few figures for whoever watches: open holds, waiting webhooks, what fal's bill left open.

Read-only; takes an open transaction. Everything comes from partial indexes and small tables: nothing here reads more
with more calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import func, literal_column, select

from abhiapi import billing, tables, timers
from abhiapi.calls import OPEN
from abhiapi.db import Tx

ROUND = "reconciled"  # the timer that the reconciler sets when it has come through
BACKUP = "backup"  # and `abhiapi backup`

_c = tables.calls.c
_w = tables.webhooks.c
_HOLDS = (
    select(_c.state, func.count(), func.sum(_c.held_micros), func.min(_c.created_at))
    .where(_c.state.in_([literal_column(f"'{state}'") for state in OPEN]))
    .group_by(_c.state)
)
_WAITING = select(func.count()).where(_w.state == literal_column("'waiting'"), _w.next_attempt_at.is_not(None))
_DUE = select(func.count()).where(_w.state == literal_column("'due'"))
_UNEXPLAINED = select(func.count()).select_from(tables.unexplained_events)
_a = tables.alerts.c
_ALERTS = select(_a.kind, func.count()).where(_a.cleared_at.is_(None)).group_by(_a.kind)


_BEGAN = select(tables.accounts.c.created_at).order_by(tables.accounts.c.account_id).limit(1)


@dataclass(frozen=True, slots=True)
class Holds:
    count: int
    held_micros: int
    oldest_at: int


@dataclass(frozen=True, slots=True)
class Vitals:
    """``holds`` by state: held (running), sent (in fal's queue), unknown (the operator's)."""

    holds: Mapping[str, Holds]
    webhooks: Mapping[str, int]
    unexplained_events: int
    alerts: Mapping[str, int]
    compared_until: int | None  # by when fal's bill was last held against our charges
    backed_up_at: int | None
    began_at: int | None  # when the first account was made


def read(tx: Tx, *, bill_bookmark: str) -> Vitals:
    return Vitals(
        holds={state: Holds(count, int(held), oldest) for state, count, held, oldest in tx.all(_HOLDS)},
        webhooks={
            state: row[0] if (row := tx.one(statement)) else 0
            for state, statement in (("waiting", _WAITING), ("due", _DUE))
        },
        unexplained_events=row[0] if (row := tx.one(_UNEXPLAINED)) else 0,
        alerts={row[0]: row[1] for row in tx.all(_ALERTS)},
        compared_until=billing.reached_at(tx, bill_bookmark),
        backed_up_at=timers.done_at(tx, BACKUP),
        began_at=row[0] if (row := tx.one(_BEGAN)) else None,
    )
