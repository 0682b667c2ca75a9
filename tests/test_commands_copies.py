"""`backup` and `restore`: a copy is proven before it counts, and what is replaced is kept."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from abhiapi.commands import session
from abhiapi.liveness import FileLock, lock_path
from abhiapi.migrations import VERSION, migrate
from tests.command_line import CommandLine
from tests.harness import Clock
from tests.rows import Customer


@pytest.fixture
def cli(tmp_path: Path) -> CommandLine:
    made = CommandLine(tmp_path)
    migrate(made.database)
    return made


@pytest.fixture
def customer(cli: CommandLine) -> Customer:
    return Customer.new(cli.database, Clock(session.now_ms()))


def balance(cli: CommandLine) -> int:
    standing: int = cli.json("balance", "ann")["balance"]
    return standing


def journal(cli: CommandLine) -> str:
    """How the database writes: «wal» lets readers and writers work side by side."""
    connection = sqlite3.connect(cli.path)
    mode: str = connection.execute("PRAGMA journal_mode").fetchone()[0]
    connection.close()
    return mode


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def no_links(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def change(path: Path, statement: str) -> None:
    """Do to a database what the program never does."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(statement)
    connection.close()


# --- backup -----------------------------------------------------------------------------------------------------


def test_backup_is_the_whole_ledger_in_one_file(cli: CommandLine, customer: Customer, tmp_path: Path) -> None:
    customer.settle()
    target = tmp_path / "copy.db"
    before = files(tmp_path)
    made = cli.json("backup", str(target))
    assert made == {"path": str(target), "size_bytes": target.stat().st_size, "accounts": 1, "entries": 2}
    assert files(tmp_path) - before == {"copy.db"}
    copy = CommandLine(tmp_path)
    copy.path = target
    copy.settings = cli.settings | {"ABHIAPI_DATABASE_URL": f"sqlite:///{target}"}
    lines = cli.dump().splitlines()
    (note,) = (line for line in lines if line.startswith("timers ('backup', "))  # for `doctor`, after the copy was made
    assert copy.dump().splitlines() == [line for line in lines if line != note]


def test_backup_waits_for_no_writer_and_holds_nothing_unfinished(
    cli: CommandLine, customer: Customer, tmp_path: Path
) -> None:
    """A transaction that is open meanwhile is not in it; the writer goes on as if nothing had been."""
    writer = cli.database.connect()
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE accounts SET plan = 'pro'")
    assert cli.json("backup", str(tmp_path / "copy.db"))["entries"] == 1
    writer.execute("COMMIT")
    writer.close()
    assert cli.json("accounts", "show", "ann")["plan"] == "pro"
    cli("restore", str(tmp_path / "copy.db"))
    assert cli.json("accounts", "show", "ann")["plan"] == "free"


