"""Statements and reports: every month foots, months join without a gap, and what is printed is safe to open."""

from __future__ import annotations

import csv
import io
import re
import sqlite3
import tracemalloc
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from abhiapi import calls, csvtext, days, ledger, reports, statement_forms, statements
from abhiapi.db import Database, Tx
from abhiapi.errors import Refused
from abhiapi.money import Micros, margin_percent_text
from tests.command_line import CommandLine, finish
from tests.harness import Clock, Server
from tests.rows import FLUX_NANO_USD, Customer
from tests.test_audit import damage

pytestmark = pytest.mark.engines

DAY_MS = days.MS_PER_DAY
SEPTEMBER = days.start_ms(date(2026, 9, 1))
HTML = statement_forms.as_html


@pytest.fixture
def customer(database: Database, clock: Clock) -> Customer:
    """Three months of a customer: top-ups, charges, refunds, an adjustment."""
    clock.now_ms = SEPTEMBER + DAY_MS
    made = Customer.new(database, clock, name="acme", credits=1000)
    for number in range(12):
        clock.tick(7 * DAY_MS + 1)
        call = made.settle(26_250 + number)
        if number % 4 == 0:
            made.write(lambda tx, of=call: calls.refund(tx, of.call_id, Micros(250), now_ms=clock.now_ms))  # type: ignore[misc]
            made.topup(10, ref=f"pay-{number}", note="thank you")
    made.write(lambda tx: ledger.adjust(tx, made.account_id, Micros(-5), note="a correction", now_ms=clock.now_ms))
    return made


def statement(database: Database, account_id: int, month: str) -> tuple[statements.Statement, list[statements.Line]]:
    def read(tx: Tx) -> tuple[statements.Statement, list[statements.Line]]:
        found = statements.of_month(tx, account_id, month)
        return found, list(statements.lines(tx, found))

    return database.read(read)


def text_of(database: Database, form: Callable[..., object], month: str, account_id: int = 1) -> str:
    found, lines = statement(database, account_id, month)
    return "".join(form(found, lines))  # type: ignore[call-overload]


def test_months_join_without_a_gap_and_each_foots(database: Database, customer: Customer) -> None:
    closing_before, seen = 0, []
    for month in ("2026-08", "2026-09", "2026-10", "2026-11", "2026-12", "2027-01"):
        found, lines = statement(database, customer.account_id, month)
        assert found.opening_micros == closing_before
        assert found.opening_micros + sum(line.amount_micros for line in lines) == found.closing_micros
        assert {days.periods(line.created_at)[1] for line in lines} <= {month}
        assert found.sums == {
            kind: statements.Sum(count, Micros(sum(line.amount_micros for line in lines if line.kind == kind)))
            for kind, count in Counter(line.kind for line in lines).items()
        }
        seen += [line.seq for line in lines]
        closing_before = found.closing_micros
    assert seen == list(range(1, len(seen) + 1))
    assert closing_before == customer.standing()[0]


def test_a_charge_names_its_model_and_a_topup_its_payment(database: Database, customer: Customer) -> None:
    _, lines = statement(database, customer.account_id, "2026-09")
    assert {line.model for line in lines if line.kind in ("charge", "refund")} == {"fal-ai/flux/dev"}
    assert [(line.ref, line.note) for line in lines if line.kind == "topup"][1] == ("pay-0", "thank you")


def test_a_clock_that_goes_back_takes_no_entry_into_the_month_before(
    database: Database, customer: Customer, clock: Clock
) -> None:
    clock.now_ms = days.start_ms(date(2027, 1, 1))
    customer.topup(1)
    clock.tick(-5000)
    customer.topup(2)
    december, _ = statement(database, customer.account_id, "2026-12")
    january, lines = statement(database, customer.account_id, "2027-01")
    assert (december.entries, january.entries) == (0, 2)
    assert lines[1].created_at == lines[0].created_at == days.start_ms(date(2027, 1, 1))


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE entries SET amount_micros = amount_micros - 1 WHERE seq = 3",
        "UPDATE entries SET balance_after_micros = balance_after_micros + 1 WHERE seq = 3",
        "DELETE FROM entries WHERE seq = 3",
        "DELETE FROM entries WHERE seq = (SELECT MAX(seq) FROM entries)",
    ],
)
@pytest.mark.parametrize("form", [[], ["--csv"], ["--html"], ["--json"]])
def test_what_does_not_foot_is_not_printed(tmp_path: Path, clock: Clock, harm: str, form: list[str]) -> None:
    cli = CommandLine(tmp_path)
    cli("accounts", "list")
    clock.now_ms = SEPTEMBER
    customer = Customer.new(cli.database, clock, name="acme")
    for _ in range(4):
        customer.settle()
    assert cli("statement", "acme", "--month", "2026-09", *form).exit_code == 0
    damage(cli.database, harm)
    assert re.search("does not foot|is missing", cli("statement", "acme", "--month", "2026-09", *form).refused())


