"""Usage, calls, ledger and jobs at the dashboard: the figures are those of the books, and everybody sees their own."""

from __future__ import annotations

import csv
import io
import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from abhiapi import calls, ids, keys, ledger, lookups, reports, shapes, spending
from abhiapi.db import Tx
from abhiapi.money import Micros
from tests.harness import Server
from tests.people import PROMPT, Customer, Person, address_of, new_user, text_of, visiting

MARKUP = "<script>alert(1)</script>\"'{{7*7}}"
PAGES = ("/dashboard/usage", "/dashboard/usage.csv", "/dashboard/calls", "/dashboard/ledger", "/dashboard/ledger.csv",
         "/dashboard/ledger/print", "/dashboard/jobs")  # fmt: skip


@pytest.fixture
def server(dashboard: Server) -> Server:
    return dashboard


@pytest.fixture
def customer(server: Server) -> Customer:
    return Customer.new(server)


# --- who sees what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PAGES, "/dashboard/calls/call_01jd3k9x2m4q7"])
def test_nobody_and_operators_without_an_account_see_no_figures(server: Server, path: str) -> None:
    """The role matrix of these pages: nobody is sent to sign in, an operator without an account has no such page."""
    sent = Person(server).get(path)
    assert sent.status_code == 302
    assert sent.headers["Location"].startswith("/dashboard/sign-in?next=")
    operator = visiting(server, new_user(server, None, is_operator=True))
    assert operator.get(path).status_code == 404


def seen(page: Any) -> str:
    """A page but for the token of its forms, of which the time of its making is a part."""
    return re.sub(r'name="csrf_token" value="[^"]+"', "", page.text)


def test_another_accounts_call_is_an_unknown_call(server: Server, customer: Customer) -> None:
    """failures.md row 57: by its id, for reading and for resending; the same page, to the byte."""
    other = Customer.new(server)
    for theirs in (other.call(), other.call("/queue/fal-ai/flux/dev?fal_webhook=http://127.0.0.1:9/hook")):
        unknown = "call_01jd3k9x2m4q7"
        known = ids.call_text(theirs.call_id)
        for path in ("/dashboard/calls/{}", "/dashboard/calls/{}?x=1"):
            refused, missing = (customer.person.get(path.format(each)) for each in (known, unknown))
            assert (refused.status_code, seen(refused)) == (404, seen(missing))
        refused, missing = (customer.person.post(f"/dashboard/jobs/{each}/resend") for each in (known, unknown))
        assert (refused.status_code, seen(refused)) == (404, seen(missing))
        assert other.person.get(f"/dashboard/calls/{known}").status_code == 200
        assert other.person.get(f"/dashboard/calls/{known}x").status_code == 404


def test_a_keys_own_limits_and_models_are_shown(customer: Customer) -> None:
    """What the operator has set, and what is spent of it."""

    def limit(tx: Tx) -> None:
        key = keys.find(tx, customer.key)
        assert key is not None
        keys.set_models(tx, key, ["fal-ai/flux/*"])
        day, month = Micros(500_000), Micros(9_000_000)
        now = customer.server.books.clock()
        spending.set_limits(tx, key.key_id, day_limit_micros=day, month_limit_micros=month, now_ms=now)

    customer.server.books.write(limit)
    customer.call()
    shown = text_of(customer.page("/dashboard/keys"))
    assert "for fal-ai/flux/* only" in shown
    assert "26.25 of 500 today" in shown
    assert "26.25 of 9,000 this month" in shown


def test_no_page_shows_anything_of_another_account(server: Server, customer: Customer) -> None:
    """Whatever its filters name."""
    other = Customer.new(server)
    other.call("/fal-ai/flux/schnell")
    key_id = ids.key_text(server.books.calls(other.name)[0].key_id)
    customer.call()
    for path in PAGES:
        for query in ("", f"?key={key_id}", "?model=fal-ai/flux/schnell"):
            shown = customer.page(path + query).replace(f'value="{key_id}"', "")
            assert "schnell</" not in shown.replace("<option selected>fal-ai/flux/schnell</", "")
            assert other.name not in shown
    assert "No call fits" in customer.page(f"/dashboard/calls?key={key_id}")


