"""What `doctor` looks at around the database: who may read the files, the write-ahead log, backups, settings that bite.

Looks only. Each check answers how things are and, where they are not well, what to do about it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from abhiapi.commands.checks import Check
from abhiapi.db import database_at
from abhiapi.db_sqlite import SqliteDatabase
from abhiapi.errors import SchemaError
from abhiapi.settings import Settings, environment, variables

WAL_LARGE_BYTES = 256 * 1024**2  # SQLite folds it in at 32 MB, and a reader that stays open keeps it from doing so
TIMEOUT_SHORT_S = 300
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def examine(settings: Settings) -> Iterator[Check]:
    yield _secrets_on_disk()
    yield from _odd_settings(settings)
    yield _session_secret(settings)
    yield _traces(settings)
    database = database_at(settings.database_url)
    with contextlib.suppress(SchemaError):  # files of another user's, of which `database` has told
        if isinstance(database, SqliteDatabase) and database.exists():
            yield _database_files(database.path, settings.kept_beside("webhook-key"))
            yield _log_size(database.path)


def is_real(settings: Settings) -> bool:
    """Whether calls cost money: fal is not a simulator on this machine."""
    return (urlsplit(settings.fal_run_url).hostname or "") not in LOOPBACK


def _secrets_on_disk() -> Check:
    """Files that hold a credential are their owner's alone."""
    environ = environment()
    named = [environ.get(f"{variable.name}_FILE", "") for variable in variables() if variable.may_be_file]
    files = [Path.cwd() / ".env", *(Path(name) for name in named if name)]
    open_to = [str(file) for file in files if file.is_file() and _mode(file) & 0o077]
    if open_to:
        return Check("secret files", "warn", f"others may read {', '.join(open_to)}: chmod 600")
    return Check("secret files", "ok", "nobody but their owner may read them")


def _database_files(path: Path, key_file: Path) -> Check:
    """Ledger and customers' addresses; a folder that others cannot enter hides what is in it."""
    files = [file for file in path.parent.glob(f"{path.name}*") if file.is_file()]
    if key_file.exists() and _mode(key_file) & 0o077:
        return Check("file rights", "fail", f"others may read {key_file}, which signs webhooks and sessions: chmod 600")
    open_to = sorted(file.name for file in files if _mode(file) & stat.S_IROTH)
    if open_to and _mode(path.parent) & stat.S_IXOTH:
        return Check(
            "file rights", "warn",
            f"everybody on this machine may read {', '.join(open_to[:3])} in {path.parent}: chmod o-rwx that folder",
        )  # fmt: skip
    return Check("file rights", "ok", f"{path.parent}: not for everybody on this machine")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _log_size(path: Path) -> Check:
    log = path.with_name(f"{path.name}-wal")
    size_bytes = log.stat().st_size if log.exists() else 0
    message = f"{size_bytes // 1024**2} MiB"
    if size_bytes > WAL_LARGE_BYTES:
        return Check(
            "write-ahead log", "warn",
            f"{message}, and it should be 32: some program keeps the database open for reading (look with `fuser`)",
        )  # fmt: skip
    return Check("write-ahead log", "ok", message)


def _odd_settings(settings: Settings) -> Iterator[Check]:
    """Values that can be read, and that hardly anybody means."""
    odd = []
    if settings.upstream_timeout_s < TIMEOUT_SHORT_S:
        odd.append(
            f"ABHIAPI_UPSTREAM_TIMEOUT_S is {settings.upstream_timeout_s}: films take minutes at fal, and a call that "
            "is given up costs you its price"
        )
    if settings.margin == 0:
        odd.append("ABHIAPI_MARGIN is 0: you sell at fal's price")
    if settings.webhook_allow_loopback and is_real(settings):
        odd.append("ABHIAPI_WEBHOOK_ALLOW_LOOPBACK is 1: customers' webhooks reach this machine's own services")
    if settings.trusted_proxies and settings.metrics_token is None:
        odd.append("/metrics is nobody's behind a proxy: set ABHIAPI_METRICS_TOKEN to read it")
    if odd:
        yield from (Check("odd settings", "warn", one) for one in odd)
    else:
        yield Check("odd settings", "ok", "none")


def _session_secret(settings: Settings) -> Check:
    if settings.secret_key is not None:
        return Check("sessions", "ok", "signed with ABHIAPI_SECRET_KEY")
    if settings.webhook_key is not None:
        return Check("sessions", "ok", "signed with what is derived from ABHIAPI_WEBHOOK_KEY")
    return Check(
        "sessions", "ok", "signed with what is derived from the webhook key's file: losing it signs everybody out"
    )


def _traces(settings: Settings) -> Check:
    if settings.otlp_endpoint is None:
        return Check("traces", "ok", "none are sent")
    if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("opentelemetry.sdk") is None:
        return Check(
            "traces",
            "fail",
            "ABHIAPI_OTLP_ENDPOINT is set: `pip install -e '.[otel]'` in the checkout, or no server starts",
        )
    return Check("traces", "ok", f"sent to {settings.otlp_endpoint}")
