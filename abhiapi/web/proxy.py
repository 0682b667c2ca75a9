"""HTTP to and from `gateway`: the WSGI door for calls. No decisions are made here.

It stands before Flask, which would cost a fifth of the whole request and hand over a decoded path where the raw one
counts (docs/decisions/0001).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from http.client import responses
from time import monotonic
from typing import IO, Any
from urllib.parse import parse_qsl, quote

import gevent
from gevent.socket import MSG_PEEK

from abhiapi import admission, gateway, jsonbytes, queue_gateway, target, upload_gateway, wire
from abhiapi.admission import Reply, ReplyBody, Request
from abhiapi.errors import AbhiError, BodyIncomplete, BodyTooLarge, MalformedJson, StorageUnavailable
from abhiapi.http_adapter import FileBody
from abhiapi.runtime import Runtime, log
from abhiapi.settings import STALL_S, UPLOAD_S

IN_MEMORY_BYTES = 256 * 1024  # larger request bodies lie in a temporary file while they wait for fal
READ_BYTES = 64 * 1024
_JSON_NAMES = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}(:\d{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:\d{1,5})?")

Environ = dict[str, Any]
StartResponse = Callable[..., Any]


Run = Callable[[Runtime, Request], Reply]

TARGET_VARIABLE = "HTTP_X_FAL_TARGET_URL"
_RUNS: dict[target.Service, Run] = {
    "run": gateway.run,
    "queue": queue_gateway.run,
    "upload": upload_gateway.run,
}


def serve_target(rt: Runtime, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    """Answer one call in the proxy protocol of fal's JavaScript client: a header names it, and the path does not count.

    It is answered as the route of ours that its target stands for.
    """
    try:
        wanted = target.parse(environ.get(TARGET_VARIABLE))
    except AbhiError as error:
        return serve(rt, environ, start_response, partial(_refused, error))
    most = upload_gateway.BODY_BYTES_MAX if wanted.service == "upload" else None
    return serve(rt, environ | {"RAW_URI": wanted.uri}, start_response, _RUNS[wanted.service], body_bytes_max=most)


def _refused(error: AbhiError, rt: Runtime, request: Request) -> Reply:
    return admission.refused(rt, request, error)


def serve(
    rt: Runtime, environ: Environ, start_response: StartResponse, run: Run, *, body_bytes_max: int | None = None
) -> Iterable[bytes]:
    """Answer one call, by `gateway.run` or another of its kind."""
    sock = environ.get("gunicorn.socket")
    if sock is not None:
        sock.settimeout(STALL_S)
    try:
        with _Files() as files:
            most = min(rt.settings.max_body_bytes, body_bytes_max or rt.settings.max_body_bytes)
            reply = run(rt, _request(rt, environ, files, most))
    except Exception:  # a bug of ours; the gateway has ended the hold
        log.exception("a call failed")
        reply = admission.internal_error()
    if environ["REQUEST_METHOD"] == "HEAD" and isinstance(reply.body, bytes):
        reply.body = b""
    body = (reply.body,) if isinstance(reply.body, bytes) else _Closing(reply.body)
    try:
        start_response(f"{reply.status} {responses.get(reply.status, 'Unknown')}", reply.headers)
    except BaseException:  # the server in front does not know the body yet, so nobody else would close it
        if isinstance(body, _Closing):
            body.close()
        raise
    return body


class _Closing:
    """An answer in pieces, with the ``close`` that WSGI servers call at its end, an error, or a hang-up."""

    def __init__(self, body: ReplyBody) -> None:
        self._body = body
        self.close = body.close

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)


def _request(rt: Runtime, environ: Environ, files: _Files, most: int) -> Request:
    raw_uri = environ.get("RAW_URI") or _rebuilt_uri(environ)
    path, _, query = raw_uri.partition("?")
    headers = {name[5:].replace("_", "-").lower(): value for name, value in environ.items() if name[:5] == "HTTP_"}
    if environ.get("CONTENT_TYPE"):
        headers["content-type"] = environ["CONTENT_TYPE"]
    return Request(
        method=environ["REQUEST_METHOD"],
        path=path,
        query=query,
        headers=headers,
        read_body=lambda: _read_body(environ, most, headers.get("content-type"), query, files),
        base_url=rt.settings.public_url or base_url(environ, rt.settings.trusted_proxies),
        has_hung_up=lambda: _has_hung_up(environ.get("gunicorn.socket")),
    )


def _has_hung_up(sock: Any) -> bool:
    """Whether the caller has closed the connection. Looks without taking: the next request may be there already."""
    if sock is None:
        return False
    try:
        sock.settimeout(0)
        return not sock.recv(1, MSG_PEEK)
    except (BlockingIOError, ValueError):  # nothing there; or TLS of our own, which cannot be looked into
        return False
    except OSError:
        return True
    finally:
        sock.settimeout(STALL_S)


def base_url(environ: Environ, hops: int) -> str:
    """This service as the caller addressed it; through reverse proxies, as the outermost trusted one was addressed."""
    scheme = _forwarded(environ, "HTTP_X_FORWARDED_PROTO", hops) or environ.get("wsgi.url_scheme", "http")
    host = _forwarded(environ, "HTTP_X_FORWARDED_HOST", hops) or environ.get("HTTP_HOST", "")
    if not _HOST.fullmatch(host):
        host = f"{environ.get('SERVER_NAME', '127.0.0.1')}:{environ.get('SERVER_PORT', '80')}"
    return f"{'https' if scheme == 'https' else 'http'}://{host}"


def _forwarded(environ: Environ, name: str, hops: int) -> str | None:
    """What the trusted proxies say, the way `ProxyFix` reads it: the value that the outermost of them added."""
    values = [value.strip() for value in environ.get(name, "").split(",")]
    return values[-hops] or None if 0 < hops <= len(values) else None


def _rebuilt_uri(environ: Environ) -> str:
    """The raw path where the server does not give it (Flask's test client): the decoded one, quoted again."""
    path = quote(environ.get("PATH_INFO", "/").encode("latin-1"), safe="/!$&'()*+,;=:@~")
    query = environ.get("QUERY_STRING", "")
    return f"{path}?{query}" if query else path


@dataclass(frozen=True, slots=True)
class _Body:
    content: Any
    call_input: Mapping[str, Any]


class _Files:
    """Temporary files of one request, removed when it has been sent to fal."""

    def __init__(self) -> None:
        self._open: list[IO[bytes]] = []

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open:
            file.close()

    def new(self) -> IO[bytes]:
        file = tempfile.TemporaryFile()
        self._open.append(file)
        return file


def _read_body(environ: Environ, most: int, content_type: str | None, query: str, files: _Files) -> _Body:
    """The request's body and what it says. Raises `BodyTooLarge`, `BodyIncomplete`, `MalformedJson`."""
    announced = environ.get("CONTENT_LENGTH")
    length = int(announced) if announced else None
    if length is not None and length > most:
        raise _too_large(most)
    deadline = monotonic() + UPLOAD_S
    wanted = IN_MEMORY_BYTES if length is None else min(IN_MEMORY_BYTES, length)
    first = _read_up_to(environ["wsgi.input"], wanted, deadline)
    if len(first) > most:  # of a body that did not announce its length
        raise _too_large(most)
    ended = len(first) == length if length is not None else len(first) < IN_MEMORY_BYTES
    if ended:
        return _Body(first or None, _input_of(first, content_type, query))
    if len(first) < IN_MEMORY_BYTES:
        raise BodyIncomplete("the request's body ended before its announced length: nothing was forwarded")
    return _spool(environ["wsgi.input"], first, length, most, content_type, files, deadline)


def _spool(
    stream: IO[bytes],
    first: bytes,
    length: int | None,
    most: int,
    content_type: str | None,
    files: _Files,
    deadline: float,
) -> _Body:
    """A large body, put into a file as it comes, and read without its long texts on the way."""
    shrinker = jsonbytes.Shrinker()
    problem: ValueError | None = None
    size, piece = 0, first
    try:
        file = files.new()
        while piece:
            size += len(piece)
            if size > most:
                raise _too_large(most)
            file.write(piece)
            try:
                if problem is None:
                    shrinker.feed(piece)
            except ValueError as error:
                problem = error
            gevent.sleep(0)  # a fast sender would otherwise keep everybody else waiting
            remaining = READ_BYTES if length is None else min(READ_BYTES, length - size)
            piece = _read_up_to(stream, remaining, deadline) if remaining else b""
        file.flush()
    except OSError as error:
        raise StorageUnavailable(
            "there is no room for the request's body just now: nothing was forwarded", retry_after_s=30
        ) from error
    if length is not None and size != length:
        raise BodyIncomplete("the request's body ended before its announced length: nothing was forwarded")
    try:
        if problem is not None:
            raise problem
        call_input = _object(shrinker.end())
    except ValueError as error:
        if wire.is_json_type(content_type):
            raise MalformedJson(f"the request's body is not a JSON object: {error}") from error
        call_input = {}
    return _Body(FileBody(file, size), call_input)


def _input_of(body: bytes, content_type: str | None, query: str) -> Mapping[str, Any]:
    """What a call asks for: its JSON object, or the query of a call without a body (fal-protocol 1.5).

    A body that does not call itself JSON is read if it is JSON all the same, since fal may do so too.
    """
    if not body:
        return dict(_pairs(query))
    try:
        return _object(body)
    except ValueError as error:
        if wire.is_json_type(content_type):
            raise MalformedJson(f"the request's body is not a JSON object: {error}") from error
        return {}


def _object(document: bytes) -> Mapping[str, Any]:
    value = jsonbytes.parse(document)
    if not isinstance(value, dict):
        raise ValueError(f"it is {_JSON_NAMES.get(type(value), 'a number')}")
    return value


def _pairs(query: str) -> Iterator[tuple[str, str]]:
    try:
        yield from parse_qsl(query, max_num_fields=1000)
    except ValueError:
        return


def _read_up_to(stream: IO[bytes], amount: int, deadline: float) -> bytes:
    """Read ``amount`` bytes or to the end, however small the pieces they come in. Raises `BodyIncomplete`."""
    pieces = []
    while amount > 0:
        try:
            piece = stream.read(amount)
        except Exception as error:  # of the connection, or of the server in front that could not read a chunk
            raise BodyIncomplete("the request's body broke off: nothing was forwarded") from error
        if not piece:
            break
        pieces.append(piece)
        amount -= len(piece)
        if monotonic() > deadline:
            raise BodyIncomplete(f"the request's body took longer than {UPLOAD_S} s: nothing was forwarded")
    return b"".join(pieces)


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request's body is larger than {most} bytes: send large inputs as URLs")
