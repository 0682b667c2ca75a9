"""`doctor`: what is wrong is named, with what to do; what is well is left alone."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import psycopg
import pytest

from abhiapi import timers
from abhiapi.commands import checks, database_checks, session
from abhiapi.metering import Verdict
from abhiapi.migrations import VERSION, migrate
from tests.command_line import CommandLine
from tests.harness import Clock, free_port
from tests.redis_server import RedisServer
from tests.rows import Customer

pytestmark = pytest.mark.engines


@pytest.fixture
def cli(tmp_path: Path, database_url: str) -> CommandLine:
    made = CommandLine(tmp_path, database_url)
    migrate(made.database)
    return made


@pytest.fixture
def customer(cli: CommandLine) -> Customer:
    return Customer.new(cli.database, Clock(session.now_ms()))


def checked(cli: CommandLine, **settings: str) -> dict[str, Any]:
    """What `doctor` says of each thing."""
    done = cli("doctor", "--json", **settings)
    assert done.exit_code == (0 if done.json["ok"] else 1)
    assert list(done.json) == ["ok", "checks"]
    assert all(list(check) == ["check", "status", "message"] for check in done.json["checks"])
    return {check["check"]: check for check in done.json["checks"]}


def test_doctor_finds_a_healthy_installation_well(cli: CommandLine, customer: Customer, engine: str) -> None:
    customer.settle()
    customer.admit()
    done = cli("doctor")
    assert done.exit_code == 0, done.stdout
    assert done.stderr == ""
    of_a_file = {"disk", "file rights", "write-ahead log"}
    assert set(checked(cli)) == (of_a_file if engine == "sqlite" else set()) | {
        *("variables", "settings", "fal credential", "limits", "open files"),
        *("database", "webhook key", "writing", "prices", "holds", "ledger"),
        *("secret files", "odd settings", "sessions", "traces"),
        *("processes", "reconciler", "alerts", "backups", "fal's bill", "play money", "margins"),
        *("fal", "public url"),
    }
    assert "1 open" in checked(cli)["holds"]["message"]


@pytest.mark.engines("sqlite")
def test_doctor_looks_at_redis(cli: CommandLine, redis_server: RedisServer) -> None:
    """Its version and latency; a policy that may evict counts is told, and so is one that is not there."""
    url = redis_server.url()
    well = checked(cli, ABHIAPI_LIMITS_URL=url)["limits"]
    assert (well["status"], "Redis " in well["message"], "ms" in well["message"]) == ("ok", True, True)
    redis_server.set("maxmemory-policy", "allkeys-lru")
    try:
        evicting = checked(cli, ABHIAPI_LIMITS_URL=url)["limits"]
    finally:
        redis_server.set("maxmemory-policy", "noeviction")
    assert (evicting["status"], "allkeys-lru" in evicting["message"]) == ("warn", True)
    gone = checked(cli, ABHIAPI_LIMITS_URL=f"redis://:top-secret@127.0.0.1:{free_port()}")["limits"]
    assert (gone["status"], "top-secret" in gone["message"]) == ("fail", False)


def test_doctor_creates_nothing(tmp_path: Path) -> None:
    cli = CommandLine(tmp_path)
    assert checked(cli)["database"]["status"] == "warn"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.engines("sqlite")
def test_doctor_tells_every_bad_setting(cli: CommandLine) -> None:
    done = cli("doctor", ABHIAPI_MARGIN="much", ABHIAPI_CONCURRENCY="0")
    assert done.exit_code == 1
    assert [line.split()[:3] for line in done.lines[1:]] == [
        ["fail", "settings", "ABHIAPI_MARGIN"],
        ["fail", "settings", "ABHIAPI_CONCURRENCY"],
    ]


@pytest.mark.engines("sqlite")
def test_doctor_warns_of_a_setting_that_nobody_reads(cli: CommandLine) -> None:
    check = checked(cli, ABHIAPI_RATE_PER_MINUT="5")["variables"]
    assert check["status"] == "warn"
    assert "ABHIAPI_RATE_PER_MINUTE" in check["message"]


def test_doctor_asks_for_the_credential_and_does_not_print_it(cli: CommandLine) -> None:
    assert checked(cli, FAL_KEY="")["fal credential"]["status"] == "fail"
    assert "hush-hush" not in cli("doctor", FAL_KEY="id:hush-hush").stdout


def test_doctor_names_holds_that_wait_for_the_operator(cli: CommandLine, customer: Customer) -> None:
    call = customer.admit()
    customer.finish(call, Verdict("unknown", reason="no_units"))
    customer.clock.tick(-checks.HOLD_AGE_MAX_MS - 60_000)
    customer.admit()
    check = checked(cli)["holds"]
    assert check["status"] == "fail"
    assert check["message"].startswith("1 of unknown cost, 1 older than an hour")


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("UPDATE accounts SET balance_micros = 1", "ledger"),
        ("UPDATE accounts SET held_micros = 1", "ledger"),
        ("PRAGMA application_id = 7", "database"),
        (f"PRAGMA user_version = {VERSION + 1}", "database"),
        ("PRAGMA user_version = 0", "database"),
        ("PRAGMA journal_mode = DELETE", "database"),
        ("INSERT INTO own_prices (model, margin, created_at) VALUES ('acme/gone', '0.1', 1)", "prices"),
    ],
)
def test_doctor_sees_what_is_wrong_with_the_database(
    cli: CommandLine, customer: Customer, statement: str, name: str
) -> None:
    connection = sqlite3.connect(cli.path, isolation_level=None)
    connection.execute(statement)
    connection.close()
    assert {check for check, told in checked(cli).items() if told["status"] == "fail"} == {name}


@pytest.mark.engines("postgresql")
@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("UPDATE accounts SET balance_micros = 1", "ledger"),
        (f"UPDATE abhiapi_schema SET version = {VERSION + 1}", "database"),
    ],
)
def test_doctor_sees_what_is_wrong_in_a_server_s_database(
    cli: CommandLine, customer: Customer, database_url: str, statement: str, name: str
) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(statement.encode())
    assert {check for check, told in checked(cli).items() if told["status"] == "fail"} == {name}
    cli.settings["ABHIAPI_DATABASE_URL"] = f"postgresql://ann:top-secret@127.0.0.1:{free_port()}/gone"
    gone = checked(cli)["database"]
    assert (gone["status"], "top-secret" in gone["message"]) == ("fail", False)


def test_doctor_warns_of_prices_that_nobody_took_over_for_days(cli: CommandLine) -> None:
    day_ms, now = 86_400_000, session.now_ms()
    cli.database.write(lambda tx: timers.done(tx, "prices", now_ms=now - day_ms, due_in_ms=day_ms))
    assert checked(cli)["prices"]["status"] == "ok"
    cli.database.write(lambda tx: timers.done(tx, "prices", now_ms=now - 3 * day_ms, due_in_ms=day_ms))
    assert checked(cli)["prices"]["status"] == "warn"
    assert checked(cli, ABHIAPI_PRICES_SYNC_S="0")["prices"]["status"] == "ok"


def test_doctor_warns_of_free_models(cli: CommandLine) -> None:
    cli("prices", "set", "acme/gift", "--unit-price", "0", "--unit", "images")
    assert "acme/gift" in checked(cli)["prices"]["message"]


@pytest.mark.engines("sqlite")
def test_doctor_survives_a_file_that_is_no_database(cli: CommandLine) -> None:
    cli.path.write_text("not a database\n" * 1000)
    check = checked(cli)["database"]
    assert check["status"] == "fail"
    assert "restore" in check["message"]


@pytest.mark.engines("sqlite")
def test_doctor_watches_the_disk(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    for least, low, status in ((0, 0, "ok"), (0, 2**80, "warn"), (2**80, 2**80, "fail")):
        monkeypatch.setattr(database_checks, "DISK_FREE_LEAST_BYTES", least)
        monkeypatch.setattr(database_checks, "DISK_FREE_LOW_BYTES", low)
        assert checked(cli)["disk"]["status"] == status


@pytest.mark.engines("sqlite")
def test_doctor_watches_open_files(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 1024))
    check = checked(cli)["open files"]
    assert check["status"] == "warn"
    assert "512 calls at once" in check["message"]
