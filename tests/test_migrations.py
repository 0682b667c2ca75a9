"""Making and upgrading databases: an upgrade never loses a ledger."""

from __future__ import annotations

import multiprocessing
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from abhiapi import audit
from abhiapi.db import Database
from abhiapi.errors import SchemaError
from abhiapi.migrations import VERSION, migrate, statements
from tests.harness import Clock
from tests.rows import Customer


def add_colour(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE keys ADD COLUMN colour TEXT")


def add_shapes(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE shapes (shape TEXT NOT NULL) STRICT")
    connection.execute("INSERT INTO shapes SELECT 'round' FROM keys")


def fail_half_way(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE half (done INTEGER) STRICT")
    raise RuntimeError("the power went")


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [line for line in connection.iterdump() if line.startswith("INSERT")]


def new_database(folder: Path) -> Database:
    return Database(f"sqlite:///{folder / 'deeper' / 'abhiapi.db'}")


def test_a_database_is_created_with_its_folders_and_said(tmp_path: Path) -> None:
    database = new_database(tmp_path)
    assert migrate(database) == f"created the database {database.path}"
    assert migrate(database) is None
    assert version_of(database.path) == VERSION


def test_an_upgrade_keeps_every_row_and_a_copy_of_the_old_file(database: Database, clock: Clock) -> None:
    customer = Customer.new(database, clock)
    customer.settle()
    before = dump(database.path)
    said = migrate(database, steps=(add_colour, add_shapes))
    copy = database.path.with_name("abhiapi.db.v1.bak")
    assert said is not None
    assert str(copy) in said
    assert version_of(database.path) == 3
    assert dump(copy) == before
    assert database.read(audit.verify).ok
    with closing(sqlite3.connect(database.path)) as connection:
        assert connection.execute("SELECT count(*) FROM shapes").fetchone() == (1,)
        assert connection.execute("SELECT colour FROM keys").fetchone() == (None,)


def test_an_upgrade_never_overwrites_an_earlier_copy(database: Database) -> None:
    database.path.with_name("abhiapi.db.v1.bak").write_text("precious")
    migrate(database, steps=(add_colour,))
    assert database.path.with_name("abhiapi.db.v1.bak").read_text() == "precious"
    assert version_of(database.path.with_name("abhiapi.db.v1.1.bak")) == 1


def test_a_failing_step_leaves_everything_before_it(database: Database, clock: Clock) -> None:
    customer = Customer.new(database, clock)
    customer.settle()
    with pytest.raises(RuntimeError, match="the power went"):
        migrate(database, steps=(add_colour, fail_half_way))
    assert version_of(database.path) == 2
    with closing(sqlite3.connect(database.path)) as connection:
        assert connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'half'").fetchone() is None
    migrate(database, steps=(add_colour, add_shapes))  # mended, it goes on from where it stood
    assert version_of(database.path) == 3
    assert database.read(audit.verify).ok


def test_a_newer_database_is_refused(database: Database) -> None:
    migrate(database, steps=(add_colour,))
    with pytest.raises(SchemaError, match="newer than this program"):
        migrate(database)


def foreign_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.commit()


def text_file(path: Path) -> None:
    path.write_text("these are my memoirs\n" * 200)


@pytest.mark.parametrize("make", [foreign_database, text_file])
def test_files_that_are_not_ours_are_refused_and_kept(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "other.db"
    make(path)
    before = path.read_bytes()
    with pytest.raises(SchemaError, match=r"other\.db"):
        migrate(Database(f"sqlite:///{path}"))
    assert path.read_bytes() == before


def _migrate_in_another_process(url: str) -> str | None:
    return migrate(Database(url))


def test_several_processes_may_start_at_once(tmp_path: Path) -> None:
    """One creates, the others find it done."""
    url = f"sqlite:///{tmp_path / 'abhiapi.db'}"
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        said = pool.map(_migrate_in_another_process, [url] * 8)
    assert len([words for words in said if words]) == 1
    assert version_of(tmp_path / "abhiapi.db") == VERSION


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "not a url", "mysql://localhost/db"])
def test_what_cannot_hold_a_ledger_is_refused(url: str) -> None:
    with pytest.raises(SchemaError):
        Database(url)


def test_triggers_are_kept_whole_when_a_script_is_split() -> None:
    script = "CREATE TABLE a (b);\nCREATE TRIGGER t BEFORE DELETE ON a\nBEGIN SELECT 1; SELECT 2; END;\n"
    assert [piece.split()[1] for piece in statements(script)] == ["TABLE", "TRIGGER"]
