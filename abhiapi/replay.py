"""The Idempotency-Key of a call: the same request again gets the first answer again, and fal hears of it once.

    the key and what is asked for -> the first call under that key, waited for while it runs -> its answer, or the call

`once` wraps the step that serves a call. A request without the header passes through it untouched. Which key stands
for which call is on disk (`idempotency`), in the transaction that holds the call's credit; what is in memory only
spares those who wait in the same process from looking again and again.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import monotonic

import gevent
from gevent.event import Event

from abhiapi import admission, idempotency, keys, queuewire, wire
from abhiapi.admission import WHOLE_BYTES_MAX, Reply, Request, RequestBody, Serve
from abhiapi.errors import (
    AbhiError,
    DatabaseUnavailable,
    IdempotencyAnswerGone,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    IdempotencyOutcomeUnknown,
    InvalidIdempotencyKey,
)
from abhiapi.ids import call_text
from abhiapi.money import credits_text
from abhiapi.polls import LOOK_AGAIN_S
from abhiapi.runtime import SETTLE_PATIENCE_S, Runtime

log = logging.getLogger("abhiapi")

HEADER = "idempotency-key"
REPLAYED = ("idempotency-replayed", "true")
KEPT_BYTES_MAX = WHOLE_BYTES_MAX + 4096  # what is read whole, and what we add to it
HANG_UP_S = 1  # how soon a waiter who has hung up is noticed
GRACE_S = 5  # another process that has ended a call is given this long to keep its answer
_KEY = re.compile(r"[\x20-\x7e]{1,255}")
# Refusals of fal's that say nothing about the request: asked again, it may be served.
_PASSING = frozenset((408, 409, 425, 429))


def once(serve: Serve) -> Serve:
    """``serve``, but no more than once for an account's Idempotency-Key."""

    def served(rt: Runtime, caller: keys.Caller, call_id: int, request: Request, dialect: wire.Dialect) -> Reply:
        key = request.headers.get(HEADER)
        if key is None:
            return serve(rt, caller, call_id, request, dialect)
        if not _KEY.fullmatch(key):
            raise InvalidIdempotencyKey("an Idempotency-Key is 1 to 255 printable ASCII characters: none was used")
        body = request.read_body()
        asked = _Asked(caller.account_id, hashlib.sha256(key.encode()).digest(), _digest(request, body))
        request = replace(request, read_body=lambda: body)
        return _served_once(rt, caller, call_id, request, dialect, serve, asked)

    return served


@dataclass(frozen=True, slots=True)
class _Asked:
    account_id: int
    key_digest: bytes
    request_digest: bytes


def _served_once(
    rt: Runtime,
    caller: keys.Caller,
    call_id: int,
    request: Request,
    dialect: wire.Dialect,
    serve: Serve,
    asked: _Asked,
) -> Reply:
    """The first answer under the key, or this one where there is none. Raises what is answered in its place."""
    patience = _Patience(rt, request)
    ended_id: int | None = None  # a call that was seen to have ended without an answer
    while True:
        found = rt.reader.read(lambda tx: idempotency.find(tx, asked.account_id, asked.key_digest))
        is_running = found is not None and patience.may_be_answered(found)
        if found is not None and found.answer is None and not is_running and found.call_id != ended_id:
            ended_id = found.call_id
            continue  # on PostgreSQL its answer may have been kept while the look was on its way
        if found is None or (not is_running and found.is_free(rt.now_ms())):
            claim = _claim(asked, found)
            try:
                return _first(rt, caller, call_id, replace(request, claim=claim), dialect, serve, claim)
            except idempotency.KeyTaken:
                continue
        if found.request_digest != asked.request_digest:
            raise IdempotencyKeyReused(
                "this Idempotency-Key stands for another request, with another path, query, body or content type: "
                "nothing was forwarded. Give each request a key of its own"
            )
        if is_running:
            patience.wait(found)
        elif found.answer is not None:
            rt.metrics.replayed.inc()
            answer = found.answer
            return Reply(answer.status, [*answer.headers, REPLAYED], answer.body, found.call_id)
        else:
            reply = admission.refusal(rt, _nothing_kept(found, request.base_url), dialect)
            reply.call_id = found.call_id
            return reply


def _claim(asked: _Asked, found: idempotency.Found | None) -> idempotency.Claim:
    """The key for this request's call, where nobody has it or ``found`` has freed it."""
    return idempotency.Claim(
        asked.account_id,
        asked.key_digest,
        asked.request_digest,
        replaces=None if found is None else found.call_id,
        was_answered=found is not None and found.answer is not None,
    )


