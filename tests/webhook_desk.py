"""What tests of webhooks in one process start from: a runtime with a clock, jobs to be told of, a fal that signs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from abhiapi import (
    jobs,
    reconcile,
    runtime,
    signing,
    webhook_intake,
    webhooks,
    webhookwire,
)
from abhiapi.db import Database
from abhiapi.ids import call_text
from abhiapi.webhook_delivery import Deliveries
from tests.harness import Books, Clock, Fal, until
from tests.receiver import Receiver
from tests.test_reconciler import is_done, placed, started

PUBLIC_URL = "https://fal.example.com"
USER_ID = "fal-user"


@dataclass
class Desk:
    """A runtime with a clock, whose rounds are started by hand, and a fal whose webhooks the test signs."""

    rt: runtime.Runtime
    clock: Clock
    fal: Fal
    books: Books
    fals_key: signing.WebhookKey
    keys_page: Receiver
    deliveries: Deliveries = field(init=False)

    def __post_init__(self) -> None:
        self.deliveries = Deliveries(self.rt, lambda _: 500)

    def wanting(self, url: str, count: int = 1, *, weather: str = "") -> tuple[str, list[jobs.Job]]:
        """An account's jobs, complete at fal, whose end is to be told to ``url``."""
        before = {job.call.call_id for job in self.rt.reader.read(lambda tx: jobs.sent_after(tx, 0, most=1000))}
        account, found = placed(self.rt, self.fal, self.books, count, weather=weather)
        found = [job for job in found if job.call.call_id not in before]
        for job in found:
            self.books.write(lambda tx, job=job: webhooks.want(tx, job.call, url, now_ms=self.clock.now_ms))  # type: ignore[misc]
        until(lambda: all(is_done(self.fal, job) for job in found), what="fal is done")
        return account, found

    def settle(self) -> None:
        assert reconcile.run_once(self.rt).failed == 0

    def row(self, job: jobs.Job) -> webhooks.WebhookRow:
        row = self.rt.reader.read(lambda tx: webhooks.one(tx, job.call.call_id))
        assert row is not None
        return row

    def signed(
        self, job: jobs.Job, body: bytes, *, age_s: int = 0, key: signing.WebhookKey | None = None
    ) -> dict[str, str]:
        timestamp = self.clock.now_ms // 1000 - age_s
        message = webhookwire.message(job.request_id, USER_ID, timestamp, webhookwire.sha256_hex(body))
        signature = (key or self.fals_key).sign(message)
        headers = webhookwire.signed_headers(job.request_id, USER_ID, timestamp, signature)
        return {name.lower(): value for name, value in headers}

    def receive(self, job: jobs.Job, body: bytes, headers: dict[str, str] | None = None, *, token: str = "") -> None:
        call = call_text(job.call.call_id)
        left = [body]
        webhook_intake.receive(
            self.rt,
            call,
            token or self.rt.webhook_key.token(call),
            headers or self.signed(job, body),
            lambda _: left.pop() if left else b"",
        )


def fals_body(job: jobs.Job) -> bytes:
    return b'{"status":"OK","request_id":"%s","payload":{"n":1.0,"u":"\\u00e9"}}' % job.request_id.encode()


@pytest.fixture
def desk_with(database: Database, database_url: str, fal: Fal) -> Iterator[Callable[..., Desk]]:
    made: list[Desk] = []
    clock = Clock(time.time_ns() // 1_000_000)
    with Receiver.started() as keys_page:

        def make(**settings: str) -> Desk:
            own = {"ABHIAPI_FAL_REST_URL": keys_page.url(""), "ABHIAPI_WEBHOOK_ALLOW_LOOPBACK": "1"}
            rt = started(database_url, fal, clock, **own | settings)
            key = signing.WebhookKey.new()
            keys_page.body = json.dumps(key.jwks()).encode()
            made.append(Desk(rt, clock, fal, Books(database, clock), key, keys_page))
            return made[-1]

        yield make
        for desk in made:
            desk.rt.close()


@pytest.fixture
def desk(desk_with: Callable[..., Desk]) -> Desk:
    return desk_with()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver.started() as running:
        yield running


@pytest.fixture
def known(desk_with: Callable[..., Desk]) -> Desk:
    """A desk whose address fal knows."""
    return desk_with(ABHIAPI_PUBLIC_URL=PUBLIC_URL)
