"""The dashboard against people who mean ill: roles, CSRF, sessions, redirects, tries, markup, and keys kept apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from abhiapi import accounts, calls, ids, jobs, keys, prices, processes, users, webhooks
from abhiapi.db import Tx
from abhiapi.money import Micros
from abhiapi.web import create_app
from abhiapi.web.pages import PREFIX, safety
from abhiapi.web.pages.desk import Role
from tests.harness import OPERATOR_KEY, Fal, Server
from tests.people import PASSWORD, SIGN_IN, Person, Rule, all_rules, new_email, new_user, visiting
from tests.rows import DEAD_PID, flux
from tests.scripted import House

MARKUP = "<script>alert(1)</script>\"'{{7*7}}"


@pytest.fixture(scope="module")
def server(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that believes one proxy in front, so that each person can have an address."""
    with Server.started(tmp_path_factory.mktemp("pages"), fal.url, ABHIAPI_TRUSTED_PROXIES="1") as running:
        yield running


@pytest.fixture
def customer(server: Server) -> Person:
    name, _ = server.books.account(100)
    return visiting(server, new_user(server, name))


def key_id_of(server: Server, person: Person) -> str:
    """The id of the one key of a person's account."""
    (found,) = set(re.findall(r"/dashboard/keys/(key_\d+)/revoke", person.get("/dashboard/keys").text))
    return found


def status_of_key(server: Server, key_id: str) -> str:
    key = server.books.read(lambda tx: keys.find(tx, key_id))
    assert key is not None
    return key.status


# --- who may do what --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> list[Rule]:
    return all_rules(tmp_path_factory.mktemp("rules"))


def test_every_page_has_a_role(rules: list[Rule]) -> None:
    """A KeyError above were one without; and nothing but signing in is open to everybody."""
    assert len(rules) > 15
    assert {rule for _, rule, role in rules if role is Role.ANYBODY} == {
        f"{PREFIX}/sign-in",
        f"{PREFIX}/sign-up",
        f"{PREFIX}/invite/<token>",
        f"{PREFIX}/demo/<token>",
    }


def call_id_of(server: Server, person: Person) -> str:
    """The id of a call of a person's account, with a webhook on its way, written into the books."""
    found = server.books.read(lambda tx: keys.find(tx, key_id_of(server, person)))
    assert found is not None

    def make(tx: Tx) -> int:
        now = server.books.clock()
        call = calls.OpenCall(ids.CallIds().new(now), found.account_id, found.key_id, "fal-ai/flux/dev", Micros(0))
        price_id = prices.version_of(tx, flux(), now_ms=now)
        process_id = processes.start(tx, pid=DEAD_PID, now_ms=now)
        calls.admit(tx, calls.Admission(call, price_id, process_id, "queue", now + 3_600_000, now))
        jobs.remember(tx, call, f"job-of-{call.call_id}", http_status=200)
        webhooks.want(tx, call, "http://127.0.0.1:9/hook", now_ms=now)
        webhooks.store(tx, call.call_id, b"{}", now_ms=now + 3_600_000)
        return call.call_id

    return ids.call_text(server.books.write(make))


def _path(rule: str, server: Server, person: Person) -> str:
    """A path of a rule whose things are this person's."""
    path = re.sub(r"<any\((\w+),[^>]*>", r"\1", rule)
    if "<key_id>" in path:
        path = path.replace("<key_id>", key_id_of(server, person))
    if "<call_id>" in path:
        path = path.replace("<call_id>", call_id_of(server, person))
    if "<int:account_id>" in path:
        found = server.books.read(lambda tx: keys.find(tx, key_id_of(server, person)))
        assert found is not None
        path = path.replace("<int:account_id>", str(found.account_id))
    return re.sub(r"<\w+>", "x" * 43, path)


def _ask(person: Person, method: str, path: str) -> requests.Response:
    return person.get(path) if method == "GET" else person.post(path)


