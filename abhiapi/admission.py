"""What every call passes before fal hears of it, and how its hold ends: shared by `gateway` and `queue_gateway`.

    within_limits: authenticate -> limits -> (the call) -> the headers that every answer carries
    hold: the credit set aside and the call written, durably
    settle: the hold ended, durably, once

Plain values in and out; no web framework.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

from abhiapi import accounts, calls, idempotency, jsonbytes, keys, ledger, prices, pricing, spending, telemetry, wire
from abhiapi.db import Tx
from abhiapi.errors import (
    AbhiError,
    ChargeNotRecorded,
    DatabaseUnavailable,
    InsufficientCredits,
    MethodNotAllowed,
    UpstreamError,
)
from abhiapi.fairness import Turn
from abhiapi.ids import call_text
from abhiapi.metering import Verdict
from abhiapi.money import NANOS_PER_MICRO, Micros, credits_text, nanos_usd_text, usd_text
from abhiapi.runtime import SETTLE_PATIENCE_S, Runtime
from abhiapi.telemetry import Times

log = logging.getLogger("abhiapi")

# Answers up to this size are read whole before the first byte leaves, so that their charge can stand in the headers.
WHOLE_BYTES_MAX = 64 * 1024


class RequestBody(Protocol):
    """The caller's body: what goes to fal byte for byte (bytes, a `http_adapter.Body`, or None), and what it says."""

    @property
    def content(self) -> Any: ...

    @property
    def call_input(self) -> Mapping[str, Any]: ...


class ReplyBody(Protocol):
    """An answer in pieces. ``close`` is called whatever happens, and calls ``when_closed`` once."""

    when_closed: Callable[[], object]

    def __iter__(self) -> Iterator[bytes]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Request:
    """A caller's request in plain values. ``path`` and ``query`` are raw, as they came over the wire."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]  # names in lower case
    read_body: Callable[[], RequestBody]  # raises MalformedJson, BodyTooLarge, BodyIncomplete
    base_url: str = ""  # this service as the caller sees it
    has_hung_up: Callable[[], bool] = lambda: False
    claim: idempotency.Claim | None = None  # the key that its call will be written down under (`replay`)
    # Made inside this process for a customer who is signed in, and never of what came over the wire (`web.proxy`): the
    # account's playground calls, and its headers hold no key.
    inside_account_id: int | None = None
    arrived: float = field(default_factory=monotonic)

    def read(self) -> tuple[RequestBody, Times]:
        """The body; and the times of a call that is about to be held, less what the caller took to send it."""
        reading = monotonic()
        body = self.read_body()
        now = monotonic()
        return body, Times(self.arrived + now - reading, now, traceparent=self.headers.get("traceparent"))


@dataclass(slots=True)
class Reply:
    """What goes back: either all bytes at once, or pieces with a ``close`` that must be called."""

    status: int
    headers: wire.Headers
    body: bytes | ReplyBody
    call_id: int | None = None  # the call whose answer this is, where that is an earlier one


@dataclass(slots=True)
class Call:
    """One admitted call on its way."""

    open: calls.OpenCall
    price: pricing.Price
    call_input: Mapping[str, Any]
    dialect: wire.Dialect
    mode: calls.Mode
    times: Times
    started: float = field(default_factory=monotonic)
    webhook_url: str | None = None  # where the customer wants to be told of the job's end
    asked: bytes | None = None  # a queued job's request, where it is short enough to be kept until the end
    turn: Turn | None = None  # at fal, for as long as fal works on it
    is_ending: bool = False  # its hold is being ended, or has been: nobody else may try

    def __post_init__(self) -> None:
        self.times.sent = self.started


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call's hold ended: what it cost and the balance after it. Not known: the operator will say what it cost."""

    charge_micros: Micros
    balance_micros: Micros
    is_known: bool = True

    def headers(self) -> wire.Headers:
        if not self.is_known:  # a charge that may follow is no charge of 0 (contract 3.3)
            return []
        return [
            ("x-abhiapi-credits-used", credits_text(self.charge_micros)),
            ("x-abhiapi-balance-remaining", credits_text(self.balance_micros)),
        ]


Serve = Callable[[Runtime, keys.Caller, int, Request, wire.Dialect], Reply]