def _first(
    rt: Runtime,
    caller: keys.Caller,
    call_id: int,
    request: Request,
    dialect: wire.Dialect,
    serve: Serve,
    claim: idempotency.Claim,
) -> Reply:
    """Serve the call, and keep its answer where that is small, before its first byte leaves."""
    answered = rt.answering[call_id] = Event()
    try:
        reply = serve(rt, caller, call_id, request, dialect)
        if isinstance(reply.body, bytes) and len(reply.body) <= KEPT_BYTES_MAX:
            _keep(rt, claim, call_id, idempotency.Answer(reply.status, list(reply.headers), reply.body))
        return reply
    finally:
        del rt.answering[call_id]
        answered.set()


def _keep(rt: Runtime, claim: idempotency.Claim, call_id: int, answer: idempotency.Answer) -> None:
    is_last_word = answer.status < 500 and answer.status not in _PASSING
    try:
        rt.write(lambda tx: idempotency.keep(tx, claim, call_id, answer, is_last_word=is_last_word))
    except DatabaseUnavailable as error:  # it is paid for, so it leaves all the same; a repeat will be refused
        log.warning("the answer of %s was not kept for a repeat: %s", call_text(call_id), error.message)


class _Patience:
    """How long a request waits for the first one under its key."""

    def __init__(self, rt: Runtime, request: Request) -> None:
        self._rt = rt
        self._has_hung_up = request.has_hung_up
        self._give_up = monotonic() + rt.settings.upstream_timeout_s + SETTLE_PATIENCE_S
        self._grace_until: dict[int, float] = {}

    def may_be_answered(self, found: idempotency.Found) -> bool:
        """Whether the first call still runs, or has ended and its answer may be about to be kept."""
        if found.answer is not None:
            return False
        if found.state == "held" or found.call_id in self._rt.answering:
            return True
        if found.process_id == self._rt.process_id or found.process_ended_at is not None:
            return False
        now = monotonic()
        return now < self._grace_until.setdefault(found.call_id, now + GRACE_S)

    def wait(self, found: idempotency.Found) -> None:
        """Wait for news of the first call, for a moment. Raises `IdempotencyInProgress` where it has taken too long."""
        if monotonic() > self._give_up or self._has_hung_up():
            raise IdempotencyInProgress(
                f"the first request under this Idempotency-Key, {call_text(found.call_id)}, is still running: "
                "nothing more was charged, ask again later",
                retry_after_s=10,
            )
        answered = self._rt.answering.get(found.call_id)
        if answered is None:
            gevent.sleep(LOOK_AGAIN_S)
        else:
            answered.wait(HANG_UP_S)


def _nothing_kept(found: idempotency.Found, base_url: str) -> AbhiError:
    """Why a key gives no answer although its call is over, or is a job."""
    name = call_text(found.call_id)
    if found.state == "unknown":
        return IdempotencyOutcomeUnknown(
            f"the call under this Idempotency-Key, {name}, went to fal, and what came of it is not known: its hold of "
            f"{credits_text(found.held_micros)} credits stands until the operator has looked. It was not sent again"
        )
    if found.mode == "queue" and found.fal_request_id is not None:
        result = base_url + queuewire.QUEUE + queuewire.job_path(found.model, found.fal_request_id, "result")
        return IdempotencyAnswerGone(
            f"the job under this Idempotency-Key, {name}, was accepted, and the answer to its submit is not kept: its "
            f"result is, or will be, at {result}. It cost {credits_text(found.charged_micros)} credits so far"
        )
    return IdempotencyAnswerGone(
        f"the call under this Idempotency-Key, {name}, has ended and cost {credits_text(found.charged_micros)} "
        "credits, and its answer is not kept: it was large, a stream, or lost in a crash. It was not sent again"
    )


def _digest(request: Request, body: RequestBody) -> bytes:
    """What is asked for: method, path, query, content type and body, byte for byte."""
    digest = hashlib.sha256()
    for text in (request.method, request.path, request.query, request.headers.get("content-type", "")):
        part = text.encode("utf-8", "surrogateescape")
        digest.update(len(part).to_bytes(8) + part)
    for block in _blocks(body):
        digest.update(block)
    return digest.digest()


def _blocks(body: RequestBody) -> Iterator[bytes]:
    if body.content is None or isinstance(body.content, bytes):
        yield body.content or b""
        return
    for block in body.content.slices():
        yield block
        gevent.sleep(0)  # a large body would otherwise keep everybody else waiting
