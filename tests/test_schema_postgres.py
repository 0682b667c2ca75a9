"""schema.postgres.sql says what schema.sql says: they cannot drift apart. And it forbids the same by itself."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest

from abhiapi import calls, db_postgres_tx, tables
from abhiapi.db_postgres import PostgresDatabase
from abhiapi.migrations import schema_sql
from abhiapi.migrations_postgres import schema_sql as schema_postgres_sql
from tests.harness import Clock
from tests.rows import Customer, settled
from tests.test_db import NEVER_RUN, STATEMENTS

pytestmark = pytest.mark.engines("postgresql")

KINDS = {"INTEGER": "bigint", "TEXT": "text", "BLOB": "bytea"}
OWN = {"abhiapi_schema", "commit_marks"}  # what only PostgreSQL needs
# SQLite's index of a rowid table ends with the rowid, which is the key, by itself.
WITH_KEY = {"calls_by_account": "(account_id, call_id)", "webhooks_by_account": "(account_id, call_id)"}


@pytest.fixture
def server(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def file() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(schema_sql())
        yield connection


def test_tables_and_columns_are_the_same(server: psycopg.Connection[Any], file: sqlite3.Connection) -> None:
    """Names, types, what may be NULL, and defaults."""
    there = {
        (table, column): (kind, nullable == "NO", _plain(default), collation)
        for table, column, kind, nullable, default, collation in server.execute(
            "SELECT table_name, column_name, data_type, is_nullable, column_default, collation_name"
            " FROM information_schema.columns WHERE table_schema = 'public'"
        )
        if table not in OWN
    }
    here = {
        (name, column): (KINDS[kind], bool(required or key), _plain(default), "C" if kind == "TEXT" else None)
        for name in tables.metadata.tables
        for _, column, kind, required, default, key in file.execute(f"PRAGMA table_info({name})")
    }
    assert there == here


def _plain(default: str | None) -> str | None:
    return None if default is None else re.sub(r"::\w+|^x(?=')|\\x", "", default)


def _indexes(script: str) -> dict[str, str]:
    script = re.sub(r"--.*", "", script)
    found = re.findall(r"CREATE ((?:UNIQUE )?INDEX) (\w+) ON (\w+) ?(\([^;]*);", script)
    return {name: " ".join(f"{kind} {table} {rest}".split()) for kind, name, table, rest in found}


def test_indexes_are_the_same() -> None:
    here, there = _indexes(schema_sql()), _indexes(schema_postgres_sql())
    assert len(here) > 20
    for name, columns in WITH_KEY.items():
        here[name] = here[name].replace("(account_id)", columns)
    assert there == here


def _checks(script: str) -> dict[str, list[str]]:
    """CHECK, UNIQUE, PRIMARY KEY and REFERENCES of each table, in their order."""
    script = re.sub(r"--.*", "", script)
    kept = r"CHECK \((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|UNIQUE|PRIMARY KEY|REFERENCES \w+"
    found = {}
    for name, body in re.findall(r"CREATE TABLE (\w+) \((.*?)\n\)[^;]*;", script, re.DOTALL):
        words = " ".join(body.split())
        found[name] = sorted(re.findall(kept, words))
    return found


def test_checks_keys_and_references_are_the_same() -> None:
    there = {name: checks for name, checks in _checks(schema_postgres_sql()).items() if name not in OWN}
    assert there == _checks(schema_sql())


def _triggers(script: str) -> dict[str, tuple[str, str]]:
    """Names, when they fire, and under which condition."""
    found = {}
    event = r"(?:BEFORE|AFTER) [\w ,]+? ON \w+"
    pattern = rf"CREATE TRIGGER (\w+) ({event})(?: FOR EACH ROW)?\s*(?:WHEN (.*?))?\s*(?:BEGIN|EXECUTE)"
    for name, when, condition in re.findall(pattern, script, re.DOTALL):
        condition = " ".join(condition.split())
        if condition.startswith("(") and condition.endswith(")") and "IN (" not in condition[:6]:
            condition = condition[1:-1]
        found[name] = (" ".join(when.split()), condition)
    return found


def test_triggers_fire_at_the_same() -> None:
    there = _triggers(schema_postgres_sql())
    whole = {name: there.pop(name) for name in list(there) if name.endswith("_are_kept_whole")}
    assert there == _triggers(schema_sql())
    assert len(there) > 10
    assert all("TRUNCATE" in event for event, _ in whole.values())


def test_every_statement_is_understood(database: PostgresDatabase) -> None:
    """One text serves both engines, and this one can plan each, whatever the types of its parameters."""
    with database.connect() as connection:
        for name in sorted(STATEMENTS.keys() - NEVER_RUN - {"db_sqlite._DANGLING"}):
            compiled = db_postgres_tx.STATEMENTS.of(STATEMENTS[name])
            query = b"EXPLAIN " + compiled.sql
            rows = connection.execute(query, dict.fromkeys(compiled._names), prepare=False).fetchall()
            assert rows, name


@pytest.mark.parametrize("name", ["jobs._SENT", "costs._LAST"])
def test_without_statistics_no_look_up_reads_all_calls(
    server: psycopg.Connection[Any], database: PostgresDatabase, clock: Clock, name: str
) -> None:
    """Tables that were analysed when they were empty, and have grown since."""
    server.execute("VACUUM ANALYZE")
    customer = Customer.new(database, clock)
    customer.settle()
    server.execute(
        "INSERT INTO calls (call_id, account_id, key_id, price_id, process_id, mode, state, held_micros, deadline_at,"
        " created_at, finished_at) SELECT call_id + n, account_id, key_id, price_id, process_id, mode, 'released', 1,"
        " 1, 1, 1 FROM calls, generate_series(1, 5000) n"
    )
    query = db_postgres_tx.STATEMENTS.of(STATEMENTS[name])
    with database.connect(plan_cache_mode="force_generic_plan") as connection:
        arguments = query.arguments({"after": 0, "most": 100})
        row = connection.execute(b"EXPLAIN (ANALYZE, FORMAT JSON) " + query.sql, arguments).fetchone()
    assert row is not None
    assert max(_rows_read(row[0][0]["Plan"])) < 100


def _rows_read(step: dict[str, Any]) -> Iterator[float]:
    """What each step of a plan looked at."""
    removed = sum(value for name, value in step.items() if name.startswith("Rows Removed"))
    yield (step["Actual Rows"] + removed) * step["Actual Loops"]
    for below in step.get("Plans", []):
        yield from _rows_read(below)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET amount_micros = 1",
        "DELETE FROM entries",
        "TRUNCATE entries CASCADE",
        "UPDATE price_versions SET unit_price_usd = '0'",
        "DELETE FROM calls",
        "DELETE FROM accounts",
        "UPDATE calls SET state = 'released', charged_micros = 0 WHERE state = 'settled'",
        "UPDATE calls SET state = 'settled' WHERE state = 'held'",
        "UPDATE calls SET refunded_micros = charged_micros + 1",
        "UPDATE accounts SET held_micros = -1",
        "UPDATE keys SET digest = ''",
        "UPDATE calls SET account_id = 77",
    ],
)
def test_the_database_itself_forbids(
    server: psycopg.Connection[Any], database: PostgresDatabase, clock: Clock, statement: str
) -> None:
    customer = Customer.new(database, clock)
    customer.settle()
    customer.admit()
    with pytest.raises(psycopg.IntegrityError):
        server.execute(statement.encode())


def test_plans_made_while_the_tables_were_small_look_rows_up(
    server: psycopg.Connection[Any], database: PostgresDatabase, clock: Clock
) -> None:
    """A connection keeps them: 18 ms a call after ten thousand calls, where one read all of a table for each row."""
    customer = Customer.new(database, clock)
    with closing(database.session(patience_s=5)) as session:

        def some_calls() -> None:
            session.begin()
            for _ in range(10):
                call = customer.open_call()
                calls.admit(session.tx, customer.admission(call))
                calls.finish(session.tx, call, settled(5), now_ms=clock.now_ms)
                session.tx.write_sums()
            session.commit()

        some_calls()
        server.execute("VACUUM ANALYZE")
        some_calls()
        kept = session._connection
        names = kept.execute(
            "SELECT name, cardinality(parameter_types) FROM pg_prepared_statements"
            " WHERE generic_plans > 0 AND cardinality(parameter_types) > 0"
        ).fetchall()
        plans = [
            str(kept.execute(f"EXPLAIN EXECUTE {name}({', '.join(['NULL'] * values)})".encode()).fetchall())
            for name, values in names
        ]
    assert len(plans) > 3
    assert [plan for plan in plans if "Seq Scan" in plan] == []