def within_limits(rt: Runtime, request: Request, serve: Serve) -> Reply:
    """Answer one call of a known caller within its limits. Never raises an `AbhiError`: it answers with it."""
    key, dialect = wire.caller_key(request.headers)
    call_id = rt.call_ids.new(rt.now_ms())
    shown = [("x-abhiapi-call-id", call_text(call_id))]
    lines_of = telemetry.entered(call_id)
    try:
        inside = request.inside_account_id
        caller = rt.authenticate(key) if inside is None else rt.authenticate_inside(inside)
    except AbhiError as error:
        telemetry.refused(rt, error)
        return with_headers(refusal(rt, error, dialect), shown)
    lines_of.account, lines_of.key_id = caller.account, caller.key_id
    try:
        lease = rt.limits.enter(caller.key_id, caller.plan)
    except AbhiError as error:
        telemetry.refused(rt, error)
        return with_headers(refusal(rt, error, dialect), shown + rt.limits.headers(caller.key_id, caller.plan))
    try:
        reply = serve(rt, caller, call_id, request, dialect)
    except AbhiError as error:
        telemetry.refused(rt, error)
        reply = refusal(rt, error, dialect)
    except BaseException:
        lease.release()
        raise
    standing = None
    if isinstance(reply.body, bytes):
        standing = lease.release()
    else:
        reply.body.when_closed = lease.release
    if reply.call_id is not None:
        shown = [("x-abhiapi-call-id", call_text(reply.call_id))]
    return with_headers(reply, shown + rt.limits.headers(caller.key_id, caller.plan, standing))


def refused(rt: Runtime, request: Request, error: AbhiError) -> Reply:
    """Answer a call that is refused whatever it asks for, as any call: its key and its limits come first."""

    def refuse(*_: object) -> Reply:
        raise error

    return within_limits(rt, request, refuse)


def hold(
    rt: Runtime,
    caller: keys.Caller,
    call: calls.OpenCall,
    price: pricing.Price,
    mode: calls.Mode,
    claim: idempotency.Claim | None,
    *,
    basis: str,
) -> int:
    """Set the credit aside and write the call, durably.

    Raises ModelNotAllowed, InsufficientCredits, KeyLimitReached, DatabaseUnavailable (503). Gives the number of the
    price as recorded. With a claim, the call's key is written in the same transaction, or nothing is
    (`idempotency.KeyTaken`). ``basis``: how the hold came about, for a caller who cannot pay it.
    """
    keys.check_model(caller, call.model)
    now = rt.now_ms()
    identity = price.identity()
    known_price_id = rt.price_ids.get(identity)

    def admit(tx: Tx) -> int:
        if claim is not None:
            idempotency.check_free(tx, claim)
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
        if claim is not None:
            idempotency.take(tx, claim, call.call_id, now_ms=now)
        if now - caller.last_used_at >= keys.LAST_USED_STEP_MS:
            keys.touch(tx, call.key_id, now)
        return price_id

    try:
        price_id = rt.price_ids[identity] = rt.write(admit)
    except InsufficientCredits as error:
        raise _with_basis(error, basis) from error
    rt.working_on.add(call.call_id)
    return price_id


def check_credit(rt: Runtime, caller: keys.Caller, call: calls.OpenCall, *, basis: str) -> None:
    """Raise what `hold` would raise as things stand, for a call that has to wait before it."""
    keys.check_model(caller, call.model)
    now = rt.now_ms()

    def look(tx: Tx) -> None:
        available = accounts.by_id(tx, call.account_id).available_micros
        if available < call.held_micros:
            raise _with_basis(ledger.too_little(call.held_micros, available), basis)
        spending.refuse(tx, call.key_id, call.held_micros, now_ms=now)

    rt.reader.read(look)


def _with_basis(error: InsufficientCredits, basis: str) -> InsufficientCredits:
    return InsufficientCredits(f"{error.message} (held for this call: {basis})")


