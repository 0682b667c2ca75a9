"""Making and upgrading databases: an upgrade never loses a ledger."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from abhiapi import audit, migrations
from abhiapi.db import Database, database_at
from abhiapi.errors import SchemaError
from abhiapi.migrations import STEPS, VERSION, migrate, statements
from tests.harness import ROOT, Clock, each_in_a_process
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
    return database_at(f"sqlite:///{folder / 'deeper' / 'abhiapi.db'}")


def test_a_database_is_created_with_its_folders_and_said(tmp_path: Path) -> None:
    database = new_database(tmp_path)
    assert migrate(database) == f"created the database {database.path}"
    assert migrate(database) is None
    assert version_of(database.path) == VERSION


def test_an_upgrade_keeps_every_row_and_a_copy_of_the_old_file(database: Database, clock: Clock) -> None:
    customer = Customer.new(database, clock)
    customer.settle()
    before = dump(database.path)
    said = migrate(database, steps=(*STEPS, add_colour, add_shapes))
    copy = database.path.with_name(f"abhiapi.db.v{VERSION}.bak")
    assert said is not None
    assert str(copy) in said
    assert version_of(database.path) == VERSION + 2
    assert dump(copy) == before
    assert database.read(audit.verify).ok
    with closing(sqlite3.connect(database.path)) as connection:
        assert connection.execute("SELECT count(*) FROM shapes").fetchone() == (1,)
        assert connection.execute("SELECT colour FROM keys").fetchone() == (None,)


SCHEMA = """
    SELECT m.type, m.name, m.tbl_name, c.name, c.type, c."notnull", c.dflt_value, c.pk
    FROM sqlite_master m LEFT JOIN pragma_table_info(m.name) c ON m.type = 'table'
    WHERE m.name NOT LIKE 'sqlite%' ORDER BY 1, 2, 4
