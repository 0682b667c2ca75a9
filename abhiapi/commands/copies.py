"""Copies of the database: a consistent one while it serves, and putting one in its place. Knows files, no command.

A copy counts only when it was opened again and its ledger recounted. Nothing is ever overwritten: a backup refuses
an existing file, a restore keeps the file it replaces beside the new one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from abhiapi import audit
from abhiapi.audit import Finding
from abhiapi.db import CLI_PATIENCE_S
from abhiapi.db_sqlite import APPLICATION_ID, SqliteDatabase, translated
from abhiapi.errors import Refused, SchemaError
from abhiapi.liveness import is_locked, reap
from abhiapi.migrations import migrate, moved_mark

_BESIDE = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a database


@dataclass(frozen=True, slots=True)
class Restored:
    """What stands in the database's place now, and where the file that stood there is (None: there was none)."""

    finding: Finding
    replaced: Path | None


def back_up(database: SqliteDatabase, target: Path) -> Finding:
    """Copy the database as it is this moment, beside its readers and writers. Raises `Refused`."""
    if os.path.lexists(target):
        raise Refused(f"{target} exists already, and a backup never overwrites anything: choose another name")
    if not database.exists():
        raise Refused(f"there is no database {database.path} to back up: check ABHIAPI_DATABASE_URL")
    database.check_ours()
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    with _file_trouble(f"cannot write {target}"), _removed_at_the_end(partial):
        source = database.connect(busy_timeout_s=CLI_PATIENCE_S)
        try:
            _check_not_moved(source, database.path, "a copy of it would be no backup")
            _copy(source, partial)
        finally:
            source.close()
        shutil.copymode(database.path, partial)
        finding = _verified(database, partial, f"the copy of {database.path}")
        _put_in_new_place(partial, target)
    return finding


def new_file(target: Path, write: Callable[[SqliteDatabase], None]) -> Finding:
    """A new database file that somebody fills, there only when it was verified. Raises `Refused`."""
    if os.path.lexists(target):
        raise Refused(f"{target} exists already, and a backup never overwrites anything: choose another name")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    with _file_trouble(f"cannot write {target}"), _removed_at_the_end(partial):
        made = SqliteDatabase.at(partial)
        write(made)
        finding = _verified(made, partial, f"the copy in {target}")
        _put_in_new_place(partial, target)
    return finding


@contextlib.contextmanager
def brought_up_to_date(backup: Path) -> Iterator[SqliteDatabase]:
    """A passing copy of a backup in this program's version. Raises `Refused`."""
    if not backup.is_file():
        raise Refused(f"there is no file {backup}")
    with tempfile.TemporaryDirectory() as folder, _file_trouble(f"cannot read {backup}"):
        copy = Path(folder) / "arriving.db"
        _copy_from_file(backup, copy)
        made = SqliteDatabase.at(copy)
        migrate(made)
        yield made


def restore(database: SqliteDatabase, backup: Path) -> Restored:
    """Put a backup in the database's place, after its ledger was verified. Raises `Refused`, with nothing replaced."""
    if not backup.is_file():
        raise Refused(f"there is no file {backup}")
    if database.path.exists() and backup.samefile(database.path):
        raise Refused(f"{backup} is the database itself")
    check_nobody_serves(database.path, "restore")
    if database.path.exists():
        with (
            contextlib.suppress(sqlite3.DatabaseError),  # a damaged one is what a backup is for
            contextlib.closing(_open_to_look(database.path)) as there,
        ):
            _check_not_moved(there, database.path, "or put this file elsewhere, if the ledger there is given up")
    arriving = database.path.with_name(f"{database.path.name}.restoring-{os.getpid()}")
    with _file_trouble(f"cannot put {backup} in the place of {database.path}"), _removed_at_the_end(arriving):
        database.path.parent.mkdir(parents=True, exist_ok=True)
        _copy_from_file(backup, arriving)
        migrate(SqliteDatabase.at(arriving))
        finding = _verified(database, arriving, str(backup))
        if database.path.exists():
            _look_like(arriving, database.path)
        replaced = _swap(arriving, database.path)
    return Restored(finding, replaced)


def _copy(source: sqlite3.Connection, target: Path) -> None:
    copy = sqlite3.connect(target)
    try:
        source.backup(copy)  # all pages in one step: one moment of the database, and no writer has to wait
    finally:
        copy.close()


def _copy_from_file(backup: Path, target: Path) -> None:
    """Copy a backup, which may lie on a medium that cannot be written."""
    is_alone = not any(_beside(backup, ending).exists() for ending in _BESIDE)
    how = "immutable=1" if is_alone else "mode=rw"
    try:
        source = sqlite3.connect(f"file:{quote(str(backup.absolute()))}?{how}", uri=True)
        try:
            if source.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
                raise SchemaError(f"{backup} is no AbhiAPI database")
            _copy(source, target)
        finally:
            source.close()
        copy = sqlite3.connect(target)
        try:
            copy.execute("PRAGMA journal_mode = WAL")
        finally:
            copy.close()
    except sqlite3.DatabaseError as error:
        raise Refused(f"{backup} cannot be read as a database: {error}") from error


