"""A queued job's end: seen complete by whoever looks first, metered from fal's own result, settled once.

The poll, the result and the reconciler all come here. Within a process they share one look at fal; between processes
the conditional update in `calls.finish` lets one of them settle, and the others read what it cost.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gevent

from abhiapi import admission, calls, jobs, jsonbytes, metering, queuewire, telemetry, wire
from abhiapi.admission import Outcome
from abhiapi.db import Tx
from abhiapi.errors import (
    AbhiError,
    DatabaseUnavailable,
    UpstreamBroken,
    UpstreamError,
    UpstreamRefused,
    UpstreamUnreachable,
)
from abhiapi.estimates import Estimate
from abhiapi.fal import FalReply
from abhiapi.ids import call_text
from abhiapi.jobs import Job
from abhiapi.metering import Verdict
from abhiapi.polls import FETCH_AGAIN_S, RETRY_S
from abhiapi.pricing import Price
from abhiapi.runtime import Runtime

log = logging.getLogger("abhiapi")

SMALL_BYTES_MAX = 32 * 1024 * 1024  # a status with its logs, or a submit's answer: more is not read
SETTLE_PATIENCE_S = 10
NOT_FOUND_AFTER_MS = 60_000  # a job that fal does not know is given this long to appear
UNAVAILABLE_AFTER_MS = 86_400_000  # a result that cannot be had for this long is the operator's to look into
RETRIES = FETCHES = 4
_PLAIN: wire.Headers = [("accept", "application/json"), ("accept-encoding", "identity")]


@dataclass(frozen=True, slots=True)
class Seen:
    """A whole answer of fal."""

    status: int
    headers: wire.Headers
    body: bytes


def read_whole(reply: FalReply, most: int = SMALL_BYTES_MAX) -> Seen:
    """An answer with all of its body. Raises `UpstreamBroken` (too large, too), `UpstreamTimeout`."""
    return Seen(reply.status, reply.headers, reply.read_whole(most))


def fetch(rt: Runtime, target: str, headers: wire.Headers) -> FalReply:
    """fal's answer to a GET, asked for again where the way to the queue was in trouble (fal-protocol 1.4).

    fal's Python client gives a job up at the first 502 of ours, and looking costs nothing; so we are the patient ones.
    Raises `Upstream*`.
    """
    for attempt in range(FETCHES):
        try:
            reply = rt.fal_queue.send("GET", target, headers, None)
        except (UpstreamUnreachable, UpstreamBroken):
            if attempt == FETCHES - 1:
                raise
        else:
            is_ingress = reply.status in (502, 503, 504) and reply.value("x-fal-request-id") is None
            if not is_ingress or attempt == FETCHES - 1:
                return reply
            reply.close()
        gevent.sleep(FETCH_AGAIN_S * 2**attempt)
    raise AssertionError("unreachable")


def status(rt: Runtime, job: Job, *, with_logs: bool) -> Seen:
    """A job's status, at most a moment old, and never from before an end that our books know. Raises `Upstream*`."""

    def look() -> Seen:
        path = queuewire.job_path(job.call.model, job.request_id, "status")
        seen = read_whole(fetch(rt, f"{path}?logs={int(with_logs)}", _PLAIN))
        refuse_operators_trouble(rt, seen.status)
        return seen

    seen: Seen = rt.polls.statuses.get((job.call.call_id, with_logs), look)
    if job.is_over and queuewire.status_of(seen.body) in queuewire.PENDING:
        seen = rt.polls.statuses.get((job.call.call_id, with_logs, "over"), look)
    return seen


def forget_status(rt: Runtime, job: Job) -> None:
    for with_logs in (False, True):
        rt.polls.statuses.forget((job.call.call_id, with_logs))
        rt.polls.statuses.forget((job.call.call_id, with_logs, "over"))


