"""The simulated fal as a WSGI application: one call from its first byte to its answer and its bill.

Owns the order of things: receive and record, authenticate, take the weather, wait, answer, bill, send. What models
answer is in `answers`, what can go wrong in `weather` and `transport`, the ``/_sandbox`` pages in `control`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl
from uuid import UUID, uuid5

import gevent

from abhiapi.metering import parse_units
from abhiapi.pricing import PriceRule
from abhiapi.sandbox import (
    billing_events,
    control,
    files,
    listing,
    queue,
    replies,
    streams,
    transport,
    uploads,
    weather,
    webhooks,
)
from abhiapi.sandbox.models import model_of
from abhiapi.sandbox.outcomes import Call, Outcome, is_billed, outcome_of, unit_texts
from abhiapi.sandbox.records import BODY_TEXT_MAX_BYTES, Bill, CallLog, Forecast, Gates, Received
from abhiapi.sandbox.replies import Reply
from abhiapi.sandbox.weather import FAIR, Weather

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

HOLD_MAX_S = 60
BODY_KEPT_MAX_BYTES = 256 * 1024**2
READ_BYTES = 256 * 1024

_SERVED_FROM = str(uuid5(UUID(int=0), "the simulator's one runner"))
_COMMON = (
    ("x-fal-served-from", _SERVED_FROM),
    ("strict-transport-security", "max-age=31536000; includeSubDomains"),
    ("x-robots-tag", "noindex"),
)


def uuid7() -> str:
    """A request id as fal makes them: time-ordered (RFC 9562, version 7)."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0x3 << 62) | 2 << 62
    return str(UUID(int=value))


def utc_now() -> datetime:
    return datetime.now(UTC)


