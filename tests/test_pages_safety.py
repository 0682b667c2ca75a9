"""The dashboard against people who mean ill: forged forms, markup in names, and what leaves with a page."""

from __future__ import annotations

import re

import pytest
import requests

from abhiapi import accounts
from abhiapi.web import create_app
from tests.harness import OPERATOR_KEY, Server
from tests.people import (
    PASSWORD,
    SIGN_IN,
    Person,
    invitation,
    key_id_of,
    new_email,
    new_user,
    status_of_key,
    visiting,
)
from tests.scripted import House

MARKUP = "<script>alert(1)</script>\"'{{7*7}}"


@pytest.fixture
def server(dashboard: Server) -> Server:
    return dashboard


@pytest.fixture
def customer(server: Server) -> Person:
    name, _ = server.books.account(100)
    return visiting(server, new_user(server, name))


# --- forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "", "x", "another's"])
def test_a_form_without_its_token_changes_nothing(server: Server, customer: Person, token: str | None) -> None:
    name, _ = server.books.account(100)
    if token == "another's":
        token = visiting(server, new_user(server, name)).csrf_token()
    key_id = key_id_of(server, customer)
    form = {} if token is None else {"csrf_token": token}
    for path in (f"/dashboard/keys/{key_id}/revoke", "/dashboard/keys/new", "/dashboard/account/sign-out-everywhere"):
        refused = customer.post_bare(path, form)
        assert refused.status_code == 400
        assert "did not come from this page" in refused.text
    assert status_of_key(server, key_id) == "active"
    assert customer.is_in()


def test_signing_in_needs_its_token_too(server: Server) -> None:
    """Else somebody could be signed in as another, without knowing."""
    user = new_user(server, server.books.account(1)[0])
    person = Person(server)
    assert person.post_bare(SIGN_IN, {"email": user.email, "password": PASSWORD}).status_code == 400
    assert not person.is_in()


def test_behind_tls_a_form_must_come_from_a_page_of_ours(server: Server) -> None:
    """The referrer is looked at, too, where nobody on the way can have taken it out."""
    user = new_user(server, server.books.account(1)[0])
    host = server.url.removeprefix("http://")
    for referrer, status in ((f"https://{host}{SIGN_IN}", 303), ("https://evil.example/", 400), (None, 400)):
        person = Person(server)
        token = person.csrf_token()
        headers = {"X-Forwarded-Proto": "https", **({"Referer": referrer} if referrer else {})}
        form = {"csrf_token": token, "email": user.email, "password": PASSWORD}
        assert person.post_bare(SIGN_IN, form, headers=headers).status_code == status


def test_nothing_is_changed_by_a_get(server: Server, customer: Person) -> None:
    key_id = key_id_of(server, customer)
    for change in ("disable", "revoke", "rotate"):
        assert customer.get(f"/dashboard/keys/{key_id}/{change}").status_code == 200
    assert status_of_key(server, key_id) == "active"
    for path in ("/dashboard/keys/new", "/dashboard/sign-out", "/dashboard/account/password"):
        assert customer.get(path).status_code == 405
    assert customer.is_in()


def test_whoever_takes_a_wrong_turn_finds_back(server: Server, customer: Person) -> None:
    lost = customer.get("/dashboard/nothing-here")
    assert lost.status_code == 404
    assert '<a href="/dashboard/keys"' in lost.text
    assert '<a href="/dashboard/keys"' not in Person(server).get("/dashboard/nothing-here").text


def test_a_form_has_a_bounded_size(customer: Person) -> None:
    assert customer.post("/dashboard/keys/new", {"name": "x" * 100_000}).status_code == 413


def test_names_come_back_as_text(server: Server, customer: Person) -> None:
    """Stored markup, in keys and in accounts, is shown and never run; templates in names are not filled in."""
    made = customer.post("/dashboard/keys/new", {"name": MARKUP})
    assert made.status_code == 200
    other = server.books.write(lambda tx: accounts.create(tx, "<img src=x onerror=alert(1)>{{7*7}}", now_ms=1))
    operator = visiting(server, new_user(server, other.name, is_operator=True))
    pages = [customer.get("/dashboard/keys"), operator.get("/dashboard/operator"), operator.get("/dashboard/account")]
    for page in (made, *pages):
        assert "<script>alert" not in page.text
        assert "<img src=x" not in page.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;{{7*7}}" in pages[0].text
    assert "&lt;img src=x onerror=alert(1)&gt;{{7*7}}" in pages[1].text
    (key_id,) = re.findall(r"/dashboard/keys/(key_\d+)/revoke\">Revoke<span[^>]*> &lt;script", pages[0].text)
    assert "<script>alert" not in customer.post(f"/dashboard/keys/{key_id}/disable").text
    shown = customer.get("/dashboard/keys").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "<script>alert" not in shown


