"""What may cross between a customer and fal: paths, headers, statuses, and the words of our own answers.

Pure. Facts about fal and its clients name their place in fal-protocol.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Literal
from urllib.parse import unquote_to_bytes

from abhiapi.errors import STATUS_NAMES, AbhiError, ForbiddenPath, UpstreamError, UpstreamOutcomeUnknown
from abhiapi.money import credits_text, usd_text

Headers = list[tuple[str, str]]

# table: a caller with x-api-key or Bearer gets the seed's error table. fal: a caller with `Authorization: Key` is
# one of fal's own clients and gets fal's own statuses (contract 3.4).
Dialect = Literal["table", "fal"]

# TRACE asks for the request to be sent back, with the operator's credential in it; CONNECT for a tunnel.
NEVER_FORWARDED = frozenset(("TRACE", "CONNECT"))

_FORWARDED = frozenset(("content-type", "accept", "user-agent"))
# fal-protocol 10.4, no. 23: headers that reach into the operator's account, storage or routing; and the target of
# the client's proxy protocol, which is ours to read.
_DROPPED = frozenset(
    (
        "x-fal-target-url",
        "x-fal-store-io",
        "x-fal-object-lifecycle-preference",
        "x-fal-object-lifecycle",
        "x-fal-tags",
        "x-fal-no-retry",
        "x-fal-retry-config",
        "x-fal-runner-hint",
        "x-fal-cdn-token",
        "x-fal-user-id",
    )
)
_HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",  # made anew: the body grows
        "date",  # the server in front of the customer writes its own
        "server",
    )
)
_OURS = ("x-abhiapi-", "x-ratelimit-")
# Which pages may read an answer is this service's to say, not fal's (fal-protocol 10.2, no. 12): `web.cors`.
_CROSS_ORIGIN = ("access-control-",)
# Digests of a body that we add to would no longer be true.
DIGESTS = frozenset(("content-md5", "digest", "content-digest", "repr-digest", "etag"))

KNOWN_PATH_MAX = 256  # longer than any model's; longer ones are not worth remembering
CREDENTIAL_MIN = 16  # fal's own have some 69 characters

_PLAIN_QUERY = re.compile(r"[\x21-\x7e]*")
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:%/-]*")


def check_path(path: str) -> None:
    """Raise `ForbiddenPath` for a raw path that could leave its host or mean another path at fal than it does here."""
    if not _PLAIN_PATH.fullmatch(path):
        raise ForbiddenPath("the path has characters that no fal path has: send it as plain ASCII, percent-encoded")
    decoded = path
    for _ in range(4):
        if re.search(r"[\x00-\x20\x7f\\@?#]|//", decoded) or {".", ".."} & set(decoded.split("/")):
            raise ForbiddenPath("the path has '..', '//', a backslash, '@' or a control character")
        further = unquote_to_bytes(decoded.encode("latin-1")).decode("latin-1")
        if further.count("/") != decoded.count("/"):
            raise ForbiddenPath("the path has an encoded slash")
        if further == decoded:
            return
        decoded = further
    raise ForbiddenPath("the path is encoded many times over")


def endpoint_of(path: str) -> tuple[str, bool]:
    """The model that a raw run path names, and whether its stream is asked for. A model's price covers its /stream.

    Raises `ForbiddenPath`.
    """
    return _known_endpoint(path) if len(path) <= KNOWN_PATH_MAX else _endpoint_of(path)


def _endpoint_of(path: str) -> tuple[str, bool]:
    check_path(path)
    endpoint = path.strip("/")
    if not endpoint:
        raise ForbiddenPath("the path names no model")
    if endpoint.endswith("/stream"):
        return endpoint.removesuffix("/stream"), True
    return endpoint, False


_known_endpoint = lru_cache(maxsize=4096)(_endpoint_of)


def forwarded_query(query: str, *, without_webhook: bool = False) -> str:
    """The query to send on, byte for byte, less ``fal_jwt_token`` (fal-protocol 10.4). Raises `ForbiddenPath`.

    ``without_webhook``: ``fal_webhook`` means nothing where no job is submitted, and must not lead fal past us.
    """
    if not _PLAIN_QUERY.fullmatch(query):
        raise ForbiddenPath("the query has blanks or control characters: send them percent-encoded")
    dropped = ("fal_jwt_token", "fal_webhook") if without_webhook else ("fal_jwt_token",)
    if "fal_" not in query.lower() and "%" not in query:
        return query
    return "&".join(part for part in query.split("&") if not _query_name(part).strip("+ ").startswith(dropped))


def _query_name(part: str) -> str:
    return unquote_to_bytes(part.split("=", 1)[0]).decode("latin-1").lower()


def request_headers(headers: Iterable[tuple[str, str]]) -> Headers:
    """The caller's headers that go to fal (names in lower case). Credentials and cookies never do."""
    kept = [
        (name, value)
        for name, value in headers
        if name in _FORWARDED or (name.startswith(("x-fal-", "x-app-fal-")) and name not in _DROPPED)
    ]
    # Spliced bytes cannot be compressed ones, so fal is asked for plain ones.
    kept.append(("accept-encoding", "identity"))
    return kept


