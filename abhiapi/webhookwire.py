"""Webhooks on the wire: the wish in a submit's query, the URL, the payload, the signed lines, the times of retries.

Pure. fal's side of it is fal-protocol 3.8; ours looks the same to the customer, signed with our key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote_plus, unquote_to_bytes, urlsplit

from abhiapi import jsonbytes, wire
from abhiapi.errors import WebhookUrlRefused

URL_MAX = 2048
PAYLOAD_BYTES_MAX = 4 * 1024 * 1024  # a larger result is announced, and fetched by the customer
FRESH_S = 300  # how old or how far ahead a signed timestamp may be
FIRST_TIMEOUT_S, TIMEOUT_S = 15, 120
ATTEMPTS_MAX = 31  # about a day
_BACKOFF_FIRST_MS, _BACKOFF_MAX_MS = 10_000, 3_600_000
CHANCE_MAX = 1000

TOO_LARGE = "Response payload is too large for a webhook: fetch the result"
NOT_JSON = "Response payload is not JSON serializable: fetch the result"

_PREFIX = "x-fal-webhook-"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?\.?")
_PLAIN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart once, so that what is checked is what is asked. ``port`` is always there."""

    scheme: str
    host: str
    port: int
    path: str  # with the query

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"


# What another reader of queries might take for the parameter: after a semicolon, or a blank.
_WISH_WITHIN = re.compile(r"(?:^|;)\s*fal_webhook\s*(?:=|$)", re.IGNORECASE)


def take_wish(query: str) -> tuple[str, str | None]:
    """A submit's query without ``fal_webhook``, however that is spelt, and its value. Raises `WebhookUrlRefused`."""
    if "webhook" not in query.lower() and "%" not in query:
        return query, None
    kept, wished = [], []
    for part in query.split("&"):
        name, _, value = part.partition("=")
        if unquote_to_bytes(name).decode("latin-1").strip().lower() == "fal_webhook":
            wished.append(unquote_plus(value))
        elif _WISH_WITHIN.search(unquote_plus(part)):
            raise WebhookUrlRefused("write fal_webhook as a query parameter of its own: nothing was forwarded")
        else:
            kept.append(part)
    if not wished:
        return query, None
    if len(wished) > 1:
        raise WebhookUrlRefused("fal_webhook is there more than once: nothing was forwarded")
    return "&".join(kept), wished[0]


def with_webhook(query: str, url: str) -> str:
    """A query that asks fal to deliver to ``url``."""
    return "&".join([*([query] if query else []), f"fal_webhook={quote(url, safe='')}"])


def target_of(url: str) -> Target:
    """A customer's URL, if it is one that can be delivered to. Raises `WebhookUrlRefused`."""
    if len(url) > URL_MAX:
        raise WebhookUrlRefused(f"the webhook's URL is longer than {URL_MAX} characters")
    if not _PLAIN.fullmatch(url) or "\\" in url:
        raise WebhookUrlRefused("the webhook's URL must be plain ASCII without spaces, percent-encoded where need be")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise WebhookUrlRefused("the webhook's URL cannot be read") from error
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https"):
        raise WebhookUrlRefused("the webhook's URL must begin with https:// or http://")
    if "@" in parts.netloc:
        raise WebhookUrlRefused("the webhook's URL may not hold a user or password")
    if not _HOST.fullmatch(host) and not re.fullmatch(r"[0-9a-f:.]{2,45}", host):
        raise WebhookUrlRefused("the webhook's URL names no host")
    if port == 0:
        raise WebhookUrlRefused("the webhook's URL has a port that is none")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path)


def shown_origin(url: str) -> str:
    """A customer's URL as a log may show it: paths and queries may hold secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def without_query(url: str) -> str:
    return url.partition("?")[0]


# --- signatures -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Signed:
    """The headers of a signed delivery."""

    request_id: str
    user_id: str
    timestamp: int
    signature: bytes


def message(request_id: str, user_id: str, timestamp: int, body_sha256_hex: str) -> bytes:
    """The four lines that are signed."""
    return f"{request_id}\n{user_id}\n{timestamp}\n{body_sha256_hex}".encode()


def sha256_hex(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def signed_headers(request_id: str, user_id: str, timestamp: int, signature: bytes) -> wire.Headers:
    return [
        ("X-Fal-Webhook-Request-Id", request_id),
        ("X-Fal-Webhook-User-Id", user_id),
        ("X-Fal-Webhook-Timestamp", str(timestamp)),
        ("X-Fal-Webhook-Signature", signature.hex()),
    ]


def signed_of(headers: Mapping[str, str]) -> Signed | None:
    """The signed headers of a delivery (names in lower case), or None where one is missing or is nonsense."""
    request_id, user_id, timestamp, signature = (
        headers.get(_PREFIX + name, "") for name in ("request-id", "user-id", "timestamp", "signature")
    )
    is_whole = request_id and user_id and re.fullmatch(r"[0-9]{1,12}", timestamp)
    if not is_whole or not re.fullmatch(r"[0-9a-fA-F]{128}", signature):
        return None
    return Signed(request_id, user_id, int(timestamp), bytes.fromhex(signature))


def user_id(account: str) -> str:
    """An account's name as a header can carry it."""
    return quote(account, safe=" !#$&'()*+,/:;=?@[]")


# --- payloads ---------------------------------------------------------------------------------------------------


def payload(request_id: str, gateway_request_id: str, http_status: int, body: bytes | None) -> bytes:
    """What fal would deliver for this result (fal-protocol 3.8). ``body`` None: it is too large to be kept."""
    members = [
        b'"request_id": ' + json.dumps(request_id).encode(),
        b'"gateway_request_id": ' + json.dumps(gateway_request_id).encode(),
    ]
    if 200 <= http_status < 300:
        members.append(b'"status": "OK"')
    else:
        members += [b'"status": "ERROR"', b'"error": "Invalid status code: %d"' % http_status]
    if body is not None and jsonbytes.is_json(body):
        members.append(b'"payload": ' + body)
    else:
        why = TOO_LARGE if body is None else NOT_JSON
        members += [b'"payload": null', b'"payload_error": ' + json.dumps(why).encode()]
    return b"{" + b", ".join(members) + b"}"


def backoff_ms(attempts: int, chance: int) -> int:
    """How long to wait after this many failed attempts, spread by a fifth either way. ``chance`` is below 1000."""
    plain = min(_BACKOFF_MAX_MS, _BACKOFF_FIRST_MS << min(max(attempts - 1, 0), 20))
    return plain * (800 + chance * 400 // CHANCE_MAX) // 1000


def timeout_s(attempts: int) -> int:
    """How long the attempt of this number may take."""
    return FIRST_TIMEOUT_S if attempts <= 1 else TIMEOUT_S
