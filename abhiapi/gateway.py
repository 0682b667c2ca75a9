"""What happens when a customer calls: from the key to the charge, top to bottom.

    authenticate -> limits -> (once per Idempotency-Key) -> price -> (a turn at fal) -> hold -> forward -> meter
        -> settle -> splice

`run` takes plain values and gives plain values; it knows no web framework. The hold is on disk before fal hears of
the call, and whatever happens after that ends it exactly once: a whole answer by its verdict (`metering`), anything
else as a release. The caller's hang-up changes nothing: fal's answer is read to its end and charged. No database
transaction is open while fal is spoken to.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from time import monotonic
from typing import Any

from abhiapi import admission, calls, encodings, eventstream, jsonbytes, keys, metering, pricing, replay, wire
from abhiapi.admission import WHOLE_BYTES_MAX, Call, Outcome, Reply, Request
from abhiapi.errors import BodyIncomplete, MethodNotAllowed, UpstreamError, UpstreamRefused
from abhiapi.fal import FalReply
from abhiapi.ids import call_text
from abhiapi.metering import Verdict
from abhiapi.runtime import Runtime
from abhiapi.settings import SLOW_CALLER_S

__all__ = ["MeteredBody", "Reply", "Request", "run"]

log = logging.getLogger("abhiapi")

FAL_REQUEST_ID_MAX = 100  # fal's are 36 characters long


def run(rt: Runtime, request: Request) -> Reply:
    """Forward one call to fal.run and charge for what it used. Never raises an `AbhiError`: it answers with it."""
    return admission.within_limits(rt, request, replay.once(_admitted))


def _admitted(rt: Runtime, caller: keys.Caller, call_id: int, request: Request, dialect: wire.Dialect) -> Reply:
    """The call itself, once its caller is known and within limits. Raises what is answered in its place."""
    if request.method in wire.NEVER_FORWARDED:
        raise MethodNotAllowed(f"{request.method} is not passed on: call models with POST or GET", allowed="GET, POST")
    model, streamed = wire.endpoint_of(request.path)
    price = rt.catalogue(caller.price_version).price_of(model)
    query = wire.forwarded_query(request.query, without_webhook=True)
    target = request.path + ("?" + query if query else "")
    headers = wire.request_headers(request.headers.items())
    body, times = request.read()
    ceiling = pricing.ceiling(price, body.call_input)
    open_call = calls.OpenCall(call_id, caller.account_id, caller.key_id, model, ceiling.amount_micros)
    mode: calls.Mode = "stream" if streamed else "sync"
    turn = rt.gate.enter(
        caller.account_id,
        has_hung_up=request.has_hung_up,
        before_waiting=lambda: admission.check_credit(rt, caller, open_call, basis=ceiling.basis),
    )
    if turn is not None:
        times.without(turn.waited_s)
    try:
        admission.hold(rt, caller, open_call, price, mode, request.claim, basis=ceiling.basis)
    except BaseException:
        rt.gate.end(turn)
        raise
    call = Call(open_call, price, body.call_input, dialect, mode, times, turn=turn)
    try:
        reply = rt.fal_run.send(request.method, target, headers, body.content)
        return _answer(rt, call, reply)
    except UpstreamError as error:
        return _failed(rt, call, error)
    except BaseException:
        if not call.is_ending:  # a bug of ours, or the end of the process: what fal answered is not known
            admission.settle(rt, call, metering.released("interrupted"))
        raise


def _answer(rt: Runtime, call: Call, reply: FalReply) -> Reply:
    """fal's answer as the caller gets it: whole where it is small, else passed on as it comes."""
    status = reply.status
    if status in metering.OPERATOR_STATUSES:
        reply.close()
        admission.fal_refused(rt, status)
        refused = UpstreamRefused("fal does not accept calls from this service just now: nothing was charged")
        return _failed(rt, call, refused, reply)
    if metering.is_concurrency_refusal(status, reply.value("x-fal-error-type"), reply.value("x-fal-needs-retry")):
        rt.gate.refused(call.turn)
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
    return admission.whole_answer(
        rt, call.open.model, shown_status, headers, whole, outcome, is_json=body.is_json, of_fal=status
    )


