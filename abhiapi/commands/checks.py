"""What `doctor` looks at. Each check answers how things are and, where they are not well, what to do about it.

Looks only: nothing is created, upgraded or repaired here.
"""

from __future__ import annotations

import difflib
import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

from dotenv import dotenv_values

from abhiapi import audit, prices, pricing, reports, serving, signing, sync, timers
from abhiapi.commands import database_checks
from abhiapi.commands.database_checks import Check as Check
from abhiapi.commands.database_checks import tried
from abhiapi.db import Database, Tx, database_at
from abhiapi.errors import AbhiError, SettingsError
from abhiapi.ids import time_text
from abhiapi.settings import Settings, variables

HOLD_AGE_MAX_MS = 3_600_000  # no call is served for an hour
SYNCS_MISSED_MAX = 2


def examine(now_ms: int) -> Iterator[Check]:
    """Look at everything, one after the other; a thing that could not be looked at is a failure, not the end."""
    yield _unknown_variables(_environment())
    try:
        settings = Settings.from_env()
    except SettingsError as error:
        yield from (Check("settings", "fail", problem) for problem in error.problems)
        return
    yield Check("settings", "ok", "every value can be read")
    yield _fal_key(settings)
    yield _limits(settings)
    yield _open_files()
    try:
        database = database_at(settings.database_url)
    except AbhiError as error:
        yield Check("database", "fail", error.message)
        return
    yield from database_checks.room(database)
    missing = database_checks.absent(database)
    if missing is not None:
        yield missing
        yield tried("prices", lambda: _prices(_shipped(settings), 0))
        return
    version = tried("database", lambda: database_checks.standing(database, now_ms))
    yield version
    if version.status != "ok":
        return
    yield tried("webhook key", lambda: _webhook_key(settings, database))
    yield tried("writing", lambda: database_checks.writable(database))
    yield tried("prices", lambda: database.read(lambda tx: _current(tx, settings, now_ms)))
    yield tried("holds", lambda: _holds(database.read(reports.open_holds), now_ms))
    yield tried("ledger", lambda: database.read(_ledger))


def _environment() -> Mapping[str, str | None]:
    """Every variable that a server would see, `.env` included, to find those that nobody reads."""
    dotenv = Path.cwd() / ".env"
    return (dotenv_values(dotenv) if dotenv.is_file() else {}) | dict(os.environ)


def _unknown_variables(environ: Mapping[str, str | None]) -> Check:
    known = [variable.name for variable in variables()]
    known += [f"{variable.name}_FILE" for variable in variables() if variable.may_be_file]
    unknown = sorted(name for name in environ if name.startswith("ABHIAPI_") and name not in known)
    if not unknown:
        return Check("variables", "ok", "every ABHIAPI_ variable is known")
    return Check("variables", "warn", "; ".join(_unknown(name, known) for name in unknown))


def _unknown(name: str, known: list[str]) -> str:
    meant = difflib.get_close_matches(name, known, 1)
    return f"{name} is no setting" + (f" (do you mean {meant[0]}?)" if meant else "")


def _fal_key(settings: Settings) -> Check:
    if settings.fal_key is None:
        return Check("fal credential", "fail", "FAL_KEY is not set: without it `serve` starts only with --sandbox")
    return Check("fal credential", "ok", "FAL_KEY is set")


def _limits(settings: Settings) -> Check:
    if settings.limits_url.startswith("memory"):
        return Check("limits", "ok", "counted in the memory of the one process that serves")
    from abhiapi import redis_line  # here, because redis-py takes its time to load

    try:
        seen = redis_line.look(settings.limits_url)
    except redis_line.RedisAway as error:
        return Check("limits", "fail", f"Redis cannot be used, so each process counts for itself: {error}")
    message = f"Redis {seen.version} answers in {seen.latency_ms} ms"
    if seen.latency_ms >= redis_line.TIMEOUT_S * 1000:
        return Check("limits", "fail", f"{message}, which is too late: calls are decided without it")
    if seen.eviction_policy != "noeviction":
        return Check(
            "limits",
            "warn",
            f"{message}, and forgets counts when it is full (maxmemory-policy {seen.eviction_policy}): "
            "set maxmemory-policy noeviction",
        )
    return Check("limits", "ok", f"{message}, and evicts nothing")


