"""What happens when a customer uses fal's queue: a job from its submit to its result, top to bottom.

    submit: authenticate -> limits -> (once per Idempotency-Key) -> price -> hold -> forward -> remember -> rewrite
        -> splice
    status, status/stream, result, cancel: authenticate -> whose job -> fal -> settle if complete -> rewrite -> splice

A submit's hold stands until the job ends; `settlement` ends it, once, whoever sees the job complete first. Whose job a
request id is, is decided from our own rows before fal is asked, since fal would show every job of the operator's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from abhiapi import admission, calls, jobs, keys, metering, pricing, queuewire, settlement, telemetry, wire
from abhiapi.admission import WHOLE_BYTES_MAX, Call, Outcome, Reply, Request
from abhiapi.db import Tx
from abhiapi.errors import (
    AbhiError,
    ChargeNotRecorded,
    DatabaseUnavailable,
    MethodNotAllowed,
    NotFound,
    Refused,
    UpstreamBroken,
    UpstreamError,
    UpstreamRefused,
)
from abhiapi.ids import call_text
from abhiapi.jobs import Job
from abhiapi.metering import Verdict
from abhiapi.money import Micros
from abhiapi.queue_bodies import ResultBody, StatusEvents, rewritten
from abhiapi.replay import once
from abhiapi.runtime import Runtime
from abhiapi.settlement import Seen
from abhiapi.webhook_intake import want, wished

log = logging.getLogger("abhiapi")

SUBMIT_BYTES_MAX = 1024 * 1024  # of fal's answer to a submit
ASKED_BYTES_MAX = 4 * 1024  # a request up to this size is kept for an answer without units
STREAM_MAX_S = 86_400  # how long a status stream may be silent, all in all: a job may wait in fal's queue for hours

_SUBMITTING = frozenset(("POST", "GET", "PUT", "PATCH", "DELETE"))  # HEAD and OPTIONS would hold for nothing


def run(rt: Runtime, request: Request) -> Reply:
    """Answer one request to the queue. Never raises an `AbhiError`: it answers with it."""
    try:
        route = queuewire.parse(request.path)
    except AbhiError as error:
        return admission.refused(rt, request, error)
    if route.action == "submit":

        def submit(rt: Runtime, caller: keys.Caller, call_id: int, request: Request, dialect: wire.Dialect) -> Reply:
            return _submit(rt, caller, call_id, request, dialect, route.target)

        return admission.within_limits(rt, request, once(submit))
    return _about_job(rt, request, route)


def _about_job(rt: Runtime, request: Request, route: queuewire.Route) -> Reply:
    """An answer about a job; each names the job and its call once it is known whose it is."""
    key, dialect = wire.caller_key(request.headers)
    job: Job | None = None
    try:
        caller = rt.authenticate(key, may_be_suspended=True)  # who has paid may have what was paid for
        rt.polls.allow(caller.key_id)
        if request.method != queuewire.METHODS[route.action]:
            allowed = queuewire.METHODS[route.action]
            raise MethodNotAllowed(f"a job's {route.action} takes {allowed}", allowed=allowed)
        job = rt.reader.read(lambda tx: jobs.find(tx, caller.account_id, route.request_id))
        if job is None:
            return _not_found(rt)
        rt.polls.check_open(caller.account_id)
        reply = _ANSWERS[route.action](rt, job, request, dialect)
        if not isinstance(reply.body, bytes):
            reply.body.when_closed = rt.polls.opened(caller.account_id)
    except AbhiError as error:
        # Whatever the dialect: asking about a job costs nothing, so a client that repeats a 502 or 504 does well.
        reply = admission.refusal(rt, error, "table")
    if job is not None:
        reply.headers.append(("x-abhiapi-call-id", call_text(job.call.call_id)))
        if all(name.lower() != "x-fal-request-id" for name, _ in reply.headers):  # clients look for it: 10.2, no. 9
            reply.headers.append(("x-fal-request-id", job.request_id))
    return reply


# --- submit -----------------------------------------------------------------------------------------------------


def _submit(
    rt: Runtime, caller: keys.Caller, call_id: int, request: Request, dialect: wire.Dialect, path: str
) -> Reply:
    """A job, once its caller is known and within limits. Raises what is answered in its place."""
    if request.method not in _SUBMITTING:
        raise MethodNotAllowed("a job is submitted with POST", allowed="POST")
    model, _ = wire.endpoint_of(path)
    price = rt.catalogue(caller.price_version).price_of(model)
    query, webhook_url = wished(rt, call_id, wire.forwarded_query(request.query), caller.account)
    headers = wire.request_headers(request.headers.items())
    body, times = request.read()
    ceiling = pricing.ceiling(price, body.call_input)
    open_call = calls.OpenCall(call_id, caller.account_id, caller.key_id, model, ceiling.amount_micros)
    admission.hold(rt, caller, open_call, price, "queue", request.claim, basis=ceiling.basis)
    asked = body.content if isinstance(body.content, bytes) and len(body.content) <= ASKED_BYTES_MAX else None
    call = Call(open_call, price, body.call_input, dialect, "queue", times, webhook_url=webhook_url, asked=asked)
    try:
        reply = rt.fal_queue.send(request.method, path + ("?" + query if query else ""), headers, body.content)
        seen = settlement.read_whole(reply, SUBMIT_BYTES_MAX)
        return _submitted(rt, call, seen, request.base_url)
    except UpstreamError as error:
        # Where fal may have taken the job, its hold stands: nobody knows the id by which it could be settled.
        if not call.is_ending:
            is_open = error.may_have_cost
            admission.settle(rt, call, metering.SUBMIT_UNKNOWN if is_open else metering.released(error.type))
        raise
    except BaseException:
        if not call.is_ending:
            admission.settle(rt, call, metering.SUBMIT_UNKNOWN)
        raise


def _submitted(rt: Runtime, call: Call, seen: Seen, base_url: str) -> Reply:
    """fal's answer to a submit: a job from now on, or a refusal that gives the hold back."""
    model = call.open.model
    if seen.status in metering.OPERATOR_STATUSES:
        admission.settle(rt, call, metering.released("fal_refused_operator"), http_status=seen.status)
        admission.fal_refused(rt, seen.status)
        refused = UpstreamRefused("fal does not accept jobs from this service: nothing was charged")
        return admission.refusal(rt, refused, call.dialect)
    body, outcome = seen.body, Outcome(Micros(0), Micros(0))
    if 200 <= seen.status < 300:
        request_id = queuewire.request_id_of(body)
        if request_id is None:
            raise UpstreamBroken("fal's answer to the submit names no job")
        balance = _remember(rt, call, request_id, seen.status)
        outcome = Outcome(Micros(0), balance)
        body = rewritten(rt, body, base_url, model, request_id)
    else:
        verdict = metering.verdict(call.price, seen.status, _values(seen, metering.UNITS_HEADER), call.call_input, None)
        outcome = admission.settle(rt, call, verdict, http_status=seen.status)
    return _whole(rt, model, seen.status, seen.headers, body, outcome, call.dialect)


