"""The Idempotency-Key when several ask at once, in one process and in two; and when its day is over."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.event import Event

from abhiapi import idempotency, replay, runtime, sweep
from abhiapi.errors import UpstreamBroken, UpstreamUnreachable
from abhiapi.liveness import lock_path
from tests.harness import Clock
from tests.keyed import (
    JOB,
    QUEUE,
    Slow,
    ask,
    charges,
    error_of,
    header,
    house_of,
    is_replay,
    kept_keys,
    started,
)
from tests.scripted import FLUX, JSON, PICTURE, House, answer

pytestmark = pytest.mark.engines

DAY_MS = 24 * 3_600_000


@pytest.fixture
def house(tmp_path: Path, clock: Clock) -> Iterator[House]:
    with house_of(tmp_path, clock) as made:
        yield made


# --- one day ----------------------------------------------------------------------------------------------------


def test_a_key_is_kept_for_a_day(house: House, clock: Clock) -> None:
    ask(house)
    clock.tick(DAY_MS - 1)
    sweep.forget_old_keys(house.rt)
    assert is_replay(ask(house))
    clock.tick(1)
    house.fal.answer = answer([PICTURE])
    assert not is_replay(ask(house, body=b'{"prompt":"another cat"}'))  # forgotten even before it is swept
    assert len(house.fal.sent) == charges(house) == 2
    assert kept_keys(house) == 1


def test_the_sweep_removes_old_keys_in_batches(house: House, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "KEYS_BATCH", 3)
    for number in range(8):
        house.fal.answer = answer([PICTURE])
        ask(house, idempotency_key=f"k{number}")
    clock.tick(DAY_MS - 1)
    house.fal.answer = answer([PICTURE])
    ask(house, idempotency_key="younger")
    clock.tick(1)
    sweep.forget_old_keys(house.rt)
    assert kept_keys(house) == 1
    assert is_replay(ask(house, idempotency_key="younger"))


def test_a_call_that_may_still_be_charged_keeps_its_key_however_old(house: House, clock: Clock) -> None:
    house.fal.answer = UpstreamBroken("cut")
    ask(house, QUEUE)
    clock.tick(30 * DAY_MS)
    sweep.forget_old_keys(house.rt)
    assert error_of(ask(house, QUEUE)) == (500, "idempotency_outcome_unknown")
    assert len(house.fal.sent) == 1


# --- at the same time -------------------------------------------------------------------------------------------


def test_requests_that_race_are_one_call(house: House) -> None:
    slow = Slow(house)
    asked = [gevent.spawn(ask, house) for _ in range(30)]
    assert slow.has_it.wait(20)
    gevent.idle()
    slow.go_on.set()
    gevent.joinall(asked, timeout=20, raise_error=True)
    replies = [greenlet.value for greenlet in asked]
    assert {reply.body for reply in replies} == {replies[0].body}
    assert sum(is_replay(reply) for reply in replies) == 29
    assert len(house.fal.sent) == charges(house) == 1


def test_those_who_wait_run_anew_when_the_first_was_given_back(house: House) -> None:
    """One of them, that is; the others wait for that one."""
    slow = Slow(house)
    house.fal.answer = UpstreamUnreachable("no way")
    asked = [gevent.spawn(ask, house) for _ in range(10)]
    assert slow.has_it.wait(20)

    def serves() -> None:
        house.fal.answer = answer([PICTURE])

    house.fal.when_sent = serves
    slow.go_on.set()
    gevent.joinall(asked, timeout=20, raise_error=True)
    statuses = sorted(greenlet.value.status for greenlet in asked)
    assert statuses == [200] * 9 + [502]
    assert len(house.fal.sent) == 2
    assert charges(house) == 1


def test_another_request_is_told_at_once_while_the_first_runs(house: House) -> None:
    slow = Slow(house)
    first = gevent.spawn(ask, house)
    assert slow.has_it.wait(20)
    assert error_of(ask(house, body=b"{}")) == (422, "idempotency_key_reused")
    slow.go_on.set()
    assert first.get(timeout=20).status == 200


def test_waiting_has_an_end_and_leaves_nothing_behind(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(house)
    first = gevent.spawn(ask, house)
    assert slow.has_it.wait(20)
    hung_up = ask(house, has_hung_up=lambda: True)
    assert error_of(hung_up) == (409, "idempotency_in_progress")
    assert house.rt.limits.in_flight() == 1
    monkeypatch.setattr(replay, "SETTLE_PATIENCE_S", -house.rt.settings.upstream_timeout_s - 1)
    impatient = ask(house)
    assert error_of(impatient) == (409, "idempotency_in_progress")
    assert header(impatient, "Retry-After") is not None
    slow.go_on.set()
    assert first.get(timeout=20).status == 200
    assert len(house.fal.sent) == 1


@pytest.mark.parametrize(("path", "told"), [(FLUX, PICTURE), (QUEUE, JOB)])
def test_another_process_waits_for_the_first(
    house: House, tmp_path: Path, clock: Clock, path: str, told: bytes
) -> None:
    other, other_fal = started(tmp_path, clock)
    slow = Slow(house)
    house.fal.answer = answer([told])
    first = gevent.spawn(ask, house, path)
    assert slow.has_it.wait(20)
    second = gevent.spawn(ask, house, path, rt=other)
    gevent.idle()
    slow.go_on.set()
    assert second.get(timeout=20).body == first.get(timeout=20).body
    assert is_replay(second.value)
    assert other_fal.sent == []
    other.close()


@pytest.mark.engines("sqlite")
def test_an_answer_may_be_kept_a_moment_after_its_charge(
    house: House, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that lives is given that moment; one that is dead has nothing more to keep."""
    other, other_fal = started(tmp_path, clock)
    keeping = held_back(monkeypatch)
    first = gevent.spawn(ask, house)
    assert keeping.is_next.wait(20)
    assert house.last().state == "settled"
    others = [gevent.spawn(ask, house, rt=rt) for rt in (other, house.rt)]
    gevent.idle()
    assert not any(second.ready() for second in others)
    keeping.go_on.set()
    assert {second.get(timeout=20).body for second in others} == {first.get(timeout=20).body}

    monkeypatch.setattr(replay, "_keep", lambda *_: None)
    house.fal.answer = answer([PICTURE])
    ask(house, idempotency_key="crashed")
    monkeypatch.setattr(replay, "GRACE_S", 3600)
    house.rt.lock._file.close()  # as the kernel does
    sweep.run_once(other)
    refused = gevent.spawn(ask, house, idempotency_key="crashed", rt=other)
    assert error_of(refused.get(timeout=20)) == (410, "idempotency_answer_gone")
    assert other_fal.sent == []
    other.close()
    lock_path(house.rt.database.path, house.rt.process_id).touch()


