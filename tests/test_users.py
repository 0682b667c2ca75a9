"""Users, invitations and passwords, as rows and rules."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import gevent
import psycopg
import pytest

from abhiapi import accounts, passwords, users
from abhiapi.db import Database
from abhiapi.errors import BadRequest, NotFound, RateLimited, Refused
from tests.command_line import CommandLine
from tests.harness import Clock

pytestmark = pytest.mark.engines

HASH = "$argon2id$a"
OTHER_HASH = "$argon2id$b"


@pytest.fixture
def account_id(database: Database) -> int:
    return database.write(lambda tx: accounts.create(tx, "acme", now_ms=1)).account_id


def invited(database: Database, clock: Clock, account_id: int | None, email: str = "ann@example.com") -> str:
    is_operator = account_id is None
    return database.write(
        lambda tx: users.invite(tx, email, account_id=account_id, is_operator=is_operator, now_ms=clock())
    )[0]


@pytest.mark.parametrize("text", ["ann@example.com", " Ann@Example.COM ", "a+b@x-y.co", "ann@localhost"])
def test_addresses_are_compared_without_case(text: str) -> None:
    assert users.normal_email(text) == text.strip().lower()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ann",
        "@example.com",
        "ann@",
        "a b@example.com",
        "a@b@c",
        "a@-x",
        "<a>@b.c",
        "a\n@b.c",
        "é@b.c",
        "a" * 250 + "@b.c",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        users.normal_email(text)


def test_an_invitation_makes_a_user_once(database: Database, clock: Clock, account_id: int) -> None:
    token = invited(database, clock, account_id)
    user = database.write(lambda tx: users.accept(tx, token, HASH, now_ms=clock()))
    assert (user.email, user.account, user.is_operator) == ("ann@example.com", "acme", False)
    with pytest.raises(NotFound):
        database.write(lambda tx: users.accept(tx, token, OTHER_HASH, now_ms=clock()))
    assert database.read(lambda tx: users.password_hash(tx, user.user_id)) == HASH


def test_an_invitation_ends_after_seven_days(database: Database, clock: Clock, account_id: int) -> None:
    token = invited(database, clock, account_id)
    clock.tick(users.INVITE_MS - 1)
    assert database.read(lambda tx: users.find_invite(tx, token, now_ms=clock())) is not None
    clock.tick()
    assert database.read(lambda tx: users.find_invite(tx, token, now_ms=clock())) is None
    with pytest.raises(NotFound):
        database.write(lambda tx: users.accept(tx, token, HASH, now_ms=clock()))


def test_a_new_invitation_ends_the_one_before(database: Database, clock: Clock, account_id: int) -> None:
    first, second = invited(database, clock, account_id), invited(database, clock, account_id)
    assert database.read(lambda tx: users.find_invite(tx, first, now_ms=clock())) is None
    assert database.read(lambda tx: users.find_invite(tx, second, now_ms=clock())) is not None


def test_the_token_is_stored_nowhere(
    database: Database, clock: Clock, account_id: int, tmp_path: Path, database_url: str
) -> None:
    """failures.md row 69: a copy of the database lets nobody in."""
    token = invited(database, clock, account_id)
    dump = CommandLine(tmp_path, database_url).dump()
    assert "ann@example.com" in dump
    assert token not in dump


def test_inviting_a_user_again_is_the_way_to_a_new_password(database: Database, clock: Clock, account_id: int) -> None:
    """And every session that the old one began is over."""
    first = invited(database, clock, account_id)
    before = database.write(lambda tx: users.accept(tx, first, HASH, now_ms=clock()))
    again = invited(database, clock, account_id)
    after = database.write(lambda tx: users.accept(tx, again, OTHER_HASH, now_ms=clock()))
    assert (after.user_id, after.session_epoch) == (before.user_id, before.session_epoch + 1)


def test_a_user_has_one_account(database: Database, clock: Clock, account_id: int) -> None:
    token = invited(database, clock, account_id)
    database.write(lambda tx: users.accept(tx, token, HASH, now_ms=clock()))
    other = database.write(lambda tx: accounts.create(tx, "other", now_ms=1)).account_id
    with pytest.raises(Refused, match="another account"):
        invited(database, clock, other)


def test_an_operator_may_get_an_account_and_keeps_their_rights(
    database: Database, clock: Clock, account_id: int
) -> None:
    token = invited(database, clock, None)
    operator = database.write(lambda tx: users.accept(tx, token, HASH, now_ms=clock()))
    assert (operator.account, operator.is_operator) == (None, True)
    with pytest.raises(Refused):
        database.write(lambda tx: users.set_operator(tx, operator, False))
    token = invited(database, clock, account_id)
    both = database.write(lambda tx: users.accept(tx, token, HASH, now_ms=clock()))
    assert (both.user_id, both.account, both.is_operator) == (operator.user_id, "acme", True)
    assert not database.write(lambda tx: users.set_operator(tx, both, False)).is_operator


def test_signing_up_makes_an_account_of_ones_own(database: Database) -> None:
    user = database.write(lambda tx: users.sign_up(tx, "ann@example.com", HASH, now_ms=1))
    assert (user.account, user.is_operator) == ("ann@example.com", False)
    with pytest.raises(Refused):
        database.write(lambda tx: users.sign_up(tx, "ann@example.com", OTHER_HASH, now_ms=1))
    assert len(database.read(users.listed)) == 1


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("INSERT INTO users (email, is_operator, created_at) VALUES ('a@b.c', 0, 1)", "CHECK"),
        ("INSERT INTO users (account_id, email, created_at) VALUES (1, 'A@b.c', 1)", "CHECK"),
        ("INSERT INTO users (account_id, email, password_hash, created_at) VALUES (1, 'a@b.c', 'hunter2', 1)", "CHECK"),
        ("INSERT INTO users (account_id, email, created_at) VALUES (99, 'a@b.c', 1)", "FOREIGN KEY"),
        ("INSERT INTO invites (digest, email, created_at, expires_at) VALUES (zeroblob(32), 'a@b.c', 1, 1)", "CHECK"),
    ],
)
def test_the_database_itself_forbids(database: Database, account_id: int, statement: str, complaint: str) -> None:
    """failures.md rows 58 and 66: nobody without an owner, no password that is none of argon2's."""
    with closing(database.connect()) as connection:
        if database.engine == "postgresql":
            statement = statement.replace("zeroblob(32)", "decode(repeat('00', 32), 'hex')")
        with pytest.raises((sqlite3.IntegrityError, psycopg.IntegrityError), match=rf"(?i){complaint} constraint"):
            connection.execute(statement)