"""
GUARDS = "SELECT name, sql FROM sqlite_master WHERE type IN ('index', 'trigger') AND sql IS NOT NULL ORDER BY 1"


def test_the_first_version_becomes_what_a_new_database_is(tmp_path: Path) -> None:
    """Every table, column, index and guard; no row is lost, and the books are still right."""
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((ROOT / "tests/data/version-1.sql").read_text())
    old, new = database_at(f"sqlite:///{path}"), new_database(tmp_path)
    migrate(old)
    migrate(new)
    with closing(sqlite3.connect(old.path)) as one, closing(sqlite3.connect(new.path)) as other:
        assert one.execute(SCHEMA).fetchall() == other.execute(SCHEMA).fetchall()
        plain = [[(name, " ".join(sql.split())) for name, sql in each.execute(GUARDS)] for each in (one, other)]
        assert plain[0] == plain[1]
        assert one.execute("SELECT count(*) FROM calls").fetchone() == (4,)
    finding = old.read(audit.verify)
    assert (finding.ok, finding.entries) == (True, 6)


def test_an_upgrade_never_overwrites_an_earlier_copy(database: Database) -> None:
    database.path.with_name(f"abhiapi.db.v{VERSION}.bak").write_text("precious")
    migrate(database, steps=(*STEPS, add_colour))
    assert database.path.with_name(f"abhiapi.db.v{VERSION}.bak").read_text() == "precious"
    assert version_of(database.path.with_name(f"abhiapi.db.v{VERSION}.1.bak")) == VERSION


def test_a_failing_step_leaves_everything_before_it(database: Database, clock: Clock) -> None:
    customer = Customer.new(database, clock)
    customer.settle()
    with pytest.raises(RuntimeError, match="the power went"):
        migrate(database, steps=(*STEPS, add_colour, fail_half_way))
    assert version_of(database.path) == VERSION + 1
    with closing(sqlite3.connect(database.path)) as connection:
        assert connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'half'").fetchone() is None
    migrate(database, steps=(*STEPS, add_colour, add_shapes))  # mended, it goes on from where it stood
    assert version_of(database.path) == VERSION + 2
    assert database.read(audit.verify).ok


def test_a_failing_step_leaves_no_copy_of_what_is_still_there(database: Database) -> None:
    """A server that is started again and again would fill the disk with them."""
    with pytest.raises(RuntimeError):
        migrate(database, steps=(*STEPS, fail_half_way))
    assert version_of(database.path) == VERSION
    assert not list(database.path.parent.glob("*.bak"))


def make_calls_anew(connection: sqlite3.Connection) -> None:
    """The way to change a CHECK: a new table with the rows of the old one, under its name."""
    (sql,) = connection.execute("SELECT sql FROM sqlite_master WHERE type = 'table' AND name = 'calls'").fetchone()
    guards = connection.execute(
        "SELECT sql FROM sqlite_master WHERE tbl_name = 'calls' AND type IN ('trigger', 'index') AND sql IS NOT NULL"
    ).fetchall()
    connection.execute(sql.replace("CREATE TABLE calls", "CREATE TABLE new_calls").replace("'queue')", "'queue', 'x')"))
    connection.execute("INSERT INTO new_calls SELECT * FROM calls")
    connection.execute("DROP TABLE calls")
    connection.execute("ALTER TABLE new_calls RENAME TO calls")
    for (guard,) in guards:
        connection.execute(guard)


def test_a_step_may_make_a_guarded_table_anew(database: Database, clock: Clock) -> None:
    customer = Customer.new(database, clock)
    customer.settle()
    before = dump(database.path)
    migrate(database, steps=(*STEPS, make_calls_anew))
    assert sorted(dump(database.path)) == sorted(before)
    assert database.read(audit.verify).ok
    with closing(sqlite3.connect(database.path)) as connection:
        with pytest.raises(sqlite3.IntegrityError, match="never deleted"):
            connection.execute("DELETE FROM calls")
        connection.execute("UPDATE calls SET mode = 'x'")


def lose_the_calls(connection: sqlite3.Connection) -> None:
    connection.execute("DROP TRIGGER calls_are_kept")
    connection.execute("DELETE FROM calls")


def test_a_step_that_loses_rows_others_name_is_not_done(database: Database, clock: Clock) -> None:
    Customer.new(database, clock).settle()
    with pytest.raises(SchemaError, match="would lose references"):
        migrate(database, steps=(*STEPS, lose_the_calls))
    assert version_of(database.path) == VERSION
    assert database.read(audit.verify).ok


def test_a_copy_is_readable_by_no_more_people_than_the_database(database: Database) -> None:
    database.path.chmod(0o600)
    migrate(database, steps=(*STEPS, add_colour))
    assert database.path.with_name(f"abhiapi.db.v{VERSION}.bak").stat().st_mode & 0o777 == 0o600


def _upgrade_in_another_process(url: str) -> str | None:
    return migrate(database_at(url), steps=(*STEPS, add_colour, add_shapes))


def test_several_processes_may_upgrade_at_once(database: Database, clock: Clock) -> None:
    """One takes the steps and keeps one copy, of the old version; the others find it done."""
    Customer.new(database, clock).settle()
    before = dump(database.path)
    said = each_in_a_process(_upgrade_in_another_process, [(f"sqlite:///{database.path}",)] * 8)
    assert len([words for words in said if words]) >= 1
    assert version_of(database.path) == VERSION + 2
    (copy,) = database.path.parent.glob(f"*.v{VERSION}.*bak")
    assert dump(copy) == before


def test_a_database_that_is_gone_while_its_log_is_there_is_not_made_anew(database: Database, clock: Clock) -> None:
    """SQLite would remove the log, with every entry that is not in the file yet."""
    with closing(database.connect()) as server:
        Customer.new(database, clock).settle()
        aside = database.path.with_name("aside.db")
        database.path.rename(aside)
        server.close()
        with pytest.raises(SchemaError, match="put the file back"):
            migrate(database)
        assert not database.path.exists()
        aside.rename(database.path)
    assert migrate(database) is None
    finding = database.read(audit.verify)
    assert (finding.ok, finding.entries) == (True, 2)


def test_a_newer_database_is_refused(database: Database) -> None:
    migrate(database, steps=(*STEPS, add_colour))
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
        migrate(database_at(f"sqlite:///{path}"))
    assert path.read_bytes() == before


def _migrate_in_another_process(url: str) -> str | None:
    return migrate(database_at(url))


def test_several_processes_may_start_at_once(tmp_path: Path) -> None:
    """One creates, the others find it done."""
    url = f"sqlite:///{tmp_path / 'abhiapi.db'}"
    said = each_in_a_process(_migrate_in_another_process, [(url,)] * 8)
    assert len([words for words in said if words]) == 1
    assert version_of(tmp_path / "abhiapi.db") == VERSION


def test_what_another_process_makes_between_two_questions_is_ours(tmp_path: Path) -> None:
    database = database_at(f"sqlite:///{tmp_path / 'abhiapi.db'}")

    class Asked:
        """A connection to what another process makes as soon as one question is answered."""

        def execute(self, query: str) -> sqlite3.Cursor:
            answer = connection.execute(query).fetchall()
            migrate(database)
            return connection.execute("SELECT ?", answer[0])

    with closing(sqlite3.connect(tmp_path / "abhiapi.db")) as connection:
        assert migrations._version(Asked(), tmp_path) == VERSION


def test_who_makes_a_file_waits_for_another_who_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite itself refuses at once to change how a file is kept while another writes to it."""
    with closing(sqlite3.connect(tmp_path / "abhiapi.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(migrations, "sleep", lambda seconds: other.execute("ROLLBACK"))
        migrate(database_at(f"sqlite:///{tmp_path / 'abhiapi.db'}"))
    assert version_of(tmp_path / "abhiapi.db") == VERSION


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "not a url", "mysql://localhost/db"])
def test_what_cannot_hold_a_ledger_is_refused(url: str) -> None:
    with pytest.raises(SchemaError):
        database_at(url)


def test_triggers_are_kept_whole_when_a_script_is_split() -> None:
    script = "CREATE TABLE a (b);\nCREATE TRIGGER t BEFORE DELETE ON a\nBEGIN SELECT 1; SELECT 2; END;\n"
    assert [piece.split()[1] for piece in statements(script)] == ["TABLE", "TRIGGER"]
