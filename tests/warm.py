"""Servers and simulators that need not load the product anew: each a fork of one process that has (`warm_child`).

A start costs a fifth of the usual second of CPU, and a run of all tests makes some hundreds. How a server starts from
nothing is what tests of `serve` and of deployment look at.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Forked:
    """A process that was started elsewhere, with what tests use of `subprocess.Popen`."""

    def __init__(self, connection: socket.socket) -> None:
        self._fd = connection.detach()
        weakref.finalize(self, os.close, self._fd)
        self.pid = self._number()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._look(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._fd], [], [], timeout)[0]:
            self.returncode = self._number()
        return self.returncode

    def _number(self) -> int:
        """The next line: the pid, then the status."""
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(self._fd, 1) or b"?\n"
        return int(line)


def start(arguments: list[str], *, env: Mapping[str, str], cwd: Path, log: Path, namespace: str = "") -> Forked:
    """Start ``python ARGUMENTS``, a module (``-m`` first) or a file; what it says goes to ``log``.

    ``namespace`` is that of a network, as `ip netns` knows it (`machines`).
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(_parent(env["PYTHONPATH"]))
    wanted = {"arguments": arguments, "env": dict(env), "cwd": str(cwd), "log": str(log), "namespace": namespace}
    connection.sendall(json.dumps(wanted).encode() + b"\n")
    return Forked(connection)


@cache
def _parent(path: str) -> str:
    """Where the process listens that all are forked from: one for each process of the run, ended with it."""
    folder = tempfile.mkdtemp(prefix="abhiapi-warm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = f"{folder}/socket"
    env = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "tests.warm_child", address]
    words = Path(folder, "stderr")
    with open(words, "wb") as said:
        parent = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
        )
    atexit.register(parent.kill)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"listening\n", words.read_text()
    return address