def _verified(database: SqliteDatabase, path: Path, name: str) -> Finding:
    """Open a copy and recount its ledger. Raises `Refused` if it does not add up."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        whole = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        connection.execute("BEGIN")
        finding = audit.verify(database.tx(connection)) if whole == "ok" else Finding(0, 0, [whole])
    except sqlite3.DatabaseError as error:
        raise Refused(f"{name} is damaged ({error}): nothing was changed") from error
    finally:
        connection.close()
    if not finding.ok:
        more = f" and {len(finding.problems) - 1} more problems" if len(finding.problems) > 1 else ""
        raise Refused(f"the ledger of {name} does not add up ({finding.problems[0]}{more}): nothing was changed")
    return finding


def _check_not_moved(opened: sqlite3.Connection, path: Path, more: str) -> None:
    """Refuse what would make a second ledger of a file whose own one lives on elsewhere."""
    moved = moved_mark(opened)
    if moved is not None:
        raise Refused(f"the ledger of {path} was moved to {moved[0]}: set ABHIAPI_DATABASE_URL to that ({more})")


def _open_to_look(path: Path) -> sqlite3.Connection:
    """A connection that neither makes nor removes a file beside ``path``, which nobody may be writing to."""
    is_alone = not any(_beside(path, ending).exists() for ending in _BESIDE)
    return sqlite3.connect(f"{path.as_uri()}?{'immutable=1' if is_alone else 'mode=ro'}", uri=True)


def check_nobody_serves(path: Path, why: str) -> None:
    """Refuse while a server has the database open: it would go on writing to the file that is put aside."""
    for lock in path.parent.glob(f"{path.name}.*"):
        number = lock.name.removeprefix(f"{path.name}.process-")
        starting = lock.name.startswith(f"{path.name}.starting-")
        if (number.isdecimal() and not reap(path, int(number), os.getpid())) or (starting and is_locked(lock)):
            raise Refused(f"a server is running on {path}: stop it first, then {why}")


def _swap(arriving: Path, path: Path) -> Path | None:
    """Put ``arriving`` in the place of ``path``, which is kept: its new name. On disk when this returns."""
    _sync(arriving)
    kept = _free_name(path)
    existed = path.exists()
    with _locked_alone(path) if existed else contextlib.nullcontext():
        for ending in _BESIDE:  # of a damaged database only: left here, SQLite would replay it onto the new one
            if _beside(path, ending).exists():
                os.rename(_beside(path, ending), _beside(kept, ending))
        if existed:
            _exchange(arriving, path, kept)
        else:
            os.rename(arriving, path)
    _sync(path.parent)
    return kept if existed else None


def _exchange(arriving: Path, path: Path, kept: Path) -> None:
    """Keep ``path`` as ``kept`` and put ``arriving`` in its place, or leave it where it is."""
    try:
        os.link(path, kept)  # a second name, so that there is a database under the first one at all times
    except OSError:  # a file system without hard links
        os.rename(path, kept)
    try:
        os.rename(arriving, path)
    except OSError:
        if path.exists():
            kept.unlink()
        else:
            os.rename(kept, path)
        raise


@contextlib.contextmanager
def _locked_alone(path: Path) -> Iterator[None]:
    """Keep everybody else out of the database while its file is exchanged. Raises `Refused` if somebody is in it.

    Only the one connection there is can leave WAL mode, so doing that proves that no other command is at work. One
    that comes later waits for the lock, and is then refused by SQLite because the file it opened was moved: what it
    wanted to write is not lost in silence.
    """
    connection = sqlite3.connect(path, timeout=CLI_PATIENCE_S, isolation_level=None)
    try:
        try:
            connection.execute("PRAGMA journal_mode = DELETE").fetchone()
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise Refused(f"{path} is in use ({error}): end what uses it, then restore") from error
        except sqlite3.DatabaseError:
            pass  # damaged beyond use, which is why it is being replaced: nobody else can use it either
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            connection.execute("PRAGMA journal_mode = WAL")
        raise
    finally:
        connection.close()


def _free_name(path: Path) -> Path:
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.replaced-{number}")):
        number += 1
    return kept


def _put_in_new_place(partial: Path, target: Path) -> None:
    """Give a finished file its name, unless somebody took that meanwhile. On disk when this returns."""
    _sync(partial)
    try:
        os.link(partial, target)  # which, unlike a rename, replaces nothing
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise
        os.rename(partial, target)
    _sync(target.parent)


def _look_like(new: Path, old: Path) -> None:
    """Mode and owner of the file that is replaced, so that the server can use it when root restored it."""
    shutil.copymode(old, new)
    status = os.stat(old)
    with contextlib.suppress(PermissionError):
        os.chown(new, status.st_uid, status.st_gid)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _sync(path: Path) -> None:
    """Have a file, or a folder's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _file_trouble(what: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise Refused(f"{what}: {translated(error).message}") from error
    except OSError as error:
        raise Refused(f"{what}: {error.strerror or error}") from error


@contextlib.contextmanager
def _removed_at_the_end(path: Path) -> Iterator[None]:
    """Whatever happens, the passing name and what SQLite may have left beside it are gone."""
    try:
        yield
    finally:
        for leftover in [path, *(_beside(path, ending) for ending in _BESIDE)]:
            leftover.unlink(missing_ok=True)
        for leftover in path.parent.glob(f"{path.name}.v*.bak"):  # an upgraded copy's original: the backup is kept
            leftover.unlink(missing_ok=True)