def worth_hiding(credential: str | None) -> str | None:
    """The operator's credential if it is one. A short one (``FAL_KEY=any``) is a word that honest answers have too."""
    return credential if credential and len(credential) >= CREDENTIAL_MIN else None


def response_headers(headers: Headers, *, secret: str | None, without: frozenset[str] = frozenset()) -> Headers:
    """fal's headers that go to the caller, as they came, less hop-by-hop ones and any that shows the credential."""
    named = {
        token.strip().lower() for name, value in headers if name.lower() == "connection" for token in value.split(",")
    }
    dropped = _HOP_BY_HOP | named | without
    return [
        (name, value)
        for name, value in headers
        if (lower := name.lower()) not in dropped
        and not lower.startswith(_OURS + _CROSS_ORIGIN)
        and not (secret and secret in value)
    ]


def status_for(dialect: Dialect, status: int) -> int:
    """The status a caller sees for fal's (contract 3.4)."""
    if dialect == "fal":
        return status
    if status == 422:
        return 400
    if status >= 500:
        return 504 if status == 504 else 502
    return status


def error_for(dialect: Dialect, error: AbhiError) -> AbhiError:
    """The error a caller sees. fal's clients repeat a 502 or 504 by themselves, so what may have cost money is 500."""
    if dialect == "fal" and isinstance(error, UpstreamError) and error.may_have_cost:
        return UpstreamOutcomeUnknown(f"{error.message}. It may have run at fal; nothing was charged here")
    return error


def error_body(error: AbhiError, *, status: int | None = None, billing: bytes | None = None) -> bytes:
    """Our error body. ``detail`` is what fal's Python client shows, ``message`` what its JavaScript client shows."""
    code = status or error.status
    name = STATUS_NAMES.get(code, "Error")
    body = {
        "error": {"code": code, "name": name, "type": error.type, "message": error.message},
        "detail": error.message,
        "message": error.message,
    }
    text = json.dumps(body).encode()
    return text if billing is None else text[:-1] + b", " + billing + b"}"


def billing_member(model: str, charge_micros: int, balance_micros: int) -> bytes:
    """``"_billing": {...}`` as spliced into an answer. Amounts are exact decimals, never floats."""
    return (
        f'"_billing": {{"model": {json.dumps(model)}, "credits_used": {credits_text(charge_micros)}, '
        f'"cost_usd": {usd_text(charge_micros)}, "balance_remaining": {credits_text(balance_micros)}}}'
    ).encode()


def billing_comment(member: bytes) -> bytes:
    """The line that closes an event stream: a comment, which fal's clients never see as an event (fal-protocol 4)."""
    return b": " + member.replace(b'"_billing":', b"_billing", 1) + b"\n"


def is_json_type(content_type: str | None) -> bool:
    media_type = (content_type or "").split(";", 1)[0].strip().lower()
    return media_type == "application/json" or media_type.endswith("+json")


def is_event_stream(content_type: str | None) -> bool:
    return (content_type or "").split(";", 1)[0].strip().lower() == "text/event-stream"


def caller_key(headers: Mapping[str, str]) -> tuple[str | None, Dialect]:
    """The key a caller sent, and the dialect to answer in. ``x-api-key`` counts before ``Authorization``."""
    api_key = headers.get("x-api-key", "").strip()
    if api_key:
        return api_key, "table"
    scheme, _, credential = headers.get("authorization", "").strip().partition(" ")
    credential = credential.strip()
    if scheme.lower() == "key" and credential:
        return credential, "fal"
    if scheme.lower() == "bearer" and credential:
        return credential, "table"
    return None, "table"
