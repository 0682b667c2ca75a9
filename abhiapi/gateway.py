"""What happens when a customer calls: from the key to the charge, top to bottom.

    authenticate -> limits -> price -> hold -> forward -> meter -> settle -> splice

`run` takes plain values and gives plain values; it knows no web framework. The hold is on disk before fal hears of
the call, and whatever happens after that ends it exactly once: a whole answer by its verdict (`metering`), anything
else as a release. The caller's hang-up changes nothing: fal's answer is read to its end and charged. No database
transaction is open while fal is spoken to.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

from abhiapi import calls, encodings, jsonbytes, keys, metering, prices, pricing, wire
from abhiapi.db import Tx
from abhiapi.errors import (
    AbhiError,
    BodyIncomplete,
    ChargeNotRecorded,
    DatabaseUnavailable,
    UnknownRoute,
    UpstreamError,
    UpstreamRefused,
)
from abhiapi.fal import FalReply
from abhiapi.ids import call_text
from abhiapi.metering import Verdict
from abhiapi.money import Micros, credits_text
from abhiapi.runtime import SETTLE_PATIENCE_S, Runtime
from abhiapi.settings import SLOW_CALLER_S

log = logging.getLogger("abhiapi")

# Answers up to this size are read whole before the first byte leaves, so that their charge can stand in the headers.
WHOLE_BYTES_MAX = 64 * 1024
FAL_REQUEST_ID_MAX = 100  # fal's are 36 characters long


class RequestBody(Protocol):
    """The caller's body: what goes to fal byte for byte (bytes, a `http_adapter.Body`, or None), and what it says."""

    @property
    def content(self) -> Any: ...

    @property
    def call_input(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Request:
    """A caller's request in plain values. ``path`` and ``query`` are raw, as they came over the wire."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]  # names in lower case
    read_body: Callable[[], RequestBody]  # raises MalformedJson, BodyTooLarge, BodyIncomplete


@dataclass(slots=True)
class Reply:
    """What goes back: either all bytes at once, or pieces with a ``close`` that must be called."""

    status: int
    headers: wire.Headers
    body: bytes | MeteredBody


@dataclass(slots=True)
class _Call:
    """One admitted call on its way."""

    open: calls.OpenCall
    price: pricing.Price
    call_input: Mapping[str, Any]
    dialect: wire.Dialect
    started: float = field(default_factory=monotonic)
    is_ending: bool = False  # its hold is being ended, or has been: nobody else may try


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a call's hold ended: what it cost and the balance after it."""

    charge_micros: Micros
    balance_micros: Micros

    def headers(self) -> wire.Headers:
        return [
            ("x-abhiapi-credits-used", credits_text(self.charge_micros)),
            ("x-abhiapi-balance-remaining", credits_text(self.balance_micros)),
        ]


def run(rt: Runtime, request: Request) -> Reply:
    """Forward one call to fal.run and charge for what it used. Never raises an `AbhiError`: it answers with it."""
    key, dialect = wire.caller_key(request.headers)
    call_id = rt.call_ids.new(rt.now_ms())
    shown = [("x-abhiapi-call-id", call_text(call_id))]
    try:
        caller = rt.authenticate(key)
    except AbhiError as error:
        return _with_headers(_refusal(rt, error, dialect), shown)
    try:
        lease = rt.limits.enter(caller.key_id, caller.plan)
    except AbhiError as error:
        return _with_headers(_refusal(rt, error, dialect), shown + rt.limits.headers(caller.key_id, caller.plan))
    try:
        reply = _admitted(rt, caller, call_id, request, dialect)
    except AbhiError as error:
        reply = _refusal(rt, error, dialect)
    except BaseException:
        lease.release()
        raise
    if isinstance(reply.body, MeteredBody):
        reply.body.when_closed = lease.release
    else:
        lease.release()
    return _with_headers(reply, shown + rt.limits.headers(caller.key_id, caller.plan))


def _admitted(rt: Runtime, caller: keys.Caller, call_id: int, request: Request, dialect: wire.Dialect) -> Reply:
    """The call itself, once its caller is known and within limits. Raises what is answered in its place."""
    if "x-fal-target-url" in request.headers:
        raise UnknownRoute("x-fal-target-url is not served here: call /{any-fal-path} on this host")
    model, streamed = wire.endpoint_of(request.path)
    price = rt.catalogue(caller.own_price_id).price_of(model)
    query = wire.forwarded_query(request.query)
    target = request.path + ("?" + query if query else "")
    headers = wire.request_headers(request.headers.items())
    body = request.read_body()
    held_micros = pricing.ceiling(price, body.call_input).amount_micros
    open_call = calls.OpenCall(call_id, caller.account_id, caller.key_id, model, held_micros)
    _hold(rt, caller, open_call, price, "stream" if streamed else "sync")
    call = _Call(open_call, price, body.call_input, dialect)
    try:
        reply = rt.fal_run.send(request.method, target, headers, body.content)
        return _answer(rt, call, reply)
    except UpstreamError as error:
        return _failed(rt, call, error)
    except BaseException:
        if not call.is_ending:  # a bug of ours, or the end of the process: what fal answered is not known
            _settle(rt, call, metering.released("interrupted"))
        raise


def _hold(rt: Runtime, caller: keys.Caller, call: calls.OpenCall, price: pricing.Price, mode: calls.Mode) -> None:
    """Set the credit aside and write the call, durably. Raises InsufficientCredits, DatabaseUnavailable (503)."""
    now = rt.now_ms()
    identity = price.identity()
    known_price_id = rt.price_ids.get(identity)

    def admit(tx: Tx) -> int:
        price_id = known_price_id or prices.version_of(tx, price, now_ms=now)
        calls.admit(
            tx,
            calls.Admission(
                call=call,
                price_id=price_id,
                process_id=rt.process_id,
                mode=mode,
                deadline_at=now + rt.settings.longest_call_s * 1000,
                created_at=now,
            ),
        )
        if now - caller.last_used_at >= keys.LAST_USED_STEP_MS:
            keys.touch(tx, call.key_id, now)
        return price_id

    rt.price_ids[identity] = rt.write(admit)
    rt.working_on.add(call.call_id)


def _answer(rt: Runtime, call: _Call, reply: FalReply) -> Reply:
    """fal's answer as the caller gets it: whole where it is small, else passed on as it comes."""
    status = reply.status
    if status in metering.OPERATOR_STATUSES:
        reply.close()
        log.error("fal refused the operator's credential or account with status %d", status)
        refused = UpstreamRefused("fal does not accept calls from this service just now: nothing was charged")
        return _failed(rt, call, refused, reply)
    body = MeteredBody(rt, call, reply)
    try:
        whole = body.read_whole(WHOLE_BYTES_MAX)
        if whole is None and not body.is_event_stream:
            body.read_first()  # an answer that is cut before its first byte still gets a proper error
    except UpstreamError as error:
        reply.close()
        return _failed(rt, call, error, reply)
    without = wire.DIGESTS if body.is_changed else frozenset()
    if body.is_decoded:
        without |= {"content-encoding"}
    headers = wire.response_headers(reply.headers, secret=wire.worth_hiding(rt.settings.fal_key), without=without)
    shown_status = wire.status_for(call.dialect, status)
    if whole is None:
        length = reply.value("content-length")
        if length is not None and not body.is_changed:
            headers.append(("Content-Length", length))
        if body.is_event_stream:
            headers.append(("X-Accel-Buffering", "no"))  # a buffering proxy in front would hold events back
        return Reply(shown_status, headers, body)
    outcome = body.settle()
    return _whole_answer(rt, call, shown_status, headers, whole, outcome, is_json=body.is_json, of_fal=status)


def _whole_answer(
    rt: Runtime,
    call: _Call,
    status: int,
    headers: wire.Headers,
    whole: bytes,
    outcome: _Outcome,
    *,
    is_json: bool,
    of_fal: int,
) -> Reply:
    """A small answer with its charge. Errors that are no JSON, and what shows the credential, get our words instead."""
    member = wire.billing_member(call.open.model, outcome.charge_micros, outcome.balance_micros)
    secret = wire.worth_hiding(rt.settings.fal_key)
    shows_secret = secret is not None and secret.encode() in whole
    if shows_secret or (of_fal >= 400 and not (is_json and jsonbytes.is_json(whole))):
        error = UpstreamError(f"fal answered with status {of_fal} and no explanation")
        status = status if of_fal >= 400 else error.status
        headers = [(name, value) for name, value in headers if not name.lower().startswith("content-")]
        headers.append(("Content-Type", "application/json"))
        whole = wire.error_body(error, status=status, billing=member)
    elif is_json:
        whole = jsonbytes.spliced(whole, member)
    headers.append(("Content-Length", str(len(whole))))
    return Reply(status, headers + outcome.headers(), whole)


def _failed(rt: Runtime, call: _Call, error: UpstreamError, reply: FalReply | None = None) -> Reply:
    """No whole answer came: the hold is given back, and the caller told whether fal may have started."""
    request_id = None if reply is None else _request_id(reply)
    outcome = _settle(
        rt,
        call,
        metering.released(error.type),
        http_status=None if reply is None else reply.status,
        fal_request_id=request_id,
    )
    shown = wire.error_for(call.dialect, error)
    member = wire.billing_member(call.open.model, outcome.charge_micros, outcome.balance_micros)
    body = wire.error_body(shown, billing=member)
    rt.metrics.refused.labels(shown.type).inc()
    headers = [*_json_headers(body), *outcome.headers()]
    if request_id is not None:
        headers.append(("x-fal-request-id", request_id))
    return Reply(shown.status, headers, body)


def _request_id(reply: FalReply) -> str | None:
    return (reply.value("x-fal-request-id") or "")[:FAL_REQUEST_ID_MAX] or None


def _settle(
    rt: Runtime, call: _Call, verdict: Verdict, *, http_status: int | None = None, fal_request_id: str | None = None
) -> _Outcome:
    """End the hold, durably, and tell what it cost. Raises `ChargeNotRecorded` when the database takes no write."""
    now = rt.now_ms()
    call.is_ending = True

    def finish(tx: Tx, by: Verdict = verdict) -> _Outcome:
        balance = calls.finish(tx, call.open, by, now_ms=now, http_status=http_status, fal_request_id=fal_request_id)
        return _Outcome(by.charge_micros, balance)

    try:
        outcome = rt.write(finish, patience_s=SETTLE_PATIENCE_S)
    except calls.CallEnded:
        outcome = _Outcome(*rt.reader.read(lambda tx: calls.ended_as(tx, call.open.call_id)))
        log.error("%s was ended by somebody else before its answer was settled", call_text(call.open.call_id))
    except DatabaseUnavailable as error:
        rt.metrics.parked.inc()
        rt.settle_later(finish, call.open.call_id)
        log.error("the charge of %s could not be written yet: %s", call_text(call.open.call_id), error.message)
        raise ChargeNotRecorded(
            "fal answered, and the charge could not be written down, so the answer is withheld. "
            "It is settled as soon as the database takes writes again"
        ) from error
    except AbhiError as error:  # the ledger refuses such a charge: the operator is asked
        unknown = Verdict("unknown", units=verdict.units, reason="charge_refused")
        outcome = rt.write(lambda tx: finish(tx, unknown), patience_s=SETTLE_PATIENCE_S)
        log.error("the charge of %s was refused by the ledger: %s", call_text(call.open.call_id), error.message)
    except BaseException:  # a bug: whatever the row says, the sweep may end it in time
        rt.working_on.discard(call.open.call_id)
        raise
    rt.working_on.discard(call.open.call_id)
    rt.metrics.ended[verdict.end].inc()
    rt.metrics.fal_seconds.observe(monotonic() - call.started)
    rt.metrics.credits.inc(outcome.charge_micros)
    if outcome.charge_micros > call.open.held_micros:
        rt.metrics.over_hold.inc()
        log.warning("%s (%s) cost more than its hold", call_text(call.open.call_id), call.open.model)
    return outcome


class MeteredBody:
    """fal's body on its way to the caller. The hold ends when the body does: at its end, a cut, or a hang-up.

    An iterator for the server in front; `close` is called whatever happens and may be called twice. A caller that
    hung up changes nothing: `close` reads fal's answer to its end first. A cut is never passed off as whole: the
    iterator raises, so the connection to the caller breaks as well.
    """

    def __init__(self, rt: Runtime, call: _Call, reply: FalReply) -> None:
        self._rt, self._call, self._reply = rt, call, reply
        content_type = reply.value("content-type")
        encoding = (reply.value("content-encoding") or "identity").strip().lower()
        is_json, is_stream = wire.is_json_type(content_type), wire.is_event_stream(content_type)
        self.is_decoded = encoding in encodings.DECODABLE and (is_json or is_stream)
        is_readable = self.is_decoded or encoding == "identity"
        self.is_json = is_json and is_readable
        self._is_replaced = reply.status >= 400 and not self.is_json  # our words stand for it
        self.is_event_stream = is_stream and is_readable and not self._is_replaced
        self.is_changed = self.is_json or self.is_event_stream
        self._read1 = encodings.DecodingReader(reply.read1) if self.is_decoded else reply.read1
        self._unit_headers = reply.values(metering.UNITS_HEADER)
        self._needs_answer = self.is_json and metering.needs_answer(reply.status, self._unit_headers)
        self._shrinker = jsonbytes.Shrinker() if self._needs_answer else None
        self._gathered: deque[bytes] = deque()  # read from fal and not passed on yet
        self._ended = False  # fal's body was read to its whole end
        self._outcome: _Outcome | None = None
        self._pieces = self._iterate()
        self.when_closed: Callable[[], None] = lambda: None

    def read_whole(self, most: int) -> bytes | None:
        """The whole body if it is a short one that does not arrive bit by bit; else None, and it is kept for later.

        Raises `UpstreamError`; the caller then ends the hold.
        """
        if self.is_event_stream or not (self.is_json or self._is_replaced or self._is_short(most)):
            return None
        size = 0
        while size <= most:
            piece = self._read1()
            if not piece:
                self._ended = True
                return b"".join(self._gathered)
            if not self._is_replaced:
                self._gathered.append(piece)
                size += len(piece)
        return None

    def read_first(self) -> None:
        """Wait for the first piece of a body that will be passed on as it comes. Raises `UpstreamError`."""
        if not self._gathered and not self._ended:
            piece = self._read1()
            self._ended = not piece
            if piece:
                self._gathered.append(piece)

    def settle(self) -> _Outcome:
        """End the hold of a body that has ended. Once; a second time tells the same."""
        if self._outcome is None:
            verdict = metering.verdict(
                self._call.price,
                self._reply.status,
                self._unit_headers,
                self._call.call_input,
                self._answer_object() if self._needs_answer else None,
            )
            if verdict.end == "unknown":
                log.error("%s (%s): %s", call_text(self._call.open.call_id), self._call.open.model, verdict.reason)
            self._end_hold(verdict)
        assert self._outcome is not None
        return self._outcome

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def close(self) -> None:
        """End everything that is still open: fal's answer, the hold, the caller's place among its calls at once."""
        try:
            self._pieces.close()
            if not self._call.is_ending:
                self._drain()
        finally:
            self._reply.close()
            when_closed, self.when_closed = self.when_closed, lambda: None
            when_closed()

    def _iterate(self) -> Generator[bytes]:
        splicer = jsonbytes.Splicer() if self.is_json else None
        give_up = self._call.started + self._rt.settings.upstream_timeout_s + SLOW_CALLER_S
        last = b""
        if self.is_event_stream:
            yield b""  # the head leaves now: the first event may be long in coming
        while piece := self._next_piece():
            if splicer:
                ready = splicer.feed(piece)
            elif self.is_event_stream:
                ready, last = piece, piece[-1:]
            else:  # settled before the last byte leaves
                ready, last = last + piece[:-1], piece[-1:]
            if ready:
                yield ready
            if monotonic() > give_up:
                raise BodyIncomplete("the answer was read too slowly")  # `close` reads the rest and settles
        outcome = self.settle()
        member = wire.billing_member(self._call.open.model, outcome.charge_micros, outcome.balance_micros)
        if splicer:
            yield splicer.end(member)
        elif self.is_event_stream:
            yield (b"" if last in (b"", b"\n", b"\r") else b"\n") + wire.billing_comment(member)
        elif last:
            yield last

    def _next_piece(self) -> bytes:
        """The next piece of fal's body; b"" at its whole end. A cut ends the hold as a release, and is raised on."""
        if self._gathered:
            piece = self._gathered.popleft()
        elif self._ended:
            return b""
        else:
            try:
                piece = self._read1()
            except UpstreamError as error:
                self._end_hold(metering.released(error.type))
                raise
            self._ended = not piece
        if self._shrinker is not None:
            try:
                self._shrinker.feed(piece)
            except ValueError:
                self._shrinker = None  # no JSON that can be read: the verdict will be that the cost is not known
        return piece

    def _drain(self) -> None:
        """The caller is gone: read fal's answer to its end, because fal bills it, and settle."""
        try:
            while self._next_piece():
                pass
            self.settle()
        except UpstreamError as error:
            log.info("fal's answer to a caller who had hung up broke off: %s", error.message)

    def _end_hold(self, verdict: Verdict) -> None:
        self._outcome = _settle(
            self._rt,
            self._call,
            verdict,
            http_status=self._reply.status,
            fal_request_id=_request_id(self._reply),
        )

    def _is_short(self, most: int) -> bool:
        length = self._reply.value("content-length")
        return self._reply.status == 204 or (length is not None and length.isdigit() and int(length) <= most)

    def _answer_object(self) -> Mapping[str, Any] | None:
        if self._gathered:
            return jsonbytes.parse_object(b"".join(self._gathered))
        try:
            return jsonbytes.parse_object(self._shrinker.end()) if self._shrinker else None
        except ValueError:
            return None


def _refusal(rt: Runtime, error: AbhiError, dialect: wire.Dialect) -> Reply:
    shown = wire.error_for(dialect, error)
    rt.metrics.refused.labels(shown.type).inc()
    body = wire.error_body(shown)
    headers = _json_headers(body)
    if shown.retry_after_s is not None:
        headers.append(("Retry-After", str(shown.retry_after_s)))
    return Reply(shown.status, headers, body)


def internal_error() -> Reply:
    """The answer to a call that met a bug of ours."""
    body = wire.error_body(AbhiError("something went wrong here: tell the operator of this service"))
    return Reply(500, _json_headers(body), body)


def _json_headers(body: bytes) -> wire.Headers:
    return [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]


def _with_headers(reply: Reply, headers: wire.Headers) -> Reply:
    reply.headers.extend(headers)
    return reply
