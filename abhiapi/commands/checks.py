"""What `doctor` looks at. Each check answers how things are and, where they are not well, what to do about it.

Looks only: nothing is created, upgraded or repaired here.
"""

from __future__ import annotations

import difflib
import os
import resource
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dotenv import dotenv_values

from abhiapi import audit, prices, pricing, reports, serving, signing, sync, timers
from abhiapi.db import APPLICATION_ID, CLI_PATIENCE_S, Database, Tx
from abhiapi.errors import AbhiError, DatabaseUnavailable, SettingsError
from abhiapi.ids import time_text
from abhiapi.migrations import VERSION
from abhiapi.settings import Settings, variables

Status = Literal["ok", "warn", "fail"]

HOLD_AGE_MAX_MS = 3_600_000  # no call is served for an hour
SYNCS_MISSED_MAX = 2
DISK_FREE_LOW_BYTES = 1024**3
DISK_FREE_LEAST_BYTES = 100 * 1024**2


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: Status
    message: str


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
    yield _open_files()
    try:
        database = Database(settings.database_url)
    except AbhiError as error:
        yield Check("database", "fail", error.message)
        return
    yield _disk(database.path)
    if not database.exists():
        yield from _absent(database.path)
        yield _tried("prices", lambda: _prices(_shipped(settings), 0))
        return
    version = _tried("database", lambda: _version(database))
    yield version
    if version.status != "ok":
        return
    yield _tried("webhook key", lambda: _webhook_key(settings, database.path))
    yield _tried("writing", lambda: _writable(database))
    yield _tried("prices", lambda: database.read(lambda tx: _current(tx, settings, now_ms)))
    yield _tried("holds", lambda: _holds(database.read(reports.open_holds), now_ms))
    yield _tried("ledger", lambda: database.read(_ledger))


def _tried(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except AbhiError as error:
        return Check(name, "fail", error.message)


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


def _disk(path: Path) -> Check:
    folder = next(parent for parent in path.parents if parent.exists())
    free_bytes = shutil.disk_usage(folder).free
    message = f"{free_bytes // 1024**2} MiB free in {folder}"
    if free_bytes < DISK_FREE_LEAST_BYTES:
        return Check("disk", "fail", f"{message}: make room, or calls will soon be refused with 503")
    if free_bytes < DISK_FREE_LOW_BYTES:
        return Check("disk", "warn", f"{message}: make room before it runs out")
    return Check("disk", "ok", message)


def _absent(path: Path) -> Iterator[Check]:
    folder = next(parent for parent in path.parents if parent.exists())
    if os.access(folder, os.W_OK):
        yield Check("database", "warn", f"{path} does not exist yet: the first command that uses it creates it")
    else:
        yield Check("database", "fail", f"{path} does not exist and cannot be created in {folder}: give it the right")


def _version(database: Database) -> Check:
    try:
        connection = database.connect(busy_timeout_s=CLI_PATIENCE_S)
        try:
            application_id, version, journal = (
                connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("application_id", "user_version", "journal_mode")
            )
        finally:
            connection.close()
    except (sqlite3.DatabaseError, DatabaseUnavailable) as error:
        return Check(
            "database", "fail", f"{database.path} cannot be read ({error}): if it is damaged, restore a backup"
        )
    problem = None
    if application_id != APPLICATION_ID:
        problem = "is not AbhiAPI's: check ABHIAPI_DATABASE_URL"
    elif version > VERSION:
        problem = f"is of version {version}, newer than this program's {VERSION}: upgrade AbhiAPI"
    elif version < VERSION:
        problem = f"is of version {version}: run any other command to upgrade it to {VERSION}"
    elif journal != "wal":
        problem = (
            f"is in journal mode {journal}, so reading blocks writing: stop the server and put it back in order with "
            "`abhiapi backup` and `abhiapi restore`"
        )
    if problem:
        return Check("database", "fail", f"{database.path} {problem}")
    return Check("database", "ok", f"{database.path}, version {version}, write-ahead log")


def _writable(database: Database) -> Check:
    database.write(lambda tx: None)
    if not os.access(database.path, os.W_OK):
        return Check("writing", "fail", f"{database.path} may not be written: give this user the right")
    return Check("writing", "ok", "the database takes writes")


def _webhook_key(settings: Settings, path: Path) -> Check:
    file = signing.key_file(path)
    if settings.webhook_key is None and not file.exists():
        return Check("webhook key", "ok", f"{file} is made at the first start")
    try:
        signing.load(settings.webhook_key, path)
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
