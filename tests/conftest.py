"""Fixtures: a database in a file, a clock that ticks when told, a real gunicorn before a real simulator, a browser."""

from __future__ import annotations

import fcntl
import gc
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser

from abhiapi import runtime
from abhiapi.db import Database
from abhiapi.settings import Settings
from tests import plain_session, plan, raw_http
from tests.browser import chromium
from tests.harness import OPERATOR_KEY, ROOT, WEBHOOK_KEY, Books, Clock, Fal, Server, ready
from tests.postgres import Postgres, shared
from tests.raw_http import Upstream
from tests.redis_server import RedisServer, Relay
from tests.scripted import House, ScriptedFal

METRICS_TOKEN = "of-the-tests"
IN_MEMORY, MEMORY_BYTES = Path("/dev/shm"), 3 << 30  # a run takes a tenth of that
STRICT_BODY_BYTES = 300_000  # more than a body that is kept in memory
# How long an example took says how busy the machine is, and nothing of the code.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@settings(max_examples=1, database=None)
@given(st.integers())
def _read_sources(number: int) -> None:
    """Hypothesis reads the sources of what is loaded before its first example: here, where no greenlet comes between.

    Python 3.11 fails in `ast` («recursion depth mismatch») where one does.
    """


def pytest_configure(config: pytest.Config) -> None:
    """Databases of tests are made by the thousand, and no test cuts the power: in memory, where there is enough."""
    gc.disable()  # until all is collected
    if counter := _counter(config):  # it has seen what is loaded with this file
        counter.pause()
    plain_session.make_usual()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; commands would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if IN_MEMORY.is_dir() and os.access(IN_MEMORY, os.W_OK) and "TMPDIR" not in os.environ:
        about = os.statvfs(IN_MEMORY)
        if about.f_bavail * about.f_frsize >= MEMORY_BYTES and not about.f_flag & os.ST_NOEXEC:
            tempfile.tempdir = os.environ["TMPDIR"] = str(IN_MEMORY)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, on each process."""
    items[:] = plan.dealt(items, lambda item: item.path.stem, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def pytest_collection_finish() -> None:
    """What is loaded stays to the end: looking through it again and again took an eighth of the tests' time."""
    _read_sources()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Coverage counts where `plan` says, from a file's first test to its last: elsewhere it would take a third more."""
    counter = _counter(item.config)
    is_measured = item.path.stem in plan.MEASURED
    if counter and counter.started != is_measured:
        (counter.resume if is_measured else counter.pause)()
    return (yield)


def _counter(config: pytest.Config) -> Any:
    """pytest-cov's, where it is asked for."""
    plugin = config.pluginmanager.getplugin("_cov")
    return plugin and plugin.cov_controller


@pytest.fixture
def clock() -> Clock:
    return Clock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests marked `engines` run on each of them, or on those that the mark names; all others on SQLite."""
    marked = metafunc.definition.get_closest_marker("engines")
    if marked and "engine" in metafunc.fixturenames:
        metafunc.parametrize("engine", marked.args or ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", "sqlite")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Postgres]:
    """One PostgreSQL for the whole run, whatever the number of its processes."""
    folder = tmp_path_factory.getbasetemp()
    with shared((folder if worker_id == "master" else folder.parent) / "postgres") as running:
        yield running


@pytest.fixture
def database_url(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Where this test's own ledger is, or will be."""
    if engine == "sqlite":
        yield f"sqlite:///{tmp_path / 'abhiapi.db'}"
    else:
        with request.getfixturevalue("postgres").fresh() as url:
            yield url


@pytest.fixture
def database(database_url: str) -> Database:
    """A fresh database of this version."""
    return ready(database_url)


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
def relay(redis_server: RedisServer) -> Iterator[Relay]:
    """A wire to the Redis of the run that can be held up."""
    wire = Relay(redis_server.port)
    yield wire
    wire.close()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """One that a test may do anything to."""
    with RedisServer.started(tmp_path) as server:
        yield server


