"""The product as tests run it: real processes, real sockets, real files. No test waits by sleeping: see `until`."""

from __future__ import annotations

import atexit
import base64
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count, cycle
from pathlib import Path
from select import select
from typing import Any, TypeVar

import gevent
import requests

from abhiapi import accounts, audit, keys, ledger, reports, serving
from abhiapi.db import Database, Tx, database_at
from abhiapi.db_sqlite import SqliteDatabase
from abhiapi.migrations import migrate
from abhiapi.money import Micros
from tests import raw_http, warm

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
OPERATOR_KEY = "operator-id:0123456789abcdef-operator-secret"
WEBHOOK_KEY = base64.b64encode(bytes(32)).decode()
START_S = 30
FIRST_PORT, LAST_PORT_LEAST = 11_000, 20_000  # browsers refuse some below
_numbers = count(1)


class Clock:
    """Milliseconds that pass only when told."""

    def __init__(self, now_ms: int = 1_795_000_000_000) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms

    def tick(self, milliseconds: int = 1) -> int:
        self.now_ms += milliseconds
        return self.now_ms


def until(condition: Callable[[], T], *, what: str, within_s: float = 20) -> T:
    """Wait for another process to reach a state that it has no way to announce; fails with ``what`` in time.

    It asks more and more seldom, a tenth of the time waited so far apart: asking keeps the other from working.
    """
    began = time.monotonic()
    while not (reached := condition()):
        waited_s = time.monotonic() - began
        if waited_s > within_s:
            raise AssertionError(f"not reached within {within_s} s: {what}")
        select([], [], [], min(max(0.01, waited_s / 10), 0.1))
    return reached


def in_time(condition: Callable[[], bool], *, what: str) -> None:
    """`until`, with greenlets of this process that must go on meanwhile."""

    def look() -> bool:
        gevent.sleep(0.01)
        return condition()

    until(look, what=what)


def ready(url: str) -> Database:
    """The database there, of this version: in a new file a copy of one that was made once."""
    database = database_at(url)
    if isinstance(database, SqliteDatabase) and not database.exists():
        shutil.copy(_template(), database.path)
    migrate(database)
    return database


