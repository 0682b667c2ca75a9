"""People at the dashboard as tests play them: each with a session and an address of their own, as a browser has."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from html import unescape
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import requests

from abhiapi import accounts, ids, keys, reports, runtime, users
from abhiapi.db import Tx
from abhiapi.settings import Settings
from abhiapi.users import User
from abhiapi.web import create_app
from abhiapi.web.pages import is_page
from abhiapi.web.pages.desk import Desk, Role
from tests import cheap_passwords
from tests.harness import OPERATOR_KEY, Server
from tests.plain_session import PlainSession

PASSWORD = "correct horse battery"
PROMPT = "a prompt that nobody may keep"
SIGN_IN = "/dashboard/sign-in"
_numbers = count(1)
_TOKEN = re.compile(r'name="csrf_token" value="([^"]+)"')


@cache
def password_hash() -> str:
    return cheap_passwords.HASHER.hash(PASSWORD)


def new_email() -> str:
    return f"person-{next(_numbers)}-{os.getpid()}@example.com"


def new_address() -> str:
    number = next(_numbers)
    return f"10.{number // 65536}.{number // 256 % 256}.{number % 256}"


class Rule(NamedTuple):
    """A page or an action."""

    method: str
    path: str
    role: Role


def all_rules(folder: Path) -> list[Rule]:
    """Every page and action of the dashboard, as the application has them."""
    url = f"sqlite:///{folder / 'abhiapi.db'}"
    rt = runtime.start(Settings.from_env({"FAL_KEY": OPERATOR_KEY, "ABHIAPI_DATABASE_URL": url}))
    app = create_app(rt)
    desk: Desk = app.extensions["abhiapi-desk"]
    found = [
        Rule(method, rule.rule, desk.roles[rule.endpoint])
        for rule in app.url_map.iter_rules()
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
        if is_page(rule.rule)
    ]
    rt.close()
    return found


class Person:
    """Somebody with a browser. The server must trust one proxy, since that is what tells their address."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.session = PlainSession()
        self.session.headers["X-Forwarded-For"] = new_address()

    def get(self, path: str, **more: Any) -> requests.Response:
        return self.session.get(self.server.url + path, timeout=30, allow_redirects=False, **more)

    def post(self, path: str, form: dict[str, str] | None = None, **more: Any) -> requests.Response:
        """Send a form as one that was just loaded."""
        return self.post_bare(path, {"csrf_token": self.csrf_token(), **(form or {})}, **more)

    def post_bare(self, path: str, form: dict[str, str], **more: Any) -> requests.Response:
        return self.session.post(self.server.url + path, data=form, timeout=30, allow_redirects=False, **more)

    def csrf_token(self) -> str:
        match = _TOKEN.search(self.get(SIGN_IN).text)
        assert match is not None
        return match[1]

    def sign_in(self, email: str, password: str = PASSWORD, *, after: str = "") -> requests.Response:
        return self.post(SIGN_IN + after, {"email": email, "password": password})

    @property
    def cookie(self) -> str:
        value = self.session.cookies.get("abhiapi_session", path="/dashboard")
        assert value is not None
        return value

    def is_in(self) -> bool:
        response = self.get("/dashboard/account")
        assert response.status_code in (200, 302)
        return response.status_code == 200


def new_user(server: Server, account: str | None, *, is_operator: bool = False, email: str | None = None) -> User:
    """A user whose password is PASSWORD."""
    hashed = password_hash()

    def make(tx: Tx) -> User:
        owner = accounts.find(tx, account) if account is not None else None
        return users.create(
            tx,
            email or new_email(),
            account_id=owner.account_id if owner else None,
            is_operator=is_operator,
            password_hash=hashed,
            now_ms=server.books.clock(),
        )

    return server.books.write(make)


def visiting(server: Server, user: User) -> Person:
    """This user, signed in; by the link that needs no password, which is quicker."""
    token, _ = server.books.write(
        lambda tx: users.invite(
            tx, user.email, account_id=user.account_id, is_operator=True, purpose="demo", now_ms=server.books.clock()
        )
    )
    person = Person(server)
    assert person.get(f"/dashboard/demo/{token}").status_code == 303
    return person


def invitation(server: Server, account: str, email: str) -> str:
    """The path of a link that lets somebody choose a password."""

    def op(tx: Tx) -> str:
        owner = accounts.find(tx, account)
        assert owner is not None
        return users.invite(tx, email, account_id=owner.account_id, now_ms=server.books.clock())[0]

    return f"/dashboard/invite/{server.books.write(op)}"


def key_id_of(server: Server, person: Person) -> str:
    """The id of the one key of a person's account."""
    (found,) = set(re.findall(r"/dashboard/keys/(key_\d+)/revoke", person.get("/dashboard/keys").text))
    return found


def status_of_key(server: Server, key_id: str) -> str:
    key = server.books.read(lambda tx: keys.find(tx, key_id))
    assert key is not None
    return key.status


@dataclass
class Customer:
    """An account, its key, and somebody who is signed in for it."""

    server: Server
    name: str
    key: str
    person: Person

    @classmethod
    def new(cls, server: Server, credits: int = 1000) -> Customer:
        name, key = server.books.account(credits)
        return cls(server, name, key, visiting(server, new_user(server, name)))

    @property
    def account_id(self) -> int:
        found = self.server.books.read(lambda tx: accounts.find(tx, self.name))
        assert found is not None
        return found.account_id

    def call(self, path: str = "/fal-ai/flux/dev", **more: Any) -> reports.CallRow:
        """A call of theirs as the books have it afterwards."""
        self.server.post(self.key, path, {"prompt": PROMPT, "image_size": "landscape_4_3"}, **more)
        return self.server.books.calls(self.name)[0]

    def page(self, path: str) -> str:
        response = self.person.get(path)
        assert response.status_code == 200, response.text
        return response.text


def text_of(page: str) -> str:
    """What a reader sees, in one line."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())


def address_of(row: reports.CallRow) -> str:
    return f"/dashboard/calls/{ids.call_text(row.call_id)}"
