"""Passwords that cost next to nothing, for servers of tests and who signs in there.

Hashing takes a tenth of a second on purpose, and a run of all tests has hundreds of sign-ins. What a password costs is
looked at in test_users; servers that start from nothing hash as they should.
"""

from __future__ import annotations

from argon2 import PasswordHasher

from abhiapi import passwords

HASHER = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


def make_usual() -> None:
    passwords._HASHER = HASHER
