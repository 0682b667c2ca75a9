"""Measures jobs and streams through this proxy, in front of the simulator.

    python bench/run_queue.py               5,000 jobs and 500 streams, under three minutes
    python bench/run_queue.py --jobs 500 --streams 50
    python bench/run_queue.py --write       also write its chapter of bench/RESULTS.md

How long after a job completed it is settled although nobody asks about it, and what that costs in calls to fal; and how
much older events are when they arrive than from the simulator directly. Tables go to stdout, progress to stderr. Exit
status 1 when a target is missed or the books do not add up, 2 when the benchmark cannot run here.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import sqlite3
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import events
import load
import report
from process import BenchError, Cores, choose_cores, raise_descriptor_limit
from stacks import FAL_KEY, JSON_HEADERS, Running, abhiapi
from stub import MODEL_PATH, Stub, simulator
from workloads import small_body

RESULTS = Path(__file__).with_name("RESULTS.md")
INTERVAL_S = 5  # ABHIAPI_RECONCILE_INTERVAL_S as it comes
TARGET_P99_S = 2 * INTERVAL_S  # contract 2
LEAD_S, WINDOW_S, TAIL_S = 15, 30, 60
SUBMITTERS = 32
FAR_S = 0.15  # how long each answer about a job takes, as from a fal that is far away
EVENTS, EVENT_S = 20, 1.0
SEED = 3

HOW_TO_READ = f"""\
The simulator and the load generator share a core, the proxy has one for itself. After everything `ledger verify` must
be ok, no hold left, and the balance exact.

- Jobs are submitted through the proxy, and from then on nobody asks about them. Each completes at a random moment of
  the same {WINDOW_S} s, and each answer about one takes {FAR_S} s, as from a fal that is far away. *Settled after* is
  the time from the simulator's completion of a job to its `finished_at` in the ledger. *Calls to fal* are status and
  result calls, of the whole time that jobs were open. CPU is the proxy's, while it only looked at open jobs.
- An event's *age* is the time from its being sent by the simulator to its arrival; streams send one event a second, and
  start evenly over a second. The direct connection is measured with the same load generator right before.
- Targets: 99 of 100 jobs settled within {TARGET_P99_S} s, twice `ABHIAPI_RECONCILE_INTERVAL_S`; every stream whole; the
  books exact."""


@dataclass(frozen=True, slots=True)
class Jobs:
    """What became of the jobs. Ages in seconds, in order."""

    count: int
    submit_s: float
    settled_after_s: list[float]
    calls_per_job: float
    open_for_s: float
    cpu_share: float


def main() -> int:
    """Measure, print, and say with the exit status whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=5_000)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--write", action="store_true", help=f"write a chapter of {RESULTS.name} beside this file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    try:
        raise_descriptor_limit()
        cores = choose_cores()
        os.sched_setaffinity(0, {cores.load})
        with tempfile.TemporaryDirectory(prefix="abhiapi-bench-") as name:
            about = report.machine(cores, Path(name))
            jobs, streams, problems = measure(Path(name), cores, arguments.jobs, arguments.streams)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    verdict = "\n".join(f"- {problem}" for problem in problems) or "- Targets met, books exact."
    page = "\n\n".join(
        ("# Jobs and streams", about, HOW_TO_READ, f"## Verdict, jobs and streams\n\n{verdict}", tables(jobs, streams))
    )
    print(page)
    if arguments.write:
        report.write_chapter(RESULTS, page)
    return 1 if problems else 0


def measure(folder: Path, cores: Cores, jobs: int, streams: int) -> tuple[Jobs, dict[str, events.Streams], list[str]]:
    with simulator(folder, cores.load) as fal, abhiapi(fal, folder, cores.proxy) as proxy:
        seen = measure_jobs(proxy, fal, folder / "abhi.db", jobs)
        flows = measure_streams(proxy, fal, streams)
        assert proxy.process is not None
        assert proxy.books is not None
        proxy.process.stop()
        proxy.books.expect(jobs + streams)
        problems = proxy.books.problems()
    p99_s = load.percentile(seen.settled_after_s, 99)
    if not p99_s <= TARGET_P99_S:
        problems.append(f"99 of 100 jobs were settled within {p99_s:.1f} s, not {TARGET_P99_S} s")
    problems += [f"{name}: {flow.failed} streams were not whole" for name, flow in flows.items() if flow.failed]
    return seen, flows, problems


# --- jobs ---------------------------------------------------------------------------------------------------------


