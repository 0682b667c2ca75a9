"""Processes of the benchmark: start one on a core, read its CPU time and memory from /proc, stop it by its id.

Knows nothing about what the processes are. Linux only.
"""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
DESCRIPTORS = 16_384  # 2,000 slow calls need two each in the proxy; the rest is room for the 256 connections and files
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0


class BenchError(Exception):
    """Something the benchmark needs is missing or misbehaves; the message is for the person who ran it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process tree has used up to now."""

    cpu_s: float
    rss_bytes: int
    peak_bytes: int  # sum of each process's VmHWM


@dataclass(frozen=True, slots=True)
class Cores:
    """The proxy under test has one core for itself; load generator and stub share the other."""

    proxy: int
    load: int


def choose_cores() -> Cores:
    """The first and the last core this process may use; the same one twice on a machine with one."""
    usable = sorted(os.sched_getaffinity(0))
    return Cores(proxy=usable[0], load=usable[-1])


def raise_descriptor_limit() -> None:
    """Let this process, and so all it starts, open enough files for the slow workload."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= DESCRIPTORS:
        return
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        raise BenchError(
            f"the file descriptor limit is {hard}; allow {DESCRIPTORS} (ulimit -Hn, as root) and run again"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Children started inside inherit this core; the caller's own affinity is put back."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Process:
    """A child on a core of its own, in a session of its own, so that Ctrl-C reaches only the benchmark."""

    def __init__(self, argv: Sequence[str], *, core: int, env: Mapping[str, str], cwd: Path, log: Path) -> None:
        self._log = log
        with on_core(core), log.open("wb") as output:
            self._popen = subprocess.Popen(
                argv,
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def wait_until_listening(self, port: int) -> None:
        """Return when the port accepts connections; raise with the end of the log when the process ends instead."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._popen.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            time.sleep(0.02)
        raise BenchError(f"{self._popen.args!r} did not start listening:\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines the process wrote."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    def usage(self) -> Usage:
        """CPU time and memory of the process and all its descendants."""
        members = [_Member.read(pid) for pid in _tree(self._popen.pid)]
        alive = [member for member in members if member is not None]
        return Usage(
            cpu_s=sum(member.cpu_ticks for member in alive) / CLOCK_TICKS,
            rss_bytes=sum(member.rss_bytes for member in alive),
            peak_bytes=sum(member.peak_bytes for member in alive),
        )

    def stop(self, *, kill: bool = False) -> None:
        """Ask the process to end, or with `kill` end its whole tree with SIGKILL; nothing stays behind."""
        tree = _tree(self._popen.pid)
        if not kill and self._popen.poll() is None:
            self._popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(STOP_TIMEOUT_S)
        if self._popen.poll() is None:
            for pid in tree:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._popen.wait()


@dataclass(frozen=True, slots=True)
class _Member:
    cpu_ticks: int
    rss_bytes: int
    peak_bytes: int

    @classmethod
    def read(cls, pid: int) -> "_Member | None":
        """One process's figures, or None when it has just ended."""
        try:
            fields = _stat_fields(pid)
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return None
        peak_kib = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), "0")
        # utime, stime, and the same of children already waited for: a worker that was replaced still counts.
        return cls(
            cpu_ticks=sum(int(field) for field in fields[11:15]),
            rss_bytes=int(fields[21]) * PAGE_BYTES,
            peak_bytes=int(peak_kib) * 1024,
        )


def _stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from the state on; the name before it may hold spaces and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _tree(root: int) -> list[int]:
    """The process and its descendants, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                children.setdefault(int(_stat_fields(int(entry.name))[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, []))
    return found