def _remember(rt: Runtime, call: Call, request_id: str, http_status: int) -> Micros:
    """Write down that fal accepted the job; the balance. Raises `ChargeNotRecorded` where that is not possible."""
    call.is_ending, now = True, rt.now_ms()
    call.times.answered = monotonic()

    def remember(tx: Tx) -> Micros:
        jobs.remember(tx, call.open, request_id, http_status=http_status)
        if call.asked is not None:
            jobs.keep_input(tx, call.open.call_id, call.asked)
        if call.webhook_url is not None:
            want(tx, call.open, call.webhook_url, now_ms=now)
        return Micros(jobs.outcome(tx, call.open.call_id)[1])

    try:
        balance = rt.write(remember, patience_s=settlement.SETTLE_PATIENCE_S)
    except DatabaseUnavailable as error:
        rt.settle_later(lambda patience_s: rt.write(remember, patience_s=patience_s), call.open.call_id)
        # Should this process die before the database takes it, the operator finds the job by this line alone.
        log.error("%s is fal's job %s, which could not be written yet", call_text(call.open.call_id), request_id)
        raise ChargeNotRecorded(
            "fal accepted the job, and that could not be written down yet. It is settled by itself later"
        ) from error
    except calls.CallEnded:
        rt.working_on.discard(call.open.call_id)
        log.error("%s is fal's job %s, and others had given it up meanwhile", call_text(call.open.call_id), request_id)
        raise  # the operator was faster with a word on the hold, or a sweep that took this process for dead
    except Refused as error:
        log.error("%s: %s", call_text(call.open.call_id), error.message)
        admission.settle(rt, call, Verdict("unknown", reason="job_id_taken"))
        raise UpstreamBroken("fal's answer to the submit names another job") from error
    except BaseException:  # a bug: whatever the row says, the sweep may end it in time
        rt.working_on.discard(call.open.call_id)
        raise
    rt.working_on.discard(call.open.call_id)  # from now on the reconciler of any process ends it
    call.times.settled = monotonic()
    telemetry.ended(rt, call.open.model, "queue", call.times, "sent", Micros(0), status=http_status, reason=None)
    return balance


# --- everything about a job -------------------------------------------------------------------------------------


def _status(rt: Runtime, job: Job, request: Request, dialect: wire.Dialect) -> Reply:
    """A job's status as fal tells it, with the charge from the moment on that it shows COMPLETED."""
    seen = settlement.status(rt, job, with_logs=queuewire.wants_logs(request.query))
    shown = queuewire.status_of(seen.body)
    outcome = settlement.settle(rt, job) if shown == "COMPLETED" else settlement.known(rt, job)
    if shown in queuewire.PENDING:  # whatever has become of it since fal said so
        outcome = Outcome(Micros(0), outcome.balance_micros)
    body = rewritten(rt, seen.body, request.base_url, job.call.model, job.request_id)
    return _whole(rt, job.call.model, seen.status, seen.headers, body, outcome, dialect)