def measure_jobs(proxy: Running, fal: Stub, database: Path, count: int) -> Jobs:
    """Submit, wait until the last is settled, and compare the simulator's times with the ledger's."""
    assert proxy.process is not None
    started = time.monotonic()
    moments = random.Random(SEED)
    completes = [started + LEAD_S + WINDOW_S * moments.random() for _ in range(count)]
    asyncio.run(_submit(proxy, completes))
    submitted = time.monotonic()
    print(f"bench: {count} jobs submitted in {submitted - started:.1f} s", file=sys.stderr)
    if submitted - started > LEAD_S:
        raise BenchError(f"submitting took longer than {LEAD_S} s: measure fewer jobs, or on a machine at rest")
    calls_before, cpu_before = _calls(fal), proxy.process.usage().cpu_s
    time.sleep(max(0.0, started + LEAD_S - submitted))
    cpu_share = (proxy.process.usage().cpu_s - cpu_before) / (time.monotonic() - submitted)
    while _open(database):
        if time.monotonic() > started + LEAD_S + WINDOW_S + TAIL_S:
            raise BenchError(f"{_open(database)} jobs are still open")
        time.sleep(0.2)
    settled = time.monotonic()
    calls_after = _calls(fal)
    return Jobs(
        count=count,
        submit_s=submitted - started,
        settled_after_s=_settled_after(fal, database),
        calls_per_job=(calls_after - calls_before) / count,
        open_for_s=settled - submitted,
        cpu_share=cpu_share,
    )


async def _submit(proxy: Running, completes: list[float]) -> None:
    """Every job, each with the moment of its completion, over a few connections."""
    gate = asyncio.Semaphore(SUBMITTERS)
    sockets = await asyncio.gather(*(load.connect(proxy.port, gate) for _ in range(SUBMITTERS)))
    todo = iter(completes)

    async def work(sock: socket.socket) -> None:
        for moment in todo:
            waits_s = max(0.0, moment - time.monotonic())
            weather = f"run_s=0; queue_s={waits_s:.3f}; poll_delay_s={FAR_S}"
            headers = proxy.headers | {"x-fal-sandbox": weather}
            status = await load.call(sock, load.Request(proxy.port, "/queue" + MODEL_PATH, headers, small_body()))
            if status != 200:
                raise BenchError(f"a submit got {status}")

    await asyncio.gather(*(work(sock) for sock in sockets))
    for sock in sockets:
        sock.close()


def _calls(fal: Stub) -> int:
    """How many calls the simulator has received."""
    return int(_asked(fal, "/_sandbox/calls?last=0")["total"])


def _asked(fal: Stub, path: str) -> dict[str, object]:
    with urllib.request.urlopen(fal.url + path, timeout=60) as answer:
        told: dict[str, object] = json.load(answer)
    return told


def _open(database: Path) -> int:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as books:
        (number,) = books.execute("SELECT count(*) FROM calls WHERE state IN ('held', 'sent')").fetchone()
    return int(number)


def _settled_after(fal: Stub, database: Path) -> list[float]:
    jobs = _asked(fal, "/_sandbox/jobs")["jobs"]
    assert isinstance(jobs, list)
    completed = {job["request_id"]: datetime.fromisoformat(job["completed_at"]).timestamp() for job in jobs}
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as books:
        rows = books.execute("SELECT fal_request_id, finished_at FROM calls WHERE mode = 'queue'").fetchall()
    return sorted(finished_ms / 1e3 - completed[request_id] for request_id, finished_ms in rows)


# --- streams ------------------------------------------------------------------------------------------------------


def measure_streams(proxy: Running, fal: Stub, count: int) -> dict[str, events.Streams]:
    """The same streams directly and through the proxy, one after the other."""
    direct = Running(fal.port, headers=JSON_HEADERS | {"authorization": f"Key {FAL_KEY}"})
    measured = {}
    for name, running in (("simulator, no proxy", direct), ("AbhiAPI", proxy)):
        weather = {"x-fal-sandbox": f"events={EVENTS}; event_delay_s={EVENT_S}; pings=1", "accept": "text/event-stream"}
        running = replace(running, headers=running.headers | weather)
        request = load.Request(running.port, MODEL_PATH + "/stream", running.headers, small_body())
        measured[name] = events.streams(request, count=count, events=EVENTS, interval_s=EVENT_S)
        print(f"bench: streams, {name}: {measured[name].whole} whole", file=sys.stderr)
    return measured


def tables(jobs: Jobs, streams: dict[str, events.Streams]) -> str:
    after = [f"{load.percentile(jobs.settled_after_s, percent):.2f}" for percent in (50, 99, 100)]
    looked = (f"{jobs.calls_per_job:.1f}", f"{jobs.open_for_s:.0f}", f"{jobs.cpu_share:.0%}")
    direct, through = streams.values()
    rows = []
    for name, flow in streams.items():
        added = [
            f"{1e3 * (load.percentile(through.ages_s, percent) - load.percentile(direct.ages_s, percent)):.2f}"
            if flow is through
            else ""
            for percent in (50, 99)
        ]
        ages = [f"{1e3 * load.percentile(flow.ages_s, percent):.2f}" for percent in (50, 99)]
        rows.append(f"| {name} | {flow.whole} | {len(flow.ages_s):,} | {' | '.join(ages)} | {' | '.join(added)} |")
    return f"""\
## {jobs.count:,} open jobs that nobody asks about

| submitted in s | settled after p50 s | p99 s | longest s | calls to fal per job | open for s | CPU meanwhile |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| {jobs.submit_s:.1f} | {" | ".join((*after, *looked))} |

## {direct.whole} streams at once

| stack | whole streams | events | age p50 ms | age p99 ms | added p50 | added p99 |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}
"""


if __name__ == "__main__":
    sys.exit(main())