@pytest.mark.parametrize("month", ["2026-13", "2026-1", "november", "2026-11-01", "", "1969-12", "9999-12"])
def test_what_is_no_month_is_told_so(tmp_path: Path, month: str) -> None:
    cli = CommandLine(tmp_path)
    cli("accounts", "create", "acme")
    assert "write 2026-11" in cli("statement", "acme", "--month", month).misused()


def test_the_csv_is_rfc_4180_and_foots(database: Database, customer: Customer) -> None:
    printed = text_of(database, statement_forms.as_csv, "2026-10")
    assert printed.endswith("\r\n")
    assert printed.count("\n") == printed.count("\r\n")
    rows = list(csv.DictReader(io.StringIO(printed, newline="")))
    assert [rows[0]["kind"], rows[-1]["kind"]] == ["opening", "closing"]
    moved = sum(Decimal(row["credits"]) for row in rows[1:-1])
    assert Decimal(rows[0]["balance"]) + moved == Decimal(rows[-1]["balance"])


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_text_becomes_a_formula_and_every_number_stays_one(start: str) -> None:
    record = csvtext.line([f'{start}cmd|"/c calc"!A1', Decimal("-26.25"), -5, None, "plain, with a comma"])
    (row,) = csv.reader(io.StringIO(record, newline=""))
    assert row == [f'\'{start}cmd|"/c calc"!A1', "-26.25", "-5", "", "plain, with a comma"]


def test_a_name_that_is_a_formula_is_text_in_every_csv(tmp_path: Path, database_url: str, clock: Clock) -> None:
    cli = CommandLine(tmp_path, database_url)
    cli("accounts", "list")
    Customer.new(cli.database, clock, name="=1+1").settle()
    assert "\n'=1+1,1," in cli("usage", "--by", "account", "--csv").stdout
    assert "'=1+1," in cli("ledger", "export").stdout


def test_csv_from_a_real_process_ends_its_lines_as_the_standard_says(
    tmp_path: Path, database_url: str, clock: Clock
) -> None:
    cli = CommandLine(tmp_path, database_url)
    cli("accounts", "list")
    Customer.new(cli.database, clock).settle()
    process = cli.start("usage", "--csv")
    raw = process.stdout.buffer.read() if process.stdout else b""  # type: ignore[attr-defined]
    finish(process)
    assert raw.count(b"\r\n") == raw.count(b"\n") == 2


def test_the_page_holds_no_script_and_nothing_from_elsewhere(database: Database, clock: Clock) -> None:
    clock.now_ms = SEPTEMBER
    evil = Customer.new(database, clock, name="<script>alert(1)</script>&\"'", credits=5)
    evil.topup(1, ref="<img src=x onerror=alert(1)>", note="javascript:alert(1) <b>")
    page = text_of(database, HTML, "2026-09", evil.account_id)
    assert "<script" not in page
    assert "<img" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page
    assert (
        re.findall(r"<(?:script|img|link|iframe|object|base|form)|https?://|url\(|@import|<[^>]*\son\w+=", page) == []
    )
    for wanted in ("prefers-color-scheme:dark", "@media print", "width=device-width"):
        assert wanted in page


def test_the_text_cannot_steer_a_terminal(database: Database, clock: Clock) -> None:
    clock.now_ms = SEPTEMBER
    evil = Customer.new(database, clock, credits=5)
    evil.topup(1, note="\x1b[2J")
    assert "\x1b" not in text_of(database, statement_forms.as_text, "2026-09", evil.account_id)


@pytest.mark.engines("sqlite")  # filled behind our back
def test_a_statement_of_twenty_thousand_entries_takes_little_memory(database: Database, clock: Clock) -> None:
    customer = Customer.new(database, clock, credits=0)
    balance, previous, rows = 0, b"", []
    for seq in range(1, 20_001):
        balance += seq
        row = (customer.account_id, seq, "topup", seq, balance, None, None, "n" * 40, SEPTEMBER + seq)
        previous = ledger.entry_hash(previous, *row)
        rows.append((*row, previous))
    with closing(sqlite3.connect(database.path)) as connection:
        connection.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        connection.execute(
            "UPDATE accounts SET balance_micros = ?, last_seq = 20000, last_hash = ?", (balance, previous)
        )
        connection.commit()
    rows.clear()
    size = 0

    def read(tx: Tx) -> None:
        nonlocal size
        found = statements.of_month(tx, customer.account_id, "2026-09")
        for piece in HTML(found, statements.lines(tx, found)):
            size += len(piece)

    tracemalloc.start()
    database.read(read)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 2_000_000
    assert peak_bytes < 3_000_000


