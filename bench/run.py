"""Measures this proxy, nginx and the official fal proxy side by side, all in front of the same stub, in one run.

    make bench                              all workloads, median of three rounds, about fifteen minutes
    python bench/run.py --quick             one short round, under two minutes
    python bench/run.py --only slow         one workload: small, answers, requests or slow
    python bench/run.py --engines           small calls on SQLite, and on PostgreSQL with 1, 2 and 4 processes
    python bench/run.py --write             also write its chapter of bench/RESULTS.md

Tables go to stdout, progress to stderr. Exit status 1 when a target is missed or the books do not add up, 2 when the
benchmark cannot run here.
"""

import argparse
import http.client
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import report
from install import install
from process import BenchError, Cores, choose_cores, raise_descriptor_limit
from stacks import ENGINES, STACKS, check_answer
from stub import MODEL_PATH, Stub
from workloads import FULL, QUICK, WORKLOADS, Sample, Scale, Workload

RESULTS = Path(__file__).with_name("RESULTS.md")
PROBE_TIMEOUT_S = 120

Cells = dict[str, dict[str, Sample]]  # by load, then by stack


def main() -> int:
    """Measure, print, and say with the exit status whether all is well."""
    arguments = parse_arguments()
    stacks: list[str] = [*arguments.stacks, *ENGINES] if arguments.engines else arguments.stacks
    only = "small" if arguments.engines else arguments.only
    workloads = [workload for workload in WORKLOADS if only in (None, workload.name)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    try:
        install(stacks)
        raise_descriptor_limit()
        cores = choose_cores()
        os.sched_setaffinity(0, {cores.load})
        with tempfile.TemporaryDirectory(prefix="abhiapi-bench-") as name:
            about = report.machine(cores, Path(name))
            scale = QUICK if arguments.quick else FULL
            bench = Bench(stacks, replace(scale, rounds=arguments.rounds or scale.rounds), cores, Path(name))
            results: dict[str, Cells] = {}
            problems: list[str] = []
            for workload in workloads:
                results[workload.name], found = bench.measure(workload)
                problems += found
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    problems += report.missed_targets(results)
    verdict = "\n".join(f"- {problem}" for problem in problems) or "- Targets met, books exact."
    page = "\n\n".join(
        (
            "# Engines and processes" if arguments.engines else "# Benchmark",
            about,
            report.HOW_TO_READ,
            f"## Verdict\n\n{verdict}",
            report.tables(workloads, results),
        )
    )
    print(page)
    if arguments.write:
        report.write_chapter(RESULTS, page)
    return 1 if problems else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round: a look, not figures to publish")
    parser.add_argument("--only", choices=[workload.name for workload in WORKLOADS], help="measure this workload alone")
    parser.add_argument("--engines", action="store_true", help="small calls alone, with PostgreSQL beside SQLite")
    parser.add_argument("--rounds", type=int, help=f"instead of {FULL.rounds}, or {QUICK.rounds} with --quick")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} beside this file")
    parser.add_argument(
        "--stacks", type=stack_names, default=list(STACKS), help=f"comma-separated, of {', '.join(STACKS)}"
    )
    return parser.parse_args()


def stack_names(text: str) -> list[str]:
    """The named stacks in the order of the tables."""
    names = text.split(",")
    unknown = set(names) - set(STACKS)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
    return [name for name in STACKS if name in names]


@dataclass(frozen=True, slots=True)
class Bench:
    """What every measurement of a run shares."""

    stacks: list[str]
    scale: Scale
    cores: Cores
    folder: Path

    def measure(self, workload: Workload) -> tuple[Cells, list[str]]:
        """All stacks under one workload: each figure's median over the rounds, and what was wrong."""
        rounds: dict[str, dict[str, list[Sample]]] = {}
        problems: list[str] = []
        with workload.stub(self.new_folder(), self.cores.load) as stub:
            body = workload.body()
            expected = post(stub.port, MODEL_PATH, {"content-type": "application/json"}, body)
            for number in range(self.scale.rounds):
                for name in rotated(self.stacks, number):
                    samples, found = self.measure_stack(name, workload, stub, body, expected)
                    problems += found
                    for load, sample in samples.items():
                        rounds.setdefault(load, {}).setdefault(name, []).append(sample)
        cells = {
            load: {name: Sample.of_rounds(by_stack[name]) for name in self.stacks} for load, by_stack in rounds.items()
        }
        return cells, problems

    def measure_stack(
        self, name: str, workload: Workload, stub: Stub, body: bytes, expected: bytes
    ) -> tuple[dict[str, Sample], list[str]]:
        """Start one stack, compare one answer of it, measure it, stop it, check its books."""
        started = time.monotonic()
        with (STACKS | ENGINES)[name](stub, self.new_folder(), self.cores.proxy) as running:
            problem = check_answer(name, post(running.port, running.path, running.headers, body), expected)
            problems = [problem] if problem else []
            if running.books:
                running.books.expect(1)
            samples = dict(workload.measure(running, stub, body, self.scale))
            if running.process:
                running.process.stop(kill=workload.kill_after)
            if running.books:
                problems += running.books.problems()
        print(f"bench: {workload.name}, {name}: {time.monotonic() - started:.1f} s", file=sys.stderr)
        return samples, [f"{workload.name}: {problem}" for problem in problems]

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))


def post(port: int, path: str, headers: dict[str, str], body: bytes) -> bytes:
    """The body of a 200 answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise BenchError(f"the probe of {path} got {answer.status}: {text[:300]!r}")
    return text


def rotated(names: list[str], by: int) -> list[str]:
    """Another stack goes first in each round."""
    start = by % len(names)
    return names[start:] + names[:start]


if __name__ == "__main__":
    sys.exit(main())
