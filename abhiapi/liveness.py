"""Which processes live, by locks that the kernel drops however a process dies; here by files beside the database.

That is proof where a heartbeat would be a guess, and it works the moment a killed server is started again.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO


class ProcessLock(ABC):
    """The lock that says «this process lives». Kept until `release`, or the end of the process."""

    @abstractmethod
    def take_place(self, process_id: int) -> None:
        """Be found under the number that the database gave."""

    @abstractmethod
    def keep(self) -> None:
        """Take it again where it was lost: without one this process would be taken for dead."""

    @abstractmethod
    def release(self) -> None: ...


class FileLock(ProcessLock):
    """A locked file beside the database.

    It is locked under a passing name first and then takes its place, so that nobody ever sees it unlocked while its
    process lives.
    """

    def __init__(self, database_path: Path) -> None:
        self._database_path = database_path
        self._path = database_path.with_name(f"{database_path.name}.starting-{os.getpid()}-{secrets.token_hex(4)}")
        self._file: IO[bytes] = open(self._path, "wb", opener=_for_its_owner)
        os.set_inheritable(self._file.fileno(), False)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def take_place(self, process_id: int) -> None:
        self._path = self._path.rename(lock_path(self._database_path, process_id))

    def keep(self) -> None:
        """Lock a new file where somebody has removed ours."""
        try:
            there = os.stat(self._path)
            if os.path.samestat(there, os.fstat(self._file.fileno())):
                return
        except FileNotFoundError:
            pass
        replaced = FileLock(self._database_path)
        replaced._path = replaced._path.rename(self._path)
        self._file.close()
        self._file = replaced._file

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        self._file.close()


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def lock_path(database_path: Path, process_id: int) -> Path:
    return database_path.with_name(f"{database_path.name}.process-{process_id}")


def reap(database_path: Path, process_id: int, pid: int) -> bool:
    """Whether a process is dead: nobody holds its lock. What it left on disk is removed.

    Where its file is missing, which no killed process leaves behind, it counts as dead only if no process has its pid.
    """
    path = lock_path(database_path, process_id)
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return not _has_process(pid)
    except BlockingIOError:
        return False
    return True


def is_alive(database_path: Path, process_id: int, pid: int) -> bool:
    """Whether a process lives, as `reap` tells it, with everything left as it is."""
    path = lock_path(database_path, process_id)
    return is_locked(path) or (not path.exists() and _has_process(pid))


def is_locked(path: Path) -> bool:
    """Whether there is such a file, and a process has locked it."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _has_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
