"""`ledger verify` finds every kind of damage, and names it. The guards are dropped first, as a thief would."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from abhiapi import audit, calls, ledger, tables
from abhiapi.db import Database
from abhiapi.money import Micros
from tests.harness import Clock
from tests.rows import Customer

pytestmark = pytest.mark.engines


@pytest.fixture
def books(database: Database, clock: Clock) -> Database:
    """Two accounts; one with a top-up, two charges, a refund and an open hold, all by a key with a limit."""
    Customer.new(database, clock, name="other")
    customer = Customer.new(database, clock, name="ann")
    customer.limit(day=500)
    first = customer.settle()
    customer.settle(10_000)
    customer.write(lambda tx: calls.refund(tx, first.call_id, Micros(250), now_ms=clock.now_ms))
    customer.admit()
    return database


@contextmanager
def unguarded(database: Database) -> Iterator[Any]:
    """A function that runs a statement, whatever the database itself forbids; values stand for its `?`."""
    connection: Any = database.connect()
    try:
        if database.engine == "sqlite":
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                connection.execute(f"DROP TRIGGER {name}")
            connection.execute("PRAGMA ignore_check_constraints = ON")
            connection.execute("PRAGMA foreign_keys = OFF")
            yield connection.execute
        else:
            connection.execute("SET session_replication_role = replica")  # no triggers, and no references
            for table, name in connection.execute(CHECKS).fetchall():
                connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
            yield lambda statement, values=(): connection.execute(
                statement.replace("randomblob(32)", "sha256(random()::text::bytea)").replace("?", "%s"), values
            )
    finally:
        connection.close()


def damage(database: Database, *statements: str) -> None:
    with unguarded(database) as execute:
        for statement in statements:
            assert execute(statement).rowcount >= 1, "the damage was done"


def test_sound_books_are_sound(books: Database) -> None:
    finding = books.read(audit.verify)
    assert finding.ok
    assert (finding.accounts, finding.entries, finding.problems) == (2, 5, [])


ANN = "account_id = 2"
CHECKS = "SELECT conrelid::regclass::text, conname FROM pg_constraint WHERE contype = 'c' AND conrelid <> 0"


@pytest.mark.parametrize(
    ("statements", "named"),
    [
        ([f"UPDATE entries SET note = 'x' WHERE {ANN} AND seq = 1"], "entry_2_1 does not match its hash"),
        ([f"UPDATE entries SET created_at = 5 WHERE {ANN} AND seq = 2"], "entry_2_2 does not match its hash"),
        ([f"UPDATE entries SET amount_micros = 2000000 WHERE {ANN} AND seq = 1"], "entry_2_1 says a balance of"),
        ([f"UPDATE entries SET hash = randomblob(32) WHERE {ANN} AND seq = 2"], "entry_2_3 does not match its hash"),
        ([f"DELETE FROM entries WHERE {ANN} AND seq = 2"], "entry_2_3 follows number 1: an entry is missing"),
        ([f"DELETE FROM entries WHERE {ANN} AND seq = 4"], "its chain ends at entry 3, its head says 4"),
        ([f"UPDATE accounts SET balance_micros = balance_micros + 1 WHERE {ANN}"], "'ann': balance"),
        ([f"UPDATE accounts SET held_micros = 0 WHERE {ANN}"], "'ann': held 0, open calls hold 26.25"),
        (["UPDATE calls SET charged_micros = 1 WHERE charged_micros = 10000"], "charged 0.001, its entry says 10"),
        (["UPDATE calls SET refunded_micros = 0 WHERE refunded_micros = 250"], "refund entries of 0.25"),
        (["UPDATE calls SET refunded_micros = 7 WHERE charged_micros = 10000"], "is refunded 0.007"),
        (["UPDATE usage_daily SET calls = calls + 1"], "differs from its calls by -1 calls"),
        (["UPDATE usage_daily SET charged_micros = charged_micros - 1"], "0.001 credits"),
        (["UPDATE usage_daily SET fal_cost_nano_usd = 0"], "nano-USD"),
        (["UPDATE usage_monthly SET calls = calls + 1"], "month 2026-11, key 2 differs from its days"),
        (["DELETE FROM usage_monthly"], "by 2 calls, 36 credits"),
        (
            ["UPDATE usage_totals SET charged_micros = charged_micros + 1000"],
            "differs from its accounts by 0 calls, -1",
        ),
        (["DELETE FROM usage_totals"], "the total of day 20775, fal-ai/flux/dev differs from its accounts by 2 calls"),
        (["UPDATE key_spending SET spent_micros = spent_micros + 1"], "limit 1 in 2026-11-18: its calls spend 62.25"),
        (["DELETE FROM key_spending WHERE period = '2026-11'"], "limit 1 in 2026-11: its calls spend 62.25, counted 0"),
        (["DELETE FROM usage_daily"], "differs from its calls by 2 calls"),
        (["UPDATE calls SET account_id = 1 WHERE charged_micros = 10000"], "charged 10"),
        ([f"UPDATE accounts SET last_hash = randomblob(32) WHERE {ANN}"], "does not match the hash of entry 4"),
        ([f"DELETE FROM accounts WHERE {ANN}"], "4 rows of entries name rows of accounts that are gone"),
        (["DELETE FROM calls WHERE charged_micros = 10000"], "has an entry of 10, its call says 0"),
        (["DELETE FROM calls WHERE refunded_micros = 250"], "2 rows of entries name rows of calls that are gone"),
    ],
)
def test_every_damage_is_found_and_named(books: Database, statements: list[str], named: str) -> None:
    damage(books, *statements)
    finding = books.read(audit.verify)
    assert not finding.ok
    assert any(named in problem for problem in finding.problems), finding.problems


def test_a_whole_forged_chain_is_found_by_the_calls_behind_it(books: Database) -> None:
    """Whoever rewrites an entry and every hash after it still cannot make the calls agree."""
    with unguarded(books) as execute:
        rows = execute(
            "SELECT seq, kind, amount_micros, call_id, ref, note, created_at FROM entries WHERE account_id = 2"
            " ORDER BY seq"
        ).fetchall()
        balance, previous = 0, b""
        for seq, kind, amount, call_id, ref, note, created_at in rows:
            forged = -1 if kind == "charge" else amount
            balance += forged
            previous = ledger.entry_hash(previous, 2, seq, kind, forged, balance, call_id, ref, note, created_at)
            execute(
                "UPDATE entries SET amount_micros = ?, balance_after_micros = ?, hash = ?"
                " WHERE account_id = 2 AND seq = ?",
                (forged, balance, previous, seq),
            )
        execute("UPDATE accounts SET balance_micros = ?, last_hash = ? WHERE account_id = 2", (balance, previous))
    finding = books.read(audit.verify)
    assert any("charged" in problem for problem in finding.problems), finding.problems


def test_great_damage_is_told_in_few_words(books: Database) -> None:
    damage(
        books,
        "UPDATE entries SET note = 'x'",
        "INSERT INTO entries WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 500)"
        " SELECT 1, 1 + i, 'topup', 1, 0, NULL, NULL, NULL, 1, randomblob(32) FROM n",
    )
    assert len(books.read(audit.verify).problems) == audit.PROBLEMS_MAX


def _many_entries(database: Database, account_id: int, number: int) -> None:
    """Top-ups of a micro each, written as the ledger writes them but all at once."""
    rows, previous = [], b""
    for seq in range(1, number + 1):
        row = (account_id, seq, "topup", 1, seq, None, None, "n" * 50, seq)
        previous = ledger.entry_hash(previous, *row)
        rows.append((*row, previous))
    database.write(lambda tx: tx.load(tables.entries, iter(rows)))
    with unguarded(database) as execute:
        execute(
            "UPDATE accounts SET balance_micros = ?, last_seq = ?, last_hash = ? WHERE account_id = ?",
            (number, number, previous, account_id),
        )


def test_twenty_thousand_entries_are_verified_in_little_memory(
    database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    customer = Customer.new(database, clock, credits=0)
    _many_entries(database, customer.account_id, 20_000)
    heard: list[int] = []
    monkeypatch.setattr(audit, "PROGRESS_EVERY", 10_000)
    tracemalloc.start()
    finding = database.read(lambda tx: audit.verify(tx, progress=heard.append))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert finding.problems == []
    assert finding.entries == 20_000
    assert heard == [10_000, 20_000]
    assert peak_bytes < 2_000_000