def test_backup_never_overwrites(cli: CommandLine, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    assert "never overwrites" in cli("backup", str(target)).refused()
    assert target.read_text() == "precious"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    assert "never overwrites" in cli("backup", str(dangling)).refused()
    assert "never overwrites" in cli("backup", str(cli.path)).refused()


def test_backup_that_cannot_be_written_is_one_line(cli: CommandLine, tmp_path: Path) -> None:
    assert "cannot write" in cli("backup", str(tmp_path / "no" / "folder" / "copy.db")).refused()


def test_backup_of_no_database_makes_none(tmp_path: Path) -> None:
    """A wrong ABHIAPI_DATABASE_URL would otherwise give an empty backup every night."""
    cli = CommandLine(tmp_path)
    assert "no database" in cli("backup", str(tmp_path / "copy.db")).refused()
    assert files(tmp_path) == set()


def test_backup_of_books_that_do_not_add_up_is_refused(cli: CommandLine, customer: Customer, tmp_path: Path) -> None:
    change(cli.path, "UPDATE accounts SET balance_micros = 1")
    before = files(tmp_path)
    assert "does not add up" in cli("backup", str(tmp_path / "copy.db")).refused()
    assert files(tmp_path) == before


# --- restore ----------------------------------------------------------------------------------------------------


def test_restore_brings_the_backup_back_and_keeps_what_it_replaces(
    cli: CommandLine, customer: Customer, tmp_path: Path
) -> None:
    backup = tmp_path / "copy.db"
    cli("backup", str(backup))
    content = backup.read_bytes()
    for number, topped_up in ((1, 7), (2, 9)):
        customer.topup(topped_up)
        done = cli("restore", str(backup), "--json")
        kept = tmp_path / f"abhiapi.db.replaced-{number}"
        assert done.json == {
            "database": str(cli.path),
            "restored_from": str(backup),
            "accounts": 1,
            "entries": 1,
            "replaced": str(kept),
        }
        assert str(kept) in done.stderr
        assert balance(cli) == 1000
        cli.entries()
    assert backup.read_bytes() == content
    assert not {name for name in files(tmp_path) if "restoring" in name or "copy.db-" in name}
    cli("restore", str(tmp_path / "abhiapi.db.replaced-2"))
    assert balance(cli) == 1009
    assert journal(cli) == "wal"


def test_restored_database_is_as_good_as_a_new_one(cli: CommandLine, customer: Customer, tmp_path: Path) -> None:
    os.chmod(cli.path, 0o640)
    cli("backup", str(tmp_path / "copy.db"))
    cli("restore", str(tmp_path / "copy.db"))
    assert journal(cli) == "wal"
    assert cli.path.stat().st_mode & 0o777 == 0o640
    assert cli("topup", "ann", "5").exit_code == 0
    assert cli.entries() == 2


def test_restore_where_there_was_no_database(cli: CommandLine, customer: Customer, tmp_path: Path) -> None:
    cli("backup", str(tmp_path / "copy.db"))
    other = CommandLine(tmp_path / "other" / "machine")
    assert other.json("restore", str(tmp_path / "copy.db"))["replaced"] is None
    assert balance(other) == 1000


def test_restore_takes_a_backup_with_its_write_ahead_log(cli: CommandLine, customer: Customer, tmp_path: Path) -> None:
    """Somebody copied the files with cp: the newest entries are in the log beside the database."""
    keeps_log = cli.database.connect()
    keeps_log.execute("SELECT count(*) FROM entries").fetchone()
    customer.topup(7)
    folder = tmp_path / "cp"
    folder.mkdir()
    for name in ("abhiapi.db", "abhiapi.db-wal"):
        (folder / name).write_bytes((tmp_path / name).read_bytes())
    keeps_log.close()
    other = CommandLine(tmp_path / "other")
    assert other.json("restore", str(folder / "abhiapi.db"))["entries"] == 2
    assert balance(other) == 1007


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "foreign", "newer", "cut", "changed", "folder"])
def test_restore_of_what_is_no_good_backup_replaces_nothing(
    cli: CommandLine, customer: Customer, tmp_path: Path, kind: str
) -> None:
    backup = tmp_path / "copy.db"
    if kind == "folder":
        backup.mkdir()
    elif kind != "missing":
        cli("backup", str(backup))
    if kind == "empty":
        backup.write_bytes(b"")
    elif kind == "text":
        backup.write_text("no database at all\n" * 100)
    elif kind == "foreign":
        change(backup, "PRAGMA application_id = 7")
    elif kind == "newer":
        change(backup, f"PRAGMA user_version = {VERSION + 1}")
    elif kind == "cut":
        backup.write_bytes(backup.read_bytes()[:40_000])
    elif kind == "changed":
        change(backup, "UPDATE accounts SET balance_micros = 5000000000")
    before = files(tmp_path) - {"abhiapi.db-wal", "abhiapi.db-shm"}
    done = cli("restore", str(backup))
    assert done.exit_code == (2 if kind == "folder" else 1)
    assert kind == "folder" or len(done.stderr.splitlines()) == 1
    assert files(tmp_path) == before
    assert balance(cli) == 1000


