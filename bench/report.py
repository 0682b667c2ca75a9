"""Turns samples into the tables that are printed and published, and says whether the targets are met."""

import math
import os
import platform
import re
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from install import EXPRESS
from process import Cores
from workloads import SLOW_CALLS, Sample, Workload

TARGET_RATIO = 1.3  # throughput against the official proxy, at every number of connections
ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "direct": "stub, no proxy",
    "nginx": "nginx",
    "official": "official on Express",
    "litellm": "LiteLLM, pass-through",
    "abhiapi": "AbhiAPI",
    "postgresql-1": "AbhiAPI, PostgreSQL, 1 process",
    "postgresql-2": "AbhiAPI, PostgreSQL, 2 processes",
    "postgresql-4": "AbhiAPI, PostgreSQL, 4 processes",
}
HEADINGS = (
    "stack",
    "answered",
    "failed",
    "req/s",
    "p50 ms",
    "p99 ms",
    "added p50",
    "added p99",
    "CPU s / 1,000",
    "RSS MB",
    "peak MB",
    "req/s ÷ official",
    "CPU ÷ official",
)
HOW_TO_READ = f"""\
Every stack stands in front of the same stub and has one core for itself; load generator and stub share another. Each
figure is the median of the rounds (failures are summed); another stack goes first in each round. Stacks are warmed up
until they get no faster (with `--quick` only a few seconds, which Node needs more of than the others).

- *Added* is against the stub called directly at the same load. These are closed loops: read added latency at one
  connection, above saturation it is queueing. nginx is held back by the core of the load generator, so it can do more
  than shown.
- CPU is user and system time of the proxy's whole process tree. Memory is the sum over that tree at the end of the
  load, its peak (VmHWM) since the stack was started.
- AbhiAPI checks a key, limits, holds, meters and charges each call on a SQLite file with `synchronous=FULL` (where a
  row says PostgreSQL: there, with Redis, both on the proxy's core beside it, each commit synced to disk); the others
  only forward. After each round its server is stopped (after the slow calls with SIGKILL, right after the last answer);
  then `ledger verify` must be ok and the balance exact. That shows that no answer left before its charge was committed;
  it does not show what a power cut would do, which the disk decides.
- Targets: {TARGET_RATIO} times the official proxy's throughput at every number of connections, {SLOW_CALLS:,} of
  {SLOW_CALLS:,} slow calls served, the books exact."""

Cell = Mapping[str, Sample]  # by stack
Results = Mapping[str, Mapping[str, Cell]]  # by workload, then by load


def tables(workloads: Sequence[Workload], results: Results) -> str:
    """One Markdown table per load of each workload."""
    parts = []
    for workload in workloads:
        parts.append(f"## {workload.title}\n")
        for load_label, cell in results[workload.name].items():
            parts.append(f"### {load_label}\n\n{_table(cell)}\n")
            in_flight = [f"{TITLES[name]} {cell[name].in_flight:,.0f}" for name in cell if cell[name].in_flight >= 0]
            if workload.kill_after:
                parts.append(f"Most calls at once that the stub held: {', '.join(in_flight)}.\n")
    return "\n".join(parts)


def missed_targets(results: Results) -> list[str]:
    """What of the targets this run does not show; empty when all that was measured is good."""
    missed = []
    for workload, cells in results.items():
        for load_label, cell in cells.items():
            ours, official = cell.get("abhiapi"), cell.get("official")
            if ours is None:
                missed.append(f"{workload}, {load_label}: AbhiAPI was not measured")
                continue
            if ours.failed:
                missed.append(f"{workload}, {load_label}: {ours.failed:.0f} calls through AbhiAPI failed")
            if workload == "slow" and ours.answered < SLOW_CALLS:
                missed.append(f"slow: {ours.answered:.0f} of {SLOW_CALLS} calls served")
            if workload == "small" and official and ours.per_s < TARGET_RATIO * official.per_s:
                missed.append(
                    f"small, {load_label}: {ours.per_s / official.per_s:.2f} times the official proxy's throughput"
                )
    return missed