def _failed(rt: Runtime, call: Call, error: UpstreamError, reply: FalReply | None = None) -> Reply:
    """No whole answer came: the hold is given back, and the caller told whether fal may have started."""
    request_id = None if reply is None else _request_id(reply)
    outcome = admission.settle(
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
    headers = [*admission.json_headers(body), *outcome.headers()]
    if request_id is not None:
        headers.append(("x-fal-request-id", request_id))
    return Reply(shown.status, headers, body)


def _request_id(reply: FalReply) -> str | None:
    """The id that fal's bill will name; None for what is none, which would only be in the charge's way."""
    text = (reply.value("x-fal-request-id") or "")[:FAL_REQUEST_ID_MAX]
    return text if text and text.isprintable() else None


class MeteredBody:
    """fal's body on its way to the caller. The hold ends when the body does: at its end, a cut, or a hang-up.

    An iterator for the server in front; `close` is called whatever happens and may be called twice. A caller that
    hung up changes nothing: `close` reads fal's answer to its end first. A cut is never passed off as whole: the
    iterator raises, so the connection to the caller breaks as well.
    """

    def __init__(self, rt: Runtime, call: Call, reply: FalReply) -> None:
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
        needs_answer = metering.needs_answer(reply.status, self._unit_headers)
        self._needs_answer = needs_answer and (self.is_json or self.is_event_stream)
        self._shrinker = jsonbytes.Shrinker() if needs_answer and self.is_json else None
        self._last_event = eventstream.LastEvent() if needs_answer and self.is_event_stream else None
        self._gathered: deque[bytes] = deque()  # read from fal and not passed on yet
        self._ended = False  # fal's body was read to its whole end
        self._outcome: Outcome | None = None
        self._pieces = self._iterate()
        self.when_closed: Callable[[], object] = lambda: None

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

    def settle(self) -> Outcome:
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
            self._rt.gate.end(self._call.turn)
            when_closed, self.when_closed = self.when_closed, lambda: None
            when_closed()

    def _iterate(self) -> Generator[bytes]:
        splicer = jsonbytes.Splicer() if self.is_json else None
        give_up = self._call.started + self._rt.settings.upstream_timeout_s + SLOW_CALLER_S
        last, cut = b"", b""
        if self.is_event_stream:
            yield b""  # the head leaves now: the first event may be long in coming
        while piece := self._next_piece():
            if splicer:
                ready = splicer.feed(piece)
            elif self.is_event_stream:
                piece = cut + piece
                at = eventstream.whole_until(piece)
                ready, cut = piece[:at], piece[at:]
                last = ready[-1:] or last
            else:  # settled before the last byte leaves
                ready, last = last + piece[:-1], piece[-1:]
            if ready:
                yield ready
            if monotonic() > give_up:
                raise BodyIncomplete("the answer was read too slowly")  # `close` reads the rest and settles
        if cut:
            yield cut
            last = cut[-1:]
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
        elif self._last_event is not None:
            self._last_event.feed(piece)
        return piece

    def _drain(self) -> None:
        """The caller is gone: read fal's answer to its end, because fal bills it, and settle.

        An answer that does not end in time is dropped. Its head says what it costs, or the operator is asked.
        """
        give_up = monotonic() + self._rt.settings.upstream_timeout_s
        try:
            while self._next_piece():
                if monotonic() > give_up:
                    log.error("%s: fal's answer has no end, and is dropped", call_text(self._call.open.call_id))
                    if self._needs_answer:
                        self._end_hold(Verdict("unknown", reason="answer_without_end"))
                    break
            self.settle()
        except UpstreamError as error:
            log.info("fal's answer to a caller who had hung up broke off: %s", error.message)

    def _end_hold(self, verdict: Verdict) -> None:
        self._outcome = admission.settle(
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
        if self._last_event is not None:
            return self._last_event.answer()
        try:
            return jsonbytes.parse_object(self._shrinker.end()) if self._shrinker else None
        except ValueError:
            return None