@pytest.fixture(scope="session")
def shared_servers(
    fal: Fal, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Callable[[str], Server]]:
    """One server an engine for tests that need no settings of their own; each makes its own account."""
    with ExitStack() as stack:

        @cache
        def of(engine: str) -> Server:
            settings = {}
            if engine == "postgresql":
                settings["ABHIAPI_DATABASE_URL"] = request.getfixturevalue("postgres").create()
            return stack.enter_context(Server.started(tmp_path_factory.mktemp("shared"), fal.url, **settings))

        yield of


@pytest.fixture
def shared_server(engine: str, shared_servers: Callable[[str], Server]) -> Server:
    return shared_servers(engine)


@pytest.fixture(scope="module")
def own_servers(
    fal: Fal, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Server]]:
    """Servers of a module's own, one for each engine and settings."""
    with ExitStack() as stack:

        @cache
        def of(engine: str, **settings: str) -> Server:
            if engine == "postgresql":
                settings["ABHIAPI_DATABASE_URL"] = request.getfixturevalue("postgres").create()
            return stack.enter_context(Server.started(tmp_path_factory.mktemp("own"), fal.url, **settings))

        yield of


@pytest.fixture(scope="module")
def odd_fal() -> Iterator[Upstream]:
    """A fal that says whatever a test tells it to."""
    with raw_http.upstream() as running:
        yield running


@pytest.fixture(scope="module")
def odd_server(odd_fal: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.started(tmp_path_factory.mktemp("odd"), odd_fal.url) as running:
        yield running


@pytest.fixture(scope="session")
def strict_server(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits for fal for a second only, and takes small bodies only."""
    settings = {"ABHIAPI_UPSTREAM_TIMEOUT_S": "1", "ABHIAPI_MAX_BODY_BYTES": str(STRICT_BODY_BYTES)}
    with Server.started(tmp_path_factory.mktemp("strict"), fal.url, **settings) as running:
        yield running


@pytest.fixture(scope="session")
def dashboard(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for people: it believes one proxy in front, so that each of them can have an address."""
    settings = {
        "ABHIAPI_TRUSTED_PROXIES": "1",
        "ABHIAPI_WEBHOOK_ALLOW_LOOPBACK": "1",
        "ABHIAPI_METRICS_TOKEN": METRICS_TOKEN,
    }
    with Server.started(tmp_path_factory.mktemp("dashboard"), fal.url, **settings) as running:
        yield running


@pytest.fixture
def books(shared_server: Server) -> Books:
    """The database of the shared server, as an operator would change it from another process."""
    return shared_server.books


@pytest.fixture
def house(database_url: str, clock: Clock) -> Iterator[House]:
    """A runtime without a server whose fal says what it is told to; afterwards nothing is left open."""
    env = {"FAL_KEY": OPERATOR_KEY, "ABHIAPI_DATABASE_URL": database_url, "ABHIAPI_WEBHOOK_KEY": WEBHOOK_KEY}
    ready(database_url)
    rt = runtime.start(Settings.from_env(env), now_ms=clock)
    rt.fal_run.close()
    rt.fal_run = fal = ScriptedFal()  # type: ignore[assignment]
    books = Books(rt.database, clock)
    account, key = books.account(1000)
    yield House(rt, fal, books, account, key)
    assert rt.limits.in_flight() == 0
    assert books.verify().problems == []
    rt.close()


@pytest.fixture(scope="session")
def node_folder(request: pytest.FixtureRequest) -> Path:
    """A folder with the JavaScript client installed, kept between runs in pytest's own cache."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js is not installed: the JavaScript client is not tried")
    package = ROOT / "tests/clients/package.json"
    wanted = package.read_bytes()
    assert request.config.cache is not None
    folder = request.config.cache.mkdir(f"fal-ai-client-{re.sub(rb'[^0-9.]', b'', wanted).decode()}")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers may come at once
        if not (folder / "installed").exists():
            shutil.copy(package, folder)
            command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            (folder / "installed").touch()
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One for the whole run; each test opens a window with a memory of its own."""
    with chromium() as launched:
        yield launched


@pytest.fixture(scope="session")
def axe(node_folder: Path) -> str:
    return (node_folder / "node_modules/axe-core/axe.min.js").read_text()