@cache
def _template() -> Path:
    folder = tempfile.mkdtemp(prefix="abhiapi-template-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = Path(folder, "abhiapi.db")
    migrate(database_at(f"sqlite:///{made}"))
    return made


def each_in_a_process(work: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> list[T]:
    """What a function makes of each of these arguments, in four processes at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest"])
    with context.Pool(4) as pool:
        return pool.starmap(work, calls, chunksize=1)


def own(name: str) -> str:
    """A name for the simulator that no other test has, nor the same one on another engine."""
    return f"{name}-{os.getpid()}-{next(_numbers)}"


def free_port() -> int:
    """A port that nobody listens at, and that nobody else is given before who asked listens there."""
    for port in _own_ports():
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise AssertionError("it goes round")


@cache
def _own_ports() -> Iterator[int]:
    """For each process of the run its own, below those that the machine gives to whoever connects."""
    beyond = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    own = range(
        FIRST_PORT + number, max(beyond, LAST_PORT_LEAST), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    )
    first = random.randrange(len(own))  # another run may be under way
    return cycle([*own[first:], *own[:first]])


def environment(**settings: str) -> dict[str, str]:
    """This process's environment without any setting of the product, and with these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ABHIAPI_", "FAL_"))}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # each server would compile all of the product anew
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"} | settings


@dataclass
class Process:
    """A child process whose output goes to a file."""

    popen: subprocess.Popen[bytes] | warm.Forked
    log: Path

    @classmethod
    def start(cls, arguments: list[str], log: Path, env: Mapping[str, str], cwd: Path = ROOT) -> Process:
        """Start Python with these arguments."""
        command = [sys.executable, *arguments]
        with open(log, "ab") as out:
            popen = subprocess.Popen(command, cwd=cwd, env=dict(env), stdout=out, stderr=out, start_new_session=True)
        return cls(popen, log)

    @classmethod
    def warm(
        cls, arguments: list[str], log: Path, env: Mapping[str, str], cwd: Path = ROOT, *, namespace: str = ""
    ) -> Process:
        """As `start`, as a fork of a process that has loaded gunicorn and the product; on another machine perhaps."""
        return cls(warm.start(arguments, env=env, cwd=cwd, log=log, namespace=namespace), log)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, with_signal: int = signal.SIGTERM, within_s: float = 30) -> int:
        """Signal it and wait; its exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(with_signal)
        try:
            return self.popen.wait(within_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, signal.SIGABRT)  # each says where its threads stand
            self.popen.wait(10)
            self.kill()
            raise AssertionError(f"did not end within {within_s} s:\n{self.output()}") from None

    def kill(self) -> None:
        """End it and its children at once, as a power cut would."""
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.popen.wait(10)


@dataclass
class Fal:
    """The simulator in a process of its own."""

    process: Process
    url: str

    @classmethod
    @contextmanager
    def started(cls, folder: Path) -> Iterator[Fal]:
        port = free_port()
        process = Process.warm(["cli.py", "sandbox", "--bind", f"127.0.0.1:{port}"], folder / "fal.log", environment())
        running = cls(process, f"http://127.0.0.1:{port}")
        try:
            until(lambda: _answers(running.url, "/_sandbox/calls?last=0", process), what="the simulator answers")
            yield running
        finally:
            process.kill()

    def calls(self, contains: str = "", *, last: int = 10_000) -> list[dict[str, Any]]:
        """What it received, newest last: so many of the calls that hold a text."""
        wanted = {"last": str(last), "contains": contains}
        received: list[dict[str, Any]] = requests.get(f"{self.url}/_sandbox/calls", wanted, timeout=10).json()["calls"]
        return received

    def total(self) -> int:
        """How many calls it has received that may cost: reconcilers of other tests' servers look at jobs meanwhile."""
        return int(requests.get(f"{self.url}/_sandbox/calls?last=0", timeout=10).json()["posts"])

    def release(self, name: str) -> None:
        """Let the calls go on that wait by `hold_until`."""
        requests.post(self.url + "/_sandbox/release", json={"name": name}, timeout=10).raise_for_status()


@dataclass
class Books:
    """The ledger of a server, read and written from this process as the command line does it."""

    database: Database
    clock: Callable[[], int] = field(default=lambda: time.time_ns() // 1_000_000)

    def write(self, op: Callable[[Tx], T]) -> T:
        return self.database.write(op)

    def read(self, op: Callable[[Tx], T]) -> T:
        return self.database.read(op)

    def account(self, credits: int = 1000, *, plan: str = "free") -> tuple[str, str]:
        """A new account with whole credits, and its key: (name, key)."""
        name = f"account-{next(_numbers)}-{os.getpid()}"

        def make(tx: Tx) -> str:
            account = accounts.create(tx, name, plan=plan, now_ms=self.clock())
            if credits:
                ledger.topup(tx, account.account_id, Micros(credits * 1000), ref=None, note=None, now_ms=self.clock())
            return keys.create(tx, account.account_id, name=None, expires_at=None, now_ms=self.clock())[0]

        return name, self.write(make)

    def standing(self, name: str) -> tuple[int, int]:
        """An account's (balance, held) in micros."""

        def read(tx: Tx) -> tuple[int, int]:
            account = accounts.find(tx, name)
            assert account is not None
            return account.balance_micros, account.held_micros

        return self.read(read)

    def calls(self, name: str) -> list[reports.CallRow]:
        """An account's calls, newest first."""

        def read(tx: Tx) -> list[reports.CallRow]:
            account = accounts.find(tx, name)
            assert account is not None
            return reports.newest_calls(tx, account_id=account.account_id, most=10_000)

        return self.read(read)

    def entries(self, name: str) -> list[reports.EntryRow]:
        """An account's entries, newest first."""

        def read(tx: Tx) -> list[reports.EntryRow]:
            account = accounts.find(tx, name)
            assert account is not None
            return reports.newest_entries(tx, account.account_id, most=10_000)

        return self.read(read)

    def verify(self) -> audit.Finding:
        return self.read(audit.verify)


@dataclass
class Server:
    """The proxy under a real gunicorn: what `serve` becomes once all is checked (of `serve` itself: test_serving).

    Its checks would load half of the product, for the gunicorn that it becomes to load it again.
    """

    process: Process
    url: str
    books: Books
    folder: Path
    env: dict[str, str]

    @classmethod
    @contextmanager
    def started(cls, folder: Path, fal_url: str, **settings: str) -> Iterator[Server]:
        server = cls.start(folder, fal_url, **settings)
        try:
            yield server
        finally:
            server.process.kill()

    @classmethod
    def start(cls, folder: Path, fal_url: str, **settings: str) -> Server:
        """Start on a database in ``folder`` (kept if there is one) and wait until it answers.

        ``PORT`` may be given, ``WORKERS``, and ``CWD``, where its .env is; a setting that is empty is not there at all.
        """
        port = int(settings.pop("PORT", 0)) or free_port()
        cwd = Path(settings.pop("CWD", ROOT))
        workers = int(settings.pop("WORKERS", "1"))
        url = settings.setdefault("ABHIAPI_DATABASE_URL", f"sqlite:///{folder / 'abhiapi.db'}")
        if url.startswith("postgresql"):
            settings.setdefault("ABHIAPI_WEBHOOK_KEY", WEBHOOK_KEY)
        env = environment(
            **{
                "FAL_KEY": OPERATOR_KEY,
                "ABHIAPI_FAL_RUN_URL": fal_url,
                "ABHIAPI_FAL_QUEUE_URL": f"{fal_url}/queue",
                "ABHIAPI_FAL_REST_URL": f"{fal_url}/rest",
                "ABHIAPI_FAL_API_URL": f"{fal_url}/v1",
                "ABHIAPI_PRICES_SYNC_S": "0",
                "ABHIAPI_LEARN_HOLDS": "0",  # else what fal is made to bill in one test changes the holds of the next
                "ABHIAPI_RATE_PER_MINUTE": "100000",
                "ABHIAPI_CONCURRENCY": "1000",
            }
            | settings
        )
        env = {name: value for name, value in env.items() if value or name not in settings}
        database = ready(url)
        arguments = serving.gunicorn_arguments(f"127.0.0.1:{port}", workers)
        process = Process.warm(["-m", "gunicorn", *arguments], folder / "server.log", env, cwd)
        server = cls(process, f"http://127.0.0.1:{port}", Books(database), folder, env)
        try:
            until(lambda: _answers(server.url, "/healthz", process), what="the server answers", within_s=START_S)
        except BaseException:
            process.kill()
            raise
        return server

    def post(
        self, key: str, path: str = "/fal-ai/flux/dev", body: Any = None, *, weather: str = "", **more: Any
    ) -> requests.Response:
        """A call as a customer makes it, with the simulator's weather for it."""
        headers = {"x-api-key": key} | more.pop("headers", {})
        if weather:
            headers["x-fal-sandbox"] = weather
        if body is None:
            body = {"prompt": "a cat", "image_size": "landscape_4_3"}
        return requests.post(self.url + path, json=body, headers=headers, timeout=60, **more)


def _answers(url: str, path: str, process: Process) -> bool:
    if process.popen.poll() is not None:
        raise AssertionError(f"ended with status {process.popen.returncode}:\n{process.output()}")
    try:
        raw_http.connect(url).close()  # a fortieth of the work of a request that nobody takes
        return requests.get(url + path, timeout=5).ok
    except OSError:  # of `requests` too
        return False
