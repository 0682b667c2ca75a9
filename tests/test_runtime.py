"""What a serving process keeps in memory: read by one greenlet for all, and never for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent.event import Event

from abhiapi import prices, runtime
from abhiapi.db import Reads, Tx
from abhiapi.errors import DatabaseUnavailable
from tests.harness import Clock
from tests.rows import server_settings


class Slow(Reads):
    """Reads that let others go on, as a server's do."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads
        self.trouble: DatabaseUnavailable | None = None
        self.go_on = Event()
        self.go_on.set()

    def read(self, op: Callable[[Tx], Any]) -> Any:
        self.go_on.wait()
        if self.trouble is not None:
            raise self.trouble
        return self._reads.read(op)

    def close(self) -> None:
        self._reads.close()


@pytest.fixture
def rt(database_url: str, clock: Clock) -> Iterator[runtime.Runtime]:
    made = runtime.start(server_settings(database_url), now_ms=clock, rules=())
    made.reader = Slow(made.reader)
    yield made
    made.close()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    catalogue = prices.catalogue

    def read(*given: Any, **more: Any) -> Any:
        counted.append(1)
        return catalogue(*given, **more)

    monkeypatch.setattr(prices, "catalogue", read)
    return counted


def at_once(rt: runtime.Runtime, version: prices.Version) -> list[Any]:
    """What a hundred get who have all come before the first has read anything."""
    assert isinstance(rt.reader, Slow)
    rt.reader.go_on.clear()
    jobs = [gevent.spawn(rt.catalogue, version) for _ in range(100)]
    gevent.spawn(rt.reader.go_on.set)
    gevent.joinall(jobs)
    return [job.exception or job.value for job in jobs]


def test_prices_are_read_by_one_greenlet_for_all(rt: runtime.Runtime, reads: list[int], clock: Clock) -> None:
    version = rt.reader.read(prices.version)
    first = at_once(rt, version)
    assert len(reads) == 1
    assert len(set(map(id, first))) == 1
    clock.tick(runtime.CATALOGUE_LASTS_MS)
    second = at_once(rt, version)  # old by age alone: whoever comes first reads, and nobody waits for it
    assert len(reads) == 2
    assert len(set(map(id, second))) == 2
    assert second.count(first[0]) == 99
    assert set(map(id, at_once(rt, version))) == {id(second[0])}
    assert len(reads) == 2


def test_a_changed_price_is_never_served_old(rt: runtime.Runtime, reads: list[int]) -> None:
    """All wait for the new one, which one of them reads."""
    rt.catalogue()
    rt._catalogue_version = (-1, -1, -1)
    looked = rt.reader.read(prices.version)
    assert len({id(one) for one in at_once(rt, looked)}) == 1
    assert len(reads) == 2


def test_who_waits_for_a_reading_hears_of_its_trouble(rt: runtime.Runtime, reads: list[int]) -> None:
    assert isinstance(rt.reader, Slow)
    rt.reader.trouble = DatabaseUnavailable("away")
    assert at_once(rt, (9, 9, 9)) == [rt.reader.trouble] * 100
    rt.reader.trouble = None
    rt.catalogue()
    assert len(reads) == 1
