"""Builds a year of calls in a database of its own and asks what each piece of book-keeping costs there.

    python bench/ledger.py                    ten million calls; some ten minutes and 5 GB of disk
    python bench/ledger.py --calls 1000000    fewer
    python bench/ledger.py --write            also write the section of bench/RESULTS.md

The books are built in bulk and are true: hashes, balances, roll-ups; `ledger verify` is part of what is measured.
The same questions are put to a database of ten thousand calls, side by side. Exit status 1 when a report takes longer
than its target or the books do not add up.
"""

import argparse
import gc
import resource
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import report  # noqa: E402

from abhiapi import (  # noqa: E402  # noqa: E402
    accounts,
    audit,
    calls,
    days,
    keys,
    prices,
    pricing,
    processes,
    reports,
    spending,
    statement_forms,
    statements,
)
from abhiapi.db import Database, Tx, database_at  # noqa: E402
from abhiapi.metering import Verdict  # noqa: E402
from abhiapi.migrations import migrate, schema_sql  # noqa: E402
from abhiapi.migrations import statements as split  # noqa: E402
from abhiapi.money import Micros  # noqa: E402

RESULTS = Path(__file__).with_name("RESULTS.md")
SMALL = 10_000
REPORT_TARGET_MS = 200
BYTES_TARGET = 400
ACCOUNTS, SLOTS, DAYS = 1000, 4096, 365
FIRST_DAY = date(2025, 11, 1)
MODELS = 30
BATCH = 50_000
UNIT_MICROS = 26_250
TOPUP_MICROS = 10**14
FREE_EVERY = 20  # one call of these many is released without a charge
LATE_MS = 2_000  # from a call's admission to its end
TIMED = 400  # writes of a round, each with a commit of its own
ROUNDS = 4  # with a warm cache, after one with a cold one

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


def build(books: Books) -> Database:
    """The database, in bulk: calls in the order of their ids, entries account by account, indexes at the end."""
    database = database_at(f"sqlite:///{books.path}")
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
            None if free else "fal", f"{number:08x}-5a1d-4e0b-9c3f-0123456789ab", None if free else _cost(charge),
            at + 900_000, at, at + LATE_MS,
        )  # fmt: skip


def _cost(charge_micros: int) -> int:
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
            cell[2] += _cost(charge)
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
        self.done += count
        if time.monotonic() - self.shown > 2:
            self.shown = time.monotonic()
            print(f"bench: {self.what}: {self.done:,} of {self.whole:,}", file=sys.stderr, flush=True)

    def end(self) -> None:
        print(f"bench: {self.what}: {time.monotonic() - self.started:.1f} s", file=sys.stderr, flush=True)


# --- measuring --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Measured:
    """What one database answered: microseconds and milliseconds by question, in order."""

    writes_us: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # first, again, with the commit
    reports_ms: dict[str, tuple[float, float]] = field(default_factory=dict)  # the first time, the median after it
    notes: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def measure(books: Books, database: Database) -> Measured:
    found = Measured()
    size = books.path.stat().st_size
    found.notes["size on disk"] = f"{size / 1e6:,.0f} MB"
    found.notes["bytes per call"] = f"{size / books.count:,.0f}"
    measure_reports(books, database, found)
    measure_writes(books, database, found)
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.monotonic()
    finding = database.read(audit.verify)
    seconds = time.monotonic() - started
    after_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found.notes["`ledger verify`"] = f"{seconds:,.1f} s for {finding.entries:,} entries"
    found.notes["memory it added at its peak"] = f"{after_mb - before_mb:,.0f} MB"
    found.problems += finding.problems
    return found


