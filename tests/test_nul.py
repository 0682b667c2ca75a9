"""A NUL character in a text from outside: PostgreSQL cannot store one, SQLite would. Both refuse, and nothing is lost.

On the wire HTTP allows none, neither ours nor fal's; in JSON, a form or a query there may be one.
"""

from __future__ import annotations

import sqlite3
from decimal import Decimal
from pathlib import Path

import pytest

from abhiapi import accounts, fal_bill, fal_prices, pricing, queuewire, webhookwire
from abhiapi.db import Database
from abhiapi.errors import BadRequest, WebhookUrlRefused
from abhiapi.http_parser import HTTPParseError, Parser
from abhiapi.price_sync import Answer, Quote, plan
from tests.command_line import CommandLine
from tests.harness import Clock, Server
from tests.people import new_user, visiting
from tests.postgres import Postgres
from tests.rows import FLUX_MICROS, MODEL, Customer
from tests.scripted import JSON, PICTURE, UNITS, House, answer

pytestmark = pytest.mark.engines
EVENT = {
    "request_id": "r-1",
    "endpoint_id": MODEL,
    "timestamp": "2026-11-18T12:00:00+00:00",
    "output_units": 1,
    "cost_estimate_nano_usd": 25_000_000,
}


def test_the_storage_takes_none_on_either_engine(database: Database, clock: Clock) -> None:
    """What every way in would come to if it let one through: one refusal, the transaction as if it had not been."""
    customer = Customer.new(database, clock)
    for note in ("\0", "a\0b"):
        with pytest.raises(BadRequest, match="NUL"):
            customer.topup(5, note=note)
        with pytest.raises(BadRequest, match="NUL"):
            database.read(lambda tx, name=note: accounts.find(tx, name))  # type: ignore[misc]
    assert customer.standing() == (1_000_000, 0)


@pytest.mark.parametrize(
    "line", [b"HTTP/1.1 200 O\0K", b"x-fal-request-id: r\0-1", b"x-fal-billable-units: 1\0", b"x-fal-error-type: \0"]
)
def test_fals_answer_brings_none_in_its_head(line: bytes) -> None:
    """The reason of a status is kept nowhere; a header with one is no HTTP."""
    head = [line] if line.startswith(b"HTTP") else [b"HTTP/1.1 200 OK", line]
    parser = Parser("POST")
    try:
        parser.parse(b"\r\n".join([*head, b"content-length: 0", b"", b""]))
    except HTTPParseError:
        return
    assert line.startswith(b"HTTP")
    assert "\0" not in repr(parser.lines)


@pytest.mark.parametrize(
    ("units", "state", "charged"),
    [
        ([UNITS], "settled", FLUX_MICROS),
        ([("x-fal-billable-units", "1\0")], "settled", FLUX_MICROS),  # computed from the answer
        ([("x-fal-billable-units", "\0")], "unknown", 0),
    ],
    ids=["whole units", "units with one", "nothing to compute from"],
)
def test_a_charge_is_written_whatever_stands_in_fals_answer(
    house: House, units: list[tuple[str, str]], state: str, charged: int
) -> None:
    house.fal.answer = answer([PICTURE if state == "settled" else b"{}"], JSON, *units, ("x-fal-request-id", "r\0-1"))
    house.fal.answer.headers[:] = [*house.fal.answer.headers[:-1]]  # the one above, not that of every answer
    assert house.call().status == 200
    call = house.last()
    assert (call.state, call.charged_micros, call.fal_request_id) == (state, charged, None)
    if state == "unknown":
        assert call.units == r"\x00"
        assert house.standing()[1] == call.held_micros  # waits for the operator


@pytest.mark.parametrize("field", ["request_id", "endpoint_id", "output_units", "cost_estimate_nano_usd"])
def test_an_event_of_fals_bill_with_one_is_unreadable_and_the_others_count(
    database: Database, clock: Clock, field: str
) -> None:
    now = clock.now_ms
    rows = [EVENT | {field: f"{EVENT[field]}\0"}, EVENT | {"request_id": "r-2"}]
    done = fal_bill.compare(database, lambda *_: rows, since_ms=now - 1000, until_ms=now, now_ms=now)
    assert (done.left_out, [one.fal_request_id for one in done.listed]) == (1, ["r-2"])
    assert "\0" not in "".join(done.unreadable)


