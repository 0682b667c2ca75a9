"""Builds a year of calls in databases of its own and asks what each piece of book-keeping costs there.

    python bench/ledger.py                    ten million calls in a file; some fifteen minutes and 5 GB of disk
    python bench/ledger.py --calls 1000000    fewer
    python bench/ledger.py --engines          on PostgreSQL as well: an hour and 20 GB
    python bench/ledger.py --write            also write the section of bench/RESULTS.md

The books are built in bulk and are true: hashes, balances, roll-ups; `ledger verify` is part of what is measured.
The same questions are put to a database of ten thousand calls, side by side; everything is built first and measured
then. Exit status 1 when a report takes longer than its target or the books do not add up.
"""

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import report
from ledger_books import ACCOUNTS, DAYS, FREE_EVERY, MODELS, Books, build, moved, server
from ledger_questions import TIMED, Measured, measure

from abhiapi.db import Database
from abhiapi.db_sqlite import SqliteDatabase

RESULTS = Path(__file__).with_name("RESULTS.md")
SMALL = 10_000
REPORT_TARGET_MS = 200
BYTES_TARGET = 400  # of a file
TITLES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}

Figures = dict[str, dict[int, Measured]]  # by engine, then by calls


def main() -> int:
    """Build, measure, print, and say with the exit status whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000_000, help="how many calls the large database has")
    parser.add_argument("--engines", action="store_true", help="measure PostgreSQL beside SQLite")
    parser.add_argument("--write", action="store_true", help=f"write the section of {RESULTS.name}")
    arguments = parser.parse_args()
    if arguments.calls < SMALL:
        parser.error(f"--calls is at least {SMALL}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="abhiapi-bench-ledger-")))
        about = report.where(folder, "python bench/ledger.py")
        databases: dict[str, dict[int, Database]] = {"sqlite": {}}
        built_s: dict[str, float] = {}
        found: Figures = {}
        books = {count: Books(count, folder / f"{count}.db") for count in (SMALL, arguments.calls)}
        for count, each in books.items():
            started = time.monotonic()
            databases["sqlite"][count] = build(each)
            built_s["sqlite"] = time.monotonic() - started
        if arguments.engines:
            postgres = stack.enter_context(server())
            for count, each in books.items():
                started = time.monotonic()
                databases.setdefault("postgresql", {})[count] = moved(SqliteDatabase.at(each.path), postgres)
                built_s["postgresql"] = time.monotonic() - started
        for engine, by_count in databases.items():
            found[engine] = {}
            for count, database in by_count.items():
                print(f"bench: {TITLES[engine]}, {count:,} calls: measuring", file=sys.stderr, flush=True)
                found[engine][count] = measure(books[count], database)
    section = page(found, arguments.calls, about, built_s)
    print(section)
    if arguments.write:
        report.write_chapter(RESULTS, section)
    return 1 if missed(found, arguments.calls) else 0


def page(found: Figures, count: int, about: str, built_s: dict[str, float]) -> str:
    """The section, as Markdown."""
    lines = [
        "# The ledger",
        "",
        f"{count:,} calls in the database.",
        "",
        about,
        f"- {ACCOUNTS:,} accounts with two keys each, {MODELS} models, {DAYS} days; one account makes a tenth of "
        f"the calls, one call in {FREE_EVERY} is free. The file was built in {built_s['sqlite']:,.0f} s.",
        f"- Writes: median of {TIMED}, of accounts all over the books, one transaction each. *First*: the statements, "
        "with pages not in the database's cache yet; *again*: the median of further rounds, what a call pays in a "
        "group commit; *committed*: that with a durable commit of its own.",
        "- Reports: the first time (file cache warm, the database's own cold), and the median of five more.",
    ]
    if "postgresql" in found:
        lines.append(
            "- PostgreSQL runs on this machine too, with `fsync` and 1 GB of `shared_buffers`. Its books were moved "
            "there from the file as `abhiapi migrate-to` copies them, in "
            f"{built_s['postgresql']:,.0f} s."
        )
    for engine, by_count in found.items():
        lines += ["", f"## Books on {TITLES[engine]}", *_tables(by_count[SMALL], by_count[count], count)]
    lines += ["", *(f"- {problem}" for problem in missed(found, count) or ["Targets met, books exact."])]
    return "\n".join(lines)


def _tables(small: Measured, large: Measured, count: int) -> list[str]:
    heads = f"{SMALL:,} calls", f"{count:,} calls"
    lines = [
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
    ]
    for name, (first, again) in large.reports_ms.items():
        was_first, was_again = small.reports_ms[name]
        lines.append(f"| {name} | {was_first:,.1f} | {was_again:,.1f} | {first:,.1f} | {again:,.1f} |")
    lines += ["", f"| | {heads[0]} | {heads[1]} |", "| --- | ---: | ---: |"]
    return lines + [f"| {name} | {small.notes[name]} | {value} |" for name, value in large.notes.items()]


def _us(value: float) -> str:
    return "" if value != value else f"{value:,.0f}"


def missed(found: Figures, count: int) -> list[str]:
    """What of the targets this run does not show."""
    problems = []
    for engine, by_count in found.items():
        large = by_count[count]
        problems += [
            f"{TITLES[engine]}, {name}: {again:,.0f} ms, more than {REPORT_TARGET_MS}"
            for name, (_, again) in large.reports_ms.items()
            if again > REPORT_TARGET_MS
        ]
        problems += [f"{TITLES[engine]}: {problem}" for problem in large.problems]
    per_call = found["sqlite"][count].notes["bytes per call"]
    if int(per_call.replace(",", "")) > BYTES_TARGET and count > SMALL:
        problems.append(f"{per_call} bytes per call in the file, more than {BYTES_TARGET}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
