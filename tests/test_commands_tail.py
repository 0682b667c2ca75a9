"""`tail`: calls as they happen, each told when it begins and when it ends, and never twice."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from abhiapi.db import Database
from abhiapi.following import AGAIN_MS, Following
from abhiapi.metering import Verdict, released
from tests.command_line import CommandLine
from tests.harness import ROOT, Clock, Fal, Server, environment, until
from tests.rows import Customer, settled

pytestmark = pytest.mark.engines


@pytest.fixture
def server(engine: str, own_servers: Callable[[str], Server]) -> Server:
    return own_servers(engine)


def command_line(server: Server) -> CommandLine:
    return CommandLine(server.folder, server.env["ABHIAPI_DATABASE_URL"])


class Tail:
    """`abhiapi tail --json` as a process, and what it has printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.told: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.told.append(json.loads(line))

    def states(self, call_id: str) -> list[str]:
        return [call["state"] for call in self.told if call["call_id"] == call_id]

    def end(self) -> tuple[int, str]:
        """Ctrl-C; the exit status, and what was said on stderr."""
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(20)
        self._thread.join(20)
        assert self.process.stderr is not None
        return status, self.process.stderr.read()


@contextmanager
def following(server: Server, *options: str) -> Iterator[Tail]:
    process = command_line(server).start("tail", "--json", *options)
    try:
        yield Tail(process)
    finally:
        process.kill()
        process.wait(10)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def test_calls_of_a_live_server_are_followed(server: Server, fal: Fal, tmp_path: Path) -> None:
    """One that runs is told as running, then as ended; a quick one once; and Ctrl-C is a good end."""
    name, key = server.books.account(1000)
    first = server.post(key).headers["x-abhiapi-call-id"]
    with following(server, "--account", name, "--last", "1") as tail:
        until(lambda: tail.states(first) == ["settled"], what="it has begun with the newest call")
        marker = f"slow {tmp_path.name}"
        slow = threading.Thread(
            target=lambda: server.post(key, body={"prompt": marker}, weather=f"hold_until={tmp_path.name}")
        )
        slow.start()
        until(lambda: len(tail.told) == 2, what="the running call is told")
        running = tail.told[1]
        assert (running["state"], running["account"]) == ("held", name)
        quick = server.post(key, weather="status=500").headers["x-abhiapi-call-id"]
        until(lambda: tail.states(quick)[-1:] == ["released"], what="the quick one is told")
        fal.release(tmp_path.name)
        slow.join(30)
        until(lambda: tail.states(running["call_id"]) == ["held", "settled"], what="its end is told")
        assert tail.end() == (0, "")
        assert tail.states(first) == ["settled"]


def test_only_what_is_asked_for_is_told(server: Server) -> None:
    name, key = server.books.account(1000)
    _, other = server.books.account(1000)
    with following(server, "--account", key, "--errors", "--model", "fal-ai/flux/*", "--last", "0") as tail:
        wanted: list[str] = []

        def is_following() -> bool:
            wanted.append(server.post(key, weather="status=500").headers["x-abhiapi-call-id"])
            return bool(tail.told)

        until(is_following, what="it follows")
        server.post(key)  # no error
        server.post(other, weather="status=500")  # somebody else's
        server.post(key, "/fal-ai/fast-sdxl", weather="status=500")  # another model
        wanted.append(server.post(key, weather="status=500").headers["x-abhiapi-call-id"])
        until(lambda: tail.states(wanted[-1])[-1:] == ["released"], what="the last is told")
        assert {call["account"] for call in tail.told} == {name}
        assert {call["model"] for call in tail.told} == {"fal-ai/flux/dev"}
        assert {call["state"] for call in tail.told} == {"released"}