def test_the_role_matrix(server: Server, rules: list[Rule]) -> None:
    """Every page and action as nobody, customer, other customer and operator (failures.md rows 57, 58 and 66).

    Whoever may not is told that there is no such page, and nothing has changed; somebody without a session is sent to
    sign in.
    """
    for method, rule, role in rules:
        name, _ = server.books.account(100)
        owner = visiting(server, new_user(server, name))
        path = _path(rule, server, owner)
        is_theirs = "_id>" in rule
        other_name, _ = server.books.account(100)
        people = {
            "nobody": Person(server),
            "other": visiting(server, new_user(server, other_name)),
            "operator": visiting(server, new_user(server, None, is_operator=True)),
            "owner": owner,
        }
        told = {who: _ask(person, method, path) for who, person in people.items()}
        statuses = {who: response.status_code for who, response in told.items()}
        where = (method, rule, statuses)
        if role is Role.ANYBODY:
            assert set(statuses.values()) <= {200, 401, 404}, where  # 404: a token that is none; no sign-up here
            continue
        assert statuses["nobody"] == 302, where
        assert told["nobody"].headers["Location"].startswith(SIGN_IN), where
        assert (statuses["owner"] == 404) == (role is Role.OPERATOR), where
        assert (statuses["operator"] == 404) == (role is Role.CUSTOMER), where
        assert (statuses["other"] == 404) == (is_theirs or role is Role.OPERATOR), where
        assert set(statuses.values()) <= {200, 302, 303, 400, 404, 422}, where


def test_somebody_elses_key_is_an_unknown_key(server: Server, customer: Person) -> None:
    """failures.md row 57: the same bytes for both, and the key goes on."""
    name, _ = server.books.account(100)
    theirs = key_id_of(server, visiting(server, new_user(server, name)))
    for change in ("disable", "revoke", "rotate"):
        answers = {
            customer.get(f"/dashboard/keys/{key}/{change}").text.replace(key, "")
            for key in (theirs, "key_999999999", "key_0", "sk-fal-x", "nothing")
        }
        token = r'value="[^"]+"'
        assert len({re.sub(token, "", answer) for answer in answers}) == 1
        assert customer.post(f"/dashboard/keys/{theirs}/{change}", {"grace": "0"}).status_code == 404
    assert status_of_key(server, theirs) == "active"


def test_a_key_itself_is_no_name_for_it_here(server: Server, customer: Person) -> None:
    """Else it would stand in addresses, and in the logs of proxies."""
    name, key = server.books.account(100)
    person = visiting(server, new_user(server, name))
    assert person.get(f"/dashboard/keys/{key}/revoke").status_code == 404


def test_an_operator_who_is_none_any_more_is_none_at_once(server: Server) -> None:
    user = new_user(server, server.books.account(1)[0], is_operator=True)
    person = visiting(server, user)
    assert person.get("/dashboard/operator").status_code == 200
    server.books.write(lambda tx: users.set_operator(tx, user, False))
    assert person.get("/dashboard/operator").status_code == 404


def test_a_suspended_account_looks_and_stops_but_prepares_nothing(server: Server) -> None:
    name, _ = server.books.account(100)
    person = visiting(server, new_user(server, name))
    key_id = key_id_of(server, person)

    def suspend(tx: Tx) -> None:
        account = accounts.find(tx, name)
        assert account is not None
        accounts.set_status(tx, account.account_id, "suspended")

    server.books.write(suspend)
    for path in ("/dashboard/", "/dashboard/keys", "/dashboard/account"):
        page = person.get(path)
        assert page.status_code == 200
        assert "This account is suspended" in page.text
    assert person.post("/dashboard/keys/new").status_code == 403
    assert person.post(f"/dashboard/keys/{key_id}/rotate", {"grace": "0"}).status_code == 403
    assert person.post(f"/dashboard/keys/{key_id}/disable").status_code == 303
    assert person.post(f"/dashboard/keys/{key_id}/enable").status_code == 403
    assert person.post(f"/dashboard/keys/{key_id}/revoke").status_code == 303
    assert status_of_key(server, key_id) == "revoked"


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
    for forged in (customer.cookie[:-1] + ("A" if customer.cookie[-1] != "A" else "B"), "x", customer.cookie * 2):
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
        text = requests.get(f"{server.url}/metrics", timeout=30).text
        return {end: int(found) for end, found in re.findall(r'abhiapi_sign_ins_total\{end="(\w+)"\} (\d+)', text)}

    before = counted()
    user = new_user(server, server.books.account(1)[0])
    assert Person(server).sign_in(user.email).status_code == 303
    tried = [Person(server).sign_in(user.email, "wrong").status_code for _ in range(11)]
    assert tried == [401] * 9 + [429] * 2
    after = counted()
    assert {end: after[end] - before[end] for end in after} == {"done": 1, "failed": 9, "throttled": 2}


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


def invitation(server: Server, account: str, email: str) -> str:
    def op(tx: Tx) -> str:
        owner = accounts.find(tx, account)
        assert owner is not None
        return users.invite(tx, email, account_id=owner.account_id, now_ms=server.books.clock())[0]

    return f"/dashboard/invite/{server.books.write(op)}"


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
