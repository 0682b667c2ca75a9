"""The dashboard by who asks: every page and action as nobody, customer, other customer and operator."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import requests

from abhiapi import accounts, calls, ids, jobs, keys, prices, processes, users, webhooks
from abhiapi.db import Tx
from abhiapi.money import Micros
from abhiapi.web.pages import PREFIX
from abhiapi.web.pages.desk import Role
from tests.harness import Fal, Server
from tests.people import (
    SIGN_IN,
    Person,
    Rule,
    all_rules,
    key_id_of,
    new_user,
    status_of_key,
    visiting,
)
from tests.rows import DEAD_PID, flux


@pytest.fixture(scope="module")
def server(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that believes one proxy in front, so that each person can have an address."""
    with Server.started(tmp_path_factory.mktemp("pages"), fal.url, ABHIAPI_TRUSTED_PROXIES="1") as running:
        yield running


@pytest.fixture
def customer(server: Server) -> Person:
    name, _ = server.books.account(100)
    return visiting(server, new_user(server, name))


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