def test_pages_with_filters_that_are_none_say_so(customer: Customer) -> None:
    for query in ("usage?since=yesterday", "usage?by=colour", "usage?key=7", "usage?since=2026-02-02&until=2026-01-01",
                  "usage?since=2020-01-01", "calls?state=lost", "calls?until=0001-01-01", "ledger?month=2026-13",
                  "ledger?page=0", "ledger?page=x", "ledger?page=9999999999", "ledger.csv?month=x"):  # fmt: skip
        refused = customer.person.get(f"/dashboard/{query}")
        assert refused.status_code == 400, query
        assert refused.headers["Content-Type"].startswith("text/html")
    assert customer.person.get("/dashboard/calls?before=x").status_code == 404
    assert "Nothing moved on this page" in customer.page("/dashboard/ledger?page=9")


# --- usage ------------------------------------------------------------------------------------------------------


def test_usage_is_what_the_books_say_by_model_key_and_day(customer: Customer) -> None:
    for path in ("/fal-ai/flux/dev", "/fal-ai/flux/dev", "/fal-ai/flux/schnell"):
        customer.call(path)
    rows = customer.server.books.read(lambda tx: reports.usage(tx, "model", account_id=customer.account_id))
    for by in ("model", "key", "day"):
        shown = text_of(customer.page(f"/dashboard/usage?by={by}"))
        told = csv.DictReader(io.StringIO(customer.page(f"/dashboard/usage.csv?by={by}"), newline=""))
        lines = list(told)
        assert told.fieldnames == [by, "calls", "credits", "cost_usd"]
        assert sum(Decimal(line["credits"]) for line in lines) * 1000 == reports.total(rows).charged_micros
        assert sum(int(line["calls"]) for line in lines) == 3
        for line in lines:
            assert f"{line['calls']} {line['credits']}" in shown
    (one,) = [row for row in rows if row.group == "fal-ai/flux/dev"]
    narrowed = csv.DictReader(io.StringIO(customer.page("/dashboard/usage.csv?model=fal-ai/flux/dev"), newline=""))
    assert [(line["model"], line["calls"]) for line in narrowed] == [("fal-ai/flux/dev", str(one.calls))]
    assert "Nothing was spent" in customer.page("/dashboard/usage?since=2026-01-01&until=2026-01-31")


def test_a_cell_of_a_file_never_becomes_a_formula(customer: Customer) -> None:
    line = csv_line_of_model(customer, "=1+1")
    assert line["model"] == "'=1+1"


def csv_line_of_model(customer: Customer, model: str) -> dict[str, str]:
    call_of_model(customer, model)
    rows = csv.DictReader(io.StringIO(customer.page("/dashboard/usage.csv"), newline=""))
    (line,) = [row for row in rows if model in row["model"]]
    return line


def call_of_model(customer: Customer, model: str) -> None:
    """A call in the books whose model has this name, whatever names fal gives."""
    row = customer.call()
    connection = customer.server.books.database.connect()
    connection.execute("UPDATE usage_daily SET model = ? WHERE account_id = ?", (model, customer.account_id))
    connection.execute(
        "INSERT INTO price_versions (model, unit, unit_price_usd, fal_unit_price_usd, source, first_used_at)"
        " VALUES (?, 'megapixels', '0.02625', '0.025', 'test', 1)",
        (model,),
    )
    connection.execute(
        "UPDATE calls SET price_id = (SELECT MAX(price_id) FROM price_versions) WHERE call_id = ?", (row.call_id,)
    )
    connection.close()


# --- calls ------------------------------------------------------------------------------------------------------


