"""Work that one process at a time does now and then."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from abhiapi import processes, timers
from abhiapi.db import Database
from tests.harness import Clock

pytestmark = pytest.mark.engines

MINUTE, DAY = 60_000, 86_400_000


def claim(database: Database, clock: Clock, process_id: int = 1) -> bool:
    return database.write(
        lambda tx: timers.claim(
            tx, "work", process_id=process_id, now_ms=clock.now_ms, lease_ms=30 * MINUTE, interval_ms=DAY
        )
    )


def done(database: Database, clock: Clock) -> None:
    database.write(lambda tx: timers.done(tx, "work", now_ms=clock.now_ms, due_in_ms=DAY))


def test_work_that_was_never_done_is_due_at_once_and_once(database: Database, clock: Clock) -> None:
    assert [claim(database, clock) for _ in range(3)] == [True, False, False]
    assert database.read(lambda tx: timers.done_at(tx, "work")) is None


def test_of_many_that_want_it_one_gets_it(database: Database, clock: Clock) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: claim(database, clock), range(16))) == 1


def test_work_that_was_done_is_due_a_day_later(database: Database, clock: Clock) -> None:
    claim(database, clock)
    done(database, clock)
    assert database.read(lambda tx: timers.done_at(tx, "work")) == clock.now_ms
    clock.tick(DAY - 1)
    assert not claim(database, clock)
    clock.tick()
    assert claim(database, clock)


def test_work_done_by_hand_counts(database: Database, clock: Clock) -> None:
    done(database, clock)
    assert not claim(database, clock)


def test_failed_work_is_tried_again_sooner(database: Database, clock: Clock) -> None:
    claim(database, clock)
    database.write(lambda tx: timers.failed(tx, "work", now_ms=clock.now_ms, due_in_ms=MINUTE))
    assert not claim(database, clock)
    clock.tick(MINUTE)
    assert claim(database, clock)


def test_the_claim_of_a_killed_process_runs_out(database: Database, clock: Clock) -> None:
    assert claim(database, clock)
    clock.tick(30 * MINUTE - 1)
    assert not claim(database, clock)
    clock.tick()
    assert claim(database, clock)


def test_the_claim_of_a_process_that_is_seen_dead_ends_there(database: Database, clock: Clock) -> None:
    """And with it none of a process that lives."""
    assert claim(database, clock, process_id=7)
    database.write(lambda tx: processes.end(tx, 8, now_ms=clock.now_ms))
    assert not claim(database, clock)
    database.write(lambda tx: processes.end(tx, 7, now_ms=clock.now_ms))
    assert claim(database, clock)


def test_a_clock_that_was_wrong_stops_nothing_for_longer_than_a_day(database: Database, clock: Clock) -> None:
    """Done, and claimed, by a process whose clock ran a year ahead."""
    right = clock.now_ms
    clock.tick(365 * DAY)
    claim(database, clock)
    clock.now_ms = right
    assert claim(database, clock)
    clock.tick(365 * DAY)
    done(database, clock)
    clock.now_ms = right + 31 * MINUTE
    assert claim(database, clock)


def test_a_clock_that_is_minutes_off_does_nothing_twice(database: Database, clock: Clock) -> None:
    claim(database, clock)
    done(database, clock)
    clock.tick(-5 * MINUTE)
    assert not claim(database, clock)
