"""`accounts invite`, `operator` and `users`: what they print and refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from abhiapi import users
from tests.command_line import CommandLine

pytestmark = pytest.mark.engines


@pytest.fixture
def abhiapi(tmp_path: Path, database_url: str) -> CommandLine:
    made = CommandLine(tmp_path, database_url)
    made("accounts", "create", "acme")
    return made


def test_an_invitation_is_a_link_alone_on_stdout(abhiapi: CommandLine) -> None:
    done = abhiapi("accounts", "invite", "acme", "Ann@Example.com", ABHIAPI_PUBLIC_URL="https://fal.example.com")
    (link,) = done.lines
    token = link.removeprefix("https://fal.example.com/dashboard/invite/")
    found = abhiapi.database.read(lambda tx: users.find_invite(tx, token, now_ms=0))
    assert found is not None
    assert (found.email, found.account) == ("ann@example.com", "acme")
    assert "ann@example.com" in done.stderr
    assert token not in abhiapi.dump()


def test_without_a_public_url_it_is_said_what_to_replace(abhiapi: CommandLine) -> None:
    done = abhiapi("accounts", "invite", "acme", "ann@example.com")
    assert done.stdout.startswith("http://127.0.0.1:8000/dashboard/invite/")
    assert "ABHIAPI_PUBLIC_URL is not set" in done.stderr


def test_an_invitation_names_a_known_account_and_an_address(abhiapi: CommandLine) -> None:
    assert "there is no account 'nobody'" in abhiapi("accounts", "invite", "nobody", "ann@example.com").refused()
    assert "no e-mail address" in abhiapi("accounts", "invite", "acme", "ann").refused()


def test_operators_are_made_and_unmade(abhiapi: CommandLine) -> None:
    made = abhiapi.json("accounts", "operator", "me@example.com")
    assert (made["email"], made["account"], made["operator"]) == ("me@example.com", None, True)
    assert set(made) == {"email", "account", "operator", "link", "expires_at"}
    token = made["link"].rpartition("/")[2]
    abhiapi.database.write(lambda tx: users.accept(tx, token, "$argon2id$x", now_ms=0))
    assert "is nothing but an operator" in abhiapi("accounts", "operator", "me@example.com", "--remove").refused()
    again = abhiapi.json("accounts", "invite", "acme", "me@example.com")["link"].rpartition("/")[2]
    abhiapi.database.write(lambda tx: users.accept(tx, again, "$argon2id$x", now_ms=0))
    assert abhiapi.json("accounts", "users", "acme")[0]["operator"] is True
    assert abhiapi.json("accounts", "operator", "me@example.com", "--remove")["operator"] is False
    assert abhiapi.json("accounts", "operator", "me@example.com")["operator"] is True
    assert "there is no user" in abhiapi("accounts", "operator", "you@example.com", "--remove").refused()


def test_users_are_listed_without_secrets(abhiapi: CommandLine) -> None:
    assert "no users yet" in abhiapi("accounts", "users").stderr
    token = abhiapi.json("accounts", "invite", "acme", "ann@example.com")["link"].rpartition("/")[2]
    abhiapi.database.write(lambda tx: users.accept(tx, token, "$argon2id$secret", now_ms=0))
    (listed,) = abhiapi.json("accounts", "users")
    assert set(listed) == {"email", "account", "operator", "created_at", "last_login_at"}
    assert "argon2" not in abhiapi("accounts", "users", "acme").stdout