@pytest.mark.engines("sqlite")  # as all that is about a terminal
def test_a_reader_who_has_enough_is_no_failure(server: Server) -> None:
    """`abhiapi tail | head -1`: no traceback, no complaint, exit 0."""
    _, key = server.books.account(1000)
    server.post(key)
    process = command_line(server).start("tail", "--json", "--last", "1")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("{")
    process.stdout.close()

    def has_ended() -> bool:
        server.post(key)
        return process.poll() is not None

    until(has_ended, what="it ends with its reader")
    with process.stderr as said:
        assert (process.returncode, said.read()) == (0, "")


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_gets_colours_unless_it_wants_none(server: Server, plain: bool) -> None:
    name, key = server.books.account(1000)
    server.post(key)
    outer, inner = pty.openpty()
    cli = command_line(server)
    env = environment(**cli.settings, **({"NO_COLOR": "1"} if plain else {}))
    arguments = [sys.executable, str(ROOT / "cli.py"), "tail", "--account", name]
    process = subprocess.Popen(arguments, env=env, stdin=inner, stdout=inner, stderr=inner, start_new_session=True)
    os.close(inner)
    try:
        text = ""
        while "settled" not in text or not text.endswith("\n"):
            text += os.read(outer, 10_000).decode()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        os.close(outer)
    assert ("\x1b[32m" in text) is not plain
    assert "CALL ID" in text
    assert "fal-ai/flux/dev" in text
    assert "26.25" in text


# --- what a look tells, without a process -----------------------------------------------------------------------


@pytest.fixture
def customer(database: Database, clock: Clock) -> Customer:
    return Customer.new(database, clock)


class Looks:
    """Looks at a database by a clock that is moved."""

    def __init__(self, database: Database, customer: Customer) -> None:
        self._database, self._clock = database, customer.clock
        self.following = Following()
        self._database.read(lambda tx: self.following.begin(tx, now_ms=self._clock.now_ms, last=0))

    def again(self) -> list[tuple[int, str]]:
        found = self._database.read(lambda tx: self.following.look(tx, now_ms=self._clock.now_ms))
        return [(row.call_id, row.state) for row in found]


def test_each_state_of_a_call_is_told_once(database: Database, customer: Customer) -> None:
    customer.numbers = iter_ids(customer)
    looks = Looks(database, customer)
    call = customer.admit()
    assert looks.again() == [(call.call_id, "held")]
    assert looks.again() == []
    customer.finish(call, Verdict("unknown", reason="no_units"))
    assert looks.again() == [(call.call_id, "unknown")]
    customer.clock.tick(10 * AGAIN_MS)
    assert looks.again() == []
    customer.finish(call, settled())
    assert looks.again() == [(call.call_id, "settled")]
    assert looks.again() == []


def test_an_end_is_told_of_a_call_that_began_long_before(database: Database, customer: Customer) -> None:
    call = customer.admit()  # its id is of long ago, too
    looks = Looks(database, customer)
    assert looks.again() == []
    customer.finish(call, released("upstream_5xx"))
    assert looks.again() == [(call.call_id, "released")]
    assert looks.again() == []


def test_a_row_that_was_written_late_is_told(database: Database, customer: Customer) -> None:
    """Ids are made when a request comes in; one whose body took longer appears below those that were told already."""
    ids = iter_ids(customer)
    early, late = next(ids), next(ids)
    looks = Looks(database, customer)
    customer.numbers = iter([late, early])  # type: ignore[assignment]
    for call_id in (late, early):
        customer.settle()
        assert looks.again() == [(call_id, "settled")]


def test_nothing_is_kept_of_calls_that_are_over_and_old(database: Database, customer: Customer) -> None:
    customer.numbers = iter_ids(customer)
    looks = Looks(database, customer)
    for _ in range(20):
        customer.settle()
    assert len(looks.again()) == 20
    customer.clock.tick(2 * AGAIN_MS)
    assert looks.again() == []
    assert looks.following._told == {}


def iter_ids(customer: Customer) -> Any:
    """Ids as calls have them now."""
    return count(customer.clock.now_ms << 20)