@pytest.mark.parametrize("name", ["acme/fine\0", "acme/ \ud800"])
def test_a_model_of_fals_list_that_is_none_is_left_out_and_the_others_are_priced(database: Database, name: str) -> None:
    quotes = {"acme/fine": Quote("acme/fine", "images", Decimal("0.04"), "USD")}
    made = plan([], pricing.shipped_rules(), Answer(["acme/fine", name], quotes), source="fal api")
    database.write(lambda tx: fal_prices.append(tx, made.words, now_ms=1))
    assert [word.model for word in database.read(fal_prices.newest)] == ["acme/fine"]
    assert [change.why for change in made.refused] == ["its name is no model's"]


def test_units_called_so_leave_a_price_out(database: Database) -> None:
    quotes = {unit: Quote(f"acme/{n}", unit, Decimal("0.04"), "USD") for n, unit in enumerate(("images", "im\0ages"))}
    said = Answer([quote.model for quote in quotes.values()], {quote.model: quote for quote in quotes.values()})
    made = plan([], pricing.shipped_rules(), said, source="fal api")
    database.write(lambda tx: fal_prices.append(tx, made.words, now_ms=1))
    assert [word.unit for word in database.read(fal_prices.newest) if word.unit_price_usd is not None] == ["images"]


def test_a_job_s_id_and_a_webhook_s_url_have_none() -> None:
    assert queuewire.request_id_of(b'{"request_id": "a\\u0000b"}') is None
    for url in ("https://example.com/\0", "https://exam\0ple.com/"):
        with pytest.raises(WebhookUrlRefused):
            webhookwire.target_of(url)


def test_people_who_type_one_are_told_so_or_find_nothing(shared_server: Server) -> None:
    """The same on both engines, and no page that breaks."""
    account, _ = shared_server.books.account(10)
    person = visiting(shared_server, new_user(shared_server, account))
    del person.session.headers["X-Forwarded-For"]
    assert person.sign_in("a\0nn@example.com", "x").status_code == 401
    assert person.get("/dashboard/calls?model=a%00b").status_code == 400
    assert person.get("/dashboard/usage?model=%00").status_code == 400
    assert person.post("/dashboard/keys/new", {"name": "a\0b"}).status_code in (400, 422)


def test_the_command_line_takes_none(tmp_path: Path, database_url: str) -> None:
    cli = CommandLine(tmp_path, database_url)
    for command in (
        ["accounts", "create", "a\0b"],
        ["keys", "create", "acme", "--name", "a\0b"],
        ["topup", "a\0b", "5", "--ref", "a\0b"],
        ["adjust", "a", "5", "--note", "a\0b"],
        ["prices", "set", "acme/a\0b", "--unit-price", "1", "--unit", "images"],
        ["prices", "set", "acme/ab", "--unit-price", "1", "--unit", "a\0b"],
        ["accounts", "invite", "acme", "a\0b@example.com"],
        ["keys", "models", "key_1", "--allow", "a\0b"],
        ["usage", "--account", "a\0b"],
        ["prices", "show", "acme/a\0b"],
        ["estimate", "acme/a\0b"],
    ):
        done = cli(*command)
        assert (done.exit_code in (1, 2), done.stdout) == (True, ""), command
    assert cli.json("accounts", "list") == []


@pytest.mark.engines("postgresql")
def test_a_ledger_with_one_from_before_is_not_moved_and_says_where(
    tmp_path: Path, postgres: Postgres, engine: str
) -> None:
    """Versions before this one wrote down the name of any model that fal listed."""
    cli = CommandLine(tmp_path)
    cli("accounts", "create", "acme")
    connection = sqlite3.connect(cli.path, isolation_level=None)
    connection.execute(
        "INSERT INTO fal_prices (model, unit, standing, source, seen_at) VALUES (?, '', 'unpriced', 'fal api', 1)",
        ("acme/a\0b",),
    )
    connection.close()
    with postgres.fresh(empty=True) as url:
        assert "a row of fal_prices has a NUL character" in cli("migrate-to", url).refused()
    assert [row["account"] for row in cli.json("accounts", "list")] == ["acme"]
