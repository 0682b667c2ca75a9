"""The operator's pages: everybody's figures, credit in, holds ended, accounts stopped; and nobody else is let in."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from decimal import Decimal

import pytest

from abhiapi import accounts, keys, ledger
from abhiapi.accounts import Account
from abhiapi.db import Tx
from abhiapi.money import Micros
from tests.harness import Fal, Server
from tests.people import Person, new_user, visiting

MARKUP = "<img src=x onerror=alert(1)>\"'{{7*7}}"
PAGES = [
    "/dashboard/operator",
    "/dashboard/operator/revenue",
    "/dashboard/operator/holds",
    "/dashboard/operator/attention",
]


@pytest.fixture(scope="module")
def server(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.started(tmp_path_factory.mktemp("operator"), fal.url, ABHIAPI_TRUSTED_PROXIES="1") as running:
        yield running


@pytest.fixture(scope="module")
def operator(server: Server) -> Person:
    return visiting(server, new_user(server, None, is_operator=True))


def account_of(server: Server, name: str) -> Account:
    found = server.books.read(lambda tx: accounts.find(tx, name))
    assert found is not None
    return found


def page_of(server: Server, name: str) -> str:
    return f"/dashboard/operator/accounts/{account_of(server, name).account_id}"


def hidden(text: str) -> dict[str, str]:
    """What a page that asks whether it is meant would send."""
    found = re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', text)
    return {name: html.unescape(value) for name, value in found if name != "csrf_token"}


def ask(operator: Person, path: str, **form: str) -> dict[str, str]:
    response = operator.post(path, form)
    assert response.status_code == 200, response.text
    return hidden(response.text)


# --- who is let in --------------------------------------------------------------------------------------------------


def test_only_operators_are_let_in(server: Server, operator: Person) -> None:
    """Nobody is sent to sign in; a customer is told that there is no such page, and nothing is done."""
    name, _ = server.books.account(100)
    other, _ = server.books.account(100)
    customer, nobody = visiting(server, new_user(server, name)), Person(server)
    one = page_of(server, other)
    for path in [*PAGES, one, f"{one}/suspend"]:
        assert operator.get(path).status_code == 200, path
        assert customer.get(path).status_code == 404, path
        assert nobody.get(path).status_code == 302, path
    for path in (f"{one}/topup", f"{one}/adjust", f"{one}/suspend", "/dashboard/operator/holds/call_1/release"):
        form = {"amount": "5", "note": "x", "confirmed": "yes", "after": "0"}
        assert customer.post(path, form).status_code == 404, path
        assert nobody.post(path, form).status_code == 302, path
        assert operator.post_bare(path, form).status_code == 400, path
    assert server.books.standing(other) == (100_000, 0)
    assert account_of(server, other).status == "active"
    assert "All accounts" not in customer.get("/dashboard/keys").text


@pytest.mark.parametrize("number", ["0", "99999", "9" * 30, "-1", "x"])
def test_an_account_that_is_not_there_is_not_found(operator: Person, number: str) -> None:
    assert operator.get(f"/dashboard/operator/accounts/{number}").status_code == 404
    assert operator.post(f"/dashboard/operator/accounts/{number}/topup", {"amount": "5"}).status_code == 404


# --- credit ---------------------------------------------------------------------------------------------------------


def test_a_topup_is_asked_about_and_added_once(server: Server, operator: Person) -> None:
    name, _ = server.books.account(0)
    path = page_of(server, name) + "/topup"
    asked = ask(operator, path, amount="49.90", unit="usd", note="bank transfer")
    assert server.books.standing(name) == (0, 0)
    assert asked["amount"] == "49900"
    for _ in range(2):  # a second click sends the same reference
        assert operator.post(path, asked).status_code == 303
    assert server.books.standing(name) == (49_900_000, 0)
    (entry,) = server.books.entries(name)
    assert (entry.kind, entry.ref, entry.note) == ("topup", asked["ref"], "bank transfer")


def test_a_reference_is_added_once_and_another_amount_under_it_is_refused(server: Server, operator: Person) -> None:
    name, _ = server.books.account(0)
    path = page_of(server, name) + "/topup"
    operator.post(path, ask(operator, path, amount="10", ref="invoice-1"))
    refused = operator.post(path, ask(operator, path, amount="11", ref="invoice-1"))
    assert refused.status_code == 422
    assert "already used" in refused.text
    assert server.books.standing(name) == (10_000, 0)


def test_a_correction_needs_a_reason_and_is_done_once(server: Server, operator: Person) -> None:
    name, _ = server.books.account(10)
    path = page_of(server, name) + "/adjust"
    assert operator.post(path, {"amount": "-5", "note": " "}).status_code == 422
    asked = ask(operator, path, amount="-12.5", note="entered twice")
    for _ in range(2):
        assert operator.post(path, asked).status_code == 303
    assert server.books.standing(name) == (-2_500, 0)
    operator.post(path, ask(operator, path, amount="-12.5", note="entered twice"))  # meant anew: done anew
    assert server.books.standing(name) == (-15_000, 0)
    assert name in operator.get("/dashboard/operator/attention").text  # below zero
    assert operator.post(path, asked | {"after": "x"}).status_code == 422
    assert server.books.verify().problems == []


@pytest.mark.parametrize("amount", ["", "0", "-1", "1e3", "0.0001", "NaN", "9" * 40, "<b>"])
def test_what_is_no_amount_is_refused_and_nothing_is_added(server: Server, operator: Person, amount: str) -> None:
    name, _ = server.books.account(0)
    response = operator.post(page_of(server, name) + "/topup", {"amount": amount, "confirmed": "yes", "ref": "r"})
    assert response.status_code == 422
    assert server.books.standing(name) == (0, 0)


def test_suspending_stops_calls_and_resuming_lets_them(server: Server, operator: Person) -> None:
    name, key = server.books.account(100)
    path = page_of(server, name)
    assert "Suspend" in operator.get(f"{path}/suspend").text
    assert operator.post(f"{path}/suspend").status_code == 303
    assert server.post(key).json()["error"]["type"] == "account_suspended"
    assert operator.post(f"{path}/resume").status_code == 303
    assert server.post(key).status_code == 200


# --- holds ----------------------------------------------------------------------------------------------------------


def unknown_call(server: Server, key: str) -> str:
    """A call whose cost fal does not tell."""
    response = server.post(key, "/fal-ai/fast-sdxl", {"prompt": "x"}, weather="units=none")
    return str(response.headers["x-abhiapi-call-id"])


def test_a_hold_is_settled_or_released_by_the_operators_word_once(server: Server, operator: Person) -> None:
    name, key = server.books.account(1000)
    settled, released = unknown_call(server, key), unknown_call(server, key)
    assert [call.state for call in server.books.calls(name)] == ["unknown", "unknown"]
    page = operator.get("/dashboard/operator/holds").text
    assert settled in page
    assert released in page
    path = "/dashboard/operator/holds"
    assert operator.get(f"{path}/{settled}/settle").status_code == 200
    assert operator.post(f"{path}/{settled}/settle", {"credits": "x"}).status_code == 422
    assert operator.post(f"{path}/{settled}/settle", {"credits": "12.5"}).status_code == 303
    assert operator.post(f"{path}/{released}/release").status_code == 303
    assert operator.post(f"{path}/{released}/settle", {"credits": "5"}).status_code == 422
    assert server.books.standing(name) == (987_500, 0)
    assert operator.get(f"{path}/call_0000000000000/settle").status_code == 404
    assert server.books.verify().problems == []


def test_a_call_that_is_still_served_is_left_alone(server: Server, operator: Person, fal: Fal) -> None:
    """This very process serves it: its own end of it would be lost."""
    name, key = server.books.account(1000)
    submitted = server.post(key, "/queue/fal-ai/flux/dev", {"prompt": "x"}, weather="run_s=600")
    call_id = submitted.headers["x-abhiapi-call-id"]
    refused = operator.post(f"/dashboard/operator/holds/{call_id}/release")
    assert refused.status_code == 422
    assert "still being served" in refused.text
    assert server.books.standing(name)[1] > 0


# --- figures --------------------------------------------------------------------------------------------------------


def test_revenue_is_what_usage_says(server: Server, operator: Person) -> None:
    _, key = server.books.account(1000)
    assert server.post(key).status_code == 200
    text = html.unescape(operator.get("/dashboard/operator/revenue").text)
    (row,) = re.findall(r'<th scope="row" class="model">fal-ai/flux/dev</th>(.*?)</tr>', text)
    charged, cost, margin = (Decimal(found) for found in re.findall(r"\$([\d.]+)", row))
    assert charged - cost == margin
    assert cost / charged == 1 / Decimal("1.05")
    assert "No call ended" in operator.get("/dashboard/operator/revenue?since=2020-01-01&until=2020-01-31").text
    for wrong in (
        "?since=x",
        "?since=2026-02-30",
        "?since=2026-03-02&until=2026-03-01",
        "?since=0001-01-01",
        "?until=0001-01-01",
    ):
        assert operator.get("/dashboard/operator/revenue" + wrong).status_code == 422, wrong


def test_accounts_are_found_by_a_part_of_their_name(server: Server, operator: Person) -> None:
    name, _ = server.books.account(77)
    found = operator.get("/dashboard/operator", params={"find": name.upper()})
    assert re.findall(r'<a class="long" href="[^"]+">([^<]+)</a>', found.text) == [name]
    assert "No account has that" in operator.get("/dashboard/operator", params={"find": "nobody"}).text


def test_markup_in_names_and_notes_stays_text(server: Server, operator: Person) -> None:
    def make(tx: Tx) -> None:
        account = accounts.create(tx, MARKUP, now_ms=1)
        keys.create(tx, account.account_id, name=MARKUP, expires_at=None, now_ms=1)
        ledger.topup(tx, account.account_id, Micros(1000), ref=MARKUP, note=MARKUP, now_ms=1)
        ledger.adjust(tx, account.account_id, Micros(-5000), note=MARKUP, now_ms=1)

    server.books.write(make)
    path = page_of(server, MARKUP)
    pages = [operator.get(one).text for one in [*PAGES, path, f"{path}/suspend"]]
    pages.append(operator.post(f"{path}/topup", {"amount": "5", "ref": MARKUP, "note": MARKUP}).text)
    pages.append(operator.get("/dashboard/operator", params={"find": MARKUP}).text)
    for text in pages:
        assert "<img src=x" not in text
    assert "&lt;img src=x" in pages[4]