def test_the_list_of_calls_is_cut_by_model_key_state_and_day_and_paged(customer: Customer) -> None:
    """Each call once, newest first."""
    server = customer.server
    made = [customer.call(path) for path in ("/fal-ai/flux/dev", "/fal-ai/flux/schnell") * 2]
    lost = customer.call(weather="status=500")
    listed = re.findall(r"/dashboard/calls/(call_\w+)", customer.page("/dashboard/calls"))
    assert listed == [ids.call_text(row.call_id) for row in [lost, *reversed(made)]]
    today = datetime.now(UTC).date()
    key_id = ids.key_text(made[0].key_id)
    for query, expected in (
        ("model=fal-ai/flux/schnell", 2), (f"key={key_id}", 5), ("state=released", 1), ("state=settled", 4),
        (f"since={today}&until={today}", 5), ("until=2026-01-01", 0), ("state=held", 0),
        ("model=fal-ai/flux/dev&state=settled", 2),
    ):  # fmt: skip
        found = re.findall(r"/dashboard/calls/(call_\w+)", customer.page(f"/dashboard/calls?{query}"))
        assert len(found) == expected, query

    def pages(tx: Tx) -> list[int]:
        numbers, before = [], reports.FIRST
        while True:
            page = lookups.calls_of_kind(tx, customer.account_id, most=2, before=before)
            numbers += [row.call_id for row in page.rows]
            if page.cursor is None:
                return numbers
            before = page.cursor

    assert server.books.read(pages) == [row.call_id for row in [lost, *reversed(made)]]


