"""Webhooks on their way out: payloads made where fal delivered none, and every payload brought to its customer.

Nothing is remembered here that is not in the rows: a killed process is resumed by the next one's first round. One
customer's slow or dead host keeps nobody else waiting: each account has few places, retries fewer still, and first
attempts always have some left.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable

import gevent
from gevent.pool import Pool

from abhiapi import (
    encodings,
    jobs,
    jsonbytes,
    metering,
    queuewire,
    settlement,
    webhook_intake,
    webhooks,
    webhookwire,
    wire,
)
from abhiapi.db import Tx
from abhiapi.errors import AbhiError, DatabaseUnavailable, UpstreamError, WebhookUrlRefused
from abhiapi.fal import FalReply
from abhiapi.ids import call_text
from abhiapi.jobs import Job
from abhiapi.outbound import RESOLVE_S, NotDelivered
from abhiapi.runtime import Runtime
from abhiapi.webhooks import Parcel, Ready

log = logging.getLogger("abhiapi")

LOOK_S = 2  # how often the rows are looked at although nobody in this process said that one is due
GATHER_MS = 50  # those that become due together are started together
GRACE_MS = 10_000  # how long fal's own delivery is waited for, where fal knows our address
MAKING_AT_ONCE = 16
DELIVERING_AT_ONCE, RETRYING_AT_ONCE = 256, 128
PER_ACCOUNT, RETRYING_PER_ACCOUNT = 16, 4
BYTES_AT_ONCE = 128 * 1024 * 1024
LEASE_SPARE_S = 5
# A payload that takes longer to be made may be made twice, which harms nobody: the first one counts. What a killed
# process was at is made by the next one after this.
MAKING_LEASE_MS = 30_000
DROP_EVERY_MS, DROP_BATCH = 3_600_000, 200
_PLAIN: wire.Headers = [("accept", "application/json"), ("accept-encoding", "identity")]


class Deliveries:
    """The deliverer of one serving process."""

    def __init__(self, rt: Runtime, chance: Callable[[int], int] = random.randrange) -> None:
        self._rt = rt
        self._chance = chance
        self._making, self._delivering = Pool(MAKING_AT_ONCE), Pool(DELIVERING_AT_ONCE)
        self._busy: set[int] = set()
        self._of_account: Counter[int] = Counter()
        self._retries_of_account: Counter[int] = Counter()
        self._retries = self._bytes = 0
        self._dropped_at = 0
        # Where fal has no address of ours, nothing is to be waited for.
        self._grace_ms = GRACE_MS if rt.settings.public_url else 0

    def run_for_ever(self) -> None:
        while True:
            self._rt.webhooks_due.wait(LOOK_S)
            self._rt.webhooks_due.clear()
            try:
                self.start_round()
                self._drop_old()
            except AbhiError as error:  # the database's trouble: the next round tries again
                log.warning("webhooks will be looked at again: %s", error.message)
            except Exception:  # without this line no webhook would ever be delivered again
                log.exception("the round over the webhooks failed and will be tried again")
            gevent.sleep(GATHER_MS / 1000)

    def run_until_idle(self) -> None:
        """Do all that can be done now, and return when it has ended."""
        while self.start_round():
            self._making.join()
            self._delivering.join()

    def start_round(self) -> int:
        """Begin what is due and finds a place; how many that is."""
        rt, now = self._rt, self._rt.now_ms()
        room = self._making.free_count()
        started = 0
        if room:
            most = room + len(self._making)
            for ready in rt.reader.read(lambda tx: webhooks.ended(tx, before=now - self._grace_ms, most=most)):
                if started < room and ready.call_id not in self._busy:
                    self._busy.add(ready.call_id)
                    self._making.spawn(self._guarded, self._make, ready, lambda: None)
                    started += 1
        accounts = rt.reader.read(lambda tx: webhooks.accounts(tx, now_ms=now))
        first = self._chance(len(accounts)) if accounts else 0  # where places are short, everybody is first at times
        for account in accounts[first:] + accounts[:first]:
            if self._delivering.free_count() < 1:
                break  # whoever gives a place back starts the next round
            if self._of_account[account] < PER_ACCOUNT:
                started += self._start_account(account, now)
        return started

    def _start_account(self, account: int, now: int) -> int:
        started, most = 0, 2 * PER_ACCOUNT  # some of them may be ours already
        for ready in self._rt.reader.read(lambda tx: webhooks.due(tx, account, now_ms=now, most=most)):
            if ready.call_id not in self._busy and self._has_place(account, ready):
                self._begin(account, ready)
                started += 1
        return started

    def _has_place(self, account: int, ready: Ready) -> bool:
        if self._of_account[account] >= PER_ACCOUNT or self._delivering.free_count() < 1:
            return False
        if self._bytes and self._bytes + ready.size_bytes > BYTES_AT_ONCE:
            return False
        is_retry = ready.attempts > 0
        return not is_retry or (
            self._retries < RETRYING_AT_ONCE and self._retries_of_account[account] < RETRYING_PER_ACCOUNT
        )

    def _begin(self, account: int, ready: Ready) -> None:
        retries = int(ready.attempts > 0)

        def count(sign: int) -> None:
            self._of_account[account] += sign
            self._retries_of_account[account] += sign * retries
            self._retries += sign * retries
            self._bytes += sign * ready.size_bytes

        def done() -> None:
            count(-1)
            for counter in (self._of_account, self._retries_of_account):
                if not counter[account]:
                    del counter[account]

        count(1)
        self._busy.add(ready.call_id)
        self._delivering.spawn(self._guarded, self._deliver, ready, done)

    def _guarded(self, work: Callable[[Ready], None], ready: Ready, done: Callable[[], None]) -> None:
        try:
            work(ready)
        except DatabaseUnavailable as error:  # the lease runs out, and the row is taken up again
            log.warning("the webhook of %s will be looked at again: %s", call_text(ready.call_id), error.message)
        except Exception:
            log.exception("the webhook of %s failed", call_text(ready.call_id))
        finally:
            self._busy.discard(ready.call_id)
            done()
            self._rt.webhooks_due.set()  # a place is free

    # --- making a payload from fal's result ---------------------------------------------------------------------

    def _make(self, ready: Ready) -> None:
        rt, call_id = self._rt, ready.call_id
        lease = rt.now_ms() - self._grace_ms + MAKING_LEASE_MS  # rows are looked at when the grace has passed too
        if not rt.write(lambda tx: webhooks.lease(tx, ready, "waiting", until=lease)):
            return
        job = rt.reader.read(lambda tx: jobs.by_call(tx, call_id))
        assert job is not None
        try:
            payload = self._payload(job)
        except UpstreamError as error:
            self._make_later(ready, lease, error.message)
            return
        now = rt.now_ms()
        rt.write(lambda tx: webhooks.store(tx, call_id, payload, now_ms=now))

    def _make_later(self, ready: Ready, lease: int, why: str) -> None:
        rt, attempts, now = self._rt, ready.attempts + 1, self._rt.now_ms()
        if attempts < webhookwire.ATTEMPTS_MAX:
            at = now - self._grace_ms + webhookwire.backoff_ms(attempts, self._chance(webhookwire.CHANCE_MAX))
            rt.write(lambda tx: webhooks.later(tx, ready.call_id, "waiting", lease=lease, at=at, why=why))
            return
        self._end(ready, "waiting", lease, None, f"fal's result could not be had: {why}")

    def _payload(self, job: Job) -> bytes:
        """What fal would have delivered, with the job's charge. Raises `UpstreamError` where fal is in trouble."""
        path = queuewire.job_path(job.call.model, job.request_id, "result")
        reply = settlement.fetch(self._rt, path, _PLAIN)
        try:
            body = _read_bounded(reply)
        finally:
            reply.close()
        gateway_id = reply.value("x-fal-request-id")
        units = reply.values(metering.UNITS_HEADER)
        meaning = queuewire.meaning(reply.status, units, gateway_id is not None, (body or b"")[:1024])
        if meaning in ("retry", "pending"):
            raise UpstreamError(f"fal answered the question for the result with status {reply.status}")
        if webhook_intake.shows_secret(self._rt, body):
            body = None
        if body is not None and not self._rt.may_keep(job.call.account_id, len(body)):
            body = None  # it is announced, as one that is too large
        made = webhookwire.payload(job.request_id, gateway_id or job.request_id, reply.status, body)
        outcome = settlement.known(self._rt, job)
        member = webhook_intake.billing(job, outcome.charge_micros, outcome.balance_micros)
        return jsonbytes.spliced(made, member)

    # --- delivering ---------------------------------------------------------------------------------------------

    def _deliver(self, ready: Ready) -> None:
        rt, call_id = self._rt, ready.call_id
        timeout_s = webhookwire.timeout_s(ready.attempts + 1)
        lease = rt.now_ms() + (timeout_s + RESOLVE_S + LEASE_SPARE_S) * 1000

        def take(tx: Tx) -> Parcel | None:
            return webhooks.parcel(tx, call_id) if webhooks.lease(tx, ready, "due", until=lease) else None

        parcel = rt.write(take)
        if parcel is None:
            return
        status, why = None, None
        try:
            status = self._post(parcel, timeout_s)
        except WebhookUrlRefused as error:
            self._end(ready, "due", lease, None, error.message, url=parcel.url)
            return
        except NotDelivered as error:
            why = str(error)
        if status is not None and 200 <= status < 300:
            self._end(ready, "due", lease, status, None)
        elif status is not None and 300 <= status < 400:
            self._end(ready, "due", lease, status, "redirects are not followed", url=parcel.url)
        elif parcel.attempts >= webhookwire.ATTEMPTS_MAX:
            self._end(ready, "due", lease, status, why or f"answered with {status} to the last", url=parcel.url)
        else:
            at = rt.now_ms() + webhookwire.backoff_ms(parcel.attempts, self._chance(webhookwire.CHANCE_MAX))
            rt.write(lambda tx: webhooks.later(tx, call_id, "due", lease=lease, at=at, http_status=status, why=why))
            rt.metrics.webhooks.labels("retried").inc()

    def _post(self, parcel: Parcel, timeout_s: int) -> int:
        """Sign and send once. The signature is of this very moment: customers refuse old ones."""
        rt, timestamp = self._rt, self._rt.now_ms() // 1000
        user_id = webhookwire.user_id(parcel.account)
        digest = webhookwire.sha256_hex(parcel.payload)
        signature = rt.webhook_key.sign(webhookwire.message(parcel.request_id, user_id, timestamp, digest))
        headers = [
            ("Content-Type", "application/json"),
            *webhookwire.signed_headers(parcel.request_id, user_id, timestamp, signature),
        ]
        target = webhookwire.target_of(parcel.url)
        return rt.outbound.post(target, headers, parcel.payload, timeout_s=timeout_s, account=parcel.account)

    def _end(
        self,
        ready: Ready,
        state: webhooks.State,
        lease: int,
        http_status: int | None,
        why: str | None,
        *,
        url: str | None = None,
    ) -> None:
        """Delivered (no ``why``), or failed for good."""
        rt, now = self._rt, self._rt.now_ms()
        new_state: webhooks.State = "delivered" if why is None else "failed"

        def end(tx: Tx) -> bool:
            return webhooks.end(
                tx, ready.call_id, state, new_state, lease=lease, now_ms=now, http_status=http_status, why=why
            )

        rt.write(end, patience_s=settlement.SETTLE_PATIENCE_S)
        rt.metrics.webhooks.labels(new_state).inc()
        if why is not None:
            where = f" to {webhookwire.shown_origin(url)}" if url else ""
            log.warning("the webhook of %s%s failed for good: %s", call_text(ready.call_id), where, why)

    def _drop_old(self) -> None:
        rt, now = self._rt, self._rt.now_ms()
        if now - self._dropped_at < DROP_EVERY_MS:
            return
        while rt.write(lambda tx: webhooks.drop_old(tx, now_ms=now, most=DROP_BATCH)) == DROP_BATCH:
            gevent.sleep(0)
        self._dropped_at = now


def _read_bounded(reply: FalReply) -> bytes | None:
    """The body of a result, plain; None where it is larger than a payload may be. Raises `UpstreamError`."""
    encoding = (reply.value("content-encoding") or "identity").strip().lower()
    read1 = encodings.DecodingReader(reply.read1) if encoding in encodings.DECODABLE else reply.read1
    pieces, size = [], 0
    while piece := read1():
        size += len(piece)
        if size > webhookwire.PAYLOAD_BYTES_MAX:
            return None
        pieces.append(piece)
    return b"".join(pieces)
