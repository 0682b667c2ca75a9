"""Machines of the tests' own: network namespaces, each joined to this one by a wire.

Where namespaces may not be made (no root, no `ip`), a machine is another address of the loopback network: the same
processes, and everything but the separate network stack.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import requests

from abhiapi import serving
from tests.harness import START_S, Process, environment, free_port, until

_numbers = count(1)


@dataclass(frozen=True)
class Machine:
    """Where servers may be started. ``address`` is its own, ``outside`` is this machine's as seen from there."""

    address: str
    outside: str
    namespace: str


@contextmanager
def machine() -> Iterator[Machine]:
    number = next(_numbers)
    name = f"abhi-{os.getpid()}-{number}"
    if os.geteuid() != 0 or shutil.which("ip") is None or not _ip("netns", "add", name):
        yield Machine(f"127.0.1.{number}", "127.0.0.1", "")
        return
    # Four addresses of a range that nothing else uses, other ones for each test process.
    base = f"10.213.{os.getpid() % 200}.{4 * number % 252}".rsplit(".", 1)
    outside, inside = (f"{base[0]}.{int(base[1]) + end}" for end in (1, 2))
    near, far = f"ab{os.getpid() % 100000}n{number}", f"ab{os.getpid() % 100000}f{number}"
    try:
        for command in (
            ("link", "add", near, "type", "veth", "peer", "name", far, "netns", name),
            ("addr", "add", f"{outside}/30", "dev", near),
            ("link", "set", near, "up"),
            ("-n", name, "addr", "add", f"{inside}/30", "dev", far),
            ("-n", name, "link", "set", far, "up"),
            ("-n", name, "link", "set", "lo", "up"),
        ):
            assert _ip(*command), command
        yield Machine(inside, outside, name)
    finally:
        _ip("netns", "del", name)  # the wire goes with it


def _ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@dataclass
class Host:
    """What `abhiapi serve` starts, with several workers, on a machine: killed whole or in part, and started again."""

    machine: Machine
    folder: Path
    settings: Mapping[str, str]
    workers: int
    port: int
    process: Process

    @classmethod
    @contextmanager
    def started(cls, at: Machine, folder: Path, settings: Mapping[str, str], *, workers: int = 2) -> Iterator[Host]:
        folder.mkdir(exist_ok=True)
        port = free_port()
        host = cls(at, folder, settings, workers, port, cls._launch(at, folder, settings, workers, port))
        try:
            host.wait()
            yield host
        finally:
            host.process.kill()

    @staticmethod
    def _launch(at: Machine, folder: Path, settings: Mapping[str, str], workers: int, port: int) -> Process:
        command = ["-m", "gunicorn", *serving.gunicorn_arguments(f"{at.address}:{port}", workers)]
        return Process.warm(command, folder / "server.log", environment(**settings), namespace=at.namespace)

    @property
    def url(self) -> str:
        return f"http://{self.machine.address}:{self.port}"

    def wait(self) -> None:
        until(self._answers, what=f"{self.url} answers", within_s=START_S)

    def restart(self) -> None:
        """After `kill`: the same machine, a minute later."""
        self.process = self._launch(self.machine, self.folder, self.settings, self.workers, self.port)
        self.wait()

    def kill(self) -> None:
        """As when the machine loses its power."""
        self.process.kill()

    def worker_pids(self) -> list[int]:
        """The processes that serve: children of gunicorn's own."""
        path = Path(f"/proc/{self.process.popen.pid}/task/{self.process.popen.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def kill_worker(self, chosen: int) -> int:
        """SIGKILL for one of the workers, which gunicorn replaces; its pid."""
        pids = until(self.worker_pids, what="there are workers")
        pid = sorted(pids)[chosen % len(pids)]
        os.kill(pid, signal.SIGKILL)
        return pid

    def _answers(self) -> bool:
        if self.process.popen.poll() is not None:
            raise AssertionError(f"ended with status {self.process.popen.returncode}:\n{self.process.output()}")
        try:
            return requests.get(f"{self.url}/healthz", timeout=5).ok
        except requests.RequestException:
            return False
