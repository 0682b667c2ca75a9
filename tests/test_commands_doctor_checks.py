"""`doctor`, part two: the place, the network and the books; each thing that may be wrong is found, and named."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import bindparam, update

from abhiapi import alerts, billing, fal_bill, processes, serving, tables, timers, vitals
from abhiapi.commands import checks_network, checks_place, session
from abhiapi.migrations import migrate
from abhiapi.settings import Settings
from tests.command_line import NOWHERE, CommandLine
from tests.harness import Clock, Fal, Server, until
from tests.redis_server import RedisServer
from tests.rows import DEAD_PID, Customer

DAY_MS = 86_400_000
REAL = {"ABHIAPI_FAL_RUN_URL": "https://fal.run"}  # `doctor` never asks this one


@pytest.fixture
def cli(tmp_path: Path) -> CommandLine:
    made = CommandLine(tmp_path)
    migrate(made.database)
    return made


def told(cli: CommandLine, name: str, *options: str, **settings: str) -> tuple[str, str]:
    """How `doctor` finds one thing: (status, message), the worst where it says several."""
    done = cli("doctor", "--json", *(options or ("--offline",)), **settings)
    found = [(check["status"], check["message"]) for check in done.json["checks"] if check["check"] == name]
    return min(found, key=lambda one: ("fail", "warn", "ok").index(one[0]))


def assert_told(found: tuple[str, str], status: str, *words: str) -> None:
    assert found[0] == status, found
    for word in words:
        assert word in found[1]


# --- the place ----------------------------------------------------------------------------------------------------


def test_secrets_that_others_may_read_are_named(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, settings in ((".env", {}), ("fal-key", {"FAL_KEY": "", "FAL_KEY_FILE": str(tmp_path / "fal-key")})):
        file = tmp_path / name
        file.write_text("" if name == ".env" else "id:secret")
        file.chmod(0o644)
        assert_told(told(cli, "secret files", **settings), "warn", name, "chmod 600")
        file.chmod(0o600)
        assert_told(told(cli, "secret files", **settings), "ok")


def test_a_ledger_that_everybody_may_read_is_named(cli: CommandLine, tmp_path: Path) -> None:
    cli.path.chmod(0o644)
    tmp_path.chmod(0o755)
    assert_told(told(cli, "file rights"), "warn", cli.path.name, "chmod o-rwx")
    tmp_path.chmod(0o750)  # nobody else comes in
    assert_told(told(cli, "file rights"), "ok")
    key = tmp_path / f"{cli.path.name}.webhook-key"
    key.write_text("x")
    key.chmod(0o644)
    assert_told(told(cli, "file rights"), "fail", key.name)


def test_a_log_that_nobody_folds_in_is_named(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("accounts", "create", "ann")
    connection = cli.database.connect()  # keeps the log from being removed
    cli("accounts", "create", "bob")
    monkeypatch.setattr(checks_place, "WAL_LARGE_BYTES", 0)
    assert_told(told(cli, "write-ahead log"), "warn", "keeps the database open")
    connection.close()
    monkeypatch.setattr(checks_place, "WAL_LARGE_BYTES", 2**40)
    assert_told(told(cli, "write-ahead log"), "ok")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"ABHIAPI_UPSTREAM_TIMEOUT_S": "60"}, "films"),
        ({"ABHIAPI_MARGIN": "0"}, "fal's price"),
        ({"ABHIAPI_WEBHOOK_ALLOW_LOOPBACK": "1", **REAL}, "webhooks"),
        ({"ABHIAPI_TRUSTED_PROXIES": "1"}, "ABHIAPI_METRICS_TOKEN"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_settings_that_hardly_anybody_means_are_named(cli: CommandLine, settings: dict[str, str], word: str) -> None:
    assert_told(told(cli, "odd settings", **settings), "warn", word)
    assert_told(told(cli, "odd settings"), "ok")


def test_traces_without_their_extra_are_a_failure(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server would not start."""
    endpoint = {"ABHIAPI_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    assert_told(told(cli, "traces", **endpoint), "ok", "4318")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_told(told(cli, "traces", **endpoint), "fail", "pip install -e '.[otel]'")


def test_a_setting_in_a_file_is_no_unknown_variable(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("metrics-token")
    assert_told(told(cli, "variables", ABHIAPI_METRICS_TOKEN_FILE=str(tmp_path / "token")), "ok")
    assert_told(told(cli, "variables", ABHIAPI_MARGIN_FILE=str(tmp_path / "token")), "warn", "ABHIAPI_MARGIN_FILE")


# --- the network ------------------------------------------------------------------------------------------------


class Answers:
    """A server on this machine that says one thing to everybody."""

    def __init__(self, status: int, body: bytes, date: str) -> None:
        head = f"HTTP/1.1 {status} X\r\nDate: {date}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self._answer = head.encode() + body
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.asked: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(65536))
                connection.sendall(self._answer)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@contextmanager
def answering(status: int = 200, body: bytes = b"{}", *, seconds_off: int = 0) -> Iterator[Answers]:
    server = Answers(status, body, formatdate(session.now_ms() // 1000 + seconds_off, usegmt=True))
    try:
        yield server
    finally:
        server.close()


def test_fals_word_on_the_credential_counts(cli: CommandLine, fal: Fal) -> None:
    """Asked for with the credential itself, and told without it."""
    assert_told(told(cli, "fal", "--json", ABHIAPI_FAL_API_URL=f"{fal.url}/v1"), "ok", "takes FAL_KEY")
    for status, found in ((401, "fail"), (403, "fail"), (500, "warn")):
        with answering(status) as server:
            assert_told(told(cli, "fal", "--json", ABHIAPI_FAL_API_URL=server.url), found, str(status))
            assert b"Key id:secret" in server.asked[0]
            assert "id:secret" not in cli("doctor", ABHIAPI_FAL_API_URL=server.url).stdout
    assert_told(told(cli, "fal", "--json", ABHIAPI_FAL_API_URL=NOWHERE), "warn", "does not answer")


@pytest.mark.parametrize(("seconds_off", "status"), [(0, "ok"), (30, "warn"), (-30, "warn"), (600, "fail")])
def test_a_clock_that_is_off_is_named(cli: CommandLine, seconds_off: int, status: str) -> None:
    with answering(seconds_off=seconds_off) as server:
        assert_told(told(cli, "clock", "--json", ABHIAPI_FAL_API_URL=server.url), status)


def test_the_public_address_must_be_this_service(cli: CommandLine, shared_server: Server) -> None:
    def found(url: str) -> tuple[str, str]:
        return told(cli, "public url", "--json", ABHIAPI_PUBLIC_URL=url)

    assert_told(found(shared_server.url), "ok", "answers")
    assert_told(found(NOWHERE), "warn", "does not answer from here as this service does: Connection refused")
    with answering(200, b"<html>welcome</html>") as other:
        assert_told(found(other.url), "warn", "something else")
    with answering(503, b'{"status": "unavailable"}') as ill:
        assert_told(found(ill.url), "warn", "503")


def test_an_address_without_encryption_is_named(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's own, taken for another's."""
    with answering(200, b'{"status": "ok"}') as server:
        settings = {"ABHIAPI_PUBLIC_URL": server.url}
        assert_told(told(cli, "public url", "--json", **settings), "ok")
        monkeypatch.setattr(checks_network, "LOOPBACK", ())
        assert_told(told(cli, "public url", "--json", **settings), "warn", "not encrypted")


def test_offline_asks_nobody(cli: CommandLine) -> None:
    with answering() as server:
        done = cli("doctor", "--offline", ABHIAPI_FAL_API_URL=server.url, ABHIAPI_PUBLIC_URL=server.url)
        assert done.exit_code == 0
        assert server.asked == []


# --- the books --------------------------------------------------------------------------------------------------


def test_a_reconciler_that_stands_still_is_a_failure(cli: CommandLine) -> None:
    now = session.now_ms()
    customer = Customer.new(cli.database, Clock(now))
    assert_told(told(cli, "reconciler"), "ok", "no server runs here")
    customer.admit()
    assert_told(told(cli, "reconciler"), "warn", "1 holds are open", "no server")
    cli.database.write(lambda tx: processes.start(tx, pid=os.getpid(), now_ms=now))
    assert_told(told(cli, "reconciler"), "ok", "not come through yet")
    for ago_ms, status in ((60_000, "ok"), (3_600_000, "fail")):
        cli.database.write(lambda tx, at=now - ago_ms: timers.done(tx, vitals.ROUND, now_ms=at, due_in_ms=0))  # type: ignore[misc]
        assert_told(told(cli, "reconciler"), status)


def test_standing_alerts_are_told(cli: CommandLine) -> None:
    for kind, status in (("below_cost", "warn"), ("fal_account", "fail")):
        cli.database.write(lambda tx, kind=kind: alerts.raise_(tx, kind, "x", f"{kind} it is", now_ms=1))  # type: ignore[misc]
        assert_told(told(cli, "alerts"), status, kind)


def test_a_ledger_without_a_fresh_backup_is_named(cli: CommandLine, tmp_path: Path) -> None:
    now = session.now_ms()
    assert_told(told(cli, "backups", **REAL), "ok")  # nothing is in it yet
    Customer.new(cli.database, Clock(now - 2 * DAY_MS))
    assert_told(told(cli, "backups", **REAL), "warn", "never run")
    assert_told(told(cli, "backups"), "ok")  # the simulator's money
    assert cli("backup", str(tmp_path / "copy.db")).exit_code == 0
    assert_told(told(cli, "backups", **REAL), "ok", "the last was made at")
    old = now - 3 * DAY_MS
    cli.database.write(lambda tx: timers.done(tx, vitals.BACKUP, now_ms=old, due_in_ms=0))
    assert_told(told(cli, "backups", **REAL), "warn", "timer")


def test_a_bill_that_nobody_compares_any_more_is_named(cli: CommandLine) -> None:
    now = session.now_ms()
    assert_told(told(cli, "fal's bill"), "ok", "never compared")
    for days, status in ((1, "ok"), (9, "warn")):
        at = now - days * DAY_MS
        cli.database.write(lambda tx, at=at: billing.reach(tx, fal_bill.BOOKMARK, at))  # type: ignore[misc]
        assert_told(told(cli, "fal's bill"), status)


def test_play_money_that_can_spend_real_credit_is_a_failure(cli: CommandLine) -> None:
    settings = Settings.from_env({"FAL_KEY": "id:secret"} | cli.settings)
    serving.demo_key(settings)
    assert_told(told(cli, "play money"), "ok")  # at the simulator it is what it is for
    assert_told(told(cli, "play money", **REAL), "fail", "suspend")
    cli("accounts", "suspend", serving.DEMO_ACCOUNT)
    assert_told(told(cli, "play money", **REAL), "ok", "suspended")


def test_prices_below_fals_are_told(cli: CommandLine) -> None:
    assert_told(told(cli, "margins"), "ok")
    cli("prices", "set", "fal-ai/flux/dev", "--unit-price", "0.001", "--unit", "megapixels")
    assert_told(told(cli, "margins"), "warn", "fal-ai/flux/dev")


def test_a_dead_server_is_none(cli: CommandLine) -> None:
    cli.database.write(lambda tx: processes.start(tx, pid=DEAD_PID, now_ms=1))
    assert_told(told(cli, "reconciler"), "ok", "no server runs here")
    assert_told(told(cli, "processes"), "ok", "none")
    ended = subprocess.Popen(["true"])
    ended.wait()
    cli.database.write(lambda tx: processes.start(tx, pid=ended.pid, now_ms=1))
    assert_told(told(cli, "processes"), "ok", "none")
    cli.database.write(lambda tx: processes.start(tx, pid=os.getpid(), now_ms=1))
    assert_told(told(cli, "processes"), "ok", "1 serves")
    cli.database.write(lambda tx: processes.start(tx, pid=os.getppid(), now_ms=1))
    assert_told(told(cli, "processes"), "fail", "2 serve")


@pytest.mark.engines("postgresql")
def test_servers_of_one_ledger_that_count_limits_apart_are_named(
    fal: Fal, tmp_path: Path, database_url: str, redis_server: RedisServer
) -> None:
    """B7, row 55: each is let do what all together may. A reload looks the same while the old process ends."""
    cli = CommandLine(tmp_path, database_url)

    def told_of(limits_url: str) -> tuple[str, str]:
        return told(cli, "processes", ABHIAPI_LIMITS_URL=limits_url)

    with (
        Server.started(tmp_path, fal.url, ABHIAPI_DATABASE_URL=database_url),
        Server.started(tmp_path, fal.url, ABHIAPI_DATABASE_URL=database_url) as other,
    ):
        assert_told(told_of("memory://"), "warn", "2 serve this database", "one Redis", "reload")
        assert_told(told_of(redis_server.url()), "ok", "2 serve this database", "together")
        long_ago = update(tables.processes).values(started_at=bindparam("long_ago"))
        cli.database.write(lambda tx: tx.run(long_ago, long_ago=session.now_ms() - DAY_MS))
        assert_told(told_of("memory://"), "fail", "2 times", "ABHIAPI_LIMITS_URL")
        other.process.kill()
        until(lambda: told_of("memory://") == ("ok", "1 serves this database"), what="one is seen to be gone")


def test_what_ails_the_settings_is_all_that_is_said(cli: CommandLine) -> None:
    """The other checks stand on them."""
    done: Any = cli("doctor", "--json", ABHIAPI_MARGIN="much")
    assert {check["check"] for check in done.json["checks"]} == {"variables", "settings"}


@contextmanager
def somebody_else() -> Iterator[None]:
    """A user who may not read what only its owner may."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", ["file", "folder"])
def test_a_command_of_another_user_is_told_so(cli: CommandLine, tmp_path: Path, closed: str) -> None:
    """The service's folder and file are its own, and an operator's first command is often run as somebody else."""
    with tempfile.TemporaryDirectory() as service:  # not in pytest's folder, which is closed to others itself
        settings = {"ABHIAPI_DATABASE_URL": f"sqlite:///{service}/abhiapi.db"}
        commands = [("accounts", "list"), ("doctor", "--offline"), ("backup", str(tmp_path / "copy.db"))]
        for command in commands:  # loads what each needs
            cli(*command, **settings)
        (tmp_path / "copy.db").unlink()
        os.chmod(service, 0o700 if closed == "folder" else 0o755)
        with somebody_else():
            for command in commands:
                done = cli(*command, **settings)
                said = done.stdout + done.stderr
                assert (done.exit_code, "run this as the user who serves" in said) == (1, True), said
