"""A real PostgreSQL for the tests: one server a run, shared by all its processes, and cheap fresh databases in it.

Nothing of it outlives the run: whoever leaves last stops the server. It does not sync to disk, save where a test
wants it to.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

from abhiapi import db_postgres, processes, runtime, sweep
from abhiapi.db import database_at
from abhiapi.migrations import migrate
from abhiapi.settings import Settings
from tests.harness import Server, free_port, until

USER = "abhiapi"
TEMPLATE = "fresh"
FAST = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "64MB", "max_connections": "300"}
FAST["dynamic_shared_memory_type"] = "mmap"  # in its folder: what a kill leaves goes with that


def programs() -> Path:
    """The folder of the newest PostgreSQL there is; its programs may not be on the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        raise AssertionError("the tests need PostgreSQL: run tools/servers")
    return (found[-1] if found else Path(on_path or "")).parent


@dataclass(frozen=True)
class Postgres:
    """A server whose files are in a folder."""

    folder: Path
    port: int
    _numbers: count[int] = field(default_factory=lambda: count(1))

    @classmethod
    def start(cls, **settings: str) -> Postgres:
        server = cls.make(**settings)
        server.go()
        return server

    @classmethod
    def make(cls, **settings: str) -> Postgres:
        """A new server that does not run yet, in a folder that its user can reach (pytest's are root's alone)."""
        folder = Path(tempfile.mkdtemp(prefix="abhiapi-postgres-"))
        folder.chmod(0o755)
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
        server = cls(folder, free_port())
        server._do("initdb", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-U", USER, "--no-sync")
        lines = {"listen_addresses": "127.0.0.1", "port": str(server.port), "unix_socket_directories": str(folder)}
        with open(folder / "data" / "postgresql.conf", "a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in (lines | FAST | settings).items())
        return server

    def go(self, *options: str) -> None:
        """Start it, with options of `postgres` itself, which count more than its file."""
        self._do("pg_ctl", "-l", str(self.folder / "log"), "-o", shlex.join(options), "-w", "start")

    def stop(self, mode: str = "immediate") -> None:
        self._do("pg_ctl", "-m", mode, "-w", "stop")

    def become_standby(self) -> None:
        """Start anew as one that follows (nobody): it reads, and takes no writes."""
        self.stop("fast")
        (self.folder / "data" / "standby.signal").touch()
        self.go()

    def promote(self) -> None:
        self._do("pg_ctl", "-w", "promote")

    def remove(self) -> None:
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, name: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{name}"

    def connect(self, name: str = "postgres") -> psycopg.Connection[Any]:
        return psycopg.connect(self.url(name), autocommit=True)

    def make_template(self) -> None:
        with self.connect() as connection:
            connection.execute("CREATE DATABASE fresh")
        made = database_at(self.url(TEMPLATE))
        migrate(made)

    @contextmanager
    def fresh(self, *, empty: bool = False) -> Iterator[str]:
        """The URL of a database of its own: of this version, or without any table."""
        url = self.create(empty=empty)
        try:
            yield url
        finally:
            with self.connect() as connection:
                connection.execute(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def create(self, *, empty: bool = False) -> str:
        """The same, for as long as the server runs."""
        name = f"test_{os.getpid()}_{next(self._numbers)}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {'template0' if empty else TEMPLATE}")
        return self.url(name)

    def _do(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs, which refuse to run as root."""
        command = [str(programs() / program), "-D", str(self.folder / "data"), *arguments]
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            who = pwd.getpwnam("postgres")
            as_user = {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []}
        done = subprocess.run(
            command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, **as_user,
        )  # fmt: skip
        if done.returncode:
            raise AssertionError(f"{program}: {done.stderr}\n{_tail(self.folder / 'log')}")


@contextmanager
def shared(root: Path) -> Iterator[Postgres]:
    """The server of this run, started by whoever needs it first and stopped by whoever leaves last."""
    root.mkdir(exist_ok=True)
    with open(root / "users", "wb") as users, open(root / "gate", "wb") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        try:
            known = root / "server"
            if known.exists():
                port, _, folder = known.read_text().partition(" ")
                server = Postgres(Path(folder), int(port))
            else:
                server = Postgres.start()
                server.make_template()
                known.write_text(f"{server.port} {server.folder}")
            fcntl.flock(users, fcntl.LOCK_SH)
        finally:
            fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield server
        finally:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(users, fcntl.LOCK_UN)
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass  # others still use it
            else:
                known.unlink()
                server.remove()


def sweep_at_once(server: Server) -> None:
    """End what killed processes left to this server, as any process does once it has seen a lock free for long enough.

    Which here is no time.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(db_postgres, "FREE_FOR_S", 0)
        rt = runtime.start(Settings.from_env(server.env))
        try:
            until(
                lambda: sweep.run_once(rt) == 0 and len(server.books.read(processes.running)) == 2,
                what="only the server is left, and who looks",
            )
        finally:
            rt.close()


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-2000:] if path.exists() else ""
