"""Sessions of the dashboard, signing in, invitations: what begins one, what ends it, and how often one may try."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from abhiapi import accounts, users
from abhiapi.db import Tx
from abhiapi.web.pages import safety
from tests.conftest import METRICS_TOKEN
from tests.harness import Fal, Server
from tests.people import (
    PASSWORD,
    SIGN_IN,
    Person,
    invitation,
    new_email,
    new_user,
    visiting,
)


@pytest.fixture
def server(dashboard: Server) -> Server:
    return dashboard


@pytest.fixture
def customer(server: Server) -> Person:
    name, _ = server.books.account(100)
    return visiting(server, new_user(server, name))


# --- sessions ---------------------------------------------------------------------------------------------------


def test_a_session_given_before_signing_in_is_not_the_one_after(server: Server) -> None:
    """Session fixation: who knows the old cookie is not in, and nothing of it lives on."""
    user = new_user(server, server.books.account(1)[0])
    person = Person(server)
    person.csrf_token()
    planted, token = person.cookie, person.csrf_token()
    assert person.sign_in(user.email).status_code == 303
    assert person.cookie != planted
    attacker = Person(server)
    attacker.session.cookies.set("abhiapi_session", planted, path="/dashboard")
    assert not attacker.is_in()
    assert person.post_bare("/dashboard/keys/new", {"csrf_token": token}).status_code == 400
    assert person.is_in()


def test_a_cookie_that_we_did_not_sign_is_none(server: Server, customer: Person) -> None:
    at = len(customer.cookie) - 10  # within the signature, whose last character has bits that do not count
    other = "A" if customer.cookie[at] != "A" else "B"
    for forged in (customer.cookie[:at] + other + customer.cookie[at + 1 :], "x", customer.cookie * 2):
        person = Person(server)
        person.session.cookies.set("abhiapi_session", forged, path="/dashboard")
        assert not person.is_in()


def test_signing_out_everywhere_ends_every_session(server: Server) -> None:
    user = new_user(server, server.books.account(1)[0])
    first, second = visiting(server, user), visiting(server, user)
    kept = first.cookie
    assert first.post("/dashboard/account/sign-out-everywhere").status_code == 303
    assert not first.is_in()
    assert not second.is_in()
    thief = Person(server)
    thief.session.cookies.set("abhiapi_session", kept, path="/dashboard")
    assert not thief.is_in()
    assert visiting(server, user).is_in()


def test_a_new_password_ends_all_sessions_but_this_one(server: Server) -> None:
    user = new_user(server, server.books.account(1)[0])
    here, elsewhere = visiting(server, user), visiting(server, user)
    new = {"password": "another good one", "again": "another good one"}
    assert here.post("/dashboard/account/password", {"current": "wrong", **new}).status_code == 422
    assert elsewhere.is_in()
    assert here.post("/dashboard/account/password", {"current": PASSWORD, **new}).status_code == 303
    assert here.is_in()
    assert not elsewhere.is_in()
    assert Person(server).sign_in(user.email).status_code == 401
    assert Person(server).sign_in(user.email.upper(), "another good one").status_code == 303


def test_signing_out_ends_this_session_only(server: Server) -> None:
    user = new_user(server, server.books.account(1)[0])
    here, elsewhere = visiting(server, user), visiting(server, user)
    assert here.post("/dashboard/sign-out").status_code == 303
    assert not here.is_in()
    assert elsewhere.is_in()


def test_the_cookie_is_for_pages_only_and_not_for_scripts(server: Server) -> None:
    user = new_user(server, server.books.account(1)[0])
    person = Person(server)
    plain = person.sign_in(user.email).headers["Set-Cookie"]
    assert {"HttpOnly", "Path=/dashboard", "SameSite=Lax"} <= set(plain.split("; "))
    assert "Secure" not in plain
    behind_tls = requests.get(
        server.url + SIGN_IN, headers={"X-Forwarded-For": "10.9.9.9", "X-Forwarded-Proto": "https"}, timeout=30
    )
    assert "; Secure;" in behind_tls.headers["Set-Cookie"]
    assert "max-age" in behind_tls.headers["Strict-Transport-Security"]


def test_keys_open_no_page_and_cookies_make_no_call(server: Server, customer: Person) -> None:
    name, key = server.books.account(100)
    for headers in ({"x-api-key": key}, {"Authorization": f"Key {key}"}, {"Authorization": f"Bearer {key}"}):
        asked = requests.get(f"{server.url}/dashboard/", headers=headers, timeout=30, allow_redirects=False)
        assert asked.status_code == 302
    cookie = {"Cookie": f"abhiapi_session={customer.cookie}"}
    for method, path in (("GET", "/v1/account"), ("GET", "/v1/calls"), ("POST", "/fal-ai/flux/dev")):
        refused = requests.request(method, server.url + path, headers=cookie, json={"prompt": "x"}, timeout=30)
        assert refused.status_code == 401
    assert server.books.calls(name) == []


def test_where_nobody_gets_in_without_a_password(server: Server) -> None:
    """failures.md row 69: no account comes with a password, and a user without one cannot sign in by one."""
    email = new_email()
    owner = server.books.account(1)[0]

    def make(tx: Tx) -> None:
        account = accounts.find(tx, owner)
        assert account is not None
        users.create(tx, email, account_id=account.account_id, is_operator=True, password_hash=None, now_ms=1)

    server.books.write(make)
    for password in ("", "nobody's password", "None", "demo", "admin"):
        assert Person(server).sign_in(email, password).status_code == 401


# --- signing in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "after",
    [
        "https://evil.example", "//evil.example", "/\\evil.example", "\\\\evil.example", "/dashboard//evil.example",
        "javascript:alert(1)", "/dashboard@evil.example", "/dashboard/..//evil.example",
        "/dashboard/%0d%0ax:x", "/dashboard/\r\nx: y", "http:evil", "/v1/account", "/dashboard/" + "x" * 600,
        "/dashboardevil", " /dashboard/keys",
    ],
)  # fmt: skip
def test_nobody_is_sent_elsewhere_after_signing_in(after: str) -> None:
    assert safety.page_or(after, "/dashboard/") == "/dashboard/"


@pytest.mark.parametrize("after", ["/dashboard/keys", "/dashboard/usage?by=model&since=2026-11-01", "/dashboard/"])
def test_one_comes_back_to_the_page_that_was_asked_for(after: str) -> None:
    assert safety.page_or(after, "/") == after


def test_next_is_followed_to_our_own_pages_only(server: Server) -> None:
    user = new_user(server, server.books.account(1)[0])
    asked = Person(server).get("/dashboard/keys?x=1").headers["Location"]
    assert Person(server).sign_in(user.email, after=asked.removeprefix(SIGN_IN)).headers["Location"] == (
        "/dashboard/keys?x=1"
    )
    evil = Person(server).sign_in(user.email, after="?next=//evil.example")
    assert evil.headers["Location"] == "/dashboard/"


def test_an_unknown_person_is_told_what_a_wrong_password_is_told(server: Server) -> None:
    user = new_user(server, server.books.account(1)[0])
    person = Person(server)
    wrong = person.sign_in(user.email, "not the password")
    unknown = person.sign_in("nobody-here@example.com", "not the password")
    assert (wrong.status_code, unknown.status_code) == (401, 401)
    plain = [re.sub(r'value="[^"]*"', "", page.text) for page in (wrong, unknown)]
    assert plain[0] == plain[1]


def test_an_unknown_person_costs_as_much_work(server: Server) -> None:
    """Time tells nothing: whoever it is, a hash is computed."""
    user = new_user(server, server.books.account(1)[0])

    def best_s(email: str) -> float:
        person = Person(server)
        return min(person.sign_in(email, "not the password").elapsed.total_seconds() for _ in range(4))

    best_s(new_email())  # the first one makes the hash that nobody has
    known, unknown = best_s(user.email), best_s(new_email())
    assert unknown > known / 3
    assert known > unknown / 3


def test_tries_are_counted_for_each_address_of_mail(server: Server) -> None:
    """From wherever they come; and one person's tries do not keep another out."""
    user, other = (new_user(server, server.books.account(1)[0]) for _ in range(2))
    spellings = [user.email, user.email.upper(), f" {user.email} "]
    statuses = [Person(server).sign_in(spellings[try_ % 3], "wrong").status_code for try_ in range(10)]
    assert statuses == [401] * 10
    refused = Person(server).sign_in(user.email)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) > 0
    assert "Too many tries" in refused.text
    assert Person(server).sign_in(other.email).status_code == 303


