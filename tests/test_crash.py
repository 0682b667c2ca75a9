"""What is left after the server is killed or told to stop, with a real gunicorn under load.

Killed twenty times on PostgreSQL, and left to the others to find out: test_several_machines.
"""

from __future__ import annotations

import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from sqlalchemy import select

from abhiapi import processes, tables
from tests.harness import Fal, Server, own, until
from tests.postgres import sweep_at_once
from tests.redis_server import RedisServer

PRICE_MICROS = 26_250  # one megapixel of flux dev at the default margin
KILLS = {"sqlite": 20, "postgresql": 3}


class Load:
    """A few callers who call again and again until the server is gone; they count what they were answered."""

    def __init__(self, server: Server, key: str, callers: int = 6) -> None:
        self._server, self._key = server, key
        self._over = threading.Event()
        self.answered: list[int] = []
        self._threads = [threading.Thread(target=self._call) for _ in range(callers)]
        for thread in self._threads:
            thread.start()

    def _call(self) -> None:
        while not self._over.is_set():
            try:
                answer = self._server.post(self._key, weather="delay_s=0.02")
            except requests.RequestException:
                return  # the server is gone
            if answer.status_code == 200:
                self.answered.append(answer.json()["_billing"]["balance_remaining"])

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)


@pytest.mark.engines
def test_nothing_is_lost_or_doubled_when_the_server_is_killed_again_and_again(
    fal: Fal, tmp_path: Path, engine: str, database_url: str
) -> None:
    """After each restart: the ledger adds up, no hold is left, and whoever got an answer was charged for it, once."""
    key, name, answered = "", "", 0
    for _ in range(KILLS[engine]):
        server = Server.start(tmp_path, fal.url, ABHIAPI_DATABASE_URL=database_url)
        try:
            if not key:
                name, key = server.books.account(10_000)
            if engine == "postgresql":
                sweep_at_once(server)  # on SQLite the start has swept what the kill before this one left behind
            assert server.books.standing(name)[1] == 0
            assert server.books.read(_open_holds) == 0
            finding = server.books.verify()
            assert finding.ok, finding.problems
            load = Load(server, key)
            until(lambda load=load: len(load.answered) >= 6, what="some calls are answered")  # type: ignore[misc]
        finally:
            server.process.kill()
        load.end()
        answered += len(load.answered)
        assert len(set(load.answered)) == len(load.answered), "two answers told the same balance"
    with Server.started(tmp_path, fal.url, ABHIAPI_DATABASE_URL=database_url) as server:
        if engine == "postgresql":
            sweep_at_once(server)
        finding = server.books.verify()
        assert finding.ok, finding.problems
        calls = server.books.calls(name)
        assert {call.state for call in calls} <= {"settled", "released"}
        settled = [call for call in calls if call.state == "settled"]
        assert all(call.charged_micros == PRICE_MICROS for call in settled)
        # Every answer was charged before it left; a call may have been charged whose answer was cut by the kill.
        assert answered <= len(settled) <= answered + KILLS[engine] * 6
        balance, held = server.books.standing(name)
        assert (balance, held) == (10_000_000 - len(settled) * PRICE_MICROS, 0)
        charges = [entry for entry in server.books.entries(name) if entry.kind == "charge"]
        assert len(charges) == len({entry.call_id for entry in charges}) == len(settled)


@pytest.mark.engines
def test_a_server_told_to_stop_finishes_fifty_running_calls(fal: Fal, tmp_path: Path, database_url: str) -> None:
    """SIGTERM: all of them are answered and charged, and the exit status is 0."""
    server = Server.start(tmp_path, fal.url, ABHIAPI_DATABASE_URL=database_url)
    name, key = server.books.account(10_000)
    answers: list[requests.Response] = []
    marker = f"graceful {tmp_path.name}"
    weather = f"hold_until={tmp_path.name}"

    def call() -> None:
        answers.append(server.post(key, body={"prompt": marker}, weather=weather))

    threads = [threading.Thread(target=call) for _ in range(50)]
    try:
        for thread in threads:
            thread.start()
        until(lambda: len(fal.calls(marker)) == 50, what="fal has all calls")
        server.process.popen.send_signal(signal.SIGTERM)
        until(lambda: not _accepts(server), what="no new connection is taken")
        fal.release(tmp_path.name)
        for thread in threads:
            thread.join(60)
        assert server.process.popen.wait(30) == 0
    finally:
        server.process.kill()
    assert [answer.status_code for answer in answers] == [200] * 50
    assert server.books.standing(name) == (10_000_000 - 50 * PRICE_MICROS, 0)
    assert server.books.verify().ok
    assert not list(tmp_path.glob("*.process-*")), "a clean end leaves no lock file"


