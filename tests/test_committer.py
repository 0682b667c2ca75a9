"""Group commit: durable before told, one failing write harms no other, the event loop never waits for a lock."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from time import monotonic

import gevent
import pytest

from abhiapi import accounts, calls, ledger
from abhiapi.committer import GroupCommitter, Reader, in_thread
from abhiapi.db import Busy, Database, Tx, assert_no_transaction
from abhiapi.errors import DatabaseUnavailable, InsufficientCredits, Refused
from abhiapi.fal import Fal
from abhiapi.money import Micros
from tests.harness import Clock
from tests.rows import FLUX_MICROS, Customer


@pytest.fixture
def sizes() -> list[int]:
    return []


@pytest.fixture
def writer(database: Database, sizes: list[int]) -> Iterator[GroupCommitter]:
    made = GroupCommitter(database, on_group=sizes.append)
    yield made
    made.close()


def create(name: str) -> object:
    return lambda tx: accounts.create(tx, name, now_ms=1).account_id


def names(database: Database) -> list[str]:
    """As another process sees them."""
    with closing(sqlite3.connect(database.path)) as connection:
        return [row[0] for row in connection.execute("SELECT name FROM accounts ORDER BY name")]


def test_a_write_is_seen_by_others_when_it_returns(database: Database, writer: GroupCommitter) -> None:
    writer.write(create("ann"), patience_s=5)  # type: ignore[arg-type]
    assert names(database) == ["ann"]


def test_writes_that_wait_together_share_a_commit(database: Database, writer: GroupCommitter, sizes: list[int]) -> None:
    jobs = [gevent.spawn(writer.write, create(f"a{n:03}"), patience_s=5) for n in range(100)]
    gevent.joinall(jobs, raise_error=True)
    assert len(names(database)) == 100
    assert sum(sizes) == 100
    assert len(sizes) < 20


def test_a_failing_write_is_undone_and_harms_no_neighbour(database: Database, writer: GroupCommitter) -> None:
    def half(tx: Tx) -> None:
        accounts.create(tx, "half", now_ms=1)
        raise Refused("changed my mind")

    def broken(tx: Tx) -> None:
        accounts.create(tx, "broken", now_ms=1)
        raise ZeroDivisionError

    before = gevent.spawn(writer.write, create("before"), patience_s=5)
    failing = [gevent.spawn(writer.write, op, patience_s=5) for op in (half, broken)]
    after = gevent.spawn(writer.write, create("after"), patience_s=5)
    gevent.joinall([before, *failing, after])
    assert [type(job.exception) for job in failing] == [Refused, ZeroDivisionError]
    assert before.successful()
    assert after.successful()
    assert names(database) == ["after", "before"]


def test_a_refusal_that_wrote_nothing_undoes_nobody(database: Database, writer: GroupCommitter) -> None:
    def refuse(tx: Tx) -> None:
        raise Refused("no")

    jobs = [gevent.spawn(writer.write, op, patience_s=5) for op in (create("ann"), refuse, create("bob"))]
    gevent.joinall(jobs)
    assert [job.successful() for job in jobs] == [True, False, True]
    assert names(database) == ["ann", "bob"]


def test_fifty_greenlets_with_credit_for_five_get_five_holds(
    database: Database, writer: GroupCommitter, clock: Clock
) -> None:
    customer = Customer.new(database, clock, credits=0)
    customer.write(lambda tx: customer_topup(tx, customer.account_id, 5 * FLUX_MICROS))

    def hold() -> None:
        admission = customer.admission(customer.open_call())
        writer.write(lambda tx: calls.admit(tx, admission), patience_s=5)

    jobs = [gevent.spawn(hold) for _ in range(50)]
    gevent.joinall(jobs)
    assert sum(job.successful() for job in jobs) == 5
    assert {type(job.exception) for job in jobs} == {type(None), InsufficientCredits}
    assert customer.standing() == (5 * FLUX_MICROS, 5 * FLUX_MICROS)


def customer_topup(tx: Tx, account_id: int, amount_micros: int) -> None:
    ledger.topup(tx, account_id, Micros(amount_micros), ref=None, note=None, now_ms=1)


def test_a_lock_held_by_another_process_stops_no_other_greenlet(database: Database, writer: GroupCommitter) -> None:
    """The waiting is done by trying again, never inside SQLite, whose wait would freeze the whole process."""
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            gevent.sleep(0.001)

    with closing(sqlite3.connect(database.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        ticking = gevent.spawn(tick)
        waiting = gevent.spawn(writer.write, create("late"), patience_s=30)
        started = monotonic()
        with pytest.raises(Busy):
            writer.write(create("impatient"), patience_s=0.3)  # type: ignore[arg-type]
        assert monotonic() - started < 10
        assert ticks > 20
        assert not waiting.ready()
        other.execute("ROLLBACK")
    waiting.join(10)
    ticking.kill()
    assert waiting.successful()
    assert names(database) == ["late"]


def test_a_lost_file_is_noticed_and_its_return_too(database: Database, writer: GroupCommitter) -> None:
    writer.write(create("ann"), patience_s=5)  # type: ignore[arg-type]
    reader = Reader(database)
    assert reader.read(accounts.everyone)[0].name == "ann"
    with closing(sqlite3.connect(database.path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    aside = database.path.with_name("aside.db")
    database.path.rename(aside)
    with pytest.raises(DatabaseUnavailable):
        writer.write(create("lost"), patience_s=0.1)  # type: ignore[arg-type]
    with pytest.raises(DatabaseUnavailable):
        reader.read(accounts.everyone)
    assert not database.path.exists()
    aside.rename(database.path)
    writer.write(create("bob"), patience_s=5)  # type: ignore[arg-type]
    assert names(database) == ["ann", "bob"]
    assert len(reader.read(accounts.everyone)) == 2
    reader.close()


def test_fal_cannot_be_asked_inside_a_transaction(writer: GroupCommitter) -> None:
    fal = Fal("http://127.0.0.1:9", "id:secret", timeout_s=1)

    def ask(tx: Tx) -> None:
        fal.send("POST", "/fal-ai/flux/dev", [], b"{}")

    with pytest.raises(AssertionError, match="inside a database transaction"):
        writer.write(ask, patience_s=5)
    assert_no_transaction()  # and the mark is gone afterwards


def test_errors_of_a_native_thread_come_back_as_they_are() -> None:
    def fail() -> None:
        raise LookupError("there")

    with pytest.raises(LookupError, match="there"):
        in_thread(gevent.get_hub().threadpool, fail)
    assert in_thread(gevent.get_hub().threadpool, lambda: 5) == 5
