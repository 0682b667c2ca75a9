"""The simulator's webhooks: a signed POST when a job completes, as fal sends it (fal-protocol 3.8), to loopback only.

Owns a key of its own, made at each start; its public half is at ``/.well-known/jwks.json``, with and without ``/rest``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import gevent

from abhiapi import addresses, webhookwire
from abhiapi.errors import WebhookUrlRefused
from abhiapi.outbound import NotDelivered, Outbound
from abhiapi.signing import WebhookKey

if TYPE_CHECKING:
    from abhiapi.sandbox.queue import Job

PATHS = ("/.well-known/jwks.json", "/rest/.well-known/jwks.json")
USER_ID = "sandbox-user"
PAUSES_S = (0.2, 0.4, 0.8, 1.6)
PAYLOAD_BYTES_MAX = 32 * 1024 * 1024
STALE_S = 3600


class Webhooks:
    """Deliveries of one simulator."""

    def __init__(self) -> None:
        self._key = WebhookKey.new()
        self._outbound = Outbound(addresses.is_loopback)

    def jwks(self) -> dict[str, Any]:
        return self._key.jwks()

    def deliver(self, job: Job) -> None:
        """Tell of a completed job; repeated a few times until somebody takes it."""
        if not job.webhook or job.weather.webhook == "none":
            return
        reply = job.answer()
        is_small = reply.length is not None and reply.length <= PAYLOAD_BYTES_MAX
        body = b"".join(reply.body) if is_small else None
        payload = webhookwire.payload(job.request_id, job.request_id, reply.status, body)
        for _ in range(2 if job.weather.webhook == "twice" else 1):
            self._until_taken(job, payload)

    def _until_taken(self, job: Job, payload: bytes) -> None:
        for pause_s in (*PAUSES_S, 0):
            try:
                target = webhookwire.target_of(job.webhook or "")
                status = self._outbound.post(target, self._headers(job, payload), payload, timeout_s=15)
                if status < 400:
                    return
            except WebhookUrlRefused:
                return
            except NotDelivered:
                pass
            gevent.sleep(pause_s)

    def _headers(self, job: Job, payload: bytes) -> list[tuple[str, str]]:
        timestamp = int(time.time()) - (STALE_S if job.weather.webhook == "stale" else 0)
        digest = webhookwire.sha256_hex(payload)
        signature = self._key.sign(webhookwire.message(job.request_id, USER_ID, timestamp, digest))
        if job.weather.webhook == "bad_signature":
            signature = bytes(len(signature))
        signed = webhookwire.signed_headers(job.request_id, USER_ID, timestamp, signature)
        return [("Content-Type", "application/json"), *signed]
