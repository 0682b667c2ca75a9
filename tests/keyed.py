"""Requests with an Idempotency-Key over a real database and a scripted fal, and what came of them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from gevent.event import Event

from abhiapi import admission, gateway, queue_gateway, runtime
from abhiapi.settings import Settings
from tests.harness import OPERATOR_KEY, WEBHOOK_KEY, Books, Clock, ready
from tests.scripted import FLUX, Body, House, ScriptedFal

MEGAPIXEL = 26_250
START = 1_000_000
JOB = b'{"request_id":"job-1","status":"IN_QUEUE"}'
QUEUE = "/queue/fal-ai/flux/dev"


def started(folder: Path, clock: Clock, url: str | None = None) -> tuple[runtime.Runtime, ScriptedFal]:
    """A serving process on the database in ``folder``, or at a URL, with one fal for calls and jobs."""
    url = url or f"sqlite:///{folder / 'abhiapi.db'}"
    ready(url)
    env = {
        "FAL_KEY": OPERATOR_KEY,
        "ABHIAPI_DATABASE_URL": url,
        "ABHIAPI_WEBHOOK_KEY": WEBHOOK_KEY,
    }
    rt = runtime.start(Settings.from_env(env), now_ms=clock)
    rt.fal_run.close()
    rt.fal_queue.close()
    rt.fal_run = rt.fal_queue = fal = ScriptedFal()  # type: ignore[assignment]
    return rt, fal


@contextmanager
def house_of(tmp_path: Path, clock: Clock, url: str | None = None) -> Iterator[House]:
    """A customer of a serving process; afterwards nobody waits, and the books are right."""
    rt, fal = started(tmp_path, clock, url)
    books = Books(rt.database, clock)
    account, key = books.account(1000, plan="pro")
    yield House(rt, fal, books, account, key)
    assert rt.limits.in_flight() == 0
    assert rt.answering == {}
    assert books.verify().problems == []
    rt.close()


def ask(
    house: House,
    path: str = FLUX,
    *,
    idempotency_key: str | None = "k1",
    body: Any = b'{"prompt":"a cat"}',
    method: str = "POST",
    query: str = "",
    content_type: str = "application/json",
    key: str | None = None,
    rt: runtime.Runtime | None = None,
    has_hung_up: Any = lambda: False,
) -> admission.Reply:
    headers = {"x-api-key": key or house.key, "content-type": content_type}
    if idempotency_key is not None:
        headers["idempotency-key"] = idempotency_key
    read = Body(body, json.loads(body) if isinstance(body, bytes) and body else {})
    run = queue_gateway.run if path.startswith("/queue/") else gateway.run
    request = admission.Request(
        method, path, query, headers, lambda: read, base_url="https://here", has_hung_up=has_hung_up
    )
    return run(rt or house.rt, request)


def header(reply: admission.Reply, name: str) -> str | None:
    return dict(reply.headers).get(name)


def is_replay(reply: admission.Reply) -> bool:
    return header(reply, "idempotency-replayed") == "true"


def error_of(reply: admission.Reply) -> tuple[int, str]:
    assert isinstance(reply.body, bytes)
    return reply.status, json.loads(reply.body)["error"]["type"]


def drained(reply: admission.Reply) -> bytes:
    """A whole answer, its hold ended."""
    if isinstance(reply.body, bytes):
        return reply.body
    try:
        return b"".join(reply.body)
    finally:
        reply.body.close()


def charges(house: House) -> int:
    return len([entry for entry in house.books.entries(house.account) if entry.kind == "charge"])


def kept_keys(house: House) -> int:
    with closing(sqlite3.connect(house.rt.database.path)) as connection:
        return int(connection.execute("SELECT count(*) FROM idempotency_keys").fetchone()[0])


class Slow:
    """A fal that answers when told."""

    def __init__(self, house: House) -> None:
        self.has_it, self.go_on = Event(), Event()
        house.fal.when_sent = self._wait

    def _wait(self) -> None:
        self.has_it.set()
        assert self.go_on.wait(20)
