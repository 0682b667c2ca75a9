"""Passwords: hashed with argon2id and compared, in native threads of their own. Sole user of `argon2`.

A hash costs 64 MiB and a tenth of a second of processor time on purpose. Two threads do this work and nothing else, so
a flood of log-ins takes a bounded part of the machine, and no call waits for it; nor do more people than can be served.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from gevent.threadpool import ThreadPool

from abhiapi.committer import in_thread
from abhiapi.errors import RateLimited

T = TypeVar("T")

THREADS = 2
WAITING_MAX = 50  # people whose password is being looked at: the last of them waits for some three seconds
LENGTH_MIN, LENGTH_MAX = 10, 200
DISTINCT_MIN = 5  # characters that differ: "aaaaaaaaaa" and "1212121212" are no passwords

# RFC 9106's second recommendation, on one lane: the other processors go on with the calls.
_HASHER = PasswordHasher(time_cost=3, memory_cost=65_536, parallelism=1)


def problem(password: str, email: str) -> str | None:
    """Why a password is refused, in words for the person; None if it is not."""
    if len(password) < LENGTH_MIN:
        return f"Use at least {LENGTH_MIN} characters."
    if len(password) > LENGTH_MAX:
        return f"Use at most {LENGTH_MAX} characters."
    if len(set(password)) < DISTINCT_MIN:
        return f"Use at least {DISTINCT_MIN} different characters."
    if email and password.lower() in (email, email.partition("@")[0]):
        return "Use something else than your e-mail address."
    return None


class Passwords:
    """Hashes and compares without holding up the event loop. Raises `RateLimited` where too many wait already."""

    def __init__(self) -> None:
        self._threads = ThreadPool(THREADS)
        self._waiting = 0
        self._of_nobody = ""  # what an unknown person's password is compared with: the answer takes as long

    def hashed(self, password: str) -> str:
        return self._in_turn(lambda: _HASHER.hash(_bounded(password)))

    def matches(self, known: str | None, password: str) -> bool:
        """Whether a password is the one; without a known hash never, after the same work."""
        if known is None and not self._of_nobody:
            self._of_nobody = self.hashed("nobody's password")
        compared = known if known is not None else self._of_nobody
        return self._in_turn(lambda: _verify(compared, password)) and known is not None

    def is_outdated(self, known: str) -> bool:
        """Whether a hash was made with other parameters than today's."""
        return _HASHER.check_needs_rehash(known)

    def _in_turn(self, work: Callable[[], T]) -> T:
        if self._waiting >= WAITING_MAX:
            raise RateLimited("Too many people sign in just now. Try again in a minute.", retry_after_s=60)
        self._waiting += 1
        try:
            return in_thread(self._threads, work)
        finally:
            self._waiting -= 1


def _verify(known: str, password: str) -> bool:
    try:
        return _HASHER.verify(known, _bounded(password))
    except (VerificationError, InvalidHashError):
        return False


def _bounded(password: str) -> bytes:
    return password[: LENGTH_MAX + 1].encode("utf-8", "surrogatepass")
