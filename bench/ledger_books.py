"""A year of calls in a database of its own, for `ledger.py`: built in bulk, and true to the last hash.

On PostgreSQL it is a copy of the same from a file.
"""

import secrets
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import Decimal
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from abhiapi import accounts, days, keys, migrations_postgres, prices, pricing, processes  # noqa: E402
from abhiapi.commands import transfer  # noqa: E402
from abhiapi.db import Database, Tx, database_at  # noqa: E402
from abhiapi.db_postgres import PostgresDatabase  # noqa: E402
from abhiapi.db_sqlite import SqliteDatabase  # noqa: E402
from abhiapi.migrations import VERSION, migrate, schema_sql  # noqa: E402
from abhiapi.migrations import statements as split  # noqa: E402
from tests.postgres import Postgres  # noqa: E402

ACCOUNTS, SLOTS, DAYS = 1000, 4096, 365
FIRST_DAY = date(2025, 11, 1)
MODELS = 30
BATCH = 50_000
UNIT_MICROS = 26_250
TOPUP_MICROS = 10**14
FREE_EVERY = 20  # one call of these many is released without a charge
LATE_MS = 2_000  # from a call's admission to its end
# A server of a small machine, each commit synced to disk.
SERVER = {"fsync": "on", "full_page_writes": "on", "shared_buffers": "1GB", "max_wal_size": "8GB"}

CALL_COLUMNS = (
    "call_id, account_id, key_id, price_id, process_id, mode, state, held_micros, charged_micros, refunded_micros,"
    " http_status, units, usage_source, fal_request_id, fal_cost_nano_usd, deadline_at, created_at, finished_at"
)


