"""Answers as values: fal's error bodies by status, odd but real bodies, and one of any size made in slices.

Pure. A `Reply` holds its body as slices and knows its length where that is knowable, so that the largest answer
passes without ever being whole in memory. Error shapes: fal-protocol 7.1 to 7.3, seen 2026-11-22.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any

JSON = "application/json"
SLICE_BYTES = 256 * 1024

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """``length`` is the body's size in bytes, None where it is known only at its end (a compressed stream)."""

    status: int
    content_type: str
    body: Iterable[bytes]
    length: int | None
    headers: Headers = field(default=())

    def with_headers(self, *more: tuple[str, str]) -> Reply:
        return replace(self, headers=self.headers + more)

    @property
    def status_line(self) -> str:
        try:
            return f"{self.status} {HTTPStatus(self.status).phrase}"
        except ValueError:
            return f"{self.status} Unassigned"

    def head(self) -> list[tuple[str, str]]:
        """The headers without the framing, which is the sender's business."""
        return [("content-type", self.content_type), *self.headers]


def of_bytes(status: int, body: bytes, content_type: str = JSON, headers: Headers = ()) -> Reply:
    return Reply(status, content_type, (body,) if body else (), len(body), headers)


def of_json(status: int, value: Any, headers: Headers = ()) -> Reply:
    """As fal's framework prints JSON: compact, and unescaped but for what UTF-8 cannot say (lone surrogates)."""
    try:
        body = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        body = json.dumps(value, separators=(",", ":")).encode()
    return of_bytes(status, body, JSON, headers)


def gzipped(reply: Reply) -> Reply:
    packed = _packed(reply.body)
    if reply.length is not None and reply.length <= SLICE_BYTES:
        body = b"".join(packed)
        reply = replace(reply, body=(body,), length=len(body))
    else:
        reply = replace(reply, body=packed, length=None)
    return reply.with_headers(("content-encoding", "gzip"))


def _packed(body: Iterable[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(1, wbits=31)
    for piece in body:
        yield packer.compress(piece)
    yield packer.flush()


# --- errors in fal's shapes -------------------------------------------------------------------------------------

# Platform errors (fal-protocol 7.2): status -> error type and text.
_PLATFORM = {
    400: ("bad_request", "Bad request"),
    499: ("client_cancelled", "Request was cancelled"),
    500: ("internal_error", "Internal server error"),
    502: ("runner_incomplete_response", "Runner returned an incomplete response"),
    503: ("runner_scheduling_failure", "No runner could be scheduled"),
    504: ("request_timeout", "Request timed out"),
}
_PLAIN = {
    401: "invalid key credentials",
    403: "User is locked. Reason: Exhausted balance. Top up your balance at fal.ai/dashboard/billing",
    405: "Method Not Allowed",
}


def error(status: int, path: str, host: str) -> Reply:
    """What fal answers with this status (3xx: a redirect to another path of this host)."""
    if status in (204, 304):
        return of_bytes(status, b"")
    if 300 <= status < 400:
        location = f"http://{host}/redirected{path}"
        return of_json(status, {"detail": "Redirected"}, (("location", location),))
    if status == 404:
        return not_found(path)
    if status == 422:
        return of_json(status, {"detail": [_CONTENT_POLICY]})
    if status == 429:
        detail = {"detail": "Concurrent requests limit reached", "error_type": "concurrent_requests_limit"}
        return of_json(status, detail, (("x-fal-needs-retry", "1"), ("x-fal-error-type", "concurrent_requests_limit")))
    if status in _PLATFORM or status >= 500:
        kind, text = _PLATFORM.get(status, _PLATFORM[500])
        return of_json(status, {"detail": text, "error_type": kind}, (("x-fal-error-type", kind),))
    return of_json(status, {"detail": _PLAIN.get(status, HTTPStatus(status).phrase if _known(status) else "Error")})


_CONTENT_POLICY = {
    "loc": ["body", "prompt"],
    "msg": "The content could not be processed because it contained material flagged by a content checker.",
    "type": "content_policy_violation",
    "url": "https://docs.fal.ai/errors#content_policy_violation",
    "input": "",
}


def not_found(path: str) -> Reply:
    return of_json(404, {"detail": f"Path {path} not found"})


def _known(status: int) -> bool:
    return status in HTTPStatus._value2member_map_


# --- odd bodies -------------------------------------------------------------------------------------------------

_NGINX = (
    b"<html>\r\n<head><title>503 Service Temporarily Unavailable</title></head>\r\n<body>\r\n"
    b"<center><h1>503 Service Temporarily Unavailable</h1></center>\r\n<hr><center>nginx</center>\r\n"
    b"</body>\r\n</html>\r\n"
)
_NESTED_DEPTH = 800

# Each is something that an edit of the text, or a decode and re-encode, would get wrong somewhere.
_ODD: dict[str, tuple[str, bytes]] = {
    "html": ("text/html", _NGINX),
    "empty": (JSON, b""),
    "object": (JSON, b"{}"),
    "array": (JSON, b'[{"url":"https://example.com/a.png"},{"url":"https://example.com/b.png"}]'),
    "text": ("text/plain; charset=utf-8", "no JSON, only text: \u00fc }\n".encode()),
    "binary": ("audio/mpeg", bytes(range(256)) * 64),
    "nested": (JSON, b'{"a":' * _NESTED_DEPTH + b"{}" + b"}" * _NESTED_DEPTH),
    "latin1": ("application/json; charset=iso-8859-1", '{"prompt":"caf\u00e9 \u00fc"}'.encode("latin-1")),
    "whitespace": (JSON, b'\r\n\t {  "images" : [ ] ,\n  "seed" :  7\r\n \t } \n\n  '),
    "escaped": (
        JSON,
        rb'{"prompt":"a \"}\" and \\","u":"\u00e9\ud83d\ude00\/","n":[1.0,1E400,-0,0.10000000000000000000000001],'
        rb'"n":12345678901234567890123,"raw":"' + "\u00e9\u2028".encode() + rb'","_billing\u0022":"}","end":"}"}',
    ),
    "billing": (JSON, b'{"images":[],"_billing":{"model":"not ours","credits_used":0}}'),
}


def odd(status: int, kind: str) -> Reply:
    content_type, body = _ODD[kind]
    return of_bytes(status, body, content_type)


def sized(status: int, size_bytes: int) -> Reply:
    """A JSON object of exactly this many bytes: one member, a base64 text, made in slices as it is sent."""
    return Reply(status, JSON, _sized(size_bytes), size_bytes)


_SIZED_HEAD, _SIZED_TAIL = b'{"image":{"content":"data:image/png;base64,', b'"}}'
_BASE64 = b"iVBORw0KGgoAAAANSUhEUgAABAAAAAMACAIAAAA12IJaAAAgAElEQVR4nOzdd3yV" * (SLICE_BYTES // 64)


def _sized(size_bytes: int) -> Iterator[bytes]:
    left = size_bytes - len(_SIZED_HEAD) - len(_SIZED_TAIL)
    yield _SIZED_HEAD
    while left > 0:
        yield _BASE64[: min(left, SLICE_BYTES)]
        left -= min(left, SLICE_BYTES)
    yield _SIZED_TAIL
