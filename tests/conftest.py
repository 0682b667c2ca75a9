"""Fixtures: a real database in a file, a clock that ticks when told, a real gunicorn before a real simulator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from abhiapi import runtime
from abhiapi.db import Database
from abhiapi.migrations import migrate
from abhiapi.settings import Settings
from tests.harness import OPERATOR_KEY, Books, Clock, Fal, Server
from tests.redis_server import RedisServer
from tests.scripted import House, ScriptedFal

STRICT_BODY_BYTES = 300_000  # more than a body that is kept in memory


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database(tmp_path: Path) -> Database:
    """A fresh database of this version."""
    made = Database(f"sqlite:///{tmp_path / 'abhiapi.db'}")
    migrate(made)
    return made


@pytest.fixture(scope="session")
def fal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fal]:
    """One simulator for the whole run; each test looks at its own calls only."""
    with Fal.started(tmp_path_factory.mktemp("fal")) as running:
        yield running


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for the whole run; each test takes a database of its own in it."""
    with RedisServer.started(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """One that a test may do anything to."""
    with RedisServer.started(tmp_path) as server:
        yield server


@pytest.fixture(scope="session")
def shared_server(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for tests that need no settings of their own; each makes its own account."""
    with Server.started(tmp_path_factory.mktemp("shared"), fal.url) as running:
        yield running


@pytest.fixture(scope="session")
def strict_server(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits for fal for a second only, and takes small bodies only."""
    settings = {"ABHIAPI_UPSTREAM_TIMEOUT_S": "1", "ABHIAPI_MAX_BODY_BYTES": str(STRICT_BODY_BYTES)}
    with Server.started(tmp_path_factory.mktemp("strict"), fal.url, **settings) as running:
        yield running


@pytest.fixture
def books(shared_server: Server) -> Books:
    """The database of the shared server, as an operator would change it from another process."""
    return shared_server.books


@pytest.fixture
def house(tmp_path: Path, clock: Clock) -> Iterator[House]:
    """A runtime without a server whose fal says what it is told to; afterwards nothing is left open."""
    url = f"sqlite:///{tmp_path / 'abhiapi.db'}"
    rt = runtime.start(Settings.from_env({"FAL_KEY": OPERATOR_KEY, "ABHIAPI_DATABASE_URL": url}), now_ms=clock)
    rt.fal_run.close()
    rt.fal_run = fal = ScriptedFal()  # type: ignore[assignment]
    books = Books(rt.database, clock)
    account, key = books.account(1000)
    yield House(rt, fal, books, account, key)
    assert rt.limits.in_flight() == 0
    assert books.verify().problems == []
    rt.close()