@dataclass(slots=True)
class Books:
    """A year of calls, spread over accounts as a pattern of slots: one large customer, and many of all sizes."""

    count: int
    path: Path
    price_ids: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # slot -> account

    def __post_init__(self) -> None:
        heavy = SLOTS // 10
        tail = [1 + (number * number) % (ACCOUNTS - 1) + 1 for number in range(SLOTS - heavy - (ACCOUNTS - 1))]
        self.slots = [1] * heavy + list(range(2, ACCOUNTS + 1)) + tail
        self.slots = [self.slots[(number * 1597) % SLOTS] for number in range(SLOTS)]

    @property
    def step_ms(self) -> int:
        return DAYS * days.MS_PER_DAY // self.count

    def at_ms(self, number: int) -> int:
        return days.start_ms(FIRST_DAY) + number * self.step_ms + 1000

    def call(self, number: int) -> tuple[int, int, int, int, int]:
        """(call id, account, key, model, charge) of a call by its number."""
        turn, slot = divmod(number, SLOTS)
        account = self.slots[slot]
        key = 2 * account - (0 if turn % 10 == 0 else 1)
        model = (account * 7 + (turn + slot) % 3) % MODELS
        charge = 0 if number % FREE_EVERY == 0 else UNIT_MICROS * (1 + number % 3)
        return (self.at_ms(number) << 20) + number % (1 << 20), account, key, model, charge

    def numbers_of(self, account: int) -> Iterator[int]:
        mine = [slot for slot, owner in enumerate(self.slots) if owner == account]
        for turn in range(self.count // SLOTS + 1):
            for slot in mine:
                number = turn * SLOTS + slot
                if number < self.count:
                    yield number


def build(books: Books) -> SqliteDatabase:
    """The database, in bulk: calls in the order of their ids, entries account by account, indexes at the end."""
    database = SqliteDatabase.at(books.path)
    migrate(database)
    at = books.at_ms(0) - 1000
    database.write(lambda tx: _people(tx, books, at))
    with closing(sqlite3.connect(books.path, isolation_level=None)) as connection:
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -200000", "locking_mode = EXCLUSIVE"):
            connection.execute(f"PRAGMA {pragma}")
        indexes = ("calls_by_account", "entries_one_charge", "calls_one_job", "entries_one_ref")
        for name in indexes:
            connection.execute(f"DROP INDEX {name}")
        connection.execute("BEGIN")
        _fill(connection, "calls", CALL_COLUMNS, _call_rows(books), books.count)
        progress = Progress("entries", books.count)
        for account in range(1, ACCOUNTS + 1):
            progress.more(_fill_account(connection, books, account))
        progress.end()
        for statement in split(schema_sql()):
            if any(f"INDEX {name} " in statement for name in indexes):
                Progress("index", 1).end()
                connection.execute(statement)
        connection.execute(
            "INSERT INTO usage_monthly SELECT strftime('%Y-%m', day * 86400, 'unixepoch'), account_id, key_id,"
            " SUM(calls), SUM(charged_micros), SUM(fal_cost_nano_usd) FROM usage_daily GROUP BY 1, 2, 3"
        )
        connection.execute(
            "INSERT INTO usage_totals SELECT day, model, SUM(calls), SUM(charged_micros), SUM(fal_cost_nano_usd)"
            " FROM usage_daily GROUP BY day, model"
        )
        connection.execute("COMMIT")
        connection.execute("PRAGMA locking_mode = NORMAL")
        connection.execute("PRAGMA journal_mode = WAL")
    return database


@contextmanager
def server() -> Iterator[Postgres]:
    """A PostgreSQL of its own, that ends with the benchmark."""
    started = Postgres.start(**SERVER)
    try:
        yield started
    finally:
        started.remove()


def moved(source: SqliteDatabase, postgres: Postgres) -> Database:
    """The same books on PostgreSQL, copied as `abhiapi migrate-to` does it; recounted when they are measured."""
    database = database_at(url := postgres.create(empty=True))
    assert isinstance(database, PostgresDatabase)
    progress = Progress("postgresql", 0)

    def told(done: str, rows: int, total: int) -> None:
        progress.what, progress.whole = f"postgresql, {done}", total
        progress.at(rows)

    number = secrets.token_hex(8)

    def copied(there: Tx) -> None:
        with migrations_postgres.arrival(database, VERSION, number, source.name) as here:
            transfer.copy(there, here, told)

    source.read(copied)
    migrations_postgres.finish_arrival(database, number)
    progress.end()
    with postgres.connect(url.rpartition("/")[2]) as connection:
        connection.execute("VACUUM ANALYZE")  # what autovacuum has long done where books grew for a year
    return database


def _people(tx: Tx, books: Books, at_ms: int) -> None:
    for number in range(1, ACCOUNTS + 1):
        account = accounts.create(tx, f"customer-{number:04}", now_ms=at_ms)
        for name in ("production", "trial"):
            keys.create(tx, account.account_id, name=name, expires_at=None, now_ms=at_ms)
    flux = pricing.Catalogue(pricing.shipped_rules(), [], Decimal("0.05")).price_of("fal-ai/flux/dev")
    for number in range(MODELS):
        price = replace(flux, model=f"fal-ai/model-{number:02}/text-to-image")
        books.price_ids.append(prices.version_of(tx, price, now_ms=at_ms))
    processes.start(tx, pid=1, now_ms=at_ms)


def _call_rows(books: Books) -> Iterator[tuple[object, ...]]:
    for number in range(books.count):
        call_id, account, key, model, charge = books.call(number)
        at = books.at_ms(number)
        free = charge == 0
        yield (
            call_id, account, key, books.price_ids[model], 1, "sync", "released" if free else "settled",
            charge or UNIT_MICROS, charge, 0, 500 if free else 200, None if free else f"{charge // UNIT_MICROS}.0",
            None if free else "fal", f"{number:08x}-5a1d-4e0b-9c3f-0123456789ab", None if free else cost_of(charge),
            at + 900_000, at, at + LATE_MS,
        )  # fmt: skip


def cost_of(charge_micros: int) -> int:
    """What fal took: 25 of 26.25."""
    return charge_micros * 1000 * 100 // 105


def _fill(connection: sqlite3.Connection, table: str, columns: str, rows: Iterator[tuple[object, ...]], n: int) -> None:
    progress = Progress(table, n)
    marks = ", ".join("?" * (columns.count(",") + 1))
    sql = f"INSERT INTO {table} ({columns}) VALUES ({marks})"  # noqa: S608
    while batch := [row for _, row in zip(range(BATCH), rows, strict=False)]:
        connection.executemany(sql, batch)
        progress.more(len(batch))
    progress.end()


def _fill_account(connection: sqlite3.Connection, books: Books, account: int) -> int:
    """One account's entries, its chain's head and its days; how many calls it has."""
    at = books.at_ms(0) - 1000
    balance, seq, previous = TOPUP_MICROS, 1, b""
    rows: list[tuple[object, ...]] = []
    usage: dict[tuple[int, int, int], list[int]] = {}
    document = f'[{account},1,"topup",{balance},{balance},null,null,null,{at}]'
    previous = sha256(document.encode()).digest()
    rows.append((account, 1, "topup", balance, balance, None, at, previous))
    count = 0
    for number in books.numbers_of(account):
        call_id, _, key, model, charge = books.call(number)
        ended = books.at_ms(number) + LATE_MS
        cell = usage.setdefault((ended // days.MS_PER_DAY, model, key), [0, 0, 0])
        cell[0] += 1
        count += 1
        if charge:
            cell[1] += charge
            cell[2] += cost_of(charge)
            balance -= charge
            seq += 1
            document = f'[{account},{seq},"charge",{-charge},{balance},{call_id},null,null,{ended}]'
            previous = sha256(previous + document.encode()).digest()
            rows.append((account, seq, "charge", -charge, balance, call_id, ended, previous))
    connection.executemany(
        "INSERT INTO entries (account_id, seq, kind, amount_micros, balance_after_micros, call_id, created_at, hash)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        rows,
    )
    connection.executemany(
        "INSERT INTO usage_daily VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (account, day, f"fal-ai/model-{model:02}/text-to-image", key, *cell)
            for (day, model, key), cell in sorted(usage.items())
        ],
    )
    connection.execute(
        "UPDATE accounts SET balance_micros = ?, last_seq = ?, last_hash = ? WHERE account_id = ?",
        (balance, seq, previous, account),
    )
    return count


class Progress:
    """A line on stderr, where somebody watches."""

    def __init__(self, what: str, whole: int) -> None:
        self.what, self.whole, self.done, self.started = what, whole, 0, time.monotonic()
        self.shown = self.started

    def more(self, count: int) -> None:
        self.at(self.done + count)

    def at(self, done: int) -> None:
        self.done = done
        if time.monotonic() - self.shown > 2:
            self.shown = time.monotonic()
            print(f"bench: {self.what}: {self.done:,} of {self.whole:,}", file=sys.stderr, flush=True)

    def end(self) -> None:
        print(f"bench: {self.what}: {time.monotonic() - self.started:.1f} s", file=sys.stderr, flush=True)
