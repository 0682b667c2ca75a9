"""Background work of several processes: done by one of them, and by another when that one dies, hangs or is late."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import gevent
import pytest
from sqlalchemy import select

from abhiapi import processes as ended
from abhiapi import runtime, tables, timers, turns
from tests.harness import Clock
from tests.rows import server_settings

pytestmark = pytest.mark.engines

INTERVAL_MS = 5_000
UNTIL = select(tables.timers.c.claimed_until)


@pytest.fixture
def processes(database_url: str, clock: Clock) -> Iterator[list[runtime.Runtime]]:
    """Two over one database."""
    settings = server_settings(database_url)
    made = [runtime.start(settings, now_ms=clock, rules=()) for _ in range(2)]
    yield made
    for rt in made:
        rt.close()


def take(rt: runtime.Runtime, work: Callable[[], object] = lambda: None) -> bool:
    """Whether the work was this process's."""
    done = []
    turns.take(rt, "work", lambda: done.append(work()), interval_ms=INTERVAL_MS)
    return bool(done)


def test_work_is_done_by_one_and_is_due_again_an_interval_after_it_began(
    processes: list[runtime.Runtime], clock: Clock
) -> None:
    one, other = processes
    seen = []

    def work() -> None:
        seen.append(take(other))
        clock.tick(1_000)

    assert take(one, work)
    assert not take(other)
    clock.tick(INTERVAL_MS - 1_001)
    assert not take(other)
    clock.tick()
    assert take(other)
    assert seen == [False]
    assert one.database.read(lambda tx: timers.done_at(tx, "work")) == clock.now_ms


def test_the_turn_of_a_dead_process_moves_when_its_lease_ends(processes: list[runtime.Runtime], clock: Clock) -> None:
    class Death(BaseException):
        pass

    def die() -> None:
        raise Death

    one, other = processes
    with pytest.raises(Death):
        take(one, die)
    clock.tick(turns.LEASE_MS - 1)
    assert not take(other)
    clock.tick()
    assert take(other)


def test_who_had_the_last_turn_waits_for_nobody(processes: list[runtime.Runtime], clock: Clock) -> None:
    """Alone, a process works at the pace of its loop: whatever its clock does, and where a turn was not given back."""

    class Lost(BaseException):
        pass

    def be_lost() -> None:
        raise Lost

    one, other = processes
    assert take(one)
    assert take(one)
    clock.tick(-30_000)
    assert take(one)
    with pytest.raises(Lost):
        take(one, be_lost)
    assert not take(other)
    assert take(one)


def test_whose_process_has_ended_makes_nobody_wait(processes: list[runtime.Runtime], clock: Clock) -> None:
    """After a restart open jobs are looked at right away."""
    one, other = processes
    assert take(one)
    assert not take(other)
    one.write(lambda tx: ended.end(tx, one.process_id, now_ms=clock.now_ms))
    assert take(other)


def test_work_that_outlasts_its_turn_counts_as_done(processes: list[runtime.Runtime], clock: Clock) -> None:
    one, other = processes

    def late() -> None:
        clock.tick(turns.LEASE_MS)
        with pytest.raises(ZeroDivisionError):
            take(other, lambda: 1 // 0)
        clock.tick()

    assert take(one, late)
    assert one.database.read(lambda tx: timers.done_at(tx, "work")) == clock.now_ms


def test_work_that_failed_is_tried_again_after_the_interval(processes: list[runtime.Runtime], clock: Clock) -> None:
    def fail() -> None:
        raise ValueError("trouble")

    one, other = processes
    with pytest.raises(ValueError, match="trouble"):
        take(one, fail)
    clock.tick(INTERVAL_MS)
    assert take(other)


def test_a_turn_is_kept_while_the_work_runs(
    processes: list[runtime.Runtime], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many leases that takes, and no other process's turn is given back at its end."""
    monkeypatch.setattr(turns, "RENEW_S", 0.001)
    one, other = processes
    seen = []

    def renewed() -> bool:
        row = one.database.read(lambda tx: tx.one(UNTIL))
        return row is not None and row[0] == clock.now_ms + turns.LEASE_MS

    def work() -> None:
        for _ in range(5):
            clock.tick(turns.LEASE_MS - 1)
            with gevent.Timeout(20):
                while not renewed():
                    gevent.sleep(0.001)
            seen.append(take(other))

    assert take(one, work)
    assert seen == [False] * 5


def test_who_was_late_takes_nothing_from_the_next(processes: list[runtime.Runtime], clock: Clock) -> None:
    """A process that stood still for longer than its lease ends its work without ending the other's turn."""
    one, other = processes
    inside: list[bool] = []

    def theirs() -> None:
        inside.append(take(one))

    def late() -> None:
        clock.tick(turns.LEASE_MS)
        turns.take(other, "work", lambda: None, interval_ms=10 * INTERVAL_MS)

    assert take(one, late)
    clock.tick(INTERVAL_MS)
    assert not take(one)  # the other's word on when it is due stands
    clock.tick(10 * INTERVAL_MS)
    assert take(other, theirs)
    assert inside == [False]
