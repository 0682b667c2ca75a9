"""schema.sql is the truth: tables.py says the same, and what must never happen is refused by the database itself."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest
from sqlalchemy import Table

from abhiapi import tables
from abhiapi.calls import MOVES
from abhiapi.db import Database
from abhiapi.migrations import schema_sql
from tests.harness import Clock
from tests.rows import Customer

FAL_PRICE = (
    "INSERT INTO fal_prices (model, unit, unit_price_usd, standing, source, seen_at) VALUES ('m', 'u', {}, 's', 1)"
)
KINDS = {"INTEGER": "BIGINT", "TEXT": "TEXT", "BLOB": "BLOB"}


@pytest.fixture
def raw(database: Database, clock: Clock) -> Iterator[sqlite3.Connection]:
    """A connection of somebody who knows nothing of our code, to books with one charged call and one open one."""
    customer = Customer.new(database, clock)
    customer.settle()
    customer.admit()
    customer.topup(5, ref="paid")
    with closing(sqlite3.connect(database.path, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("INSERT INTO own_prices (model, created_at) VALUES ('m', 1)")
        connection.execute(FAL_PRICE.format("'0.1', 'priced'"))
        yield connection


def test_every_table_of_the_schema_is_known(raw: sqlite3.Connection) -> None:
    rows = raw.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
    assert {row[0] for row in rows} == set(tables.metadata.tables)


@pytest.mark.parametrize("table", tables.metadata.tables.values(), ids=lambda table: table.name)
def test_columns_are_the_same_in_both(raw: sqlite3.Connection, table: Table) -> None:
    """Names, types, what may be NULL, and primary keys."""
    there = {
        name: (KINDS[kind], not (required or key), bool(key))
        for _, name, kind, required, _, key in raw.execute(f"PRAGMA table_info({table.name})")
    }
    here = {column.name: (str(column.type), bool(column.nullable), column.primary_key) for column in table.columns}
    assert here == there


def test_every_table_is_strict(raw: sqlite3.Connection) -> None:
    """No float can hide in an integer column."""
    assert {row[5] for row in raw.execute("PRAGMA table_list") if row[1] in tables.metadata.tables} == {1}


def test_every_amount_says_its_unit() -> None:
    amounts = re.findall(r"^    (\w*(?:amount|balance|held|charged|refunded|cost)\w*) ", schema_sql(), re.MULTILINE)
    assert amounts
    assert all(re.search(r"_(micros|nano_usd)$", name) for name in amounts)


def test_the_states_of_the_schema_are_those_of_the_code(raw: sqlite3.Connection) -> None:
    match = re.search(r"state IN \(([^)]*)\)\)", schema_sql())
    assert match is not None
    assert set(re.findall(r"'(\w+)'", match[1])) == set(MOVES)


SETTLED = "(SELECT call_id FROM calls WHERE state = 'settled')"
OPEN = "(SELECT call_id FROM calls WHERE state = 'held')"
ENTRY = (
    "INSERT INTO entries (account_id, seq, kind, amount_micros, balance_after_micros, call_id, ref, created_at, hash)"
)


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("UPDATE entries SET amount_micros = 1", "never changed"),
        ("UPDATE entries SET note = 'x'", "never changed"),
        ("DELETE FROM entries", "never deleted"),
        ("UPDATE price_versions SET unit_price_usd = '0'", "never changed"),
        ("DELETE FROM price_versions", "never deleted"),
        ("UPDATE own_prices SET margin = '0'", "appended to"),
        ("UPDATE fal_prices SET unit_price_usd = '0'", "appended to"),
        ("DELETE FROM fal_prices", "never deleted"),
        (FAL_PRICE.format("NULL, 'priced'"), "CHECK"),
        (FAL_PRICE.format("'1', 'free'"), "CHECK"),
        ("INSERT INTO observed_costs VALUES ('m', 0, 1, 0, 1)", "CHECK"),
        ("INSERT INTO hold_raises (model, percent, created_at) VALUES ('m', 100, 1)", "CHECK"),
        ("DELETE FROM calls", "never deleted"),
        ("DELETE FROM accounts", "never deleted"),
        (f"UPDATE calls SET state = 'released', charged_micros = 0 WHERE call_id = {SETTLED}", "exactly once"),
        (f"UPDATE calls SET charged_micros = 5 WHERE call_id = {SETTLED}", "exactly once"),
        ("UPDATE calls SET refunded_micros = charged_micros + 1", "CHECK"),
        (f"UPDATE calls SET state = 'settled' WHERE call_id = {OPEN}", "CHECK"),
        (f"UPDATE calls SET state = 'gone', finished_at = 1 WHERE call_id = {OPEN}", "CHECK"),
        (f"UPDATE calls SET charged_micros = 5 WHERE call_id = {OPEN}", "CHECK"),
        ("UPDATE accounts SET held_micros = -1", "CHECK"),
        ("UPDATE accounts SET balance_micros = 1.5", "REAL"),
        ("UPDATE accounts SET plan = 'gold'", "CHECK"),
        ("UPDATE keys SET digest = x'00'", "CHECK"),
        (f"{ENTRY} VALUES (1, 99, 'charge', -1, 0, {SETTLED}, NULL, 1, randomblob(32))", "UNIQUE"),
        (f"{ENTRY} VALUES (1, 99, 'topup', 1, 0, NULL, 'paid', 1, randomblob(32))", "UNIQUE"),
        (f"{ENTRY} VALUES (1, 1, 'topup', 1, 0, NULL, NULL, 1, randomblob(32))", "UNIQUE"),
        (f"{ENTRY} VALUES (1, 99, 'charge', -1, 0, NULL, NULL, 1, randomblob(32))", "CHECK"),
        (f"{ENTRY} VALUES (1, 99, 'charge', 1, 0, {OPEN}, NULL, 1, randomblob(32))", "CHECK"),
        (f"{ENTRY} VALUES (1, 99, 'refund', -1, 0, {OPEN}, NULL, 1, randomblob(32))", "CHECK"),
        (f"{ENTRY} VALUES (1, 99, 'topup', -1, 0, NULL, NULL, 1, randomblob(32))", "CHECK"),
        (f"{ENTRY} VALUES (1, 99, 'gift', 1, 0, NULL, NULL, 1, randomblob(32))", "CHECK"),
        (f"{ENTRY} VALUES (1, 99, 'topup', 0, 0, NULL, NULL, 1, randomblob(32))", "CHECK"),
        (f"{ENTRY} VALUES (1, 99, 'topup', 1, 0, NULL, NULL, 1, x'00')", "CHECK"),
        (f"{ENTRY} VALUES (77, 1, 'topup', 1, 0, NULL, NULL, 1, randomblob(32))", "FOREIGN KEY"),
        ("UPDATE calls SET account_id = NULL", "NOT NULL"),
        ("UPDATE keys SET account_id = NULL", "NOT NULL"),
        ("UPDATE calls SET mode = 'queue', fal_request_id = 'one job'", "UNIQUE"),
        ("INSERT INTO accounts (name, created_at) VALUES ('', 1)", "CHECK"),
        ("INSERT INTO accounts (name, created_at) VALUES ('ann', 1)", "UNIQUE"),
    ],
)
def test_the_database_itself_forbids(raw: sqlite3.Connection, statement: str, complaint: str) -> None:
    """Row 58 of B8 among them: nothing is without an owner."""
    with pytest.raises(sqlite3.IntegrityError, match=complaint):
        raw.execute(statement)
