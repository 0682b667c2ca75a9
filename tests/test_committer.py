"""Group commit: durable before told, one failing write harms no other, the event loop never waits for a lock."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from time import monotonic

import gevent
import gevent.monkey
import pytest
from gevent.event import Event
from sqlalchemy import text

from abhiapi import accounts, calls, committer, ledger
from abhiapi.committer import GroupCommitter, in_thread
from abhiapi.db import Busy, Database, Tx, assert_no_transaction
from abhiapi.errors import DatabaseUnavailable, InsufficientCredits, Refused
from abhiapi.fal import Fal
from abhiapi.money import Micros
from tests.harness import Clock
from tests.rows import FLUX_MICROS, Customer

pytestmark = pytest.mark.engines


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
    return [account.name for account in database.read(accounts.everyone)]


def test_a_write_is_seen_by_others_when_it_returns(database: Database, writer: GroupCommitter) -> None:
    writer.write(create("ann"), patience_s=5)  # type: ignore[arg-type]
    assert names(database) == ["ann"]


@pytest.mark.engines("sqlite")
def test_closing_beside_another_process_that_writes_is_no_error(database: Database) -> None:
    """`abhiapi reconcile` closed its writer while a server committed, and failed with «locked» after all was done."""
    made = GroupCommitter(database)
    made.write(create("ann"), patience_s=5)  # type: ignore[arg-type]
    with closing(sqlite3.connect(database.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        made.close()
    assert names(database) == ["ann"]


def test_writes_that_wait_together_share_a_commit(database: Database, writer: GroupCommitter, sizes: list[int]) -> None:
    jobs = [gevent.spawn(writer.write, create(f"a{n:03}"), patience_s=5) for n in range(100)]
    gevent.joinall(jobs, raise_error=True)
    assert len(names(database)) == 100
    assert sum(sizes) == 100
    assert len(sizes) < 20


@pytest.mark.engines("sqlite")
def test_a_failing_write_is_undone_and_harms_no_neighbour(database: Database, writer: GroupCommitter) -> None:
    def half(tx: Tx) -> None:
        accounts.create(tx, "half", now_ms=1)
        raise Refused("changed my mind")

    def broken(tx: Tx) -> None:
        accounts.create(tx, "broken", now_ms=1)
        raise ZeroDivisionError

    def misspelt(tx: Tx) -> None:
        accounts.create(tx, "misspelt", now_ms=1)
        tx.run(text("UPDATE accounts SET colour = 1"))

    before = gevent.spawn(writer.write, create("before"), patience_s=5)
    failing = [gevent.spawn(writer.write, op, patience_s=5) for op in (half, broken, misspelt)]
    after = gevent.spawn(writer.write, create("after"), patience_s=5)
    gevent.joinall([before, *failing, after])
    assert [type(job.exception) for job in failing] == [Refused, ZeroDivisionError, sqlite3.OperationalError]
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


@pytest.mark.engines("sqlite")
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


@pytest.mark.engines("sqlite")
def test_a_lost_file_is_noticed_and_its_return_too(database: Database, writer: GroupCommitter) -> None:
    writer.write(create("ann"), patience_s=5)  # type: ignore[arg-type]
    reader = database.reads()
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


@pytest.mark.engines("sqlite")
def test_commits_that_are_only_in_the_log_come_back_with_the_file(database: Database, writer: GroupCommitter) -> None:
    """Nobody folds the log in before the file is moved away; while it is gone, everybody tries to use it."""
    reader = database.reads()
    for name in ("ann", "bob"):
        writer.write(create(name), patience_s=5)  # type: ignore[arg-type]
        assert len(reader.read(accounts.everyone)) > 0
    aside = database.path.with_name("aside.db")
    database.path.rename(aside)
    for use in (
        lambda: writer.write(create("lost"), patience_s=0),  # type: ignore[arg-type]
        lambda: reader.read(accounts.everyone),
        lambda: database.read(accounts.everyone),
        lambda: database.write(create("lost")),  # type: ignore[arg-type]
    ):
        with pytest.raises(DatabaseUnavailable):
            use()
    reader.close()
    aside.rename(database.path)
    writer.write(create("cid"), patience_s=5)  # type: ignore[arg-type]
    assert names(database) == ["ann", "bob", "cid"]


@pytest.mark.engines("sqlite")
def test_another_file_in_its_place_is_not_written_to_by_a_process_that_knew_the_first(
    database: Database, writer: GroupCommitter
) -> None:
    """What that process keeps in memory, prices and its own number, belongs to the ledger that was there."""
    writer.write(create("ann"), patience_s=5)  # type: ignore[arg-type]
    reader = database.reads()
    reader.read(accounts.everyone)
    copy = database.path.with_name("copy.db")
    with closing(sqlite3.connect(database.path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    aside = database.path.with_name("aside.db")
    database.path.rename(aside)
    copy.rename(database.path)
    with pytest.raises(DatabaseUnavailable, match="another file stands where"):
        writer.write(create("bob"), patience_s=0)  # type: ignore[arg-type]
    with pytest.raises(DatabaseUnavailable, match="another file stands where"):
        reader.read(accounts.everyone)
    aside.rename(database.path)
    writer.write(create("cid"), patience_s=5)  # type: ignore[arg-type]
    assert [account.name for account in reader.read(accounts.everyone)] == ["ann", "cid"]
    reader.close()


@pytest.mark.engines("sqlite")
def test_those_with_patience_outlast_those_without_and_come_in_their_order(
    database: Database, writer: GroupCommitter
) -> None:
    """Charges wait for a lock; calls that come meanwhile are refused, and take no charge with them."""
    with closing(sqlite3.connect(database.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        charges = [gevent.spawn(writer.write, create(f"charge-{n}"), patience_s=30) for n in range(3)]
        holds = [gevent.spawn(writer.write, create(f"hold-{n}"), patience_s=0.1) for n in range(3)]
        late = gevent.spawn(writer.write, create("charge-3"), patience_s=30)
        gevent.joinall(holds, timeout=10)
        assert [type(hold.exception) for hold in holds] == [Busy] * 3
        assert not any(charge.ready() for charge in [*charges, late])
        other.execute("ROLLBACK")
    gevent.joinall([*charges, late], timeout=10, raise_error=True)
    assert [charge.value for charge in [*charges, late]] == [1, 2, 3, 4]
    assert names(database) == [f"charge-{n}" for n in range(4)]


@pytest.mark.engines("sqlite")
def test_a_trouble_of_the_disk_in_one_operation_undoes_and_tries_again_with_all(
    database: Database, writer: GroupCommitter
) -> None:
    tries = 0

    def troubled(tx: Tx) -> int:
        nonlocal tries
        tries += 1
        made = accounts.create(tx, "troubled", now_ms=1).account_id
        if tries < 3:
            raise sqlite3.OperationalError("disk I/O error")
        return made

    jobs = [gevent.spawn(writer.write, op, patience_s=10) for op in (create("ann"), troubled, create("bob"))]
    gevent.joinall(jobs, raise_error=True)
    assert (tries, names(database)) == (3, ["ann", "bob", "troubled"])


SLEEP = text("SELECT pg_sleep(:seconds)")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits as a server does, which is patched, and for less than half a second."""
    monkeypatch.setattr(gevent.monkey, "is_module_patched", lambda name: True)
    monkeypatch.setattr(committer, "ANSWER_S", 0.3)
    monkeypatch.setattr(committer, "CLOSE_PATIENCE_S", 0.3)


