"""Bad days of the disk, with a real server: nothing is forwarded unpaid, and service resumes by itself."""

from __future__ import annotations

import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.harness import Fal, Server, until

PRICE_MICROS = 26_250


@pytest.fixture
def server(fal: Fal, tmp_path: Path) -> Iterator[Server]:
    with Server.started(tmp_path, fal.url) as running:
        yield running


@contextmanager
def locked(server: Server) -> Iterator[None]:
    """Another process is in the middle of a write, and stays there."""
    connection = sqlite3.connect(server.books.database.path, timeout=30, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def refused_unpaid(server: Server, fal: Fal, key: str, marker: str) -> None:
    """A call gets 503 with Retry-After, fal hears nothing of it, and /healthz says so."""
    answer = server.post(key, body={"prompt": marker})
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "database_unavailable"
    assert int(answer.headers["Retry-After"]) >= 1
    assert fal.calls(marker) == []
    until(lambda: not requests.get(server.url + "/healthz", timeout=20).ok, what="the next look says so, too")
    health = requests.get(server.url + "/healthz", timeout=20)
    assert health.json()["status"] == "unavailable"


def served(server: Server, key: str) -> None:
    until(lambda: requests.get(server.url + "/healthz", timeout=20).ok, what="the server is well again")
    assert server.post(key).status_code == 200


def test_a_locked_database_refuses_calls_and_recovers(server: Server, fal: Fal, tmp_path: Path) -> None:
    name, key = server.books.account(100)
    with locked(server):
        refused_unpaid(server, fal, key, f"locked {tmp_path.name}")
    served(server, key)
    assert server.books.standing(name) == (100_000 - PRICE_MICROS, 0)


def test_an_answer_waits_for_a_locked_database_and_is_charged_once(server: Server, fal: Fal, tmp_path: Path) -> None:
    """The lock falls between fal's hearing of the call and its answer."""
    name, key = server.books.account(100)
    marker, answers = f"in flight {tmp_path.name}", []
    thread = threading.Thread(
        target=lambda: answers.append(server.post(key, body={"prompt": marker}, weather=f"hold_until={tmp_path.name}"))
    )
    thread.start()
    until(lambda: len(fal.calls(marker)) == 1, what="fal has the call")
    with locked(server):
        fal.release(tmp_path.name)
        # Others are refused meanwhile, which shows that the settlement does not hold up the whole server.
        assert server.post(key).status_code == 503
        assert answers == []
    thread.join(60)
    assert answers[0].status_code == 200
    assert answers[0].json()["_billing"]["credits_used"] == 26.25
    assert server.books.standing(name) == (100_000 - PRICE_MICROS, 0)
    assert server.books.verify().ok


def test_a_full_disk_refuses_calls_and_recovers(server: Server, fal: Fal, tmp_path: Path) -> None:
    """No file of the server's may grow any more, as on a full disk; then they may again."""
    name, key = server.books.account(100)
    assert server.post(key).status_code == 200
    _limit_files(server, "0")
    refused_unpaid(server, fal, key, f"full {tmp_path.name}")
    _limit_files(server, "unlimited")
    served(server, key)
    assert server.books.standing(name) == (100_000 - 2 * PRICE_MICROS, 0)
    assert server.books.verify().ok


def test_a_lost_database_file_refuses_calls_and_recovers(server: Server, fal: Fal, tmp_path: Path) -> None:
    """Writing on into a file that has no name any more would lose every charge; so would an empty one in its place,
    for which SQLite removes the log with the latest of them."""
    name, key = server.books.account(100)
    assert server.post(key).status_code == 200
    path = server.books.database.path
    aside = path.with_name("aside.db")
    path.rename(aside)
    refused_unpaid(server, fal, key, f"gone {tmp_path.name}")
    listed = requests.get(server.url + "/v1/calls", headers={"x-api-key": key}, timeout=20)
    assert listed.status_code == 503
    assert not path.exists(), "no empty database may take its place"
    aside.rename(path)
    served(server, key)
    assert server.books.standing(name) == (100_000 - 2 * PRICE_MICROS, 0)
    assert server.books.verify().ok


def _limit_files(server: Server, size: str) -> None:
    """Bound the size of files that the server's processes may write; only growth beyond it fails."""
    listed = subprocess.run(
        ["pgrep", "-g", str(server.process.popen.pid)], capture_output=True, text=True, check=True, timeout=10
    )
    for pid in listed.stdout.split():
        subprocess.run(["prlimit", "--pid", pid, f"--fsize={size}:unlimited"], check=True, timeout=10)
