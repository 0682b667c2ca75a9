"""Processes that count limits together over one Redis, each told what to do (`limits_child`)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from tests.harness import ROOT, environment, until

LEASE_S, RENEW_S = "2", "0.2"


@dataclass
class Child:
    """One process with limits of its own over the Redis that all share."""

    popen: subprocess.Popen[str]

    @classmethod
    @contextmanager
    def started(cls, url: str, lease_s: str = LEASE_S, **settings: str) -> Iterator[Child]:
        module = ["-m", "gevent.monkey", "--module", "tests.limits_child"]
        command = [sys.executable, *module, url, lease_s, RENEW_S, json.dumps(settings)]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as popen:
            try:
                yield cls(popen)
            finally:
                popen.kill()

    def say(self, command: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(command + "\n")
        self.popen.stdin.flush()

    def hear(self) -> Any:
        assert self.popen.stdout is not None
        return json.loads(self.popen.stdout.readline())

    def ask(self, command: str) -> Any:
        self.say(command)
        return self.hear()

    def running(self, account: int) -> int:
        """How many calls of an account fal works on for this process."""
        found: dict[str, int] = self.ask("state")["running"]
        return found.get(str(account), 0)

    def is_shared(self) -> bool:
        return bool(self.ask("state")["shared"])


@contextmanager
def children(url: str, number: int, settings: dict[str, str], lease_s: str = LEASE_S) -> Iterator[list[Child]]:
    with ExitStack() as stack:
        started = [stack.enter_context(Child.started(url, lease_s, **settings)) for _ in range(number)]
        for child in started:
            until(child.is_shared, what="it has found Redis")
        yield started