def slowly(name: str, seconds: float) -> object:
    def write(tx: Tx) -> int:
        tx.one(SLEEP, seconds=seconds)
        return accounts.create(tx, name, now_ms=1).account_id

    return write


@pytest.mark.engines("postgresql")
def test_a_slow_server_gets_through_smaller_groups(database: Database, writer: GroupCommitter, impatient: None) -> None:
    """All at once take longer than an answer may; tried again at the same size they would for ever."""
    jobs = [gevent.spawn(writer.write, slowly(f"a{n}", 0.05), patience_s=20) for n in range(8)]
    gevent.joinall(jobs, raise_error=True)
    assert names(database) == [f"a{n}" for n in range(8)]


@pytest.mark.engines("postgresql")
def test_a_write_that_is_too_slow_by_itself_keeps_nobody_back(
    impatient: None, database: Database, writer: GroupCommitter
) -> None:
    stuck = gevent.spawn(writer.write, slowly("stuck", 60), patience_s=60)
    others = [gevent.spawn(writer.write, create(f"a{n}"), patience_s=60) for n in range(3)]
    gevent.joinall(others, raise_error=True)
    assert not stuck.ready()
    assert names(database) == ["a0", "a1", "a2"]
    stuck.kill()


@pytest.mark.engines("sqlite")
def test_a_bug_of_ours_is_told_to_those_who_wait_and_ends_no_others_service(
    database: Database, writer: GroupCommitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: object) -> sqlite3.Connection:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(database, "connect", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            writer.write(create("ann"), patience_s=5)  # type: ignore[arg-type]
    writer.write(create("bob"), patience_s=5)  # type: ignore[arg-type]
    assert names(database) == ["bob"]


@pytest.mark.engines("sqlite")
def test_a_reader_tells_trouble_from_bugs_and_mends_itself(database: Database) -> None:
    reader = database.reads()

    def troubled(tx: Tx) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    def wrong(tx: Tx) -> None:
        raise sqlite3.ProgrammingError("a bug")

    with pytest.raises(DatabaseUnavailable, match="disk I/O"):
        reader.read(troubled)
    with pytest.raises(sqlite3.ProgrammingError):
        reader.read(wrong)
    with pytest.raises(sqlite3.OperationalError, match="no such column"):
        reader.read(lambda tx: tx.all(text("SELECT colour FROM accounts")))
    assert reader.read(accounts.everyone) == []
    reader.close()
    reader.close()


def test_a_closed_writer_has_written_what_was_handed_in(database: Database) -> None:
    made = GroupCommitter(database)
    handing_in: list[int] = []
    all_handed_in = Event()

    def write(number: int) -> None:
        handing_in.append(number)
        if len(handing_in) == 10:
            all_handed_in.set()  # whoever waits for it runs when this greenlet waits for its write
        made.write(create(f"a{number}"), patience_s=5)  # type: ignore[arg-type]

    jobs = [gevent.spawn(write, number) for number in range(10)]
    assert all_handed_in.wait(5)
    made.close()
    gevent.joinall(jobs, raise_error=True)
    assert len(names(database)) == 10


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
