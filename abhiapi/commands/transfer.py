"""A whole ledger from one engine to another, compared row by row afterwards; and never two ledgers alive.

A move has three commits. The new place has every row, and is not to be used yet; then the file says that it was
moved, and where to, and takes no more writes; then the new place may be used. Broken off before the second, the file
is the ledger and a rerun begins anew; broken off after it, neither is, and a rerun takes the last step.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from sqlalchemy import Select, func, select
from sqlalchemy.sql import Executable

from abhiapi import audit, migrations, migrations_postgres, tables
from abhiapi.audit import Finding
from abhiapi.commands import copies
from abhiapi.commands.progress import Progress
from abhiapi.db import CLI_PATIENCE_S, Row, Tx, marked
from abhiapi.db_postgres import PostgresDatabase
from abhiapi.db_sqlite import SqliteDatabase, translated
from abhiapi.errors import Refused

# Whoever is named by a row comes before it.
ORDER = (
    "accounts key_limits keys key_spending price_versions own_prices fal_prices hold_raises timers processes calls"
    " observed_costs unexplained_events bookmarks entries usage_daily usage_monthly usage_totals idempotency_keys"
    " webhooks job_inputs alerts users invites playground_keys"
).split()
_ROWS: dict[str, Select[Row]] = {
    name: select(tables.metadata.tables[name]).order_by(*tables.metadata.tables[name].primary_key) for name in ORDER
}
_HOW_MANY: dict[str, Executable] = {
    name: select(func.count()).select_from(tables.metadata.tables[name]) for name in ORDER
}
PROGRESS_EVERY = 500


def silent(done: str, rows: int, total: int) -> None:
    """No progress is shown."""


def move(source: SqliteDatabase, target: PostgresDatabase, progress: Progress = silent) -> Finding:
    """Move a ledger that nobody serves to a database without content. Raises `Refused`, `SchemaError`."""
    if not source.exists():
        raise Refused(f"there is no database {source.path} to move")
    source.check_ours()
    under_way = migrations.moved_to(source)
    if under_way is not None and migrations_postgres.finish_arrival(target, under_way[1]):
        return target.read(audit.verify)
    migrations.migrate(source)  # refuses one that was moved, and brings an old one up to date
    copies.check_nobody_serves(source.path, "move")
    connection = source.connect(busy_timeout_s=CLI_PATIENCE_S)
    try:
        connection.execute("BEGIN IMMEDIATE")  # from here on nobody else writes to it
        number = secrets.token_hex(8)
        finding = _arrive(target, source.tx(connection), number, source.name, progress)
        migrations.mark_moved(connection, target.name, number)
        copies.check_nobody_serves(source.path, "move")  # nor has begun to meanwhile
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        raise translated(error) from error
    finally:
        connection.close()
    migrations_postgres.finish_arrival(target, number)
    return finding


def fill(source: SqliteDatabase, target: PostgresDatabase, origin: str, progress: Progress = silent) -> Finding:
    """Put a copy of a ledger into a database without content, which may be used at once: a backup's restoring.

    Broken off between its two commits it can be done again, from the same ``origin``.
    """
    number = secrets.token_hex(8)
    finding = source.read(lambda tx: _arrive(target, tx, number, origin, progress))
    migrations_postgres.finish_arrival(target, number)
    return finding


def back_up(source: PostgresDatabase, target: Path, progress: Progress = silent) -> Finding:
    """Copy one moment of a server's ledger into a new file, which is a ledger of its own. Raises `Refused`."""

    def write(partial: SqliteDatabase) -> None:
        migrations.migrate(partial)
        source.read_at_leisure(lambda tx: partial.write(lambda there: copy(tx, there, progress)))

    return copies.new_file(target, write)


def restore(target: PostgresDatabase, backup: Path, progress: Progress = silent) -> Finding:
    """Fill a database without content from a backup. Raises `Refused`, with nothing written."""
    with copies.brought_up_to_date(backup) as arriving:
        return fill(arriving, target, str(backup.absolute()), progress)


def copy(source: Tx, target: Tx, progress: Progress = silent) -> None:
    """Every row of every table, into tables that are empty."""
    told = _Told("copied", _how_many(source), progress)
    for name in ORDER:
        target.load(tables.metadata.tables[name], told.each(source.each(_ROWS[name])))


def _arrive(target: PostgresDatabase, source: Tx, number: str, origin: str, progress: Progress) -> Finding:
    """Everything there, compared, recounted and committed, and not to be used yet."""
    with migrations_postgres.arrival(target, migrations.VERSION, number, origin) as there, marked():
        copy(source, there, progress)
        _compare(source, there, progress)
        entries = source.one(_HOW_MANY["entries"]) or (0,)
        finding = audit.verify(there, progress=lambda recounted: progress("recounted", recounted, entries[0]))
        if not finding.ok:
            raise Refused(f"the ledger does not add up ({finding.problems[0]}): nothing was moved")
    return finding


def _compare(source: Tx, target: Tx, progress: Progress) -> None:
    told = _Told("compared", _how_many(source), progress)
    for name in ORDER:
        for here, there in zip_longest(told.each(source.each(_ROWS[name])), target.each(_ROWS[name])):
            if here != there:
                raise Refused(f"a row of {name} is not there what it is here: nothing was moved")


def _how_many(source: Tx) -> int:
    """Rows of all tables."""
    counts = (source.one(_HOW_MANY[name]) for name in ORDER)
    return sum(count[0] for count in counts if count is not None)


class _Told:
    """Rows that are counted as they pass."""

    def __init__(self, done: str, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress = done, total, progress
        self._rows = 0

    def each(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self._rows += 1
            if self._rows % PROGRESS_EVERY == 0 or self._rows == self._total:
                self._progress(self._done, self._rows, self._total)
            yield row
