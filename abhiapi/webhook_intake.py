"""Webhooks on their way in: a customer's wish with a submit, and fal's delivery when the job has ended.

    wished: take it out of the query -> check the URL -> our own URL in its place
    receive: token -> signature -> whose job -> settle -> store the payload

fal is given a URL of ours that only we can have made (a token over the call's id), because its keys sign for all of
fal's customers: a delivery that is validly signed for somebody else's job does not know that URL. What a job costs is
never read from a delivery, but from fal's result, like at any other end.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping

from gevent.lock import BoundedSemaphore

from abhiapi import calls, jobs, jsonbytes, settlement, webhooks, webhookwire, wire
from abhiapi.db import Tx
from abhiapi.errors import (
    AbhiError,
    BodyTooLarge,
    NotFound,
    UpstreamError,
    WebhookNotTaken,
    WebhookSignatureInvalid,
    WebhookUrlRefused,
)
from abhiapi.ids import call_text, parse_call
from abhiapi.jobs import Job
from abhiapi.outbound import NotDelivered
from abhiapi.runtime import Runtime
from abhiapi.webhooks import want

__all__ = ["receive", "want", "wished"]

log = logging.getLogger("abhiapi")

ROUTE = "/v1/webhooks/fal"
BODY_BYTES_MAX = 256 * 1024 * 1024  # is read and hashed; beyond `webhookwire.PAYLOAD_BYTES_MAX` it is not kept
READ_BYTES = 64 * 1024
SETTLING_AT_ONCE = 50
WAIT_S = 10  # fal's first try takes 15 s at most

_settling = BoundedSemaphore(SETTLING_AT_ONCE)


def wished(rt: Runtime, call_id: int, query: str, account: str = "") -> tuple[str, str | None]:
    """The query for fal and the customer's URL, if one was given. Raises `WebhookUrlRefused`."""
    rest, url = webhookwire.take_wish(query)
    if url is None:
        return query, None
    try:
        rt.outbound.resolve(webhookwire.target_of(url), account)
    except NotDelivered as error:
        raise WebhookUrlRefused(f"the webhook cannot be delivered: {error}") from error
    base_url = rt.settings.public_url
    if base_url is None:  # fal could not reach us: the reconciler sees the job's end
        return rest, url
    text = call_text(call_id)
    return webhookwire.with_webhook(rest, f"{base_url}{ROUTE}/{text}/{rt.webhook_key.token(text)}"), url


def receive(rt: Runtime, call: str, token: str, headers: Mapping[str, str], read: Callable[[int], bytes]) -> None:
    """Take one delivery of fal's; when this returns, nothing of it can be lost any more.

    ``headers`` have names in lower case, ``read`` gives the next bytes of the body. Raises `NotFound`,
    `WebhookSignatureInvalid`, `WebhookNotTaken` and `DatabaseUnavailable` (fal repeats those two).
    """
    call_id = parse_call(call)
    if call_id is None or not rt.webhook_key.is_token(call, token):
        raise NotFound("no such webhook")
    body, digest = _read(read)
    signed = _checked(rt, headers, digest)
    job, state = rt.reader.read(lambda tx: (jobs.by_call(tx, call_id), webhooks.state_of(tx, call_id)))
    if job is None or state is None:
        raise _without_job(rt, call_id, signed.request_id)
    if signed.request_id != job.request_id:
        raise NotFound("no such webhook")
    if state != "waiting":
        return  # a replay, or the reconciler was faster
    document = None if body is None else jsonbytes.parse_object(body)
    if document is not None and document.get("request_id") != job.request_id:
        raise NotFound("no such webhook")
    payload = body if document is not None and not shows_secret(rt, body) else None
    _store(rt, job, payload)
    rt.webhooks_due.set()


def _without_job(rt: Runtime, call_id: int, request_id: str) -> AbhiError:
    """fal may be faster than the row of a job that it has just accepted; or the submit's answer was lost."""
    try:
        rt.reader.read(lambda tx: calls.open_call(tx, call_id))
    except (NotFound, calls.CallEnded):
        return NotFound("no such webhook")
    log.warning("fal delivered %s for %s, which has no such job (yet)", request_id, call_text(call_id))
    return WebhookNotTaken("no such job yet: deliver it again", retry_after_s=10)


def shows_secret(rt: Runtime, document: bytes | None) -> bool:
    secret = wire.worth_hiding(rt.settings.fal_key)
    return bool(secret and document and secret.encode() in document)


def _checked(rt: Runtime, headers: Mapping[str, str], digest: str) -> webhookwire.Signed:
    """The signed headers, if fal has signed this very body just now."""
    signed = webhookwire.signed_of(headers)
    if signed is None:
        raise WebhookSignatureInvalid("the delivery is not signed")
    if abs(rt.now_ms() // 1000 - signed.timestamp) > webhookwire.FRESH_S:
        raise WebhookSignatureInvalid("the delivery was signed too long ago, or the clocks differ")
    message = webhookwire.message(signed.request_id, signed.user_id, signed.timestamp, digest)
    try:
        is_fals = rt.fal_keys.have_signed(signed.signature, message)
    except UpstreamError as error:
        raise WebhookNotTaken("the signature cannot be checked just now", retry_after_s=30) from error
    if not is_fals:
        raise WebhookSignatureInvalid("the signature is none of fal's")
    if rt.settings.fal_user_id not in (None, signed.user_id):
        raise WebhookSignatureInvalid("the delivery was signed for another user of fal")
    return signed


def _read(read: Callable[[int], bytes]) -> tuple[bytes | None, str]:
    """The body, or None where it is too large to be kept, and its SHA-256."""
    pieces, size, digest = [], 0, hashlib.sha256()
    while piece := read(READ_BYTES):
        size += len(piece)
        if size > BODY_BYTES_MAX:
            raise BodyTooLarge(f"a delivery has at most {BODY_BYTES_MAX} bytes")
        digest.update(piece)
        if size <= webhookwire.PAYLOAD_BYTES_MAX:
            pieces.append(piece)
        else:
            pieces.clear()
    return (b"".join(pieces) if size <= webhookwire.PAYLOAD_BYTES_MAX else None), digest.hexdigest()


def _store(rt: Runtime, job: Job, payload: bytes | None) -> None:
    """Settle the job, then keep the payload with its charge; without one, have it made from fal's result."""
    if not _settling.acquire(timeout=WAIT_S):
        raise WebhookNotTaken("too many deliveries at once", retry_after_s=10)
    try:
        outcome = settlement.settle(rt, job)
    except UpstreamError as error:
        raise WebhookNotTaken("fal's result cannot be had just now", retry_after_s=10) from error
    finally:
        _settling.release()
    call_id, now = job.call.call_id, rt.now_ms()
    if payload is None or not rt.may_keep(job.call.account_id, len(payload)):
        rt.write(lambda tx: webhooks.hurry(tx, call_id))
        return
    whole = jsonbytes.spliced(payload, billing(job, outcome.charge_micros, outcome.balance_micros))

    def store(tx: Tx) -> bool:
        return webhooks.store(tx, call_id, whole, now_ms=now)

    rt.write(store)


def billing(job: Job, charge_micros: int, balance_micros: int) -> bytes:
    return wire.billing_member(job.call.model, charge_micros, balance_micros)