def test_a_search_looks_so_far_and_says_where_it_stopped(customer: Customer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no index holds is looked for in bounded steps; the steps together see every call once."""
    made = [customer.call(path) for path in ("/fal-ai/flux/schnell", *["/fal-ai/flux/dev"] * 4)]
    monkeypatch.setattr(lookups, "LOOKED_AT", 2)

    def look(tx: Tx) -> tuple[list[int], int]:
        found, before, steps = [], reports.FIRST, 0
        while True:
            page = lookups.calls_of_kind(tx, customer.account_id, most=5, before=before, model="fal-ai/flux/schnell")
            found += [row.call_id for row in page.rows]
            steps += 1
            assert page.is_cut == (page.cursor is not None)
            if page.cursor is None:
                return found, steps
            before = page.cursor

    assert customer.server.books.read(look) == ([made[0].call_id], 3)


def test_one_call_shows_what_calls_show_shows(customer: Customer) -> None:
    """Every field that a customer's program reads, but not what the call cost the operator."""
    row = customer.call()
    refunded = customer.server.books.write(
        lambda tx: calls.refund(tx, row.call_id, Micros(6250), now_ms=customer.server.books.clock())
    )
    assert refunded is not None
    (row,) = customer.server.books.calls(customer.name)
    shown = text_of(customer.page(address_of(row)))
    shape = shapes.call(row)
    for name in ("created_at", "finished_at"):
        assert shape.pop(name) in customer.page(address_of(row))
    for name, value in shape.items():
        assert value is not None, name
        assert f"{value}" in shown, name
    assert "In all: 20 credits" in shown
    assert "6.25 credits were refunded" in shown
    assert "charge no. 2" in shown
    assert "refund no. 3" in shown
    assert "0.025" not in shown  # fal's own price


@pytest.mark.parametrize(
    ("path", "weather", "said"),
    [
        ("/fal-ai/flux/dev", "", "fal named the units: 1 megapixel, at $0.02625 for each"),
        ("/fal-ai/flux/dev", "units=0", "0 megapixels, so the call was free"),
        ("/fal-ai/flux/dev", "units=none", "fal named no units, so they were computed"),
        ("/fal-ai/flux/dev", "units=3", "52.5 credits more than was held"),
        ("/fal-ai/flux/dev", "units=0.5", "The rest of the hold, 13.125 credits, was given back"),
        ("/fal-ai/flux/dev", "status=500", "fal failed (an error of the 500s), which it never bills"),
        ("/queue/fal-ai/flux/dev", "queue_s=600", "fal has taken the job"),
    ],
)
def test_a_charge_is_told_in_words(customer: Customer, path: str, weather: str, said: str) -> None:
    row = customer.call(path, weather=weather)
    assert said in text_of(customer.page(address_of(row)))


# --- the ledger -------------------------------------------------------------------------------------------------


def test_the_statement_foots_and_each_line_has_its_balance(customer: Customer) -> None:
    server = customer.server
    for _ in range(3):
        customer.call()
    server.books.write(
        lambda tx: ledger.topup(
            tx, customer.account_id, Micros(5_000), ref=None, note=MARKUP, now_ms=server.books.clock()
        )
    )
    page = customer.page("/dashboard/ledger")
    shown = text_of(page)
    for entry in server.books.entries(customer.name):
        amount, after = (shapes.entry(entry)[name] for name in ("credits", "balance_after"))
        assert re.search(rf"{amount:,f} {after:,f}\b", shown), entry
    assert "Opening balance 0 $0.00" in shown
    assert "Charges -78.75 3 entries" in shown
    assert "Closing balance 926.25 credits" in shown
    lines = list(csv.DictReader(io.StringIO(customer.page("/dashboard/ledger.csv"), newline="")))
    assert [line["kind"] for line in lines] == ["opening", "topup", *["charge"] * 3, "topup", "closing"]
    assert lines[-1]["balance"] == "926.25"
    assert "926.250" in customer.page("/dashboard/ledger/print")


def test_months_are_joined_and_long_ones_are_paged(customer: Customer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by halving and read whole, a month is the same; every entry is on exactly one page."""
    for _ in range(3):
        customer.call()
    month = datetime.now(UTC).date().isoformat()[:7]

    def read(tx: Tx) -> Any:
        return lookups.month(tx, customer.account_id, customer.name, month)

    whole = customer.server.books.read(read)
    monkeypatch.setattr(lookups, "SUMS_MAX", 1)
    halved = customer.server.books.read(read)
    assert whole.sums.keys() == {"topup", "charge"}
    assert (halved.opening_micros, halved.closing_micros, halved.first_seq, halved.last_seq) == (0, 921_250, 1, 4)
    assert (whole.opening_micros, whole.closing_micros, whole.first_seq, whole.last_seq) == (0, 921_250, 1, 4)
    assert not halved.sums
    before = customer.page("/dashboard/ledger?month=2020-01")
    assert "Nothing moved in this month" in before
    after = text_of(customer.page("/dashboard/ledger?month=2030-01"))
    assert "Opening balance 921.25" in after


# --- what is shown ----------------------------------------------------------------------------------------------


def test_stored_markup_stays_text_and_prompts_are_nowhere(server: Server, customer: Customer) -> None:
    """In models, notes and references, on every page of figures."""
    call_of_model(customer, MARKUP)
    server.books.write(
        lambda tx: ledger.topup(
            tx, customer.account_id, Micros(5_000), ref=MARKUP, note=MARKUP, now_ms=server.books.clock()
        )
    )
    customer.call("/queue/fal-ai/flux/dev", weather="queue_s=600")
    rows = server.books.calls(customer.name)
    shown = {path: customer.page(path) for path in [*PAGES, *map(address_of, rows)]}
    for path, page in shown.items():
        assert PROMPT not in page
        if not path.endswith(".csv"):
            assert "<script>alert" not in page, path
            assert "49" not in re.findall(r"alert\(1\).{0,30}", page)
            assert not re.search(r"\sstyle=|\son\w+=", page), path
    assert sum("&lt;script&gt;" in page for page in shown.values()) >= 4


def test_every_page_is_strict_about_what_it_loads(customer: Customer) -> None:
    customer.call()
    for path in PAGES:
        response = customer.person.get(path)
        policy = response.headers["Content-Security-Policy"]
        assert "unsafe" not in policy
        assert "default-src 'none'" in policy
        assert response.headers["Cache-Control"] == "no-store"
    assert "sha256-" in customer.person.get("/dashboard/ledger/print").headers["Content-Security-Policy"]
