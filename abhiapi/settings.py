"""The environment, read once (contract 2). Nothing else in the package reads it.

Every bad value is reported, all of them together. Secrets hide from ``repr``. A ``.env`` file in the working folder
fills in what the environment leaves out.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dotenv import dotenv_values
from sqlalchemy.engine import make_url

from abhiapi import redis_url
from abhiapi import setting_forms as form
from abhiapi.errors import SettingsError
from abhiapi.money import Micros

SLOW_CALLER_S = 600  # how much longer than fal a caller may take to read a large answer before it is cut off
STALL_S = 60  # a caller that neither sends nor takes anything for this long has hung up
FILE_BYTES_MAX = 64 * 1024
UPLOAD_S = 900  # how long a caller may take to send a request's body
NO_FAL_KEY = "FAL_KEY is not set: set it; `abhiapi serve --sandbox` serves the built-in simulator without one"


@dataclass(frozen=True, slots=True)
class Variable:
    """One setting as people read of it: the docs' table is made from these."""

    name: str
    default: str
    meaning: str
    may_be_file: bool = False  # whether NAME_FILE may name a file that holds the value


def _setting(
    name: str, default: str, meaning: str, parse: Callable[[str], Any], *, secret: bool = False, hidden: bool = False
) -> Any:
    """``secret``: never said. ``hidden``: said in an error without its password, and not by ``repr``."""
    variable = Variable(name, default, meaning, secret or hidden)
    return field(repr=not (secret or hidden), metadata={"variable": variable, "parse": parse, "secret": secret})


