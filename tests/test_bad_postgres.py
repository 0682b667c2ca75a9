"""PostgreSQL goes away under load, and processes that share one die: nothing is free, lost or charged twice."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests

from abhiapi import accounts, ledger
from abhiapi.db import Tx
from abhiapi.money import Micros
from tests.harness import Books, Fal, Server, own, until
from tests.postgres import Postgres

PRICE_MICROS = 26_250
pytestmark = pytest.mark.engines("postgresql")


class Callers:
    """Some callers of a server who call again and again; what they were answered."""

    def __init__(self, server: Server, key: str, count: int = 4, *, weather: str = "delay_s=0.02") -> None:
        self._server, self._key, self._weather = server, key, weather
        self._over = threading.Event()
        self.answers: list[tuple[int, str | None]] = []
        self.charged = 0
        self._threads = [threading.Thread(target=self._call) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _call(self) -> None:
        while not self._over.is_set():
            try:
                answer = self._server.post(self._key, weather=self._weather)
            except requests.RequestException:
                return  # the server is gone
            self.answers.append((answer.status_code, answer.headers.get("retry-after")))

    def count(self, status: int) -> int:
        return sum(answer[0] == status for answer in self.answers)

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive()


def _topup(tx: Tx, name: str) -> None:
    account = accounts.find(tx, name)
    assert account is not None
    ledger.topup(tx, account.account_id, Micros(10 * PRICE_MICROS), ref=None, note=None, now_ms=1)


def charges(books: Books, name: str) -> int:
    return sum(entry.kind == "charge" for entry in books.entries(name))


def test_calls_are_refused_while_postgresql_is_away_and_none_is_free(fal: Fal, tmp_path: Path) -> None:
    """B2 rows 11 to 13: killed under load and started again. What fal did was charged, what it did not was not."""
    postgres = Postgres.start(fsync="on")  # what was committed is there after the crash
    try:
        postgres.make_template()
        with postgres.fresh() as url, Server.started(tmp_path, fal.url, ABHIAPI_DATABASE_URL=url) as server:
            name, key = server.books.account(100_000)
            before = fal.total()
            load = Callers(server, key)
            until(lambda: load.count(200) >= 10, what="calls are answered")
            postgres.stop("immediate")
            late = Callers(server, key)  # each of the first may have a charge to wait for, a minute long
            until(lambda: late.count(503) >= 4, what="calls are refused", within_s=60)
            seen = fal.total()
            refused = late.count(503)
            until(lambda: late.count(503) >= refused + 4, what="more calls are refused", within_s=60)
            assert fal.total() == seen  # fal hears of none of them
            health = server.url + "/healthz"  # a verdict may be a second old
            until(lambda: requests.get(health, timeout=10).status_code == 503, what="it says that it cannot serve")
            postgres.go()
            paid = late.count(200)
            until(lambda: late.count(200) >= paid + 10, what="calls are answered again", within_s=60)
            load.end()
            late.end()
            until(lambda: server.books.standing(name)[1] == 0, what="every hold has ended")
            answers = load.answers + late.answers
            assert {status for status, _ in answers} <= {200, 503}
            assert all(wait is not None for status, wait in answers if status == 503)
            assert charges(server.books, name) >= load.count(200) + late.count(200)
            assert charges(server.books, name) == fal.total() - before
            assert server.books.verify().problems == []
            assert server.process.stop() == 0
    finally:
        postgres.remove()


def test_two_servers_on_one_database_and_one_is_killed_again_and_again(
    fal: Fal, tmp_path: Path, database_url: str
) -> None:
    """B1 row 1, B2 row 12: nothing is lost or doubled, and the other frees what the dead one held."""
    settings = {"ABHIAPI_DATABASE_URL": database_url, "ABHIAPI_RECONCILE_INTERVAL_S": "1"}
    (tmp_path / "stays").mkdir()
    with ExitStack() as stack:
        stays = stack.enter_context(Server.started(tmp_path / "stays", fal.url, **settings))
        books = stays.books
        name, key = books.account(100_000)
        before, on_stays = fal.total(), Callers(stays, key, 2)
        stack.callback(on_stays.end)
        answered = 0
        for number in range(2):
            folder = tmp_path / f"dies-{number}"
            folder.mkdir()
            dies = Server.start(folder, fal.url, **settings)
            load = Callers(dies, key)
            stuck = own("stuck")  # a call that is at fal for sure when its server dies
            waits = Callers(dies, key, 1, weather=f"hold_until={stuck}")
            until(lambda load=load: load.count(200) >= 4, what="calls are answered")  # type: ignore[misc]
            until(lambda stuck=stuck: fal.calls(stuck), what="one is at fal")  # type: ignore[misc]
            dies.process.kill()
            fal.release(stuck)
            load.end()
            waits.end()
            answered += load.count(200)
        on_stays.end()
        answered += on_stays.count(200)
        until(lambda: books.standing(name)[1] == 0, what="the other server frees what the dead held", within_s=60)
        ends = Counter((call.state, call.reason) for call in books.calls(name))
        assert ends["released", "process_died"] >= 2
        assert answered <= charges(books, name) <= fal.total() - before
        assert books.standing(name)[0] == 100_000_000 - charges(books, name) * PRICE_MICROS
        assert books.verify().problems == []
        assert stays.process.stop(signal.SIGTERM) == 0


def test_two_servers_spend_exactly_what_is_there(fal: Fal, tmp_path: Path, database_url: str) -> None:
    """B1 rows 1 and 10: calls at once through two processes, with credit for ten."""
    with ExitStack() as stack:
        servers = []
        for number in range(2):
            folder = tmp_path / str(number)
            folder.mkdir()
            started = Server.started(folder, fal.url, ABHIAPI_DATABASE_URL=database_url)
            servers.append(stack.enter_context(started))
        name, key = servers[0].books.account(0)
        servers[0].books.write(lambda tx: _topup(tx, name))
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda n=n: statuses.append(servers[n % 2].post(key).status_code))
            for n in range(60)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert Counter(statuses) == {200: 10, 402: 50}
        assert servers[0].books.standing(name) == (0, 0)
        assert servers[1].books.verify().problems == []
