"""The parts of a serving process, put together once: settings, database, prices, limits, fal, clock and chance."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import gevent
from gevent.event import AsyncResult, Event

from abhiapi import accounts, addresses, alerts, keys, prices, pricing, processes, signing
from abhiapi.allowances import DailyBytes
from abhiapi.committer import GroupCommitter, in_thread
from abhiapi.db import Busy, Database, Reads, Tx
from abhiapi.errors import DatabaseUnavailable, SettingsError
from abhiapi.fal import Fal
from abhiapi.fal_keys import FETCH_S, FalKeys
from abhiapi.gate import Gate
from abhiapi.ids import CallIds, NowMs, call_text
from abhiapi.limits import CallLimits
from abhiapi.liveness import ProcessLock
from abhiapi.metrics import Metrics
from abhiapi.migrations import open_database
from abhiapi.outbound import Outbound
from abhiapi.polls import Polls
from abhiapi.settings import NO_FAL_KEY, Settings
from abhiapi.tracing import Tracer

if TYPE_CHECKING:
    from abhiapi.shared_turns import SharedTurns

T = TypeVar("T")
log = logging.getLogger("abhiapi")
__all__ = ["Runtime", "log", "open_database", "start", "system_now_ms"]

HOLD_PATIENCE_S = 3  # how long a call may wait for the database before it is refused with 503
SETTLE_PATIENCE_S = 60  # how long a finished call's charge may wait before its answer is withheld
SETTLE_LATER_S = 7 * 86_400  # and how long it is tried after that
HEALTH_PATIENCE_S = 1
CLOSE_PATIENCE_S = 15  # a command that ends beside a busy server waits for its turn
REST_TIMEOUT_S = 30  # longest wait for fal's upload service, which only signs an address
CATALOGUE_LASTS_MS = 600_000
QUEUE_TIMEOUT_S = 120  # longest wait for an answer of fal's queue, which runs nothing while one waits


def system_now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class Runtime:
    """What a request needs. Tests make one with a clock and a database of their own."""

    settings: Settings
    database: Database
    writer: GroupCommitter
    reader: Reads
    fal_run: Fal
    fal_queue: Fal
    fal_rest: Fal
    limits: CallLimits
    gate: Gate
    metrics: Metrics
    process_id: int
    lock: ProcessLock
    rules: tuple[pricing.PriceRule, ...]
    webhook_key: signing.WebhookKey
    outbound: Outbound
    fal_keys: FalKeys
    now_ms: NowMs = system_now_ms
    polls: Polls = field(default_factory=Polls)
    webhooks_due: Event = field(default_factory=Event)  # set where a webhook may have become due
    call_ids: CallIds = field(default_factory=CallIds)
    _catalogue: pricing.Catalogue | None = None
    _catalogue_version: prices.Version = (-1, -1, -1)
    _catalogue_at: int = 0
    _catalogue_reading: AsyncResult[pricing.Catalogue] | None = None  # by a greenlet, just now
    _catalogue_reads: int = 0
    price_list: tuple[pricing.Catalogue, bytes] | None = None  # as GET /v1/prices answers it
    price_ids: dict[tuple[str, ...], int] = field(default_factory=dict)
    answering: dict[int, Event] = field(default_factory=dict)  # calls whose answer may still be kept for a repeat
    working_on: set[int] = field(default_factory=set)  # calls that this process will end: no sweep touches them
    standing: set[tuple[str, str]] = field(default_factory=set)  # alerts as of the last look: (kind, subject)
    log_calls: bool = True
    proxy_seen_at: int = 0  # when a request last came through a reverse proxy that the settings do not know of
    tracer: Tracer | None = None  # where nobody collects traces
    kept_today: DailyBytes = field(default_factory=DailyBytes)
    parked: int = 0  # ends of calls that wait for the database
    oldest_hold_at: int | None = None  # as of the last look; None: nothing is held

    def write(self, op: Callable[[Tx], T], *, patience_s: float = HOLD_PATIENCE_S) -> T:
        """A durable write, in a transaction shared with other greenlets'."""
        try:
            return self.writer.write(op, patience_s=patience_s)
        except DatabaseUnavailable as error:
            self.metrics.database_errors["busy" if isinstance(error, Busy) else "unavailable"].inc()
            raise

    def settle_later(self, end: Callable[[float], object], call_id: int) -> None:
        """Go on trying to write the end of a call whose answer was withheld. Its hold stands until then.

        ``end`` writes it, with so many seconds of patience.
        """

        def settle() -> None:
            try:
                end(SETTLE_LATER_S)
                self.parked -= 1
            except Exception:  # the last to hear of it: without this line the charge would vanish in silence
                log.exception("the parked charge of %s was not written", call_text(call_id))
            self.working_on.discard(call_id)

        self.parked += 1
        self.alert("parked_charge", "charges", f"the end of {call_text(call_id)} could not be written, and waits")
        gevent.spawn(settle)

    def may_keep(self, account_id: int, size_bytes: int) -> bool:
        """Whether an answer or a payload of an account's may be stored: whether it has not had too many of them today.

        Raises `DatabaseUnavailable`.
        """
        if self.kept_today.take(account_id, size_bytes, now_ms=self.now_ms()):
            return True
        if self.kept_today.is_news(account_id):
            name = self.reader.read(lambda tx: accounts.by_id(tx, account_id).name)
            most = self.kept_today.most >> 20
            log.warning("%d MiB of answers and webhooks were kept for %s today: no more large ones are", most, name)
        return False

    def alert(self, kind: str, subject: str, message: str) -> None:
        """Raise an alert unless it stands already: written off the path of the call that met it."""
        if (kind, subject) not in self.standing:
            self.standing.add((kind, subject))
            now = self.now_ms()
            self._write_aside(lambda tx: alerts.raise_(tx, kind, subject, message, now_ms=now))

    def all_clear(self, kind: str, subject: str) -> None:
        """What an alert told of is over. Costs a look into a set where none stands."""
        if (kind, subject) in self.standing:
            self.standing.discard((kind, subject))
            now = self.now_ms()
            self._write_aside(lambda tx: alerts.clear(tx, kind, subject, now_ms=now))

    def _write_aside(self, op: Callable[[Tx], object]) -> None:
        def write() -> None:
            try:
                self.write(op, patience_s=SETTLE_LATER_S)
            except Exception:  # an alert is no reason for trouble, and this is nobody's call
                log.exception("an alert was not written")

        gevent.spawn(write)

    def read_aside(self, op: Callable[[Tx], T]) -> T:
        """A longer read (lists, reports) on a snapshot, while other greenlets go on."""
        if self.database.waits_cooperatively:
            return self.database.read(op)
        return in_thread(gevent.get_hub().threadpool, lambda: self.database.read(op))

    def authenticate(self, key: str | None, *, may_be_suspended: bool = False) -> keys.Caller:
        """Who is calling, as the database has it this very moment."""
        now = self.now_ms()
        return self.reader.read(lambda tx: keys.authenticate(tx, key, now_ms=now, may_be_suspended=may_be_suspended))

    def authenticate_inside(self, account_id: int) -> keys.Caller:
        """The account's playground as a caller: for somebody whom this process has signed in."""
        now = self.now_ms()
        return self.reader.read(lambda tx: keys.authenticate_inside(tx, account_id, now_ms=now))

    def catalogue(self, version: prices.Version | None = None) -> pricing.Catalogue:
        """The prices in force. ``version`` is what the caller has just read of them.

        Read by one greenlet for all: others wait for it, or go on with what is only due to be read anew.
        """
        if version is None:
            version = self.reader.read(prices.version)
        now = self.now_ms()
        before_us = self._catalogue_reads
        while True:
            reading, number = self._catalogue_reading, self._catalogue_reads
            if self._catalogue is not None and version == self._catalogue_version:
                is_old = not 0 <= now - self._catalogue_at < CATALOGUE_LASTS_MS  # what calls cost is read now and then
                if reading is not None or not is_old:
                    return self._catalogue
            if reading is None:
                return self._read_catalogue(now)
            reading.wait()
            if isinstance(reading.exception, DatabaseUnavailable):
                raise reading.exception
            if reading.value is not None and number > before_us:  # begun after the caller had looked: as new as that
                return reading.value

    def _read_catalogue(self, now: int) -> pricing.Catalogue:
        reading: AsyncResult[pricing.Catalogue] = AsyncResult()
        self._catalogue_reading = reading
        self._catalogue_reads += 1
        try:
            version, found = self.reader.read(
                lambda tx: (prices.version(tx), prices.catalogue(tx, self.rules, self.settings, now_ms=now))
            )
        except BaseException as error:
            reading.set_exception(error)
            raise
        finally:
            self._catalogue_reading = None
        self._catalogue, self._catalogue_version, self._catalogue_at = found, version, now
        reading.set(found)
        return found

    def oldest_hold_s(self) -> int:
        """The age of the oldest open hold, as of the last look; 0 when nothing is held."""
        return 0 if self.oldest_hold_at is None else max(0, self.now_ms() - self.oldest_hold_at) // 1000

    def close(self) -> None:
        """End cleanly: nothing of this process's is left for a sweep."""
        try:
            self.write(lambda tx: processes.end(tx, self.process_id, now_ms=self.now_ms()), patience_s=CLOSE_PATIENCE_S)
        except DatabaseUnavailable as error:  # the next sweep ends it: its lock is free
            log.warning("this process was not signed off: %s", error.message)
        self.gate.close()
        self.limits.close()
        self.writer.close()
        self.reader.close()
        self.lock.release()
        self.fal_run.close()
        self.fal_queue.close()
        self.fal_rest.close()
        self.fal_keys.close()
        self.outbound.close()
        if self.tracer is not None:
            self.tracer.close()