def measure_reports(books: Books, database: Database, found: Measured) -> None:
    last = FIRST_DAY + timedelta(days=DAYS - 1)
    uneven = {"since": FIRST_DAY + timedelta(days=1), "until": last - timedelta(days=2)}
    month = f"{last:%Y-%m}"
    heavy, small = 1, 500
    questions: dict[str, Callable[[Tx], object]] = {}
    for by in ("day", "model", "key", "account"):
        questions[f"usage by {by}, all accounts, all time"] = lambda tx, by=by: reports.usage(tx, by)
        questions[f"usage by {by}, all accounts, days at odds with months"] = lambda tx, by=by: reports.usage(
            tx, by, **uneven
        )
    for by in ("day", "model", "key"):
        questions[f"usage by {by}, largest account, all time"] = lambda tx, by=by: reports.usage(
            tx, by, account_id=heavy
        )
    questions["newest 50 calls, all accounts"] = lambda tx: reports.newest_calls(tx, most=50)
    questions["newest 50 calls, one account"] = lambda tx: reports.newest_calls(tx, account_id=small, most=50)
    questions["newest 50 entries, one account"] = lambda tx: reports.newest_entries(tx, small, most=50)
    questions["open holds"] = reports.open_holds
    questions["statement of a month, a small account, as HTML"] = lambda tx: _statement(tx, small, month, found)
    questions["statement of a month, the largest account, footed, first page"] = lambda tx: statements.page(
        tx, at := statements.of_month(tx, heavy, month), at.first_seq - 1
    )
    for name, ask in questions.items():
        first, *later = [_timed(lambda ask=ask: database.read(ask)) for _ in range(6)]
        found.reports_ms[name] = first * 1000, statistics.median(later) * 1000
    seconds = _timed(lambda: database.read(lambda tx: _statement(tx, heavy, month, found)))
    found.notes["the largest account's whole month as HTML"] = f"{seconds:,.1f} s, {found.notes.pop('entries')} entries"


def _statement(tx: Tx, account_id: int, month: str, found: Measured) -> None:
    statement = statements.of_month(tx, account_id, month)
    size = sum(map(len, statement_forms.as_html(statement, statements.lines(tx, statement))))
    found.notes["entries"] = f"{statement.entries:,}"
    assert size > 0


def measure_writes(books: Books, database: Database, found: Measured) -> None:
    """Holds and charges of accounts all over the file, each durable by itself; with a limit on the key, and without."""
    now = books.at_ms(books.count) + days.MS_PER_DAY
    picks = [1 + (number * 7919) % ACCOUNTS for number in range(TIMED)]
    verdict = Verdict("settled", Micros(UNIT_MICROS), "1.0", "fal", _cost(UNIT_MICROS))
    with closing(database.connect()) as connection:
        tx = database.tx(connection)
        look = [lambda of=of: accounts.by_id(tx, of) for of in picks]
        first, again = [_median_us([_timed(ask) for ask in look]) for _ in range(2)]
        found.writes_us["balance of an account"] = first, again, float("nan")
        connection.execute("BEGIN IMMEDIATE")
        for of in set(picks):  # each account's second key
            spending.set_limits(
                tx, 2 * of, day_limit_micros=Micros(10**12), month_limit_micros=Micros(10**13), now_ms=now
            )
        connection.execute("COMMIT")
        rounds: dict[str, list[tuple[float, float]]] = {}
        for turn in range(1 + ROUNDS):
            for label, limited in (("", 0), (", key with limits", 1)):
                base = (now << 20) + (2 * turn + limited) * TIMED
                admissions = [_admission(books, of, base + number, limited, now) for number, of in enumerate(picks)]
                holds = [lambda a=a: calls.admit(tx, a) for a in admissions]
                ends = [lambda a=a: calls.finish(tx, a.call, verdict, now_ms=now + 5) for a in admissions]
                rounds.setdefault(f"hold{label}", []).append(_writes(connection, holds))
                rounds.setdefault(f"charge{label}", []).append(_writes(connection, ends))
        for name, (first_round, *later) in rounds.items():
            alone, whole = (statistics.median(each) for each in zip(*later, strict=True))
            found.writes_us[name] = first_round[0], alone, whole


def _admission(books: Books, of: int, call_id: int, limited: int, now_ms: int) -> calls.Admission:
    model = (of * 7) % MODELS
    key = 2 * of - 1 + limited
    call = calls.OpenCall(call_id, of, key, f"fal-ai/model-{model:02}/text-to-image", Micros(UNIT_MICROS))
    return calls.Admission(call, books.price_ids[model], 1, "sync", now_ms + 900_000, now_ms)


