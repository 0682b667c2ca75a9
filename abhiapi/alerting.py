"""Telling the operator: looks at what is wrong, announces alerts in the log and the metrics, posts them to a webhook.

Runs beside the calls, never in their way. Which alerts stand, which were announced and which were delivered are rows,
so a restart repeats nothing and forgets nothing. Safe in several processes at once: an announcement and a delivery are
claimed, and what one process sees no other declares to be over.
"""

from __future__ import annotations

import logging
from functools import partial

from abhiapi import alerts, shapes, timers, turns
from abhiapi.alerts import Alert, OpenHolds
from abhiapi.db import Tx
from abhiapi.ids import call_text
from abhiapi.operator_webhook import OperatorWebhook
from abhiapi.runtime import Runtime
from abhiapi.settings import Settings

log = logging.getLogger("abhiapi")

PAGE = 100  # alerts told in one round
PATIENCE_S = 30
OLD_HOLD_MS = 86_400_000
RENEWED_MS = 60_000  # how often a process writes down that it still sees what an alert tells of
PROXY_FORGOTTEN_MS = 86_400_000  # a proxy that nobody came through for so long
DELIVER_WITHIN_MS = 86_400_000  # what is older was not meant for a webhook that has just been set
FIRST_PAUSE_MS = 15_000  # before the second try; four times as long before each further one
DELIVERIES_MAX = 20  # in one round


def run_once(rt: Runtime, webhook: OperatorWebhook | None) -> int:
    """Look once, and tell what is new; how many alerts were announced."""
    holds, standing = rt.read_aside(lambda tx: (alerts.open_holds(tx), alerts.standing(tx)))
    rt.oldest_hold_at = holds.oldest_at
    _watch_holds(rt, holds, {(alert.kind, alert.subject) for alert in standing})
    _watch_witnessed(rt, standing)
    announced = _announce(rt)
    if webhook is not None:
        _deliver(rt, webhook)
    rt.standing = {(alert.kind, alert.subject) for alert in rt.read_aside(alerts.standing)}
    return announced


def _watch_holds(rt: Runtime, holds: OpenHolds, standing: set[tuple[str, str]]) -> None:
    """Raise what open holds tell, and clear what they told before."""
    now = rt.now_ms()
    wanted = {
        ("unknown_hold", model): f"{count} calls on {model} wait for your word, the oldest is {call_text(oldest)}"
        for model, count, oldest in holds.unknown
    }
    if holds.oldest_at is not None and now - holds.oldest_at > OLD_HOLD_MS:
        wanted["old_hold", "holds"] = "a hold has been open for more than a day: see `abhiapi holds list`"
    watched = {key for key in standing if key[0] in ("unknown_hold", "old_hold")}
    over = watched - wanted.keys()
    new = wanted.keys() - standing
    if not over and not new:
        return

    def write(tx: Tx) -> None:
        for kind, subject in sorted(new):
            alerts.raise_(tx, kind, subject, wanted[kind, subject], now_ms=now)
        for kind, subject in sorted(over):
            alerts.clear(tx, kind, subject, now_ms=now)

    rt.write(write, patience_s=PATIENCE_S)


def _announce(rt: Runtime) -> int:
    """One line in the log and one count in the metrics for each alert that nobody has announced yet."""
    count = 0
    for alert in rt.read_aside(lambda tx: alerts.to_announce(tx, most=PAGE)):
        if rt.write(partial(alerts.announce, alert_id=alert.alert_id, now_ms=rt.now_ms()), patience_s=PATIENCE_S):
            count += 1
            rt.metrics.alerts.labels(alert.kind).inc()
            log.error("alert %s: %s", alert.kind, alert.message)
    return count


def _watch_witnessed(rt: Runtime, standing: list[Alert]) -> None:
    """Clear what no process has seen for a while, and note what this one sees: no other can see into its memory."""
    for alert in [each for each in standing if each.kind in ("parked_charge", "unexpected_proxy")]:
        timer, now = f"alert {alert.kind}", rt.now_ms()
        last = max(alert.raised_at, rt.read_aside(partial(timers.done_at, name=timer)) or 0)
        seen_at = (now if rt.parked else 0) if alert.kind == "parked_charge" else rt.proxy_seen_at
        if seen_at >= last + RENEWED_MS:
            rt.write(partial(timers.done, name=timer, now_ms=seen_at, due_in_ms=0), patience_s=PATIENCE_S)
        elif now - max(last, seen_at) > quiet_ms(alert.kind, rt.settings):
            clear = partial(alerts.clear, kind=alert.kind, subject=alert.subject, now_ms=now)
            rt.write(clear, patience_s=PATIENCE_S)


def quiet_ms(kind: str, settings: Settings) -> int:
    """How long nobody must have seen a thing for it to be over."""
    if kind == "unexpected_proxy" and not settings.trusted_proxies:
        return PROXY_FORGOTTEN_MS
    return 2 * (RENEWED_MS + 1000 * settings.reconcile_interval_s)


def _deliver(rt: Runtime, webhook: OperatorWebhook) -> None:
    """Post what is due, one process for all of them."""
    if _due(rt):
        turns.take(rt, "alert webhook", lambda: _post(rt, webhook), interval_ms=0)


def _due(rt: Runtime) -> list[Alert]:
    now = rt.now_ms()
    found = rt.read_aside(lambda tx: alerts.to_deliver(tx, since=now - DELIVER_WITHIN_MS, most=PAGE))
    return [each for each in found if is_due(each, now)][:DELIVERIES_MAX]


def _post(rt: Runtime, webhook: OperatorWebhook) -> None:
    """After a failure the others wait for the next round."""
    for alert in _due(rt):
        if not rt.write(partial(alerts.claim_try, alert=alert), patience_s=PATIENCE_S):
            return  # this turn was lost
        trouble = webhook.post(shapes.alert_event(alert))
        if trouble is not None:
            log.warning("the alert webhook did not take alert %d: %s", alert.alert_id, trouble)
            return
        rt.write(partial(alerts.delivered, alert_id=alert.alert_id, now_ms=rt.now_ms()), patience_s=PATIENCE_S)


def is_due(alert: Alert, now_ms: int) -> bool:
    """Whether the webhook is to be tried (again) now."""
    if alert.tries == 0:
        return True
    pause_ms = FIRST_PAUSE_MS << 2 * (alert.tries - 1)
    return now_ms >= (alert.announced_at or alert.raised_at) + pause_ms
