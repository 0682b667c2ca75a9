"""What `doctor` reads in the books: work that stands still, alerts, backups, play money, prices that lose money.

Looks only. Each check answers how things are and, where they are not well, what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator

from abhiapi import accounts, alerts, fal_bill, price_problems, prices, pricing, reports, serving, vitals
from abhiapi.commands.checks import Check
from abhiapi.commands.checks_place import is_real
from abhiapi.db import Tx
from abhiapi.ids import time_text
from abhiapi.processes import Process
from abhiapi.settings import Settings
from abhiapi.timers import done_at
from abhiapi.vitals import Vitals

DAY_MS = 86_400_000
ROUND_LATE_MS = 15 * 60_000
BACKUP_OLD_MS = 2 * DAY_MS
COMPARED_OLD_MS = 4 * DAY_MS  # a comparison reads to a day or so ago
GRAVE = ("fal_account", "parked_charge")


def examine(tx: Tx, settings: Settings, now_ms: int, serving_now: list[Process]) -> list[Check]:
    """``serving_now``: the processes that serve this database, on whatever machine."""
    seen = vitals.read(tx, bill_bookmark=fal_bill.BOOKMARK)
    return [
        _processes(serving_now, settings, now_ms),
        _work(tx, seen, settings, now_ms, serving_now),
        *_alerts(tx),
        _backups(seen, settings, now_ms),
        _bill(seen, now_ms),
        _play_money(tx, settings),
        _losing_prices(tx, settings, now_ms),
    ]


def _processes(serving_now: list[Process], settings: Settings, now_ms: int) -> Check:
    """Whether those that serve count limits together. After a reload two serve for a while, the old one to its end."""
    count = len(serving_now)
    if count == 0:
        return Check("processes", "ok", "none serves this database")
    if count == 1:
        return Check("processes", "ok", "1 serves this database")
    if not settings.limits_url.startswith("memory"):
        return Check("processes", "ok", f"{count} serve this database, and count limits together")
    message = (
        f"{count} serve this database and each counts limits for itself, so that a key is let do {count} times what "
        "it may: set ABHIAPI_LIMITS_URL to one Redis for all of them, or stop all but one"
    )
    newest = max(process.started_at for process in serving_now)
    if now_ms - newest < settings.drain_s * 1000:
        return Check("processes", "warn", f"{message}; unless one is the old one of a reload, which ends by itself")
    return Check("processes", "fail", message)


def _work(tx: Tx, seen: Vitals, settings: Settings, now_ms: int, serving_now: list[Process]) -> Check:
    """Whether somebody settles what customers do not come back for."""
    waiting = sum(holds.count for state, holds in seen.holds.items() if state != "unknown")
    noted_at = done_at(tx, vitals.ROUND)
    if not serving_now:
        if waiting:
            return Check("reconciler", "warn", f"{waiting} holds are open and no server runs here: start one")
        return Check("reconciler", "ok", "no server runs here, and no hold waits for one")
    late_ms = ROUND_LATE_MS + 10_000 * settings.reconcile_interval_s
    if noted_at is not None and now_ms - noted_at > late_ms:
        return Check(
            "reconciler", "fail",
            f"a server runs, and its reconciler last came through at {time_text(noted_at)}: see its log, restart it",
        )  # fmt: skip
    return Check("reconciler", "ok", "it came through a moment ago" if noted_at else "it has not come through yet")


def _alerts(tx: Tx) -> Iterator[Check]:
    found = alerts.standing(tx)
    for one in found:
        yield Check("alerts", "fail" if one.kind in GRAVE else "warn", f"{one.kind}: {one.message}")
    if not found:
        yield Check("alerts", "ok", "none stands")


def _backups(seen: Vitals, settings: Settings, now_ms: int) -> Check:
    if seen.backed_up_at is None:
        if is_real(settings) and seen.began_at is not None and now_ms - seen.began_at > DAY_MS:
            return Check("backups", "warn", "`abhiapi backup` was never run on this ledger: run it by a timer")
        return Check("backups", "ok", "none yet")
    message = f"the last was made at {time_text(seen.backed_up_at)}"
    if now_ms - seen.backed_up_at > BACKUP_OLD_MS:
        return Check("backups", "warn", f"{message}: see why the timer does not run")
    return Check("backups", "ok", message)


def _bill(seen: Vitals, now_ms: int) -> Check:
    if seen.compared_until is None:
        return Check("fal's bill", "ok", "never compared: `abhiapi reconcile` does, with an ADMIN key of fal's")
    message = f"compared up to {time_text(seen.compared_until)}"
    if now_ms - seen.compared_until > COMPARED_OLD_MS:
        return Check("fal's bill", "warn", f"{message}: run `abhiapi reconcile` once a day")
    if seen.unexplained_events:
        return Check("fal's bill", "warn", f"{message}; {seen.unexplained_events} events of it no call explains")
    return Check("fal's bill", "ok", message)


def _play_money(tx: Tx, settings: Settings) -> Check:
    """The demo's account has credit that nobody paid for, and its link signs in an operator."""
    demo = accounts.find(tx, serving.DEMO_ACCOUNT)
    first = None if demo is None else reports.entry(tx, demo.account_id, 1)
    if demo is None or first is None or first.ref != serving.DEMO_REF or not is_real(settings):
        return Check("play money", "ok", "none")
    if demo.status == "active":
        return Check("play money", "fail", "the account 'demo' holds play money and can spend yours: suspend it")
    return Check("play money", "ok", "the account 'demo' is suspended")


def _losing_prices(tx: Tx, settings: Settings, now_ms: int) -> Check:
    catalogue = prices.catalogue(tx, pricing.shipped_rules(), settings, now_ms=now_ms)
    losing = [row.model for row in price_problems.found(tx, catalogue) if row.problem == "below cost"]
    if losing:
        shown = ", ".join(losing[:3]) + (" ..." if len(losing) > 3 else "")
        return Check("margins", "warn", f"sold for less than fal takes: {shown} (`abhiapi prices check`)")
    return Check("margins", "ok", "no price is below fal's")
