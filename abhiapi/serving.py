"""What has to be true before a server starts, and what `serve --sandbox --demo` sets up besides."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

from abhiapi import accounts, keys, ledger, processes, users
from abhiapi.db import Database, Tx
from abhiapi.errors import BadRequest, Refused, SettingsError
from abhiapi.migrations import open_database
from abhiapi.money import Micros
from abhiapi.settings import NO_FAL_KEY, Settings, default_database_url, environment

CONNECTIONS = 4000
FILES_PER_CALL = 2  # one connection to the caller, one to fal
DEMO_ACCOUNT, DEMO_MICROS, DEMO_REF = "demo", Micros(5_000_000), "demo credit"
DEMO_EMAIL = "demo@example.com"
SANDBOX_CREDENTIAL = "sandbox:not-a-credential-of-fal"


def checked_settings() -> Settings:
    """The settings of a server. Raises `SettingsError`, with every problem."""
    settings = Settings.from_env()
    if settings.fal_key is None:
        raise SettingsError([NO_FAL_KEY])
    return settings


def check_workers(settings: Settings, count: int) -> None:
    """Raises `SettingsError`: more than one process needs a database and limits that several can share."""
    if count > 1 and (settings.database_url.startswith("sqlite") or settings.limits_url.startswith("memory")):
        raise SettingsError(
            [
                "more than one worker needs PostgreSQL (ABHIAPI_DATABASE_URL) and Redis (ABHIAPI_LIMITS_URL); "
                "with SQLite or memory:// serve with one"
            ]
        )


def others_counting_apart(database: Database, settings: Settings) -> int:
    """How many processes serve this ledger already, each counting limits for itself: money is safe, limits are not."""
    if not settings.limits_url.startswith("memory"):
        return 0
    running = database.read(processes.running)
    return len(database.living({process.process_id: process.pid for process in running}))


def raise_file_limit() -> str | None:
    """Allow as many open files as calls may need; a warning where the system does not let us.

    1,024, the usual default, loses every call past the five hundredth.
    """
    wanted = CONNECTIONS * FILES_PER_CALL + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return None
    best = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (best, hard))
    return f"only {best} open files are allowed: raise 'ulimit -n' to {wanted}" if best < wanted else None


def parse_bind(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``. Raises `BadRequest`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise BadRequest(f"{text!r} is no HOST:PORT such as 127.0.0.1:8000")
    return host.strip("[]"), int(port)


def check_port_free(host: str, port: int) -> None:
    """Raises `Refused` where somebody listens already: gunicorn would try for long, and say less."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Refused(
                f"cannot listen on {host}:{port}: {error.strerror}. Choose another with --bind (`make run`: PORT=8001)"
            ) from error


def gunicorn_arguments(bind: str, workers: int = 1) -> list[str]:
    """What gunicorn is told, to serve as `serve` does."""
    return ["-c", "python:abhiapi.gunicorn_config", "-b", bind, "-w", str(workers), "abhiapi.wsgi:app"]


def make_importable() -> None:
    """Let the processes that are started from here import this package, also from a checkout in another folder."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if root not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *paths])


def sandbox_database() -> dict[str, str]:
    """The environment that keeps play money apart: a ledger of its own, unless one was named (decisions/0008)."""
    if environment().get("ABHIAPI_DATABASE_URL"):
        return {}
    return {"ABHIAPI_DATABASE_URL": default_database_url().replace("abhiapi.db", "sandbox.db")}


def start_simulator() -> dict[str, str]:
    """Start the simulator as a child that ends with this process; the environment that points a server at it.

    The listening socket is made here and handed down, so the address is known and taken before anything starts.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listener.getsockname()[1]
    command = [sys.executable, "-m", "abhiapi.sandbox", "--fd", str(listener.fileno()), "--until-parent-ends"]
    subprocess.Popen(command, pass_fds=[listener.fileno()], start_new_session=True)
    listener.close()
    url = f"http://127.0.0.1:{port}"
    return {
        "FAL_KEY": SANDBOX_CREDENTIAL,
        "ABHIAPI_FAL_RUN_URL": url,
        "ABHIAPI_FAL_QUEUE_URL": f"{url}/queue",
        "ABHIAPI_FAL_REST_URL": f"{url}/rest",
        "ABHIAPI_FAL_API_URL": f"{url}/v1",
        "ABHIAPI_WEBHOOK_ALLOW_LOOPBACK": environment().get("ABHIAPI_WEBHOOK_ALLOW_LOOPBACK") or "1",
    }