def _status_stream(rt: Runtime, job: Job, request: Request, dialect: wire.Dialect) -> Reply:
    """fal's events as they come, with our URLs; the job is settled before the event that shows it complete leaves."""
    path = queuewire.job_path(job.call.model, job.request_id, "stream")
    headers = [("accept", "text/event-stream"), ("accept-encoding", "identity")]
    target = f"{path}?logs={int(queuewire.wants_logs(request.query))}"
    reply = rt.fal_queue.send("GET", target, headers, None, timeout_s=STREAM_MAX_S)
    if reply.status != 200 or not wire.is_event_stream(reply.value("content-type")):
        return _passed(rt, job, settlement.read_whole(reply), dialect)
    shown = wire.response_headers(reply.headers, secret=wire.worth_hiding(rt.settings.fal_key), without=wire.DIGESTS)
    return Reply(200, [*shown, ("X-Accel-Buffering", "no")], StatusEvents(rt, job, reply, request.base_url))


def _result(rt: Runtime, job: Job, request: Request, dialect: wire.Dialect) -> Reply:
    """A job's answer, and its charge, settled before the first byte of it leaves."""
    outcome = settlement.look(rt, job)
    query = wire.forwarded_query(request.query)
    target = queuewire.job_path(job.call.model, job.request_id, "result") + ("?" + query if query else "")
    reply = settlement.fetch(rt, target, wire.request_headers(request.headers.items()))
    try:
        settlement.refuse_operators_trouble(rt, reply.status)
        if outcome is None:  # it ran a moment ago; an answer says that it has completed since
            outcome = settlement.settle(rt, job) if 200 <= reply.status < 300 else settlement.known(rt, job)
        body = ResultBody(reply, wire.billing_member(job.call.model, outcome.charge_micros, outcome.balance_micros))
        whole = body.read_whole(WHOLE_BYTES_MAX)
    except BaseException:
        reply.close()
        raise
    if whole is not None:
        return _whole(rt, job.call.model, reply.status, body.headers, whole, outcome, dialect)
    headers = _shown_headers(rt, body.headers, is_changed=body.is_json)
    length = reply.value("content-length")
    if length is not None and not body.is_json:
        headers.append(("Content-Length", length))
    return Reply(wire.status_for(dialect, reply.status), headers + outcome.headers(), body)


def _cancel(rt: Runtime, job: Job, request: Request, dialect: wire.Dialect) -> Reply:
    """A wish to cancel. It costs nothing and gives nothing back: the job's end does (contract 3.5)."""
    path = queuewire.job_path(job.call.model, job.request_id, "cancel")
    seen = settlement.read_whole(rt.fal_queue.send("PUT", path, wire.request_headers(request.headers.items()), None))
    settlement.forget_status(rt, job)
    if 200 <= seen.status < 300 and not job.is_over:
        try:
            rt.write(lambda tx: jobs.note_cancel(tx, job))
        except DatabaseUnavailable as error:  # only a word for the operator is lost: fal has taken the wish
            log.warning("a wish to cancel was not noted: %s", error.message)
    return _passed(rt, job, seen, dialect)


_ANSWERS: dict[queuewire.Action, Callable[[Runtime, Job, Request, wire.Dialect], Reply]] = {
    "status": _status,
    "stream": _status_stream,
    "result": _result,
    "cancel": _cancel,
}


# --- answers ----------------------------------------------------------------------------------------------------


def _not_found(rt: Runtime) -> Reply:
    """The one answer for an id that nobody has and for one that somebody else has (fal-protocol 10.4, no. 19)."""
    error = NotFound("no such job of this account")
    rt.metrics.refused.labels(error.type).inc()
    body = wire.error_body(error, billing=b'"status": "NOT_FOUND"')
    return Reply(error.status, admission.json_headers(body), body)


def _passed(rt: Runtime, job: Job, seen: Seen, dialect: wire.Dialect) -> Reply:
    """An answer that costs nothing, whatever the job will."""
    settlement.refuse_operators_trouble(rt, seen.status)
    balance = rt.reader.read(lambda tx: jobs.balance(tx, job))
    return _whole(rt, job.call.model, seen.status, seen.headers, seen.body, Outcome(Micros(0), balance), dialect)


def _whole(
    rt: Runtime,
    model: str,
    status: int,
    headers: wire.Headers,
    body: bytes,
    outcome: Outcome,
    dialect: wire.Dialect,
) -> Reply:
    is_json = any(name.lower() == "content-type" and wire.is_json_type(value) for name, value in headers)
    shown = _shown_headers(rt, headers, is_changed=is_json)
    shown_status = wire.status_for(dialect, status)
    return admission.whole_answer(rt, model, shown_status, shown, body, outcome, is_json=is_json, of_fal=status)


def _shown_headers(rt: Runtime, headers: wire.Headers, *, is_changed: bool) -> wire.Headers:
    without = wire.DIGESTS if is_changed else frozenset[str]()
    return wire.response_headers(headers, secret=wire.worth_hiding(rt.settings.fal_key), without=without)


def _values(seen: Seen, name: str) -> list[str]:
    return [value for header, value in seen.headers if header.lower() == name]