def test_restore_of_the_database_over_itself_is_refused(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(cli.path)
    for name in ("abhiapi.db", "alias"):
        assert "is the database itself" in cli("restore", str(tmp_path / name)).refused()


@pytest.mark.parametrize("started", [True, False])
def test_restore_while_a_server_runs_is_refused(
    cli: CommandLine, customer: Customer, tmp_path: Path, started: bool
) -> None:
    """Also one that is only just starting, and has no number yet."""
    cli("backup", str(tmp_path / "copy.db"))
    lock = FileLock(cli.path)
    if started:
        lock.take_place(customer.process_id)
    try:
        assert "a server is running" in cli("restore", str(tmp_path / "copy.db")).refused()
    finally:
        lock.release()
    assert cli("restore", str(tmp_path / "copy.db")).exit_code == 0


def test_restore_after_a_server_was_killed_is_allowed(cli: CommandLine, customer: Customer, tmp_path: Path) -> None:
    """Its lock's file is still there, and nobody holds it."""
    cli("backup", str(tmp_path / "copy.db"))
    lock_path(cli.path, customer.process_id).touch()
    (tmp_path / "abhiapi.db.starting-1-abcd").touch()
    assert cli("restore", str(tmp_path / "copy.db")).exit_code == 0


def test_restore_while_another_command_is_at_work_is_refused(
    cli: CommandLine, customer: Customer, tmp_path: Path
) -> None:
    cli("backup", str(tmp_path / "copy.db"))
    other = cli.database.connect()
    other.execute("SELECT count(*) FROM entries").fetchone()
    try:
        assert "is in use" in cli("restore", str(tmp_path / "copy.db")).refused()
    finally:
        other.close()
    assert journal(cli) == "wal"
    assert not {name for name in files(tmp_path) if "restor" in name or "replaced" in name}


def test_write_on_the_file_that_a_restore_put_aside_is_refused(
    cli: CommandLine, customer: Customer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that opened the old file while it was being exchanged is told; nothing lands where nobody looks."""
    cli("backup", str(tmp_path / "copy.db"))
    late: list[sqlite3.Connection] = []
    rename = os.rename

    def rename_with_somebody_waiting(old: Path, new: Path) -> None:
        if new == cli.path:
            late.append(sqlite3.connect(cli.path, timeout=0, isolation_level=None))
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                late[0].execute("SELECT count(*) FROM entries")
        rename(old, new)

    monkeypatch.setattr("os.rename", rename_with_somebody_waiting)
    assert cli("restore", str(tmp_path / "copy.db")).exit_code == 0
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        late[0].execute("UPDATE accounts SET plan = 'pro'")
    late[0].close()
    assert cli.json("accounts", "show", "ann")["plan"] == "free"


def test_damaged_database_can_be_replaced(cli: CommandLine, customer: Customer, tmp_path: Path) -> None:
    """With the log that belongs to it: left beside the new database, SQLite would replay it."""
    cli("backup", str(tmp_path / "copy.db"))
    cli.path.write_text("not a database any more\n" * 1000)
    (tmp_path / "abhiapi.db-wal").write_text("its log")
    assert cli("restore", str(tmp_path / "copy.db")).exit_code == 0
    assert balance(cli) == 1000
    assert (tmp_path / "abhiapi.db.replaced-1").read_text().startswith("not a database")
    assert (tmp_path / "abhiapi.db.replaced-1-wal").read_text() == "its log"


@pytest.mark.parametrize("has_links", [True, False])
def test_restore_that_fails_at_the_last_moment_leaves_everything(
    cli: CommandLine, customer: Customer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    cli("backup", str(tmp_path / "copy.db"))
    before = files(tmp_path)
    rename = os.rename

    def rename_but_not_the_new_one(old: Path, new: Path) -> None:
        if "restoring" in old.name:
            raise OSError(28, "No space left on device")
        rename(old, new)

    with monkeypatch.context() as broken:
        broken.setattr("os.rename", rename_but_not_the_new_one)
        if not has_links:
            broken.setattr("os.link", no_links)
        assert "No space left" in cli("restore", str(tmp_path / "copy.db")).refused()
    assert journal(cli) == "wal"
    assert balance(cli) == 1000
    assert files(tmp_path) == before


def test_copies_need_no_hard_links(
    cli: CommandLine, customer: Customer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.link", no_links)
    assert cli("backup", str(tmp_path / "copy.db")).exit_code == 0
    customer.topup(7)
    assert cli("restore", str(tmp_path / "copy.db")).exit_code == 0
    assert balance(cli) == 1000
    assert (tmp_path / "abhiapi.db.replaced-1").exists()
    assert not {name for name in files(tmp_path) if "partial" in name}