def refuse_operators_trouble(rt: Runtime, http_status: int) -> None:
    """Raises `UpstreamRefused`: fal's words about the operator's account are not for customers."""
    if http_status in metering.OPERATOR_STATUSES:
        admission.fal_refused(rt, http_status)
        raise UpstreamRefused("fal does not answer this service just now: nothing was changed, try again later")


def look(rt: Runtime, job: Job) -> Outcome | None:
    """A job's outcome, settled now if it has completed; None while it runs. Raises `Upstream*` and 503."""
    if job.is_over:
        return known(rt, job)
    seen = status(rt, job, with_logs=False)
    if seen.status == 404 and queuewire.status_of(seen.body) == "NOT_FOUND":
        return _gone(rt, job)
    if queuewire.status_of(seen.body) != "COMPLETED":
        return None
    return settle(rt, job)


def known(rt: Runtime, job: Job) -> Outcome:
    """What our own books say of a job: its charge once it ended, nothing before."""
    return Outcome(*rt.reader.read(lambda tx: jobs.outcome(tx, job.call.call_id)))


def settle(rt: Runtime, job: Job) -> Outcome:
    """End the hold of a job that fal says is complete. Raises `UpstreamError` where its result cannot be had now."""
    if job.is_over:
        return known(rt, job)
    outcome: Outcome = rt.polls.settling.get(job.call.call_id, lambda: _settle(rt, job))
    return outcome


def _settle(rt: Runtime, job: Job) -> Outcome:
    """Look at the job's result and end its hold by it; where fal is in trouble, try a few times more."""
    for attempt in range(RETRIES):
        if attempt:
            gevent.sleep(RETRY_S * attempt)
        current = rt.reader.read(lambda tx: jobs.find(tx, job.call.account_id, job.request_id))
        if current is None or current.is_over:
            return known(rt, job)
        try:
            reply = rt.fal_queue.send("GET", queuewire.job_path(job.call.model, job.request_id, "result"), _PLAIN, None)
            meaning, verdict = _judged(rt, job, reply)
        except UpstreamError as error:
            log.info("the result of %s could not be looked at: %s", call_text(job.call.call_id), error.message)
            continue
        if verdict is None and reply.status >= 500 and _has_failed(rt, job):
            verdict = metering.released("fal_5xx")
        if verdict is not None:
            return _end(rt, job, verdict, http_status=reply.status)
        if meaning == "gone" and (outcome := _gone(rt, job)) is not None:
            return outcome
        refuse_operators_trouble(rt, reply.status)
    if rt.now_ms() - job.created_at > UNAVAILABLE_AFTER_MS:
        return _end(rt, job, Verdict("unknown", reason="result_not_available"), http_status=None)
    raise UpstreamError("fal cannot show the finished job's result just now: try again")


def _has_failed(rt: Runtime, job: Job) -> bool:
    """Whether fal's status says so, where the result's 5xx might be an ingress's that knows nothing of the job."""
    try:
        return queuewire.has_failed(status(rt, job, with_logs=False).body)
    except UpstreamError:
        return False


def _judged(rt: Runtime, job: Job, reply: FalReply) -> tuple[queuewire.Meaning, Verdict | None]:
    """What a result's answer means; with a verdict where it ends the hold."""
    try:
        unit_headers = reply.values(metering.UNITS_HEADER)
        if metering.needs_answer(reply.status, unit_headers):
            answer = _read_answer(reply)
            price, call_input = _asked(rt, job)
            return "final", metering.verdict(price, reply.status, unit_headers, call_input, answer)
        # A short body is read to its end, so that the connection can be used again; a long one is left alone.
        head = reply.read1() if reply.status >= 300 or _is_short(reply) else b""
        has_id = reply.value("x-fal-request-id") is not None
        meaning = queuewire.meaning(reply.status, unit_headers, has_id, head)
        if meaning != "final":
            return meaning, None
        price, call_input = _asked(rt, job)
        return "final", metering.verdict(price, reply.status, unit_headers, call_input, None)
    finally:
        reply.close()