def test_every_form_tells_the_same(tmp_path: Path, database_url: str, clock: Clock) -> None:
    cli = CommandLine(tmp_path, database_url)
    cli("accounts", "list")
    clock.now_ms = SEPTEMBER
    Customer.new(cli.database, clock, name="acme").settle()
    shown = cli.json("statement", "acme", "--month", "2026-09")
    assert (shown["opening_balance"], shown["closing_balance"]) == (0, Decimal("973.75"))
    assert shown["totals"] == {
        "topup": {"entries": 1, "credits": 1000},
        "charge": {"entries": 1, "credits": Decimal("-26.25")},
    }
    assert list(shown["entries"][0]) == list(statement_forms.COLUMNS)
    assert re.search(r"topup +1,000\.000 +1,000\.000", cli("statement", "acme", "--month", "2026-09").stdout)
    assert "973.750" in cli("statement", "acme", "--month", "2026-09", "--html").stdout
    assert cli("statement", "acme", "--month", "2026-09", "--csv", "--json").exit_code == 2


def test_customers_get_their_own_statement(shared_server: Server) -> None:
    import requests

    name, key = shared_server.books.account(500)
    assert shared_server.post(key).status_code == 200
    month = f"{datetime.now(UTC):%Y-%m}"
    url, headers = f"{shared_server.url}/v1/statement", {"x-api-key": key}
    answer = requests.get(url, params={"month": month}, headers=headers, timeout=10).json(parse_float=Decimal)
    assert answer["account"] == name
    assert answer["opening_balance"] + sum(each["credits"] for each in answer["entries"]) == answer["closing_balance"]
    assert [each["kind"] for each in answer["entries"]] == ["topup", "charge"]
    as_csv = requests.get(url, params={"month": month, "format": "csv"}, headers=headers, timeout=10)
    assert as_csv.headers["content-type"] == "text/csv; charset=utf-8"
    assert as_csv.text.count("\r\n") == 5
    for wrong in ({"month": "x"}, {}, {"month": month, "format": "pdf"}):
        assert requests.get(url, params=wrong, headers=headers, timeout=10).status_code == 400
    assert requests.get(url, params={"month": month}, timeout=10).status_code == 401


# --- usage ------------------------------------------------------------------------------------------------------


def test_usage_over_all_is_what_the_days_add_up_to(database: Database, clock: Clock) -> None:
    """Whole months and the days around them, in every way that a time can cut them."""
    clock.now_ms = SEPTEMBER + 20 * DAY_MS
    people = [Customer.new(database, clock, name=name) for name in ("ann", "bob")]
    days_of: list[tuple[date, str, int]] = []
    for number in range(40):
        clock.tick(3 * DAY_MS)
        who = people[number % 3 % 2]
        who.settle(1000 + number)
        days_of.append((days.EPOCH + timedelta(days=clock.now_ms // DAY_MS), f"key_{who.key_id}", 1000 + number))
    edges = [None, date(2026, 9, 30), date(2026, 10, 1), date(2026, 10, 2), date(2026, 11, 15), date(2026, 11, 30),
             date(2026, 12, 1), date(2026, 12, 31), date(2027, 1, 1), date(2027, 1, 18)]  # fmt: skip
    for since in edges:
        for until in edges:
            expected: Counter[str] = Counter()
            for day, key, micros in days_of:
                if (since is None or day >= since) and (until is None or day <= until):
                    expected[key] += micros
            found = database.read(lambda tx, a=since, b=until: reports.usage(tx, "key", since=a, until=b))  # type: ignore[misc]
            assert {row.group: row.charged_micros for row in found} == expected, (since, until)
            for by in ("day", "model", "account"):
                others = database.read(lambda tx, a=since, b=until, by=by: reports.usage(tx, by, since=a, until=b))  # type: ignore[misc]
                assert sum(row.charged_micros for row in others) == sum(expected.values()), (by, since, until)
                assert sum(row.calls for row in others) == sum(row.calls for row in found)


@pytest.mark.parametrize(
    ("earned", "cost", "percent"),
    [
        (26_250_000, FLUX_NANO_USD, "4.76"),
        (3, 2, "33.33"),
        (3, 4, "-33.34"),  # rounded down: never better than it is
        (100, 0, "100"),
        (1, 10**30, f"-{10**32 - 100}"),
        (0, 0, None),
        (0, 5, None),
    ],
)
def test_a_margin_in_percent_is_exact_and_rounded_down(earned: int, cost: int, percent: str | None) -> None:
    assert margin_percent_text(earned, cost) == percent


@pytest.mark.engines("sqlite")  # where triggers can be taken away
def test_a_statement_is_refused_for_an_account_without_its_entries(database: Database, customer: Customer) -> None:
    damage(database, "DELETE FROM entries")
    with pytest.raises(Refused, match="is missing"):
        statement(database, customer.account_id, "2026-10")