def start(
    settings: Settings,
    *,
    now_ms: NowMs = system_now_ms,
    rules: tuple[pricing.PriceRule, ...] | None = None,
) -> Runtime:
    """Open everything that serving needs. Raises `SettingsError`, `SchemaError`, `DatabaseUnavailable`."""
    if settings.fal_key is None:
        raise SettingsError([NO_FAL_KEY])
    database = open_database(settings)
    webhook_key = signing.load(settings.webhook_key, settings.kept_beside("webhook-key"))
    metrics = Metrics()
    writer = GroupCommitter(database, on_group=metrics.group_size.observe)
    lock = database.process_lock()
    try:
        process_id = writer.write(lambda tx: processes.start(tx, pid=os.getpid(), now_ms=now_ms()), patience_s=30)
        lock.take_place(process_id)
    except BaseException:  # it may be tried again
        writer.close()
        lock.release()
        raise
    limits = CallLimits(settings, on_fallback=metrics.limits_fallback.inc)
    runtime = Runtime(
        settings=settings,
        database=database,
        writer=writer,
        reader=database.reads(),
        fal_run=Fal(settings.fal_run_url, settings.fal_key, timeout_s=settings.upstream_timeout_s),
        fal_queue=Fal(
            settings.fal_queue_url, settings.fal_key, timeout_s=min(QUEUE_TIMEOUT_S, settings.upstream_timeout_s)
        ),
        fal_rest=Fal(
            settings.fal_rest_url, settings.fal_key, timeout_s=min(REST_TIMEOUT_S, settings.upstream_timeout_s)
        ),
        limits=limits,
        gate=Gate(settings.fal_concurrency, settings.fal_queue_s, shared=_shared_turns(limits), metrics=metrics),
        metrics=metrics,
        process_id=process_id,
        lock=lock,
        rules=rules if rules is not None else pricing.shipped_rules(),
        webhook_key=webhook_key,
        outbound=Outbound(partial(addresses.is_allowed, with_loopback=settings.webhook_allow_loopback)),
        fal_keys=FalKeys(Fal(settings.fal_rest_url, None, timeout_s=FETCH_S), now_ms),
        now_ms=now_ms,
        log_calls=settings.log_calls,
        tracer=None if settings.otlp_endpoint is None else Tracer(settings.otlp_endpoint),
    )
    metrics.gauge("abhiapi_in_flight", "Calls running just now", runtime.limits.in_flight)
    metrics.gauge(
        "abhiapi_limits_shared", "Whether limits are counted by all processes just now", runtime.limits.is_shared
    )
    metrics.gauge("abhiapi_fal_waiting", "Calls of this process that wait for their turn at fal", runtime.gate.waiting)
    metrics.gauge("abhiapi_fal_limit", "Calls that may run at fal at once, 0: any number", runtime.gate.limit)
    metrics.gauge("abhiapi_alerts_standing", "Alerts that stand", lambda: len(runtime.standing))
    metrics.gauge("abhiapi_oldest_open_hold_seconds", "Age of the oldest open hold", runtime.oldest_hold_s)
    return runtime


def _shared_turns(limits: CallLimits) -> SharedTurns | None:
    if limits.shared is None:
        return None
    from abhiapi.shared_turns import SharedTurns  # here, because most serve with memory:// and need no redis

    return SharedTurns(limits.shared)
