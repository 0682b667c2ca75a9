"""Telling the operator: looks at what is wrong, announces alerts in the log and the metrics, posts them to a webhook.

Runs beside the calls, never in their way. Which alerts stand, which were announced and which were delivered are rows,
so a restart repeats nothing and forgets nothing. Safe in several processes at once: an announcement is claimed.
"""

from __future__ import annotations

import logging
from functools import partial

from abhiapi import alerts, shapes
from abhiapi.alerts import Alert, OpenHolds
from abhiapi.db import Tx
from abhiapi.ids import call_text
from abhiapi.operator_webhook import OperatorWebhook
from abhiapi.runtime import Runtime

log = logging.getLogger("abhiapi")

PAGE = 100  # alerts told in one round
PATIENCE_S = 30
OLD_HOLD_MS = 86_400_000
PROXY_FORGOTTEN_MS = 86_400_000  # a proxy that nobody came through for so long
DELIVER_WITHIN_MS = 86_400_000  # what is older was not meant for a webhook that has just been set
FIRST_PAUSE_MS = 15_000  # before the second try; four times as long before each further one
DELIVERIES_MAX = 20  # in one round


def run_once(rt: Runtime, webhook: OperatorWebhook | None) -> int:
    """Look once, and tell what is new; how many alerts were announced."""
    holds, standing = rt.read_aside(lambda tx: (alerts.open_holds(tx), alerts.standing(tx)))
    rt.oldest_hold_at = holds.oldest_at
    _watch_holds(rt, holds, {(alert.kind, alert.subject) for alert in standing})
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
    if rt.settings.trusted_proxies or now - rt.proxy_seen_at > PROXY_FORGOTTEN_MS:
        over |= {key for key in standing if key[0] == "unexpected_proxy"}
    if rt.parked == 0:
        over |= {key for key in standing if key[0] == "parked_charge"}
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


def _deliver(rt: Runtime, webhook: OperatorWebhook) -> None:
    """Post what is due; after a failure the others wait for the next round."""
    now = rt.now_ms()
    since = now - DELIVER_WITHIN_MS
    found = rt.read_aside(lambda tx: alerts.to_deliver(tx, since=since, most=PAGE))
    for alert in [each for each in found if is_due(each, now)][:DELIVERIES_MAX]:
        trouble = webhook.post(shapes.alert_event(alert))
        at = rt.now_ms() if trouble is None else None
        rt.write(partial(alerts.tried, alert_id=alert.alert_id, delivered_at=at), patience_s=PATIENCE_S)
        if trouble is not None:
            log.warning("the alert webhook did not take alert %d: %s", alert.alert_id, trouble)
            return


def is_due(alert: Alert, now_ms: int) -> bool:
    """Whether the webhook is to be tried (again) now."""
    if alert.tries == 0:
        return True
    pause_ms = FIRST_PAUSE_MS << 2 * (alert.tries - 1)
    return now_ms >= (alert.announced_at or alert.raised_at) + pause_ms
