"""Storage: durable transactions, troubles told apart from bugs, a file that is never made by accident."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, text
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.sql import Executable

import abhiapi
from abhiapi import accounts, audit
from abhiapi.db import Busy, Database, Tx, assert_no_transaction, database_at
from abhiapi.errors import DatabaseUnavailable, Refused
from abhiapi.migrations import migrate
from tests.harness import Clock
from tests.rows import Customer

FULL = 2
NAMES = text("SELECT name FROM accounts ORDER BY name")


def names(database: Database) -> list[str]:
    return [row[0] for row in database.read(lambda tx: tx.all(NAMES))]


def create(name: str) -> Any:
    return lambda tx: accounts.create(tx, name, now_ms=1).account_id


def test_every_connection_is_durable_and_keeps_references(database: Database) -> None:
    with closing(database.connect()) as connection:
        asked = ("synchronous", "foreign_keys", "journal_mode", "busy_timeout")
        told = {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in asked}
    assert told == {"synchronous": FULL, "foreign_keys": 1, "journal_mode": "wal", "busy_timeout": 0}


def test_a_write_is_undone_as_a_whole_when_its_operation_fails(database: Database) -> None:
    def half(tx: Tx) -> None:
        accounts.create(tx, "half", now_ms=1)
        raise Refused("changed my mind")

    with pytest.raises(Refused):
        database.write(half)
    assert names(database) == []
    assert database.write(create("ann")) == 1


def test_a_broken_constraint_or_statement_is_a_bug_and_keeps_its_name(database: Database) -> None:
    database.write(create("ann"))
    with pytest.raises(sqlite3.IntegrityError):
        database.write(lambda tx: tx.run(text("UPDATE accounts SET held_micros = -1")))
    with pytest.raises(KeyError):
        database.write(lambda tx: tx.run(text("UPDATE accounts SET held_micros = :amount")))
    for wrong in ("SELECT colour FROM accounts", "SELECT 1 FROM nowhere", "SELEKT 1"):
        for use in (database.write, database.read):
            with pytest.raises(sqlite3.OperationalError):
                use(lambda tx, wrong=wrong: tx.all(text(wrong)))  # type: ignore[misc]


def test_a_reader_sees_one_moment_whatever_others_write(database: Database) -> None:
    def read(tx: Tx) -> tuple[int, int]:
        before = len(tx.all(NAMES))
        writing = threading.Thread(target=database.write, args=(create("late"),))
        writing.start()
        writing.join(20)
        return before, len(tx.all(NAMES))

    assert database.read(read) == (0, 0)
    assert names(database) == ["late"]


def test_whoever_waits_too_long_for_a_turn_is_told_so(database: Database) -> None:
    with closing(sqlite3.connect(database.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Busy) as trouble:
            database.write(create("ann"), patience_s=0)
        assert names(database) == []  # reading goes on
        other.execute("ROLLBACK")
    assert (trouble.value.status, trouble.value.retry_after_s) == (503, 2)
    database.write(create("ann"), patience_s=0)


def test_the_network_is_forbidden_inside_and_allowed_after(database: Database) -> None:
    def network(tx: Tx) -> None:
        assert_no_transaction()

    for run in (database.write, database.read):
        with pytest.raises(AssertionError, match="inside a database transaction"):
            run(network)
        assert_no_transaction()


def test_a_missing_file_is_trouble_and_is_not_made(tmp_path: Path) -> None:
    missing = database_at(f"sqlite:///{tmp_path / 'not here.db'}")
    for use in (lambda: missing.write(create("ann")), lambda: missing.read(lambda tx: tx.all(NAMES))):
        with pytest.raises(DatabaseUnavailable, match="unable to open"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_commits_that_are_only_in_the_log_survive_a_file_that_is_moved_and_used_meanwhile(database: Database) -> None:
    """An empty database made in the place of the lost one would make SQLite remove the log, and every commit in it."""
    with closing(database.connect()) as server:  # its open connection keeps the log from being folded in
        database.write(create("ann"))
        aside = database.path.with_name("aside.db")
        database.path.rename(aside)
        for use in (lambda: database.write(create("lost")), lambda: database.read(lambda tx: tx.all(NAMES))):
            with pytest.raises(DatabaseUnavailable):
                use()
        server.close()
        aside.rename(database.path)
    assert names(database) == ["ann"]


def test_a_damaged_file_is_trouble_and_no_bug(database: Database) -> None:
    database.write(create("ann"))
    with database.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (database.path.stat().st_size - 4096))
    with pytest.raises(DatabaseUnavailable, match="cannot be used"):
        names(database)


def test_a_path_may_hold_any_character(tmp_path: Path) -> None:
    path = tmp_path / "a b?c#d%20é" / "x.db"
    database = database_at(URL.create("sqlite", database=str(path)).render_as_string())
    migrate(database)
    database.write(create("ann"))
    assert names(database) == ["ann"]
    assert path.exists()


def _shipped() -> Iterator[tuple[str, Executable]]:
    """Every statement of the package, wherever it is kept; those of the audit are looked at apart."""
    for info in pkgutil.iter_modules(abhiapi.__path__):
        if info.name in ("audit", "wsgi", "gunicorn_config"):  # the last two start to serve when imported
            continue
        for name, value in vars(importlib.import_module(f"abhiapi.{info.name}")).items():
            kept = value.items() if isinstance(value, Mapping) else [("", value)]
            for key, one in kept:
                if isinstance(one, Executable):
                    yield f"{info.name}.{name}{[key] if key else ''}", one


# `ledger export` and `ledger verify` read every entry, which is what they are for.
READS_ALL = {"reports._ALL_ENTRIES"}
NEVER_RUN = {"reports._CALLS", "jobs._JOB", "billing._CALLS"}  # what others are made of
STATEMENTS = dict(_shipped())


@pytest.mark.parametrize("name", sorted(STATEMENTS.keys() - READS_ALL - NEVER_RUN))
def test_no_statement_reads_all_calls_or_entries(database: Database, name: str) -> None:
    """What answers a request or a report costs the same at ten million rows as at ten."""
    compiled = STATEMENTS[name].compile(dialect=sqlite_dialect.dialect())  # type: ignore[attr-defined]
    nothing = [None] * len(compiled.positiontup or ())
    with closing(database.connect()) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {compiled}", nothing)]
    # A partial index (calls_open) holds nothing but what is asked for; scanning it is no scan of the table.
    scans = [step for step in plan if re.match(r"SCAN (calls|entries)\b(?!.*INDEX calls_open)", step)]
    assert scans == []


@pytest.mark.parametrize(
    "name",
    "jobs._SENT calls._OVERDUE calls._OF_PROCESS calls._HOLDING vitals._HOLDS following._OPEN lookups._OPEN"
    " alerts._OLDEST_OPEN alerts._UNKNOWN_BY_MODEL".split(),
)
def test_what_looks_for_open_calls_reads_no_others(database: Database, name: str) -> None:
    """Asked every few seconds, by the reconciler in the event loop: a search by ids would read every call there is."""
    compiled = STATEMENTS[name].compile(dialect=sqlite_dialect.dialect())  # type: ignore[attr-defined]
    with closing(database.connect()) as connection:
        query = f"EXPLAIN QUERY PLAN {compiled}"
        plan = [row[3] for row in connection.execute(query, [None] * len(compiled.positiontup or ()))]
    assert [step for step in plan if re.search(r"\bcalls\b", step) and "calls_open" not in step] == []


def test_the_statements_were_found() -> None:
    assert {name.split(".")[0] for name in STATEMENTS} >= {
        "accounts",
        "calls",
        "keys",
        "ledger",
        "processes",
        "reports",
    }
    assert len(STATEMENTS) > 40
    assert STATEMENTS.keys() > READS_ALL | NEVER_RUN


def test_verify_reads_in_bounded_steps(database: Database, clock: Clock) -> None:
    """Even the great recount uses indexes where it looks things up: no step scans one table per row of another."""
    Customer.new(database, clock).settle()
    sources = [value for name, value in vars(audit).items() if isinstance(value, Executable) and name != "text"]
    assert len(sources) > 5
    with closing(database.connect()) as connection:
        for source in sources:
            compiled = source.compile(dialect=sqlite_dialect.dialect())  # type: ignore[attr-defined]
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {compiled}")]
            assert sum(step.startswith("SCAN") and "CONSTANT" not in step for step in plan) <= 5, plan
            assert not any("AUTOMATIC" in step for step in plan), plan
