"""Who is asking one of our own routes."""

from __future__ import annotations

from flask import current_app, request

from abhiapi import keys, wire
from abhiapi.monitoring import Monitor
from abhiapi.runtime import Runtime


def runtime() -> Runtime:
    rt: Runtime = current_app.extensions["abhiapi"]
    return rt


def monitor() -> Monitor:
    watching: Monitor = current_app.extensions["abhiapi_monitor"]
    return watching


def request_key() -> str:
    """What Flask-Limiter counts by: the key that was sent, as a digest, else the address."""
    key, _ = wire.caller_key({name.lower(): value for name, value in request.headers.items()})
    if key and keys.is_well_formed(key):
        return keys.digest_of(key).hex()
    return request.remote_addr or "nobody"


def caller() -> keys.Caller:
    """The caller by their key; a suspended account may look at what it has. Raises 401 and 403 errors."""
    key, _ = wire.caller_key({name.lower(): value for name, value in request.headers.items()})
    return runtime().authenticate(key, may_be_suspended=True)


def base_url() -> str:
    """What customers write before a path to reach this service."""
    return runtime().settings.public_url or request.host_url.rstrip("/")
