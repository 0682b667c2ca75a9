"""Which pages of other origins may call this service from a browser (CORS): a thin layer around the whole application.

Owns the `Access-Control-*` headers. There is none of it where `ABHIAPI_CORS_ORIGINS` is empty. A preflight is answered
here, without a key, and never forwarded. Credentials that browsers add by themselves (cookies) are never allowed: a
page sends its key itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

METHODS = "GET, POST, PUT, OPTIONS"  # what fal's clients use (fal-protocol 10.2, no. 12)
MAX_AGE_S = 7200  # the longest that Chromium keeps a preflight's answer

_HEADERS = frozenset(
    ("accept", "authorization", "cache-control", "content-type", "idempotency-key", "last-event-id", "x-api-key")
)
_HEADER_PREFIXES = ("x-fal-", "x-app-fal-")
EXPOSED = (
    "x-fal-request-id",
    "x-fal-billable-units",
    "x-fal-request-timeout-type",
    "x-fal-error-type",
    "x-abhiapi-call-id",
    "x-abhiapi-credits-used",
    "x-abhiapi-balance-remaining",
    "retry-after",
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
    "idempotency-replayed",
)
_EXPOSED_TEXT = ", ".join(EXPOSED)

Headers = list[tuple[str, str]]
StartResponse = Callable[..., Any]
WsgiApp = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


def allowing(origins: frozenset[str], app: WsgiApp) -> WsgiApp:
    """The application, open to pages of these origins; ``*`` is every origin."""

    def application(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        origin = environ.get("HTTP_ORIGIN")
        allowed = "*" if "*" in origins else origin if origin in origins else None
        # Every answer says that it depends on the asking page: caches in between want that.
        ours = [("Vary", "Origin")]
        if allowed is not None:
            ours.append(("Access-Control-Allow-Origin", allowed))
        if _is_preflight(environ):
            asked = environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "")
            start_response("204 No Content", ours if allowed is None else ours + preflight_headers(asked))
            return ()
        if allowed is not None:
            ours.append(("Access-Control-Expose-Headers", _EXPOSED_TEXT))

        def start(status: str, headers: Headers, *more: Any) -> Any:
            return start_response(status, headers + ours, *more)

        return app(environ, start)

    return application


def _is_preflight(environ: dict[str, Any]) -> bool:
    is_asking = "HTTP_ORIGIN" in environ and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
    return is_asking and environ["REQUEST_METHOD"] == "OPTIONS"


def preflight_headers(asked: str) -> Headers:
    """What a page may send. Of the headers it asks for those are listed that mean something here."""
    names = [name for part in asked.split(",") if _is_allowed(name := part.strip().lower())]
    allowed = [("Access-Control-Allow-Headers", ", ".join(names))] if names else []
    return [
        ("Access-Control-Allow-Methods", METHODS),
        *allowed,
        ("Access-Control-Max-Age", str(MAX_AGE_S)),
    ]


def _is_allowed(name: str) -> bool:
    is_plain = name.isascii() and name.replace("-", "").isalnum()
    return is_plain and (name in _HEADERS or name.startswith(_HEADER_PREFIXES))