def test_the_operator_sees_how_often_people_get_in_and_do_not(server: Server) -> None:
    """`abhiapi_sign_ins_total`: done, failed and throttled, and nothing of whom."""

    def counted() -> dict[str, int]:
        text = requests.get(
            f"{server.url}/metrics", headers={"Authorization": f"Bearer {METRICS_TOKEN}"}, timeout=30
        ).text
        return {end: int(found) for end, found in re.findall(r'abhiapi_sign_ins_total\{end="(\w+)"\} (\d+)', text)}

    before = counted()
    user = new_user(server, server.books.account(1)[0])
    assert Person(server).sign_in(user.email).status_code == 303
    tried = [Person(server).sign_in(user.email, "wrong").status_code for _ in range(11)]
    assert tried == [401] * 9 + [429] * 2
    after = counted()
    assert {end: after[end] - before[end] for end in after} == {"done": 1, "failed": 9, "throttled": 2}


def test_tries_are_counted_for_each_address_of_the_network(server: Server) -> None:
    person = Person(server)
    token = person.csrf_token()
    form = {"csrf_token": token, "password": "wrong"}
    with ThreadPoolExecutor(4) as pool:
        statuses = list(
            pool.map(lambda _: person.post_bare(SIGN_IN, form | {"email": new_email()}).status_code, range(24))
        )
    assert sorted(statuses) == [401] * 20 + [429] * 4
    assert person.get(SIGN_IN).status_code == 200  # looking is free