@pytest.mark.parametrize("name", ["x" * 65, "two\nlines", "\x1b[2J"])
def test_a_keys_name_is_a_short_line(customer: Person, name: str) -> None:
    refused = customer.post("/dashboard/keys/new", {"name": name})
    assert refused.status_code == 422
    assert "at most 64 printable characters" in refused.text


def test_nobody_gets_round_the_limits_by_making_keys(customer: Person) -> None:
    statuses = [customer.post("/dashboard/keys/new").status_code for _ in range(20)]
    assert statuses == [200] * 19 + [422]  # with the first key: twenty


def test_the_navigation_shows_where_one_is(server: Server) -> None:
    """One entry, and on pages without one of their own the one that they stand under."""
    name, _ = server.books.account(1)
    person = visiting(server, new_user(server, name, is_operator=True))
    for path, label, how in (
        ("keys", "Keys", "page"), (f"keys/{key_id_of(server, person)}/revoke", "Keys", "true"),
        ("calls", "Usage", "true"), ("operator/holds", "Open holds", "page"), ("operator/revenue", "Revenue", "page"),
    ):  # fmt: skip
        shown = person.get(f"/dashboard/{path}").text
        assert re.findall(r'aria-current="(\w+)">([\w ]+)</a></li>', shown) == [(how, label)], path


# --- what leaves ------------------------------------------------------------------------------------------------


def test_every_page_is_strict_about_what_it_loads_and_is_kept_nowhere(server: Server, customer: Person) -> None:
    asked = [
        Person(server).get(SIGN_IN),
        Person(server).get("/dashboard/nothing-here"),
        Person(server).get("/dashboard/keys"),
        Person(server).get(f"/dashboard/invite/{'x' * 43}"),
        *(customer.get(path) for path in ("/dashboard/", "/dashboard/keys", "/dashboard/account", "/dashboard/none")),
        customer.post("/dashboard/keys/new"),
        customer.post_bare("/dashboard/keys/new", {}),
    ]
    for response in asked:
        policy = response.headers["Content-Security-Policy"]
        assert "unsafe" not in policy
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Content-Type"].startswith("text/html")
        assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?! src=\"/static/)", response.text)
        hosts = set(re.findall(r"(?:src|href|action)=\"(?:https?:)?//([^/\"]+)", response.text))
        assert hosts == set()


def test_files_are_kept_for_ever_under_an_address_that_changes_with_them(server: Server) -> None:
    page = Person(server).get(SIGN_IN).text
    found = re.findall(r"\"(/static/([\w.]+)\?v=\w+)\"", page)
    assert {name for _, name in found} == {"base.css", "app.css", "app.js", "copy.js", "icon.svg"}
    for address, name in found:
        file = requests.get(server.url + address, timeout=30)
        assert file.status_code == 200
        assert "immutable" in file.headers["Cache-Control"]
        bare = requests.get(f"{server.url}/static/{name}", timeout=30)
        assert bare.headers["Cache-Control"] == "no-cache"
        again = requests.get(f"{server.url}/static/{name}", headers={"If-None-Match": bare.headers["ETag"]}, timeout=30)
        assert again.status_code == 304
    for path in ("/static/nothing.css", "/static/..%2ftemplates%2fbase.html", "/static/..%2f__init__.py"):
        assert requests.get(server.url + path, timeout=30).status_code in (400, 404)


def test_no_page_and_no_log_shows_a_secret(server: Server, customer: Person) -> None:
    """failures.md row 65: keys, passwords and tokens, in pages, logs and the database."""
    user = new_user(server, server.books.account(1)[0])
    Person(server).sign_in(user.email, "canary-password-1")
    made = customer.post("/dashboard/keys/new", {"name": "canary"}).text
    (key,) = set(re.findall(r"sk-fal-[0-9A-Za-z]{32}", made))
    link = invitation(server, server.books.account(1)[0], new_email())
    Person(server).post(link, {"password": "canary-password-2", "again": "canary-password-2"})
    pages = "".join(customer.get(path).text for path in ("/dashboard/", "/dashboard/keys", "/dashboard/account"))
    connection = server.books.database.connect()
    dump = "\n".join(connection.iterdump())
    connection.close()
    for secret in (key, "canary-password-1", "canary-password-2", link.rpartition("/")[2], OPERATOR_KEY):
        assert secret not in pages
        assert secret not in dump
        assert secret not in server.process.output()


def test_a_database_in_trouble_is_a_page_that_says_so(house: House) -> None:
    """And no traceback, although who asks cannot be looked up either."""
    app = create_app(house.rt)
    client = app.test_client()
    assert client.get("/dashboard/keys").status_code == 302
    with client.session_transaction(base_url="http://localhost/dashboard/") as session:
        session["_user_id"] = "1:1"
    path = house.rt.database.path
    aside = path.with_name("aside.db")
    path.rename(aside)
    told = client.get("/dashboard/keys")
    aside.rename(path)
    assert told.status_code == 503
    assert "the database file is gone" in told.text
    assert told.content_type.startswith("text/html")