def demo_key(settings: Settings) -> str:
    """The key of the demo account, made with its 5,000 credits at the first start and kept in a file for the next.

    Play money only: the caller sees to it that the database is the simulator's.
    """
    database = open_database(settings)
    file = settings.kept_beside("demo-key")
    kept = file.read_text().strip() if file.exists() else ""
    now_ms = time.time_ns() // 1_000_000

    def set_up(tx: Tx) -> str:
        account = accounts.find(tx, DEMO_ACCOUNT) or accounts.create(tx, DEMO_ACCOUNT, now_ms=now_ms)
        ledger.topup(tx, account.account_id, DEMO_MICROS, ref=DEMO_REF, note="play money", now_ms=now_ms)
        if kept and keys.find(tx, kept) is not None:
            return kept
        return keys.create(tx, account.account_id, name="demo", expires_at=None, now_ms=now_ms)[0]

    key = database.write(set_up)
    if key != kept:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write(key + "\n")
    return key


def demo_link(settings: Settings) -> str:
    """The path of a link that signs in the demo account's user, who sees the operator's pages as well.

    They have no password, so nothing but this link lets anybody in as them, and each start makes a new one.
    """
    now_ms = time.time_ns() // 1_000_000

    def set_up(tx: Tx) -> str:
        account = accounts.find(tx, DEMO_ACCOUNT) or accounts.create(tx, DEMO_ACCOUNT, now_ms=now_ms)
        owner = account.account_id
        if users.find(tx, DEMO_EMAIL) is None:
            users.create(tx, DEMO_EMAIL, account_id=owner, is_operator=True, password_hash=None, now_ms=now_ms)
        return users.invite(tx, DEMO_EMAIL, account_id=owner, purpose="demo", now_ms=now_ms)[0]

    return f"/dashboard/demo/{open_database(settings).write(set_up)}"


def may_offer_demo(settings: Settings, host: str) -> bool:
    """Whether pages may show the demo's link: nobody but this machine is served, and the books are the demo's own.

    A ledger with an account that is older than the demo's is one of real customers, whatever it was named for.
    """
    try:
        is_here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = False
    database = open_database(settings)
    oldest = min(database.read(accounts.everyone), key=lambda account: account.account_id)
    return is_here and oldest.name == DEMO_ACCOUNT


def demo_banner(base_url: str, key: str, link: str, database_url: str, *, is_offered: bool) -> str:
    """What a newcomer reads: where to click, a line that works when pasted, and how to look at the books."""
    where = f"""Open this, and click on from there:

  {base_url}

This opens the dashboard at once:"""
    return f"""
AbhiAPI serves the built-in simulator of fal: nothing here costs money. {where if is_offered else "This signs you in:"}

  {base_url}{link}

Or paste this:

  curl -X POST {base_url}/fal-ai/flux/dev \\
    -H "x-api-key: {key}" \\
    -H "Content-Type: application/json" \\
    -d '{{"prompt": "a futuristic city at night", "image_size": "landscape_4_3"}}'

Then look at the books in another terminal:

  export ABHIAPI_DATABASE_URL={database_url}
  {_command()} usage
  {_command()} ledger show demo
"""


def _command() -> str:
    installed = Path(sys.executable).with_name("abhiapi")
    if not installed.exists():
        return f"{sys.executable} cli.py"
    try:
        return str(installed.relative_to(Path.cwd()))
    except ValueError:
        return str(installed)
