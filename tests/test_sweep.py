"""The sweep: holds that no living process will end are released, once, and no others are touched."""

from __future__ import annotations

from collections.abc import Iterator

import gevent
import pytest
from sqlalchemy import text

from abhiapi import calls, db_postgres, reports, runtime, sweep
from abhiapi.db_postgres import ServerLock
from abhiapi.liveness import FileLock, lock_path
from abhiapi.metering import Verdict
from tests.harness import Clock, until
from tests.rows import Customer, server_settings

pytestmark = pytest.mark.engines


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock of a server's counts as free when it is seen so once; what the wait is for is test_postgres's."""
    monkeypatch.setattr(db_postgres, "FREE_FOR_S", 0)


@pytest.fixture
def serving(database_url: str, clock: Clock) -> Iterator[runtime.Runtime]:
    """A process that serves."""
    made = runtime.start(server_settings(database_url), now_ms=clock, rules=())
    yield made
    made.close()


@pytest.fixture
def customer(serving: runtime.Runtime, clock: Clock) -> Customer:
    """A customer whose calls are worked on by the serving process."""
    made = Customer.new(serving.database, clock)
    made.process_id = serving.process_id
    return made


@pytest.fixture
def next_process(serving: runtime.Runtime, database_url: str, clock: Clock) -> Iterator[runtime.Runtime]:
    """Another one, which looks for what the first may have left."""
    made = runtime.start(server_settings(database_url), now_ms=clock, rules=())
    yield made
    made.close()


def die(rt: runtime.Runtime) -> None:
    """The kernel drops the lock, and the file that carried it stays; or PostgreSQL does, a moment later."""
    if isinstance(rt.lock, FileLock):
        rt.lock._file.close()
    elif isinstance(rt.lock, ServerLock) and rt.lock._connection is not None:
        rt.lock._connection.close()
        until(lambda: rt.database.dead({rt.process_id: 0}), what="the server has noticed")


def states(customer: Customer) -> dict[int, tuple[str, str | None]]:
    """Each call's state and reason."""
    rows = customer.write(lambda tx: reports.newest_calls(tx, most=1000))
    return {row.call_id: (row.state, row.reason) for row in rows}


def test_a_living_process_keeps_its_calls(customer: Customer, next_process: runtime.Runtime) -> None:
    call = customer.admit()
    assert sweep.run_once(next_process) == 0
    assert states(customer)[call.call_id] == ("held", None)


def test_a_dead_process_loses_its_held_calls_and_only_those(
    serving: runtime.Runtime, customer: Customer, next_process: runtime.Runtime
) -> None:
    """A call whose outcome is unknown is the operator's; one that fal's queue has is fal's."""
    held, queued, parked, done = (customer.admit() for _ in range(4))
    move = text("UPDATE calls SET state = 'sent' WHERE call_id = :call")
    customer.write(lambda tx: tx.run(move, call=queued.call_id))
    customer.finish(parked, Verdict("unknown", reason="no_units"))
    customer.finish(done, Verdict("settled", customer.account().balance_micros, "1", "fal", 1))
    die(serving)
    assert sweep.run_once(next_process) == 1
    assert states(customer) == {
        held.call_id: ("released", "process_died"),
        queued.call_id: ("sent", None),
        parked.call_id: ("unknown", "no_units"),
        done.call_id: ("settled", None),
    }
    assert customer.standing() == (0, queued.held_micros + parked.held_micros)
    assert sweep.run_once(next_process) == 0


def test_a_dead_process_is_told_to_have_ended_and_leaves_no_file(
    serving: runtime.Runtime, customer: Customer, next_process: runtime.Runtime, engine: str
) -> None:
    die(serving)
    sweep.run_once(next_process)
    running = text("SELECT process_id FROM processes WHERE ended_at IS NULL AND pid > 1")
    assert customer.write(lambda tx: tx.all(running)) == [(next_process.process_id,)]
    if engine == "sqlite":
        assert not lock_path(serving.database.path, serving.process_id).exists()


def test_more_calls_than_one_transaction_takes_are_all_released(
    serving: runtime.Runtime, customer: Customer, next_process: runtime.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "BATCH", 3)
    for _ in range(8):
        customer.admit()
    die(serving)
    assert sweep.run_once(next_process) == 8
    assert customer.standing() == (1_000_000, 0)


def test_two_that_sweep_at_once_release_each_hold_once(
    serving: runtime.Runtime, customer: Customer, next_process: runtime.Runtime, database_url: str, clock: Clock
) -> None:
    third = runtime.start(server_settings(database_url), now_ms=clock, rules=())
    for _ in range(20):
        customer.admit()
    die(serving)
    jobs = [gevent.spawn(sweep.run_once, rt) for rt in (next_process, third)]
    gevent.joinall(jobs, raise_error=True)
    assert sum(job.value for job in jobs) == 20
    assert customer.standing() == (1_000_000, 0)
    third.close()


def test_an_overdue_call_is_released_after_a_grace_by_its_own_process(
    serving: runtime.Runtime, customer: Customer, next_process: runtime.Runtime, clock: Clock
) -> None:
    """Another's clock may be an hour ahead, and it does not know what the first one is still at."""
    call = customer.admit(deadline_in_ms=1000)
    clock.tick(1000 + sweep.GRACE_MS)
    assert sweep.run_once(serving) == 0
    clock.tick(1)
    assert sweep.run_once(next_process) == 0
    assert sweep.run_once(serving) == 1
    assert states(customer)[call.call_id] == ("released", "overdue")


def test_a_call_whose_end_is_being_written_is_left_alone_however_late(
    serving: runtime.Runtime, customer: Customer, clock: Clock
) -> None:
    """Its charge waits for the disk; releasing the hold now would give fal's work away."""
    busy, lost = customer.admit(deadline_in_ms=1), customer.admit(deadline_in_ms=1)
    serving.working_on.add(busy.call_id)
    clock.tick(10 * sweep.GRACE_MS)
    assert sweep.run_once(serving) == 1
    assert {number: state for number, (state, _) in states(customer).items()} == {
        busy.call_id: "held", lost.call_id: "released",
    }  # fmt: skip


def test_a_call_that_is_swept_counts_as_ended_and_free(
    serving: runtime.Runtime, customer: Customer, next_process: runtime.Runtime
) -> None:
    customer.admit()
    die(serving)
    sweep.run_once(next_process)
    (row,) = customer.write(lambda tx: reports.usage(tx, "model"))
    assert (row.calls, row.charged_micros) == (1, 0)


def test_who_answers_after_the_sweep_is_told_and_charges_nothing(
    serving: runtime.Runtime, customer: Customer, next_process: runtime.Runtime
) -> None:
    call = customer.admit()
    die(serving)
    sweep.run_once(next_process)
    with pytest.raises(calls.CallEnded):
        customer.finish(call, Verdict("settled", call.held_micros, "1", "fal", 1))
    assert customer.standing() == (1_000_000, 0)
