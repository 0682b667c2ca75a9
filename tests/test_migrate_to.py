"""`migrate-to`, and backups of PostgreSQL: every row arrives, and there is never more than one ledger alive."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

from abhiapi import accounts, audit, migrations_postgres, tables
from abhiapi.commands import progress, session, transfer
from abhiapi.db import Database, database_at
from abhiapi.db_sqlite import SqliteDatabase
from abhiapi.errors import DatabaseUnavailable, SchemaError
from abhiapi.liveness import FileLock
from abhiapi.migrations import migrate
from tests.command_line import CommandLine
from tests.harness import Clock
from tests.postgres import Postgres
from tests.rows import Customer


@pytest.fixture
def cli(tmp_path: Path) -> CommandLine:
    """A ledger in a file, with calls of all kinds of ends."""
    made = CommandLine(tmp_path)
    migrate(made.database)
    customer = Customer.new(made.database, Clock(session.now_ms()))
    customer.limit(day=900)
    for charge in (26_250, 0, 1):
        customer.settle(charge)
    customer.admit()
    customer.topup(5, ref="paid", note="żółć \\ \t 'quoted'")
    return made


@pytest.fixture
def empty(postgres: Postgres) -> Iterator[str]:
    with postgres.fresh(empty=True) as url:
        yield url


def rows(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    return database.read(lambda tx: {name: tx.all(transfer._ROWS[name]) for name in transfer.ORDER})


@pytest.mark.parametrize("is_terminal", [False, True], ids=["a log", "a terminal"])
def test_a_move_that_takes_a_while_tells_how_far_it_is(
    cli: CommandLine, empty: str, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    """A line now and then in a log, one that is written over at a terminal; of a short move nothing."""
    ticks, seconds = count(), 1 if is_terminal else 4
    monkeypatch.setattr(progress, "monotonic_ns", lambda: next(ticks) * seconds * 10**9)
    monkeypatch.setattr(transfer, "PROGRESS_EVERY", 1)
    total = sum(len(each) for each in rows(cli.database).values())
    monkeypatch.setattr(progress, "_is_terminal", lambda: is_terminal)
    done = cli("migrate-to", empty, "--json")
    told = done.stderr.split("set ABHIAPI_DATABASE_URL")[0]
    if is_terminal:
        steps = [
            f"{done} {number} of {total} rows" for done in ("copied", "compared") for number in range(1, total + 1)
        ]
        assert told.split("\r") == ["", *steps, ""]  # Click leaves out what clears a line where there is no terminal
    else:
        assert told.splitlines()[:2] == [f"copied {number} of {total} rows" for number in (1, 3)]
        assert told.splitlines()[-1].startswith("compared ")


def test_a_short_move_is_silent(cli: CommandLine, empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "monotonic_ns", lambda: 0)  # on a busy machine no move is short
    assert "rows" not in cli("migrate-to", empty).stderr


def test_every_table_is_moved() -> None:
    assert sorted(transfer.ORDER) == sorted(tables.metadata.tables)


def test_a_moved_ledger_is_there_row_by_row_and_its_file_is_one_no_more(cli: CommandLine, empty: str) -> None:
    before = rows(cli.database)
    done = cli.json("migrate-to", empty)
    assert (done["accounts"], done["entries"]) == (1, 4)
    moved = database_at(empty)
    assert rows(moved) == before
    assert moved.read(audit.verify).problems == []
    for arguments in (("balance", "ann"), ("migrate-to", empty), ("topup", "ann", "5"), ("restore", str(cli.path))):
        assert cli(*arguments).exit_code == 1, arguments
    assert "was moved to postgresql://" in cli("balance", "ann").refused()
    cli.settings["ABHIAPI_DATABASE_URL"] = empty
    assert cli.json("balance", "ann")["balance"] * 1000 == before["accounts"][0][4]
    cli("accounts", "create", "bob")  # under a number of its own
    cli("topup", "bob", "7")
    assert cli.json("ledger", "verify")["ok"]


def test_a_moved_file_is_neither_backed_up_nor_restored_over(cli: CommandLine, empty: str, tmp_path: Path) -> None:
    """Else a timer that was not told of the move makes copies that nothing can restore, or there are two ledgers."""
    before, after = tmp_path / "before.db", tmp_path / "after.db"
    cli.json("backup", str(before))
    cli.json("migrate-to", empty)
    assert "was moved to postgresql://" in cli("backup", str(after)).refused()
    assert not after.exists()
    assert "was moved to postgresql://" in cli("restore", str(before)).refused()
    assert "was moved to postgresql://" in cli("balance", "ann").refused()
    cli.path.rename(tmp_path / "aside.db")
    assert cli.json("restore", str(before))["entries"] == 4
    assert cli("balance", "ann").exit_code == 0


def test_a_file_that_was_open_when_its_ledger_was_moved_takes_no_more(cli: CommandLine, empty: str) -> None:
    late = cli.database
    with closing(late.connect()):
        cli.json("migrate-to", empty)
        with pytest.raises(DatabaseUnavailable, match="this ledger was moved"):
            late.write(lambda tx: accounts.create(tx, "late", now_ms=1))


def test_a_ledger_that_is_served_is_not_moved(cli: CommandLine, empty: str) -> None:
    lock = FileLock(cli.path)
    lock.take_place(1)
    assert "stop it first" in cli("migrate-to", empty).refused()
    lock.release()
    assert cli("migrate-to", empty).exit_code == 0


def test_a_place_with_content_is_refused(cli: CommandLine, database_url: str, postgres: Postgres) -> None:
    with postgres.fresh() as url:
        assert "is not empty" in cli("migrate-to", url).refused()
    assert cli("balance", "ann").exit_code == 0
    assert "is no PostgreSQL" in cli("migrate-to", "sqlite:////tmp/x.db").refused()
    assert "such as postgresql://" in cli("migrate-to", "mysql://user@host/name").refused()


class Broken(Exception):
    """The power went."""


@pytest.mark.parametrize("at", ["copy", "mark", "end"])
def test_a_move_that_is_broken_off_leaves_at_most_one_ledger_and_a_rerun_ends_it(
    cli: CommandLine, empty: str, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def break_off(*_: object) -> None:
        raise Broken

    before = rows(cli.database)
    place, name = {
        "copy": (transfer, "_compare"),
        "mark": (transfer.migrations, "mark_moved"),
        "end": (migrations_postgres, "finish_arrival"),
    }[at]
    with monkeypatch.context() as patched:
        patched.setattr(place, name, break_off)
        with pytest.raises(Broken):
            cli("migrate-to", empty)
    alive = [_is_alive(cli.database), _is_alive(database_at(empty))]
    assert alive == [at != "end", False]
    assert cli("migrate-to", empty).exit_code == 0
    assert [_is_alive(cli.database), _is_alive(database_at(empty))] == [False, True]
    assert rows(database_at(empty)) == before


def _is_alive(database: Database) -> bool:
    """Whether our programs take it for a ledger. Nothing is made where there is none."""
    if not isinstance(database, SqliteDatabase):
        with psycopg.connect(_url(database)) as connection:
            row = connection.execute("SELECT to_regclass('abhiapi_schema') IS NULL").fetchone()
            if row == (True,):
                return False
    try:
        migrate(database)
    except SchemaError:
        return False
    return True


def _url(database: Any) -> str:
    given = database._parameters
    return f"postgresql://{given['user']}@{given['host']}:{given['port']}/{given['dbname']}"


def test_what_is_on_its_way_from_another_file_is_not_touched(
    cli: CommandLine, empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(*_: object) -> None:
        raise Broken

    with monkeypatch.context() as patched:
        patched.setattr(migrations_postgres, "finish_arrival", break_off)
        with pytest.raises(Broken):
            cli("migrate-to", empty)
    other = CommandLine(tmp_path / "other")
    (tmp_path / "other").mkdir()
    migrate(other.database)
    assert "on its way from" in other("migrate-to", empty).refused()
    assert cli("migrate-to", empty).exit_code == 0


def test_a_row_that_arrives_changed_stops_the_move(
    cli: CommandLine, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = transfer.copy

    def damaged(source: Any, target: Any, progress: Any) -> None:
        copy(source, target, progress)
        target._connection.execute("UPDATE keys SET name = 'changed'")

    monkeypatch.setattr(transfer, "copy", damaged)
    assert "a row of keys" in cli("migrate-to", empty).refused()
    assert cli("balance", "ann").exit_code == 0


def test_a_backup_of_postgresql_is_a_ledger_in_a_file_and_can_be_restored(
    cli: CommandLine, empty: str, postgres: Postgres, tmp_path: Path
) -> None:
    cli.json("migrate-to", empty)
    cli.settings["ABHIAPI_DATABASE_URL"] = empty
    copy = tmp_path / "copy.db"
    before = rows(database_at(empty))
    assert cli.json("backup", str(copy))["entries"] == 4
    assert "exists already" in cli("backup", str(copy)).refused()
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT count(*) FROM entries").fetchone() == (4,)
    assert rows(database_at(f"sqlite:///{copy}")) == before  # that there is a backup is noted after it
    assert "is not empty" in cli("restore", str(copy)).refused()
    with postgres.fresh(empty=True) as url:
        cli.settings["ABHIAPI_DATABASE_URL"] = url
        assert cli.json("restore", str(copy))["entries"] == 4
        assert rows(database_at(url)) == before
        assert cli("topup", "ann", "5").exit_code == 0