def settle(
    rt: Runtime,
    call: Call,
    verdict: Verdict,
    *,
    http_status: int | None = None,
    fal_request_id: str | None = None,
) -> Outcome:
    """End the hold, durably, and tell what it cost.

    Raises `ChargeNotRecorded` when the database takes no write, or where the sweep has given the hold back.
    """
    now = rt.now_ms()
    call.is_ending = True
    call.times.answered = monotonic()
    rt.gate.end(call.turn)

    def finish(tx: Tx, by: Verdict) -> Outcome:
        balance = calls.finish(tx, call.open, by, now_ms=now, http_status=http_status, fal_request_id=fal_request_id)
        return Outcome(by.charge_micros, balance, by.end != "unknown")

    def end(patience_s: float) -> tuple[Outcome, Verdict]:
        try:
            return rt.write(lambda tx: finish(tx, verdict), patience_s=patience_s), verdict
        except (calls.CallEnded, DatabaseUnavailable):
            raise
        except AbhiError as error:  # the ledger refuses such a charge: the operator is asked
            log.error("the charge of %s was refused by the ledger: %s", call_text(call.open.call_id), error.message)
        unknown = Verdict("unknown", units=verdict.units, reason="charge_refused")
        return rt.write(lambda tx: finish(tx, unknown), patience_s=patience_s), unknown

    try:
        outcome, verdict = end(SETTLE_PATIENCE_S)
    except calls.CallEnded as error:
        charged, balance, why = rt.reader.read(lambda tx: calls.ended_as(tx, call.open.call_id))
        outcome = Outcome(charged, balance)
        log.error("%s was ended by somebody else before its answer was settled", call_text(call.open.call_id))
        if why in calls.SWEPT and verdict.end != "released":  # an answer that left now would be free
            rt.working_on.discard(call.open.call_id)
            raise ChargeNotRecorded(
                "fal answered, and this process had been cut off from the books for so long that it was taken for "
                "dead and the call's credit given back: nothing was charged, so the answer is withheld"
            ) from error
    except DatabaseUnavailable as error:
        rt.metrics.parked.inc()
        rt.settle_later(end, call.open.call_id)
        log.error("the charge of %s could not be written yet: %s", call_text(call.open.call_id), error.message)
        raise ChargeNotRecorded(
            "fal answered, and the charge could not be written down, so the answer is withheld. "
            "It is settled as soon as the database takes writes again"
        ) from error
    except BaseException:  # a bug: whatever the row says, the sweep may end it in time
        rt.working_on.discard(call.open.call_id)
        raise
    rt.working_on.discard(call.open.call_id)
    call.times.settled = monotonic()
    count(rt, call.open, verdict, outcome)
    telemetry.ended(
        rt, call.open.model, call.mode, call.times, verdict.end, outcome.charge_micros,
        status=http_status, reason=verdict.reason,
    )  # fmt: skip
    return outcome


def count(rt: Runtime, call: calls.OpenCall, verdict: Verdict, outcome: Outcome) -> None:
    """An ended hold, in the metrics; and in the log where it was too small."""
    rt.metrics.ended[verdict.end].inc()
    rt.metrics.count_end(call.model, verdict.end)
    rt.metrics.credits.inc(outcome.charge_micros)
    if verdict.end == "settled":
        rt.all_clear("fal_account", "fal")
        _watch_price(rt, call.model, verdict)
    if outcome.charge_micros > call.held_micros:
        rt.metrics.over_hold.inc()
        log.warning("%s (%s) cost more than its hold", call_text(call.call_id), call.model)


def _watch_price(rt: Runtime, model: str, verdict: Verdict) -> None:
    """Tell the operator when a model begins to cost more at fal than it brings in."""
    cost_nanos = verdict.fal_cost_nano_usd or 0
    if cost_nanos > verdict.charge_micros * NANOS_PER_MICRO:
        rt.alert(
            "below_cost",
            model,
            f"a call on {model} cost {nanos_usd_text(cost_nanos)} USD at fal and brought in "
            f"{usd_text(verdict.charge_micros)} USD",
        )
    elif cost_nanos:  # a call that cost nothing says nothing of the price
        rt.all_clear("below_cost", model)


def fal_refused(rt: Runtime, http_status: int) -> None:
    """fal does not take the operator's credential or account: the operator hears of it once, until it does again."""
    log.error("fal refused the operator's credential or account with status %d", http_status)
    rt.alert("fal_account", "fal", f"fal refused the operator's credential or account with status {http_status}")


def whole_answer(
    rt: Runtime,
    model: str,
    status: int,
    headers: wire.Headers,
    whole: bytes,
    outcome: Outcome,
    *,
    is_json: bool,
    of_fal: int,
) -> Reply:
    """A small answer with its charge. Errors that are no JSON, and what shows the credential, get our words instead."""
    member = wire.billing_member(model, outcome.charge_micros, outcome.balance_micros)
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


def refusal(rt: Runtime, error: AbhiError, dialect: wire.Dialect) -> Reply:
    shown = wire.error_for(dialect, error)
    rt.metrics.refused.labels(shown.type).inc()
    body = wire.error_body(shown)
    headers = json_headers(body)
    if shown.retry_after_s is not None:
        headers.append(("Retry-After", str(shown.retry_after_s)))
    if isinstance(shown, MethodNotAllowed):
        headers.append(("Allow", shown.allowed))
    return Reply(shown.status, headers, body)


def internal_error() -> Reply:
    """The answer to a call that met a bug of ours."""
    body = wire.error_body(AbhiError("something went wrong here: tell the operator of this service"))
    return Reply(500, json_headers(body), body)


def json_headers(body: bytes) -> wire.Headers:
    return [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]


def with_headers(reply: Reply, headers: wire.Headers) -> Reply:
    reply.headers.extend(headers)
    return reply
