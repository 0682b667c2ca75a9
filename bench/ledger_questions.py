"""What `ledger.py` asks of a database of books: what each write of a call costs, and how long each report takes."""

import gc
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from ledger_books import ACCOUNTS, DAYS, FIRST_DAY, MODELS, UNIT_MICROS, Books, cost_of
from sqlalchemy import text

from abhiapi import accounts, audit, calls, days, reports, spending, statement_forms, statements
from abhiapi.db import Database, Session, Tx
from abhiapi.metering import Verdict
from abhiapi.money import Micros

TIMED = 400  # writes of a round, each with a commit of its own
ROUNDS = 4  # with a warm cache, after one with a cold one
PATIENCE_S = 60
DATABASE_SIZE = text("SELECT pg_database_size(current_database())")


@dataclass(slots=True)
class Measured:
    """What one database answered: microseconds and milliseconds by question, in order."""

    writes_us: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # first, again, with the commit
    reports_ms: dict[str, tuple[float, float]] = field(default_factory=dict)  # the first time, the median after it
    notes: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def measure(books: Books, database: Database) -> Measured:
    found = Measured()
    size = _size_bytes(books, database)
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


def _size_bytes(books: Books, database: Database) -> int:
    if database.engine == "sqlite":
        return books.path.stat().st_size
    row = database.read(lambda tx: tx.one(DATABASE_SIZE))
    assert row is not None
    return int(row[0])


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
    verdict = Verdict("settled", Micros(UNIT_MICROS), "1.0", "fal", cost_of(UNIT_MICROS))
    with closing(database.session(patience_s=PATIENCE_S)) as session:
        tx = session.tx
        look = [lambda of=of: accounts.by_id(tx, of) for of in picks]
        session.begin()
        first, again = [_median_us([_timed(ask) for ask in look]) for _ in range(2)]
        session.roll_back()
        found.writes_us["balance of an account"] = first, again, float("nan")
        session.begin()
        for of in set(picks):  # each account's second key
            spending.set_limits(
                tx, 2 * of, day_limit_micros=Micros(10**12), month_limit_micros=Micros(10**13), now_ms=now
            )
        session.commit()
        rounds: dict[str, list[tuple[float, float]]] = {}
        for turn in range(1 + ROUNDS):
            for label, limited in (("", 0), (", key with limits", 1)):
                base = (now << 20) + (2 * turn + limited) * TIMED
                admissions = [_admission(books, of, base + number, limited, now) for number, of in enumerate(picks)]
                holds = [lambda a=a: calls.admit(tx, a) for a in admissions]
                ends = [lambda a=a: calls.finish(tx, a.call, verdict, now_ms=now + 5) for a in admissions]
                rounds.setdefault(f"hold{label}", []).append(_writes(session, holds))
                rounds.setdefault(f"charge{label}", []).append(_writes(session, ends))
        for name, (first_round, *later) in rounds.items():
            alone, whole = (statistics.median(each) for each in zip(*later, strict=True))
            found.writes_us[name] = first_round[0], alone, whole


def _admission(books: Books, of: int, call_id: int, limited: int, now_ms: int) -> calls.Admission:
    model = (of * 7) % MODELS
    key = 2 * of - 1 + limited
    call = calls.OpenCall(call_id, of, key, f"fal-ai/model-{model:02}/text-to-image", Micros(UNIT_MICROS))
    return calls.Admission(call, books.price_ids[model], 1, "sync", now_ms + 900_000, now_ms)


def _writes(session: Session, ops: list[Callable[[], object]]) -> tuple[float, float]:
    """Medians in microseconds: the statements, and the whole transaction with its durable commit."""
    alone, whole = [], []
    gc.collect()
    for op in ops:
        started = time.perf_counter()
        session.begin()
        begun = time.perf_counter()
        op()
        session.tx.write_sums()
        done = time.perf_counter()
        session.commit()
        whole.append(time.perf_counter() - started)
        alone.append(done - begun)
    return _median_us(alone), _median_us(whole)


def _median_us(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e6


def _timed(op: Callable[[], Any]) -> float:
    started = time.perf_counter()
    op()
    return time.perf_counter() - started
