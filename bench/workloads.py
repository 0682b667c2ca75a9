"""The workloads: which stub stands behind the stacks, what is sent, and the figures of one stack under it."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from statistics import median
from typing import Self

import load
import stub
from stacks import Running
from stub import Stub, StubStarter

CONNECTIONS = (1, 16, 64, 256)
BIG_CONNECTIONS = 4
SLOW_CALLS = 2_000
SMALL_INPUT = {"prompt": "a cat", "image_size": "landscape_4_3"}


@dataclass(frozen=True, slots=True)
class Scale:
    """How long to measure: QUICK for a look, FULL for figures worth publishing."""

    rounds: int
    warm_burst_s: int
    warm_bursts: int  # at most
    measure_s: int
    big_calls: int  # on each of BIG_CONNECTIONS
    slow_warm_calls: int  # on each of WARM_CONNECTIONS


QUICK = Scale(rounds=1, warm_burst_s=1, warm_bursts=3, measure_s=2, big_calls=1, slow_warm_calls=10)
FULL = Scale(rounds=3, warm_burst_s=2, warm_bursts=15, measure_s=6, big_calls=10, slow_warm_calls=300)
WARM_CONNECTIONS = 64
WARM_GAIN = 1.03  # a burst that is not this much faster than all before brought nothing more
WARM_PATIENCE = 2


@dataclass(frozen=True, slots=True)
class Sample:
    """One stack at one load. The process figures are of the proxy's whole tree, and not a number for `direct`."""

    answered: float
    failed: float
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_s_per_1000: float
    rss_mb: float
    peak_mb: float
    in_flight: float = math.nan  # most calls at once that the stub held, where it counts them

    @classmethod
    def of_rounds(cls, samples: list[Self]) -> Self:
        """Each figure's median, but all failures: one bad round must show."""
        medians = {item.name: median(getattr(sample, item.name) for sample in samples) for item in fields(cls)}
        return cls(**medians | {"failed": sum(sample.failed for sample in samples)})


Cells = Iterator[tuple[str, Sample]]


@dataclass(frozen=True, slots=True)
class Workload:
    """A question the benchmark asks of every stack."""

    name: str
    title: str
    stub: StubStarter
    body: Callable[[], bytes]
    measure: Callable[[Running, Stub, bytes, Scale], Cells]
    kill_after: bool = False  # end the proxy with SIGKILL after its last answer: what it told callers must be on disk


def connections_label(number: int) -> str:
    return "1 connection" if number == 1 else f"{number} connections"


def small_body() -> bytes:
    return json.dumps(SMALL_INPUT).encode()


def big_body() -> bytes:
    """A request of about BIG_BYTES: an image inline as a data URI, as fal's clients send small files."""
    return json.dumps(SMALL_INPUT | {"image_url": f"data:image/png;base64,{stub.big_text()}"}).encode()


def measure_small(running: Running, upstream: Stub, body: bytes, scale: Scale) -> Cells:
    """Small JSON at each number of connections, fewest first."""
    request = _request(running, body)
    _warm_up(running, request, scale)
    for connections in CONNECTIONS:
        yield (
            connections_label(connections),
            _observe(running, partial(_wrk, running, request, connections, scale.measure_s)),
        )


def _warm_up(running: Running, request: load.Request, scale: Scale) -> None:
    """Bursts of calls until they get no faster: Node compiles for some 20 s on one core before it is at its best."""
    best, in_vain = 0.0, 0
    for _ in range(scale.warm_bursts):
        outcome = _wrk(running, request, WARM_CONNECTIONS, scale.warm_burst_s)
        rate = outcome.answered / outcome.seconds
        in_vain = 0 if rate > WARM_GAIN * best else in_vain + 1
        best = max(best, rate)
        if in_vain == WARM_PATIENCE:
            return


def _wrk(running: Running, request: load.Request, connections: int, seconds: int) -> load.Outcome:
    """wrk, with the ledger told what to expect of it."""
    outcome = load.wrk(request, connections=connections, seconds=seconds)
    if running.books:
        running.books.expect(outcome.answered, cut=connections + outcome.failed)
    return outcome


def measure_big(running: Running, upstream: Stub, body: bytes, scale: Scale) -> Cells:
    """Large bodies, one way or the other, on a few connections."""
    request = _request(running, body)
    _calls(running, request, BIG_CONNECTIONS, 1)
    yield (
        connections_label(BIG_CONNECTIONS),
        _observe(running, partial(_calls, running, request, BIG_CONNECTIONS, scale.big_calls)),
    )


def measure_slow(running: Running, upstream: Stub, body: bytes, scale: Scale) -> Cells:
    """SLOW_CALLS at once, each answered after SLOW_ANSWER_S; warmed up with calls answered at once."""
    request = _request(running, body)
    _calls(running, request, WARM_CONNECTIONS, scale.slow_warm_calls)
    upstream.set_delay(stub.SLOW_ANSWER_S)
    sample = _observe(running, partial(_calls, running, request, SLOW_CALLS, 1))
    yield f"{SLOW_CALLS:,} calls at once", replace(sample, in_flight=upstream.peak_in_flight())
    upstream.set_delay(0)


def _calls(running: Running, request: load.Request, connections: int, per_connection: int) -> load.Outcome:
    """The client of our own, with the ledger told what to expect of it."""
    outcome = load.calls(request, connections=connections, per_connection=per_connection)
    if running.books:
        running.books.expect(outcome.answered, cut=outcome.failed)
    return outcome


def _observe(running: Running, generate: Callable[[], load.Outcome]) -> Sample:
    """Run the load and read what the proxy used for it."""
    before = running.process.usage() if running.process else None
    outcome = generate()
    after = running.process.usage() if running.process else None
    cpu_s = after.cpu_s - before.cpu_s if after and before else math.nan
    return Sample(
        answered=outcome.answered,
        failed=outcome.failed,
        per_s=outcome.answered / outcome.seconds,
        p50_ms=outcome.p50_ms,
        p99_ms=outcome.p99_ms,
        cpu_s_per_1000=1_000 * cpu_s / outcome.answered if outcome.answered else math.nan,
        rss_mb=after.rss_bytes / 1e6 if after else math.nan,
        peak_mb=after.peak_bytes / 1e6 if after else math.nan,
    )


def _request(running: Running, body: bytes) -> load.Request:
    return load.Request(running.port, running.path, running.headers, body)


WORKLOADS = (
    Workload("small", "Small JSON", stub.small_json, small_body, measure_small),
    Workload("answers", "50 MB answers", stub.big_json, small_body, measure_big),
    Workload("requests", "50 MB requests", stub.python_stub, big_body, measure_big),
    Workload("slow", "Calls of 5 s in flight", stub.python_stub, small_body, measure_slow, kill_after=True),
)