def _is_short(reply: FalReply) -> bool:
    length = reply.value("content-length")
    return length is not None and length.isdigit() and int(length) <= admission.WHOLE_BYTES_MAX


def _read_answer(reply: FalReply) -> Mapping[str, Any] | None:
    """The answer without its long texts; None for what is no JSON object."""
    shrinker = jsonbytes.Shrinker()
    try:
        while piece := reply.read1():
            shrinker.feed(piece)
        return jsonbytes.parse_object(shrinker.end())
    except ValueError:
        return None


def _asked(rt: Runtime, job: Job) -> tuple[Price, Mapping[str, Any]]:
    """The price at submission, and what was asked for. Where the latter was too long to be kept, an answer without
    units may not be computable: then it becomes the operator's, or fal's bill tells."""
    recorded = rt.reader.read(lambda tx: jobs.recorded_price(tx, job.price_id))
    document = rt.reader.read(lambda tx: jobs.input_of(tx, job.call.call_id))
    call_input = {} if document is None else jsonbytes.parse_object(document) or {}
    price = Price(
        model=job.call.model,
        unit=recorded.unit,
        unit_price_usd=recorded.unit_price_usd,
        fal_unit_price_usd=recorded.fal_unit_price_usd,
        margin=None,
        hold_micros=None,
        source=recorded.source,
        updated_at="",
        estimate=Estimate("none") if document is None else _formula(rt, job, recorded.unit),
    )
    return price, call_input


def _formula(rt: Runtime, job: Job, unit: str) -> Estimate:
    """How the units of this model are computed; none where its price has another unit by now."""
    catalogue = rt.catalogue()
    price = catalogue.price_of(job.call.model) if job.call.model in catalogue else None
    return price.estimate if price is not None and price.unit == unit else Estimate("none")


def _gone(rt: Runtime, job: Job) -> Outcome | None:
    """fal does not know the job (any more). One that was cancelled has ended so; an old one is the operator's."""
    if job.reason == jobs.CANCEL_REQUESTED:
        return _end(rt, job, metering.released("client_cancelled"), http_status=404)
    if rt.now_ms() - job.created_at > NOT_FOUND_AFTER_MS:
        return _end(rt, job, Verdict("unknown", reason="not_found_at_fal"), http_status=404)
    return None


def _end(rt: Runtime, job: Job, verdict: Verdict, *, http_status: int | None) -> Outcome:
    """End the hold, unless somebody was faster; what the job cost either way. Raises `DatabaseUnavailable`."""
    now = rt.now_ms()

    def finish(tx: Tx, by: Verdict = verdict) -> tuple[bool, Outcome]:
        try:
            calls.finish(tx, job.call, by, now_ms=now, http_status=http_status)
        except calls.CallEnded:
            return False, Outcome(*jobs.outcome(tx, job.call.call_id))
        return True, Outcome(*jobs.outcome(tx, job.call.call_id))

    try:
        was_first, outcome = rt.write(finish, patience_s=SETTLE_PATIENCE_S)
    except DatabaseUnavailable:
        raise
    except AbhiError as error:  # the ledger refuses such a charge: the operator is asked
        log.error("the charge of %s was refused by the ledger: %s", call_text(job.call.call_id), error.message)
        verdict = Verdict("unknown", units=verdict.units, reason="charge_refused")
        was_first, outcome = rt.write(lambda tx: finish(tx, verdict), patience_s=SETTLE_PATIENCE_S)
    if was_first:
        rt.webhooks_due.set()
        admission.count(rt, job.call, verdict, outcome)
        telemetry.job_ended(rt, job.call, verdict.end, outcome.charge_micros, age_ms=now - job.created_at,
                            reason=verdict.reason)  # fmt: skip
        if verdict.end == "unknown":
            log.error("%s (%s): %s", call_text(job.call.call_id), job.call.model, verdict.reason)
    return outcome