def write_chapter(file: Path, chapter: str) -> None:
    """Put a chapter, which begins with its "# Title", into a page of several: in its old one's place, or at the end."""
    title = chapter.split("\n", 1)[0]
    chapters = re.split(r"^(?=# )", file.read_text() if file.exists() else "", flags=re.MULTILINE)
    kept = [chapter if text.split("\n", 1)[0] == title else text for text in chapters if text.strip()]
    if chapter not in kept:
        kept.append(chapter)
    file.write_text("\n".join(text.strip("\n") + "\n" for text in kept))


def machine(cores: Cores, folder: Path) -> str:
    """Where these figures come from, as a Markdown list."""
    model = _first_match(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory_kib = int(_first_match(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text()) or 0)
    express = re.findall(r'"(@fal-ai/server-proxy|express)": "([^"]+)"', (EXPRESS / "package.json").read_text())
    lines = [
        f"Machine: {model}, {os.cpu_count()} cores, {memory_kib / 1e6:.0f} GB; Linux {platform.release()}; "
        f"proxy on core {cores.proxy}, load and stub on core {cores.load}; databases on {_filesystem(folder)}; "
        f"load average {os.getloadavg()[0]:.2f} before the start",
        f"Commit: {_output('git', '-C', str(ROOT), 'describe', '--always', '--dirty') or 'none yet'}; "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"Command: `{' '.join(('python bench/' + Path(sys.argv[0]).name, *sys.argv[1:]))}`",
        f"Python {platform.python_version()}, {_versions('gunicorn', 'gevent', 'flask', 'sqlalchemy')}; "
        f"{_output('nginx', '-v').removeprefix('nginx version: ')}; Node.js {_output('node', '--version')}, "
        + ", ".join(f"{name} {number}" for name, number in express),
    ]
    return "\n".join(f"- {line}" for line in lines)


def where(folder: Path, command: str) -> str:
    """Where the figures of a benchmark without stacks come from, as a Markdown list."""
    model = _first_match(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory_kib = int(_first_match(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text()) or 0)
    lines = [
        f"Machine: {model}, {os.cpu_count()} cores, {memory_kib / 1e6:.0f} GB; Linux {platform.release()}; databases "
        f"on {_filesystem(folder)}; load average {os.getloadavg()[0]:.2f} before the start",
        f"Commit: {_output('git', '-C', str(ROOT), 'describe', '--always', '--dirty') or 'none yet'}; "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"Command: `{' '.join((command, *sys.argv[1:]))}`; Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _table(cell: Cell) -> str:
    rows = [HEADINGS, ("---",) + ("---:",) * (len(HEADINGS) - 1)]
    for name, sample in cell.items():
        base, official = cell.get("direct"), cell.get("official")
        added = base is not None and name != "direct"
        rows.append(
            (
                TITLES[name],
                _figure(sample.answered, 0),
                _figure(sample.failed, 0),
                _figure(sample.per_s, 0 if sample.per_s >= 100 else 2),
                _figure(sample.p50_ms, 2),
                _figure(sample.p99_ms, 2),
                _figure(sample.p50_ms - base.p50_ms, 2) if base and added else "",
                _figure(sample.p99_ms - base.p99_ms, 2) if base and added else "",
                _figure(sample.cpu_s_per_1000, 3),
                _figure(sample.rss_mb, 0),
                _figure(sample.peak_mb, 0),
                _figure(sample.per_s / official.per_s, 2) if official and official.per_s else "",
                _figure(sample.cpu_s_per_1000 / official.cpu_s_per_1000, 2)
                if official and official.cpu_s_per_1000
                else "",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _figure(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:,.{digits}f}"


def _first_match(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else "unknown"


def _versions(*packages: str) -> str:
    known = []
    for package in packages:
        try:
            known.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(known)


def _output(*argv: str) -> str:
    """What a command prints, on either stream; empty when it fails or is not there."""
    try:
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return (done.stdout or done.stderr).strip() if done.returncode == 0 else ""


def _filesystem(folder: Path) -> str:
    """The type of file system under a folder: on tmpfs a durable write costs nothing, and that must show."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(point, kind) for point, kind in mounts if folder.is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]))[1] if holding else "unknown"