def _database_url(value: str) -> str:
    return form.database_url(value) if value else default_database_url()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    fal_key: str | None = _setting(
        "FAL_KEY",
        "",
        "the operator's fal credential; without it `serve` starts only with `--sandbox`",
        form.credential,
        secret=True,
    )
    fal_admin_key: str | None = _setting(
        "FAL_ADMIN_KEY",
        "",
        "a credential of fal's with ADMIN scope, for its billing events (`abhiapi reconcile`); unset: `FAL_KEY`",
        form.credential,
        secret=True,
    )
    database_url: str = _setting(
        "ABHIAPI_DATABASE_URL",
        "",
        "where the ledger is: `sqlite:////absolute/path.db` or `postgresql://user:password@host/name`; unset: "
        "`abhiapi.db` in Flask's instance folder",
        _database_url,
        hidden=True,
    )
    limits_url: str = _setting(
        "ABHIAPI_LIMITS_URL",
        "memory://",
        "where limits are counted: `memory://`, or a Redis (`redis://`, `rediss://`, `unix://`) where several "
        "processes serve",
        redis_url.checked,
        hidden=True,
    )
    public_url: str | None = _setting(
        "ABHIAPI_PUBLIC_URL",
        "",
        "base of the URLs handed to customers; unset: taken from each request",
        form.optional_base_url,
    )
    margin: Decimal = _setting(
        "ABHIAPI_MARGIN", "0.05", "added to fal's unit price where no price of one's own is set", form.margin
    )
    default_hold_micros: Micros = _setting(
        "ABHIAPI_DEFAULT_HOLD",
        "100",
        "credits held for a call whose cost neither its input nor the calls before it tell",
        form.credits,
    )
    learn_holds: bool = _setting(
        "ABHIAPI_LEARN_HOLDS",
        "1",
        "whether holds follow what calls of the model really cost; `0`: its formula or the default alone",
        form.flag,
    )
    prices_sync_s: int = _setting(
        "ABHIAPI_PRICES_SYNC_S",
        "86400",
        "how often a server takes over fal's prices, seconds, at least 60; `0`: never",
        form.interval,
    )
    rate_per_minute: int = _setting(
        "ABHIAPI_RATE_PER_MINUTE", "30", "calls in any minute, per key, free plan", form.whole(1, 10**9)
    )
    concurrency: int = _setting("ABHIAPI_CONCURRENCY", "5", "calls at once, per key, free plan", form.whole(1, 10**6))
    pro_rate_per_minute: int = _setting(
        "ABHIAPI_PRO_RATE_PER_MINUTE", "300", "calls in any minute, per key, pro plan", form.whole(1, 10**9)
    )
    pro_concurrency: int = _setting(
        "ABHIAPI_PRO_CONCURRENCY", "40", "calls at once, per key, pro plan", form.whole(1, 10**6)
    )
    upstream_timeout_s: int = _setting(
        "ABHIAPI_UPSTREAM_TIMEOUT_S",
        "900",
        "longest wait for fal's answer to a sync call, seconds",
        form.whole(1, 86_400),
    )
    fal_concurrency: int = _setting(
        "ABHIAPI_FAL_CONCURRENCY",
        "0",
        "how many sync and stream calls run at fal at once, over all customers (fal allows its accounts 2 to 40); the "
        "rest waits in a fair queue; `0`: no limit here",
        form.whole(0, 100_000),
    )
    fal_queue_s: int = _setting(
        "ABHIAPI_FAL_QUEUE_S", "5", "how long a call may wait for its turn at fal, seconds", form.whole(0, 600)
    )
    drain_s: int = _setting(
        "ABHIAPI_DRAIN_S",
        "0",
        "how long a server that was told to end still takes calls while `/healthz` says 503, so that a balancer that "
        "asks there sends none any more, seconds",
        form.whole(0, 30),
    )
    max_body_bytes: int = _setting(
        "ABHIAPI_MAX_BODY_BYTES", "104857600", "larger request bodies get 413", form.whole(1, 2**40)
    )
    fal_run_url: str = _setting("ABHIAPI_FAL_RUN_URL", "https://fal.run", "where fal runs sync calls", form.base_url)
    fal_queue_url: str = _setting(
        "ABHIAPI_FAL_QUEUE_URL", "https://queue.fal.run", "where fal's queue is", form.base_url
    )
    fal_rest_url: str = _setting(
        "ABHIAPI_FAL_REST_URL", "https://rest.fal.ai", "where fal's upload service is", form.base_url
    )
    fal_api_url: str = _setting(
        "ABHIAPI_FAL_API_URL", "https://api.fal.ai/v1", "where fal's platform API (prices, billing) is", form.base_url
    )
    reconcile_interval_s: int = _setting(
        "ABHIAPI_RECONCILE_INTERVAL_S", "5", "how often open calls are looked at, seconds", form.whole(1, 3600)
    )
    trusted_proxies: int = _setting(
        "ABHIAPI_TRUSTED_PROXIES", "0", "reverse proxies in front whose `X-Forwarded-*` are believed", form.whole(0, 10)
    )
    cors_origins: frozenset[str] = _setting(
        "ABHIAPI_CORS_ORIGINS",
        "",
        "pages that may call from a browser: origins such as `https://app.example.com`, with commas between, or `*`; "
        "unset: none",
        form.origins,
    )
    webhook_key: bytes | None = _setting(
        "ABHIAPI_WEBHOOK_KEY",
        "",
        "the private key that signs customers' webhooks, 32 bytes in base64; unset: a file beside the "
        "database, made at the first start",
        form.webhook_key,
        secret=True,
    )
    secret_key: str | None = _setting(
        "ABHIAPI_SECRET_KEY",
        "",
        "what signs the dashboard's sessions, at least 32 characters; unset: derived from the webhook key",
        form.secret_key,
        secret=True,
    )
    open_signup: bool = _setting(
        "ABHIAPI_OPEN_SIGNUP",
        "0",
        "`1`: anybody may make themselves an account, without credit, on the dashboard; `0`: by invitation only",
        form.flag,
    )
    webhook_allow_loopback: bool = _setting(
        "ABHIAPI_WEBHOOK_ALLOW_LOOPBACK",
        "0",
        "`1`: customers' webhooks may lead to this machine itself, for tests and development (`serve --sandbox`: on)",
        form.flag,
    )
    fal_user_id: str | None = _setting(
        "ABHIAPI_FAL_USER_ID",
        "",
        "the operator's user id at fal; if set, fal's webhooks must name it",
        form.credential,
    )
    metrics_token: str | None = _setting(
        "ABHIAPI_METRICS_TOKEN",
        "",
        "bearer token of `/metrics`; unset: loopback only, and nobody where a reverse proxy is in front",
        form.credential,
        secret=True,
    )

    alert_webhook_url: str | None = _setting(
        "ABHIAPI_ALERT_WEBHOOK_URL",
        "",
        "where alerts are sent as JSON by POST; unset: the log and `/metrics` alone",
        form.webhook_url,
        secret=True,
    )
    log_format: str = _setting(
        "ABHIAPI_LOG_FORMAT",
        "text",
        "how the log is written: `text`, or `json`, one object a line",
        form.one_of("text", "json"),
    )
    log_level: str = _setting(
        "ABHIAPI_LOG_LEVEL",
        "info",
        "the least that is logged: `debug`, `info`, `warning` or `error`",
        form.one_of("debug", "info", "warning", "error"),
    )
    log_calls: bool = _setting(
        "ABHIAPI_LOG_CALLS",
        "1",
        "whether each call is a line in the log (at level `info`) when it has ended",
        form.flag,
    )
    otlp_endpoint: str | None = _setting(
        "ABHIAPI_OTLP_ENDPOINT",
        "",
        "where traces are sent by OTLP/HTTP, such as `http://127.0.0.1:4318` (needs the extra `otel`); unset: nowhere",
        form.optional_base_url,
    )

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must stand in no line of the log, and in no error."""
        key = None if self.webhook_key is None else base64.b64encode(self.webhook_key).decode()
        passwords = (make_url(self.database_url).password, urlsplit(self.limits_url).password)
        held = (self.fal_key, self.fal_admin_key, key, self.secret_key, self.metrics_token, self.alert_webhook_url)
        return tuple(str(secret) for secret in (*held, *passwords) if secret)

    @property
    def shown_database_url(self) -> str:
        """Where the database is, without the password."""
        return make_url(self.database_url).render_as_string()

    def kept_beside(self, what: str) -> Path:
        """A file that belongs to the database and not into it: beside SQLite's, else in Flask's instance folder."""
        url = make_url(self.database_url)
        if url.get_backend_name() == "sqlite":
            path = Path(url.database or "").resolve()
            return path.with_name(f"{path.name}.{what}")
        return default_folder() / f"postgresql-{url.database}.{what}"

    @property
    def graceful_s(self) -> int:
        """How long a server that was told to end has for what runs once it takes nothing new: longer than fal needs."""
        return self.upstream_timeout_s + 60

    @property
    def longest_call_s(self) -> int:
        """By when after its admission any call is over: fal's answer, a slow caller, and fal's rest after a hang-up."""
        return 2 * self.upstream_timeout_s + SLOW_CALLER_S + STALL_S + 60

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """The settings of an environment (default: this process's, and ``.env``). Raises `SettingsError`."""
        if environ is None:
            environ = environment()
        values: dict[str, Any] = {}
        problems: list[str] = []
        for item in fields(cls):
            variable: Variable = item.metadata["variable"]
            text = variable.default
            try:
                text = _written(environ, variable) or variable.default
                values[item.name] = item.metadata["parse"](text)
            except ValueError as error:
                shown = f" (it is {form.without_password(text)[:80]!r})" if not item.metadata["secret"] else ""
                problems.append(f"{variable.name} {error}{shown}")
        if problems:
            raise SettingsError(problems)
        return cls(**values)


def _written(environ: Mapping[str, str], variable: Variable) -> str:
    """What an environment says of a variable, or the file that ``NAME_FILE`` names; "" for nothing.

    Files are how systemd's credentials and containers' secrets arrive, and can be changed under a running server.
    """
    text = environ.get(variable.name, "").strip()
    path = environ.get(f"{variable.name}_FILE", "").strip() if variable.may_be_file else ""
    if not path:
        return text
    if text:
        raise ValueError(f"is set, and {variable.name}_FILE too: which of them counts?")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(FILE_BYTES_MAX).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read from the file that {variable.name}_FILE names: {error}") from error


def environment() -> dict[str, str]:
    """This process's environment, with a ``.env`` file of the working folder filling in what it leaves out.

    Raises `SettingsError` where that file is no text.
    """
    dotenv = Path.cwd() / ".env"
    try:
        from_file = dotenv_values(dotenv) if dotenv.is_file() else {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{dotenv} cannot be read: {error}"]) from error
    return {name: value for name, value in from_file.items() if value is not None} | dict(os.environ)


def variables() -> list[Variable]:
    """Every variable there is, for the docs and their test."""
    return [item.metadata["variable"] for item in fields(Settings)]


def default_database_url() -> str:
    """`abhiapi.db` in Flask's instance folder: the same absolute path whatever the working folder."""
    return f"sqlite:///{default_folder() / 'abhiapi.db'}"


def default_folder() -> Path:
    """Flask's instance folder."""
    from flask import Flask  # here, because most commands name their database and need no Flask

    return Path(Flask("abhiapi").instance_path)