class Sandbox:
    """A fal that costs nothing. Callable as WSGI; its records are attributes (see `records`)."""

    def __init__(self, rules: Iterable[PriceRule], new_id: Callable[[], str], now: Callable[[], datetime]) -> None:
        self.rules: Mapping[str, PriceRule] = {rule.model: rule for rule in rules}
        self.new_id = new_id
        self.now = now
        self.calls = CallLog()
        self.bill = Bill()
        self.forecast = Forecast()
        self.gates = Gates()
        self.webhooks = webhooks.Webhooks()
        self.queue = queue.Queue(self.gates, now, self.webhooks)
        self.uploads = uploads.Uploads()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path in ("/", "/_sandbox") or path.startswith("/_sandbox/"):
            return _respond(control.answer(self, environ), start_response)
        if path in webhooks.PATHS:
            return _respond(replies.of_json(200, self.webhooks.jwks()), start_response)
        if path.startswith(uploads.FILES):
            return _respond(self.uploads.served(environ), start_response)
        if path.startswith(uploads.ASKED):
            return self._asked_of_rest(environ, start_response)
        if path in listing.PATHS or path == billing_events.PATH:
            return self._listed(environ, start_response)
        if path.startswith(files.PREFIX):
            return _serve_file(environ, start_response)
        if path.startswith(queue.PREFIX) and (asked := queue.parsed(path.removeprefix(queue.PREFIX))):
            return self._polled(environ, start_response, *asked)
        return self._call(environ, start_response)

    def _asked_of_rest(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """The beginning of an upload. Only weather ordered for its path touches it: status, body."""
        call = self._receive(environ, environ["PATH_INFO"], keep=True)
        wanted = self.forecast.take_meant_for(call.path.removeprefix(uploads.REST))
        if not _is_authorized(environ.get("HTTP_AUTHORIZATION", "")):
            reply = replies.error(401, call.path, call.host)
        elif wanted is not None:
            status = wanted.status or 200
            error = replies.error(status, call.path, call.host)
            reply = error if wanted.body is None else replies.odd(status, wanted.body)
        else:
            reply = self.uploads.asked(call.path, call.received.query, call.host, call.body or b"")
        return _respond(reply, start_response)

    def _listed(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """The platform API: no call of a model's, so neither recorded as one nor billed."""
        wanted = self.forecast.take_meant_for(environ["PATH_INFO"].strip("/"))
        if wanted is not None and wanted.delay_s:
            gevent.sleep(float(wanted.delay_s))
        is_authorized = _is_authorized(environ.get("HTTP_AUTHORIZATION", ""))
        if environ["PATH_INFO"] == billing_events.PATH:
            reply = billing_events.answer(self.bill, environ, self.now(), wanted)
        else:
            reply = listing.answer(self.rules, environ, wanted, is_authorized=is_authorized)
        if wanted is not None and wanted.encoding == "gzip":
            reply = replies.gzipped(reply)
        client = environ.get("sandbox.socket")
        if wanted is None or not wanted.needs_socket or client is None:
            return _respond(reply, start_response)
        transport.send(client, reply, wanted)
        return ()

    def _polled(
        self, environ: WSGIEnvironment, start_response: StartResponse, action: str, request_id: str
    ) -> Iterable[bytes]:
        """Status, result or cancel of a queued job. Only weather ordered for ``queue/{action}``, or for this very
        job by ``queue/{action}/{request id}``, touches it."""
        call = self._receive(environ, environ["PATH_INFO"], keep=False)
        meant = self.forecast.take_meant_for
        wanted = meant(f"queue/{action}/{request_id}") or meant(f"queue/{action}")
        if not _is_authorized(environ.get("HTTP_AUTHORIZATION", "")):
            reply = replies.error(401, call.path, call.host)
        elif wanted is not None and (wanted.status is not None or wanted.body is not None):
            status = wanted.status or 200
            error = replies.error(status, call.path, call.host)
            reply = error if wanted.body is None else replies.odd(status, wanted.body)
        else:
            reply = self.queue.answer(environ, action, request_id)
        delay_s = self.queue.poll_delay_s(request_id) + (wanted.delay_s if wanted is not None else 0)
        if delay_s:
            gevent.sleep(float(delay_s))
        client = environ.get("sandbox.socket")
        if wanted is None or not wanted.needs_socket or client is None:
            return _respond(reply, start_response)
        transport.send(client, reply, wanted)
        return ()

    def _submitted(self, call: Call, wanted: Weather) -> Reply:
        """A job for this call. Its answer and its bill are what the call's would be; `Weather.status` is the job's."""
        rule = self.rules.get(call.endpoint_id)
        if rule is None:
            return replies.not_found(call.path)
        request_id = call.received.request_id

        def completed() -> int:
            outcome = outcome_of(call, wanted, rule)
            self._count(call, outcome, wanted)
            return outcome.reply.status

        def reply() -> Reply:
            return self._adorned(call, outcome_of(call, wanted, rule), wanted)

        job = queue.Job(request_id, call.endpoint_id, call.host, wanted, reply, completed)
        job.webhook = dict(parse_qsl(call.received.query)).get("fal_webhook")
        return self.queue.submit(job).with_headers(("x-fal-request-id", request_id), *_COMMON)

    def _call(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")
        is_queued = path.startswith(queue.PREFIX)
        endpoint_id = path.removeprefix(queue.PREFIX if is_queued else "").strip("/")
        authorized = _is_authorized(environ.get("HTTP_AUTHORIZATION", ""))
        problem, wanted = "", FAIR
        if authorized:
            try:
                wanted = self._weather(environ, endpoint_id)
            except weather.WeatherError as error:
                problem = str(error)
        call = self._receive(environ, path, keep=wanted.keeps_body)
        if not call.received.complete:
            raise transport.Hangup
        if not authorized:
            outcome = Outcome(replies.error(401, path, call.host), None)
        elif problem:
            outcome = Outcome(replies.of_json(400, {"detail": f"{weather.HEADER}: {problem}"}), Decimal(0))
        elif is_queued:
            if wanted.delay_s:
                gevent.sleep(float(wanted.delay_s))
            outcome = Outcome(self._submitted(replace(call, endpoint_id=endpoint_id), wanted), None)
        else:
            outcome = self._worked(call, wanted)
        if is_queued and authorized and not problem:
            reply = outcome.reply
        else:
            self._count(call, outcome, wanted)
            reply = self._adorned(call, outcome, wanted)
        if not wanted.needs_socket:
            return _respond(reply, start_response)
        client = environ.get("sandbox.socket")
        if client is None:
            return _respond(replies.of_json(500, {"detail": "this weather needs the real server"}), start_response)
        transport.send(client, reply, wanted)
        return ()

    def _weather(self, environ: WSGIEnvironment, endpoint_id: str) -> Weather:
        """The header's weather; without a header the next one ordered for this endpoint."""
        header = environ.get("HTTP_X_FAL_SANDBOX")
        if header is not None:
            return weather.from_header(header)
        return self.forecast.take(endpoint_id) or FAIR

    def _receive(self, environ: WSGIEnvironment, path: str, *, keep: bool) -> Call:
        """Read the body, in slices and without holding it unless it is asked for, and record the call."""
        source, digest, length, complete = environ["wsgi.input"], hashlib.sha256(), 0, True
        kept: bytearray | None = bytearray()
        while True:
            try:
                piece = source.read(READ_BYTES)
            except OSError:  # the client went away in the middle
                complete = False
                break
            if not piece:
                break
            digest.update(piece)
            length += len(piece)
            if kept is not None and length <= (BODY_KEPT_MAX_BYTES if keep else BODY_TEXT_MAX_BYTES):
                kept += piece
            else:
                kept = None
        body = None if kept is None else bytes(kept)
        received = Received(
            self.new_id(), self.now().isoformat(), environ["REQUEST_METHOD"], path, environ.get("QUERY_STRING", ""),
            _headers(environ), length, digest.hexdigest(), _text(body), complete,
        )  # fmt: skip
        self.calls.add(received)
        host = environ.get("HTTP_HOST") or f"{environ['SERVER_NAME']}:{environ['SERVER_PORT']}"
        start_timeout = "HTTP_X_FAL_REQUEST_TIMEOUT" in environ
        return Call(received, path.strip("/"), path, host, body if keep else None, start_timeout)

    def _worked(self, call: Call, wanted: Weather) -> Outcome:
        if wanted.delay_s:
            gevent.sleep(float(wanted.delay_s))
        if wanted.hold_until is not None and not self.gates.wait(wanted.hold_until, HOLD_MAX_S):
            detail = f"{wanted.hold_until!r} was not released within {HOLD_MAX_S} s"
            return Outcome(replies.of_json(500, {"detail": detail, "error_type": "internal_error"}), None)
        rule = self.rules.get(call.endpoint_id.removesuffix(streams.SUFFIX))
        call = replace(call, is_stream=call.endpoint_id.endswith(streams.SUFFIX))
        if rule is None or (call.is_stream and not model_of(rule).streams):
            return Outcome(replies.not_found(call.path), Decimal(0))
        if call.received.method not in ("POST", "GET"):
            return Outcome(replies.error(405, call.path, call.host).with_headers(("allow", "GET, POST")), None)
        outcome = outcome_of(call, wanted, rule)
        if not outcome.events:
            return outcome
        return replace(outcome, reply=streams.reply(outcome.reply.status, list(outcome.events), wanted, self.gates))

    def _count(self, call: Call, outcome: Outcome, wanted: Weather) -> None:
        """The call on the bill, if fal would bill it."""
        worth = None if outcome.units is None else outcome.units * wanted.units_factor
        texts = unit_texts(worth, wanted)
        if outcome.rule is not None:
            # A header that is no number hides what the call is worth; it does not change it.
            units = parse_units(texts[:1]) if texts and wanted.units != "twice" else None
            units = worth if units is None else units
            status = outcome.reply.status
            if units is not None and is_billed(status, units):
                request_id = call.received.request_id
                self.bill.add(request_id, outcome.rule, status, units, delivered=wanted.arrives_whole, at=self.now())

    def _adorned(self, call: Call, outcome: Outcome, wanted: Weather) -> Reply:
        """The reply with fal's headers."""
        reply = outcome.reply
        worth = None if outcome.units is None else outcome.units * wanted.units_factor
        if wanted.body != "html":  # a page of an ingress, which fal's headers do not adorn
            reply = reply.with_headers(("x-fal-request-id", call.received.request_id), *_COMMON)
        reply = reply.with_headers(*(("x-fal-billable-units", text) for text in unit_texts(worth, wanted)))
        return replies.gzipped(reply) if wanted.encoding == "gzip" else reply


def create_sandbox(
    rules: Iterable[PriceRule], *, new_id: Callable[[], str] = uuid7, now: Callable[[], datetime] = utc_now
) -> Sandbox:
    """A simulated fal that serves these models and bills them at these prices."""
    return Sandbox(rules, new_id, now)


def _is_authorized(header: str) -> bool:
    scheme, _, credential = header.partition(" ")
    return scheme == "Key" and bool(credential.strip())


def _headers(environ: WSGIEnvironment) -> tuple[tuple[str, str], ...]:
    as_sent = environ.get("sandbox.headers")
    if as_sent is not None:
        return tuple(as_sent)
    named = [(name[5:].replace("_", "-").lower(), value) for name, value in environ.items() if name[:5] == "HTTP_"]
    plain = [(name.replace("_", "-").lower(), environ.get(name)) for name in ("CONTENT_TYPE", "CONTENT_LENGTH")]
    return tuple([(name, value) for name, value in plain if value] + named)


def _text(body: bytes | None) -> str | None:
    if body is None or len(body) > BODY_TEXT_MAX_BYTES:
        return None
    try:
        return body.decode()
    except UnicodeDecodeError:
        return None


def _respond(reply: Reply, start_response: StartResponse) -> Iterable[bytes]:
    headers = reply.head()
    if reply.status in (204, 304):
        headers = list(reply.headers)
    elif reply.length is not None:
        headers.append(("content-length", str(reply.length)))
    start_response(reply.status_line, headers)
    return reply.body


def _serve_file(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    served = files.file_at(environ["PATH_INFO"]) if environ["REQUEST_METHOD"] in ("GET", "HEAD") else None
    if served is None:
        return _respond(replies.of_json(404, {"detail": "File not found"}), start_response)
    headers = [("content-type", served.content_type), ("cache-control", "public, max-age=31536000, immutable")]
    headers.append(("access-control-allow-origin", "*"))
    if served.length is not None:
        headers.append(("content-length", str(served.length)))
    start_response("200 OK", headers)
    return () if environ["REQUEST_METHOD"] == "HEAD" else served.pieces