# --- invitations and signing up ---------------------------------------------------------------------------------


def test_an_invitation_works_once_whoever_races(server: Server) -> None:
    link = invitation(server, server.books.account(1)[0], new_email())
    people = [Person(server) for _ in range(4)]
    form = {"password": PASSWORD, "again": PASSWORD}
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda person: person.post(link, form).status_code, people))
    assert sorted(statuses) == [303, 404, 404, 404]
    assert sum(person.is_in() for person in people) == 1
    assert "not valid any more" in Person(server).get(link).text


def test_an_invitation_says_what_is_wrong_with_a_password(server: Server) -> None:
    link = invitation(server, server.books.account(1)[0], new_email())
    person = Person(server)
    for password, again, said in (
        ("short", "short", "at least 10"),
        (PASSWORD, "something else", "differ"),
        ("aaaaaaaaaaaa", "aaaaaaaaaaaa", "different characters"),
    ):
        refused = person.post(link, {"password": password, "again": again})
        assert refused.status_code == 422
        assert said in refused.text
        assert password not in refused.text
    assert person.post(link, {"password": PASSWORD, "again": PASSWORD}).status_code == 303


def test_a_link_to_a_demo_sets_no_password_and_one_to_a_password_signs_nobody_in(server: Server) -> None:
    user = new_user(server, server.books.account(1)[0])
    token, _ = server.books.write(
        lambda tx: users.invite(tx, user.email, account_id=user.account_id, purpose="demo", now_ms=server.books.clock())
    )
    form = {"password": "taken over now", "again": "taken over now"}
    assert Person(server).post(f"/dashboard/invite/{token}", form).status_code == 404
    link = invitation(server, server.books.account(1)[0], new_email())
    assert Person(server).get(link.replace("/invite/", "/demo/")).status_code == 404


def test_nobody_signs_up_where_the_operator_has_not_said_so(server: Server) -> None:
    assert Person(server).get("/dashboard/sign-up").status_code == 404
    form = {"email": new_email(), "password": PASSWORD, "again": PASSWORD}
    assert Person(server).post("/dashboard/sign-up", form).status_code == 404


def test_where_it_is_open_whoever_signs_up_has_an_account_without_credit(
    fal: Fal, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = {"ABHIAPI_TRUSTED_PROXIES": "1", "ABHIAPI_OPEN_SIGNUP": "1"}
    with Server.started(tmp_path_factory.mktemp("open"), fal.url, **settings) as server:
        email = new_email()
        form = {"email": email.title(), "password": PASSWORD, "again": PASSWORD}
        person = Person(server)
        assert "Sign up" in person.get(SIGN_IN).text
        assert person.post("/dashboard/sign-up", form).status_code == 303
        assert person.is_in()
        assert server.books.standing(email) == (0, 0)
        again = Person(server).post("/dashboard/sign-up", form)
        assert again.status_code == 422
        assert "cannot be used" in again.text
        assert Person(server).post("/dashboard/sign-up", form | {"email": "nobody"}).status_code == 422
        made = person.post("/dashboard/keys/new")
        (key,) = set(re.findall(r"sk-fal-[0-9A-Za-z]{32}", made.text))
        assert server.post(key).status_code == 402