def _writes(connection: sqlite3.Connection, ops: list[Callable[[], object]]) -> tuple[float, float]:
    """Medians in microseconds: the statements, and the whole transaction with its durable commit."""
    alone, whole = [], []
    gc.collect()
    for op in ops:
        started = time.perf_counter()
        connection.execute("BEGIN IMMEDIATE")
        begun = time.perf_counter()
        op()
        done = time.perf_counter()
        connection.execute("COMMIT")
        whole.append(time.perf_counter() - started)
        alone.append(done - begun)
    return _median_us(alone), _median_us(whole)


def _median_us(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e6


def _timed(op: Callable[[], Any]) -> float:
    started = time.perf_counter()
    op()
    return time.perf_counter() - started


# --- telling ----------------------------------------------------------------------------------------------------


def page(small: Measured, large: Measured, count: int, about: str, built_s: float) -> str:
    heads = f"{SMALL:,} calls", f"{count:,} calls"
    lines = [
        "# The ledger",
        "",
        f"{count:,} calls in the database.",
        "",
        about,
        f"- {ACCOUNTS:,} accounts with two keys each, {MODELS} models, {DAYS} days; one account makes a tenth of "
        f"the calls, one call in {FREE_EVERY} is free. Built in {built_s:,.0f} s.",
        f"- Writes: median of {TIMED}, of accounts all over the file, one transaction each. *First*: the statements, "
        "with pages not in SQLite's cache yet; *again*: the median of further rounds, what a call pays in a group "
        "commit; *committed*: that with a durable commit of its own.",
        "- Reports: the first time (file cache warm, SQLite's own cold), and the median of five more.",
        "",
        f"| write, microseconds | {heads[0]}, first | again | committed | {heads[1]}, first | again | committed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, figures in large.writes_us.items():
        cells = " | ".join(_us(figure) for figure in (*small.writes_us[name], *figures))
        lines.append(f"| {name} | {cells} |")
    lines += [
        "",
        f"| report, milliseconds | {heads[0]} | again | {heads[1]} | again |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for name, (first, again) in large.reports_ms.items():
        was_first, was_again = small.reports_ms[name]
        lines.append(f"| {name} | {was_first:,.1f} | {was_again:,.1f} | {first:,.1f} | {again:,.1f} |")
    lines += ["", f"| | {heads[0]} | {heads[1]} |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {small.notes[name]} | {value} |" for name, value in large.notes.items()]
    verdict = missed(large, count)
    lines += ["", *(f"- {problem}" for problem in verdict or ["Targets met, books exact."])]
    return "\n".join(lines)


def _us(value: float) -> str:
    return "" if value != value else f"{value:,.0f}"


def missed(large: Measured, count: int) -> list[str]:
    """What of the targets this run does not show."""
    problems = [
        f"{name}: {again:,.0f} ms, more than {REPORT_TARGET_MS}"
        for name, (_, again) in large.reports_ms.items()
        if again > REPORT_TARGET_MS
    ]
    if int(large.notes["bytes per call"].replace(",", "")) > BYTES_TARGET and count > SMALL:
        problems.append(f"{large.notes['bytes per call']} bytes per call, more than {BYTES_TARGET}")
    return problems + large.problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000_000, help="how many calls the large database has")
    parser.add_argument("--write", action="store_true", help=f"write the section of {RESULTS.name}")
    arguments = parser.parse_args()
    if arguments.calls < SMALL:
        parser.error(f"--calls is at least {SMALL}")
    with tempfile.TemporaryDirectory(prefix="abhiapi-bench-ledger-") as name:
        about = report.where(Path(name), "python bench/ledger.py")
        measured = {}
        for count in (SMALL, arguments.calls):
            books = Books(count, Path(name) / f"{count}.db")
            started = time.monotonic()
            database = build(books)
            built_s = time.monotonic() - started
            measured[count] = measure(books, database)
    section = page(measured[SMALL], measured[arguments.calls], arguments.calls, about, built_s)
    print(section)
    if arguments.write:
        report.write_chapter(RESULTS, section)
    return 1 if missed(measured[arguments.calls], arguments.calls) else 0


if __name__ == "__main__":
    sys.exit(main())
