"""Which processes live: a lock that the kernel drops however they die, and what stands in for one that was removed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from abhiapi import processes
from abhiapi.db import Database
from abhiapi.liveness import FileLock, is_alive, lock_path, reap
from tests.harness import environment
from tests.rows import DEAD_PID

HOLD_UNTIL_KILLED = """
import subprocess, sys
from pathlib import Path
from abhiapi.liveness import FileLock
lock = FileLock(Path(sys.argv[1]))
lock.take_place(7)
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "abhiapi.db"


def test_a_process_that_holds_its_lock_lives(path: Path) -> None:
    lock = FileLock(path)
    lock.take_place(7)
    assert not reap(path, 7, os.getpid())
    assert lock_path(path, 7).exists()
    lock.release()


def test_a_lock_that_was_given_back_leaves_nothing_on_the_disk(path: Path) -> None:
    lock = FileLock(path)
    lock.take_place(7)
    lock.release()
    assert list(path.parent.iterdir()) == []


def test_a_killed_process_is_dead_at_once_though_its_child_lives_on(path: Path) -> None:
    """The kernel drops the lock; nothing that the process had started keeps it."""
    command = [sys.executable, "-c", HOLD_UNTIL_KILLED, str(path)]
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    child_pid = int(process.stdout.readline())
    assert not reap(path, 7, process.pid)
    process.kill()
    process.wait(20)
    os.kill(child_pid, 0)  # it lives, as long as nobody reads the end of its input
    assert reap(path, 7, process.pid)
    assert not lock_path(path, 7).exists()
    process.communicate()


def test_a_process_is_never_seen_without_its_lock(path: Path) -> None:
    """The file is locked before it takes the name under which others look for it."""
    lock = FileLock(path)
    (unnamed,) = path.parent.iterdir()
    assert unnamed != lock_path(path, 7)
    lock.take_place(7)
    assert list(path.parent.iterdir()) == [lock_path(path, 7)]
    assert not reap(path, 7, os.getpid())
    lock.release()


def test_a_missing_lock_means_dead_only_if_no_process_has_that_number(path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait(20)
    assert reap(path, 7, ended.pid)
    assert not reap(path, 7, os.getpid())
    assert not reap(path, 7, 1)  # somebody else's, which may not even be signalled


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_a_lock_file_that_somebody_removed_is_made_again(path: Path, replaced: bool) -> None:
    lock = FileLock(path)
    lock.take_place(7)
    lock_path(path, 7).unlink()
    if replaced:
        lock_path(path, 7).touch()
    lock.keep()
    assert not reap(path, 7, 0)
    lock.release()
    assert list(path.parent.iterdir()) == []


def test_a_lock_that_is_in_its_place_stays_as_it_is(path: Path) -> None:
    lock = FileLock(path)
    lock.take_place(7)
    before = lock_path(path, 7).stat()
    lock.keep()
    assert os.path.samestat(before, lock_path(path, 7).stat())
    lock.release()


def test_two_processes_do_not_mix_up_their_locks(path: Path) -> None:
    first, second = FileLock(path), FileLock(path)
    first.take_place(7)
    second.take_place(8)
    first.release()
    assert not reap(path, 8, os.getpid())
    second.release()


def test_a_look_at_who_lives_leaves_everything_as_it_is(path: Path) -> None:
    lock = FileLock(path)
    lock.take_place(7)
    assert is_alive(path, 7, DEAD_PID)
    lock._file.close()  # as the kernel does for one that was killed
    assert not is_alive(path, 7, os.getpid())
    assert lock_path(path, 7).exists()
    assert [is_alive(path, 8, pid) for pid in (os.getpid(), DEAD_PID)] == [True, False]


@pytest.mark.engines
def test_a_process_runs_from_its_start_to_its_end(database: Database) -> None:
    first = database.write(lambda tx: processes.start(tx, pid=41, now_ms=1))
    second = database.write(lambda tx: processes.start(tx, pid=42, now_ms=2))
    assert database.read(processes.running) == [processes.Process(first, 41, 1), processes.Process(second, 42, 2)]
    database.write(lambda tx: processes.seen(tx, second, now_ms=5))
    database.write(lambda tx: processes.end(tx, first, now_ms=6))
    assert database.read(processes.running) == [processes.Process(second, 42, 2)]