class Late:
    """A reader whose first look at a key arrives late: on PostgreSQL others go on while it is on its way."""

    def __init__(self, rt: runtime.Runtime) -> None:
        self._reader, rt.reader = rt.reader, self
        self.has_looked, self.go_on = Event(), Event()

    def read(self, op: Any) -> Any:
        seen = self._reader.read(op)
        if isinstance(seen, idempotency.Found) and not self.has_looked.is_set():
            self.has_looked.set()
            assert self.go_on.wait(20)
        return seen

    def close(self) -> None:
        self._reader.close()


REFUSED = answer([b'{"detail":"no such size"}'], JSON, status=404)


@pytest.mark.parametrize("told", [answer([PICTURE]), REFUSED], ids=["charged", "released"])
def test_an_answer_that_is_kept_while_somebody_looks_is_found(
    database_url: str, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    """Seen ended and without an answer, in a process that has kept it when the look arrives."""
    with house_of(tmp_path, clock, database_url) as house:
        keeping = held_back(monkeypatch)
        house.fal.answer = deepcopy(told)
        first = gevent.spawn(ask, house)
        assert keeping.is_next.wait(20)
        late = Late(house.rt)
        again = gevent.spawn(ask, house)
        assert late.has_looked.wait(20)
        keeping.go_on.set()
        first.get(timeout=20)
        late.go_on.set()
        assert is_replay(again.get(timeout=20))
        assert again.value.body == first.value.body
        assert len(house.fal.sent) == 1


def test_a_call_whose_answer_is_kept_after_all_is_not_run_anew(
    database_url: str, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process was given its moment, had nothing to show, and was faster than who came to take the key."""
    monkeypatch.setattr(replay, "GRACE_S", 0)
    with house_of(tmp_path, clock, database_url) as house:
        keeping = held_back(monkeypatch)
        other, other_fal = started(tmp_path, clock, database_url)
        house.fal.answer = deepcopy(REFUSED)
        first = gevent.spawn(ask, house)
        assert keeping.is_next.wait(20)
        write = other.writer.write

        def late(op: Any, *, patience_s: float) -> Any:
            keeping.go_on.set()
            first.get(timeout=20)
            return write(op, patience_s=patience_s)

        monkeypatch.setattr(other.writer, "write", late)
        again = gevent.spawn(ask, house, rt=other)
        assert is_replay(again.get(timeout=20))
        assert again.value.body == first.value.body
        assert other_fal.sent == []
        other.close()


@dataclass
class Keeping:
    is_next: Event
    go_on: Event


def held_back(monkeypatch: pytest.MonkeyPatch) -> Keeping:
    """Answers are kept when told."""
    keeping, keep = Keeping(Event(), Event()), replay._keep

    def slowly(*arguments: Any) -> None:
        keeping.is_next.set()
        assert keeping.go_on.wait(20)
        keep(*arguments)

    monkeypatch.setattr(replay, "_keep", slowly)
    return keeping


@pytest.mark.engines("sqlite")
def test_a_call_of_a_dead_process_is_swept_and_runs_anew(house: House, tmp_path: Path, clock: Clock) -> None:
    slow = Slow(house)
    lost = gevent.spawn(ask, house)
    assert slow.has_it.wait(20)
    other, other_fal = started(tmp_path, clock)
    repeat = gevent.spawn(ask, house, rt=other)
    gevent.idle()
    assert other_fal.sent == []
    house.rt.lock._file.close()
    sweep.run_once(other)
    assert repeat.get(timeout=20).status == 200
    slow.go_on.set()
    lost.get(timeout=20)  # the dead do not answer; whatever this one says, it charges nothing
    assert len(other_fal.sent) == charges(house) == 1
    assert is_replay(ask(house, rt=other))
    other.close()
    lock_path(house.rt.database.path, house.rt.process_id).touch()