def _open_files() -> Check:
    """The server raises its own soft limit, so the hard one counts."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = serving.CONNECTIONS * serving.FILES_PER_CALL
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        return Check("open files", "ok", f"enough for {serving.CONNECTIONS} calls at once")
    return Check(
        "open files",
        "warn",
        f"only {hard} are allowed, enough for {hard // serving.FILES_PER_CALL} calls at once: "
        f"raise `ulimit -n` (LimitNOFILE of the service) to {wanted}",
    )


def _webhook_key(settings: Settings, database: Database) -> Check:
    file = settings.kept_beside("webhook-key")
    if settings.webhook_key is None and database.engine != "sqlite":
        return Check(
            "webhook key", "warn", f"{file}, on this machine alone: where several serve, set ABHIAPI_WEBHOOK_KEY on all"
        )
    if settings.webhook_key is None and not file.exists():
        return Check("webhook key", "ok", f"{file} is made at the first start")
    try:
        signing.load(settings.webhook_key, file)
    except SettingsError as error:
        return Check("webhook key", "fail", error.message)
    return Check(
        "webhook key", "ok", "ABHIAPI_WEBHOOK_KEY" if settings.webhook_key else f"{file}: keep it with backups"
    )


def _shipped(settings: Settings) -> pricing.Catalogue:
    return pricing.Catalogue(pricing.shipped_rules(), (), settings.margin)


def _current(tx: Tx, settings: Settings, now_ms: int) -> Check:
    catalogue = prices.catalogue(tx, pricing.shipped_rules(), settings, now_ms=now_ms)
    done_at = timers.done_at(tx, sync.TIMER)
    check = _prices(catalogue, len(prices.own_prices(tx)))
    if check.status == "ok" and done_at is not None and settings.prices_sync_s:
        late_ms = now_ms - done_at - SYNCS_MISSED_MAX * settings.prices_sync_s * 1000
        if late_ms > 0:
            since = f"fal's prices were last taken over at {time_text(done_at)}"
            return Check("prices", "warn", f"{since}: run `abhiapi prices sync` to see why, or start the server")
    return check


def _prices(catalogue: pricing.Catalogue, own: int) -> Check:
    if catalogue.unpriceable:
        lost = ", ".join(catalogue.unpriceable)
        return Check("prices", "fail", f"a margin over a price of fal's that is not known: {lost} (set --unit-price)")
    free = [price.model for price in catalogue if price.unit_price_usd == 0]
    if free:
        return Check("prices", "warn", f"free of charge: {', '.join(free)} (`abhiapi prices set` changes that)")
    return Check("prices", "ok", f"{len(catalogue)} models, {own} own prices")


def _holds(rows: list[reports.CallRow], now_ms: int) -> Check:
    unknown = sum(row.state == "unknown" for row in rows)
    old = sum(row.state != "unknown" and now_ms - row.created_at > HOLD_AGE_MAX_MS for row in rows)
    if not unknown and not old:
        return Check("holds", "ok", f"{len(rows)} open, none of them waiting for you")
    return Check(
        "holds",
        "fail",
        f"{unknown} of unknown cost, {old} older than an hour: see `abhiapi holds list`, then settle or release them",
    )


def _ledger(tx: Tx) -> Check:
    finding = audit.verify_ends(tx)
    if finding.ok:
        return Check("ledger", "ok", f"{finding.accounts} accounts agree with their newest entries")
    return Check("ledger", "fail", f"{finding.problems[0]}: run `abhiapi ledger verify`")
