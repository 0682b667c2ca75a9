"""What a serving process tells those who watch it: health, and the figures that only the database knows.

Both are asked for by machines, again and again, so both are kept for a moment: a flood of questions is one write a
second, and one read every few.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from abhiapi import fal_bill, processes, timers, vitals
from abhiapi.errors import DatabaseUnavailable
from abhiapi.metrics import Sample
from abhiapi.polls import Shared
from abhiapi.runtime import HEALTH_PATIENCE_S, Runtime
from abhiapi.vitals import Vitals

log = logging.getLogger("abhiapi")

HEALTH_FRESH_S = 1  # how long a verdict may stand after it was found
VITALS_FRESH_S = 5


class Monitor:
    """Of one process. Make it once, with the application."""

    def __init__(self, rt: Runtime, now: Callable[[], float] = monotonic) -> None:
        self._rt = rt
        self._health: Shared[DatabaseUnavailable | None] = Shared(HEALTH_FRESH_S, now)
        self._vitals: Shared[Vitals | None] = Shared(VITALS_FRESH_S, now)
        rt.metrics.watch(self._samples)
        self._last: Vitals | None = None

    def trouble(self) -> DatabaseUnavailable | None:
        """Why this process cannot serve, found out by a durable write at most a second ago; None: it can."""

        def probe() -> DatabaseUnavailable | None:
            rt = self._rt
            try:
                rt.write(lambda tx: processes.seen(tx, rt.process_id, now_ms=rt.now_ms()), patience_s=HEALTH_PATIENCE_S)
            except DatabaseUnavailable as error:
                return error
            return None

        return self._health.get("health", probe)

    def look(self) -> None:
        """Read what the figures of the database are, unless that was done a moment ago."""

        def read() -> Vitals | None:
            try:
                return self._rt.read_aside(lambda tx: vitals.read(tx, bill_bookmark=fal_bill.BOOKMARK))
            except DatabaseUnavailable as error:
                log.warning("the database's figures could not be read: %s", error.message)
                return None

        self._last = self._vitals.get("vitals", read)

    def _samples(self) -> list[Sample]:
        return samples(self._last, self._rt.now_ms())


def samples(seen: Vitals | None, now_ms: int) -> list[Sample]:
    """The figures as they are shown; none but their absence where the database could not be read."""
    if seen is None:
        return [Sample("abhiapi_database_readable", "Whether the figures of the database could be read", 0)]
    names = {"held": "running", "sent": "queued", "unknown": "unknown"}
    shown = [Sample("abhiapi_database_readable", "Whether the figures of the database could be read", 1)]
    for state, word in names.items():
        holds = seen.holds.get(state)
        of = (("state", word),)
        shown += (
            Sample("abhiapi_open_holds", "Holds that stand", holds.count if holds else 0, of),
            Sample("abhiapi_open_holds_micros", "What they hold, in micros", holds.held_micros if holds else 0, of),
            Sample(
                "abhiapi_oldest_hold_seconds",
                "Age of the oldest",
                _age_s(holds.oldest_at if holds else None, now_ms),
                of,
            ),
        )
    shown += [
        Sample("abhiapi_webhooks_pending", "Customers' webhooks on their way", count, (("state", state),))
        for state, count in seen.webhooks.items()
    ]
    shown += [
        Sample("abhiapi_alerts_open", "Alerts that stand, by kind", count, (("kind", kind),))
        for kind, count in seen.alerts.items()
    ]
    shown.append(
        Sample("abhiapi_unexplained_events", "Events of fal's bill that no call explains", seen.unexplained_events)
    )
    for name, words, at in (
        ("abhiapi_bill_compared_timestamp_seconds", "Up to when fal's bill was compared", seen.compared_until),
        ("abhiapi_backup_timestamp_seconds", "When `abhiapi backup` was last run", seen.backed_up_at),
    ):
        if at is not None:
            shown.append(Sample(name, words, at / 1000))
    return shown


def came_through(rt: Runtime, work: str, *, at_ms: int | None = None) -> None:
    """Background work has come to its end once more: now, or at ``at_ms``."""
    rt.metrics.rounds.labels(work).set((rt.now_ms() if at_ms is None else at_ms) / 1000)


def show_round(rt: Runtime) -> None:
    """Show when the reconciler last came through, in whatever process. Raises `DatabaseUnavailable`."""
    done_at = rt.reader.read(lambda tx: timers.done_at(tx, vitals.ROUND))
    if done_at is not None:
        came_through(rt, "reconcile", at_ms=done_at)


def _age_s(at: int | None, now_ms: int) -> int:
    return 0 if at is None else max(0, now_ms - at) // 1000