@pytest.mark.engines("postgresql")
def test_several_processes_told_to_stop_finish_what_runs_in_each(
    fal: Fal, tmp_path: Path, database_url: str, redis_server: RedisServer
) -> None:
    """SIGTERM to `serve --workers 2`: whoever was let in is answered and charged, nobody is let in any more."""
    settings = {"ABHIAPI_DATABASE_URL": database_url, "ABHIAPI_LIMITS_URL": redis_server.url(), "WORKERS": "2"}
    server = Server.start(tmp_path, fal.url, **settings)
    marker = own("graceful")
    name, key = server.books.account(10_000)
    holding = select(tables.calls.c.process_id).where(tables.calls.c.state == "held").distinct()
    running: list[Future[requests.Response]] = []
    with ThreadPoolExecutor(100) as pool:
        try:
            until(lambda: server.process.output().count("AbhiAPI serves") == 2, what="both serve")
            while len(running) < 10 or len(server.books.read(lambda tx: tx.all(holding))) < 2:
                assert len(running) < 100, "one of the two takes all calls"
                running.append(pool.submit(server.post, key, body={"prompt": marker}, weather=f"hold_until={marker}"))
                until(lambda: len(fal.calls(marker)) == len(running), what="fal has the call")
            server.process.popen.send_signal(signal.SIGTERM)
            until(lambda: not _accepts(server), what="no new connection is taken")
            assert server.books.standing(name)[1] == len(running) * PRICE_MICROS
            fal.release(marker)
            assert {one.result().status_code for one in running} == {200}
            assert server.process.popen.wait(30) == 0
        finally:
            fal.release(marker)
            server.process.kill()
    assert server.books.standing(name) == (10_000_000 - len(running) * PRICE_MICROS, 0)
    assert server.books.verify().ok
    assert server.books.read(processes.running) == []


@pytest.mark.engines
@pytest.mark.parametrize("reload_signal", [signal.SIGHUP])
def test_a_reload_sweeps_no_call_of_the_process_that_is_still_finishing(
    fal: Fal, tmp_path: Path, database_url: str, reload_signal: signal.Signals
) -> None:
    """Two processes serve one database for a while; the new one leaves the old one's calls alone."""
    with Server.started(tmp_path, fal.url, ABHIAPI_DATABASE_URL=database_url) as server:
        name, key = server.books.account(1_000)
        answers: list[requests.Response] = []
        marker = f"reload {tmp_path.name}"
        weather = f"hold_until={tmp_path.name}"
        thread = threading.Thread(
            target=lambda: answers.append(server.post(key, body={"prompt": marker}, weather=weather))
        )
        thread.start()
        until(lambda: len(fal.calls(marker)) == 1, what="fal has the call")
        server.process.popen.send_signal(reload_signal)
        until(lambda: server.process.output().count("AbhiAPI serves") == 2, what="the new process serves")
        assert server.post(key).status_code == 200  # by the new process, whose sweep has run
        assert server.books.standing(name)[1] == PRICE_MICROS  # the old one's hold stands
        fal.release(tmp_path.name)
        thread.join(60)
        assert answers[0].status_code == 200
        assert server.books.standing(name) == (1_000_000 - 2 * PRICE_MICROS, 0)
        assert server.books.verify().ok


def _open_holds(tx: object) -> int:
    from abhiapi import reports

    return len(reports.open_holds(tx))  # type: ignore[arg-type]


def _accepts(server: Server) -> bool:
    try:
        requests.get(server.url + "/healthz", timeout=1)
    except requests.RequestException:
        return False
    return True