def test_passwords_are_salted_and_compared() -> None:
    """failures.md row 66."""
    made = passwords.Passwords()
    first, second = made.hashed("a good password"), made.hashed("a good password")
    assert first.startswith("$argon2id$")
    assert first != second
    assert made.matches(first, "a good password")
    assert not made.matches(first, "a good passwore")
    assert not made.matches(first, first)  # what is stored lets nobody in
    assert not made.matches(None, "nobody's password")
    assert not made.is_outdated(first)
    assert made.is_outdated("$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHQ$AAAAAAAAAAAAAAAAAAAAAA")


@pytest.mark.parametrize(
    ("password", "complaint"),
    [
        ("short", "at least 10"),
        ("x" * 201, "at most 200"),
        ("1212121212", "different characters"),
        ("ann.smith@example.com", "e-mail"),
        ("Ann.Smith@example.com", "e-mail"),
        ("ann.smith1", None),
        ("a sentence that nobody guesses", None),
        ("пароль пароль", None),
    ],
)
def test_passwords_that_everybody_guesses_are_refused(password: str, complaint: str | None) -> None:
    problem = passwords.problem(password, "ann.smith@example.com")
    assert (problem is None) if complaint is None else (problem is not None and complaint in problem)


def test_hashing_leaves_the_event_loop_to_the_others_and_takes_no_more_than_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passwords, "WAITING_MAX", 6)
    made, ticks = passwords.Passwords(), 0

    def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            gevent.sleep(0)

    beside = gevent.spawn(tick)
    waiting = [gevent.spawn(made.hashed, "a good password") for _ in range(passwords.WAITING_MAX + 3)]
    gevent.wait(waiting)
    beside.kill()
    refused = [one for one in waiting if isinstance(one.exception, RateLimited)]
    assert ticks > 100
    assert len(refused) == 3
    assert made.hashed("a good password")  # and then it goes on
