"""`usage`, `calls`, `ledger`, `prices`, `estimate`: what is in the books is printed, in the contract's shapes."""

from __future__ import annotations

import csv
import io
import json
from decimal import Decimal
from pathlib import Path

import pytest

from abhiapi import ids, keys, ledger, prices, pricing
from abhiapi.commands.output import table
from abhiapi.db import Tx
from abhiapi.metering import Verdict
from abhiapi.migrations import migrate
from abhiapi.money import Micros
from tests.command_line import CommandLine, finish
from tests.harness import Clock
from tests.rows import MODEL, Customer

pytestmark = pytest.mark.engines

CALL_FIELDS = [
    *("call_id", "key_id", "model", "mode", "state", "status", "held", "credits", "units", "unit_price_usd"),
    *("usage_source", "fal_request_id", "created_at", "finished_at"),
]
ENTRY_FIELDS = ["entry_id", "seq", "kind", "credits", "balance_after", "call_id", "ref", "note", "created_at", "hash"]
USAGE_FIELDS = ["group", "calls", "credits", "cost_usd", "fal_cost_usd", "margin_usd", "margin_percent"]
PRICE_FIELDS = ["model", "unit", "unit_price_usd", "fal_unit_price_usd", "margin", "source", "updated_at"]
DAY_MS = 86_400_000


@pytest.fixture
def cli(tmp_path: Path, database_url: str) -> CommandLine:
    made = CommandLine(tmp_path, database_url)
    migrate(made.database)
    return made


@pytest.fixture
def ann(cli: CommandLine, clock: Clock) -> Customer:
    return Customer.new(cli.database, clock)


# --- usage ------------------------------------------------------------------------------------------------------


def test_usage_adds_up_by_every_grouping(cli: CommandLine, ann: Customer, clock: Clock) -> None:
    ann.settle()
    clock.tick(DAY_MS)
    ann.settle()
    Customer.new(cli.database, clock, name="bob").settle()
    row = {
        "calls": 3,
        "credits": Decimal("78.75"),
        "cost_usd": Decimal("0.07875"),
        "fal_cost_usd": Decimal("0.075"),
        "margin_usd": Decimal("0.00375"),
        "margin_percent": Decimal("4.76"),
    }
    groups = {
        "day": ["2026-11-18", "2026-11-19"],
        "model": [MODEL],
        "key": ["key_1", "key_2"],
        "account": ["ann", "bob"],
    }
    for by, expected in groups.items():
        usage = cli.json("usage", "--by", by)
        assert list(usage) == ["rows", "total"]
        assert [list(each) for each in usage["rows"]] == [USAGE_FIELDS] * len(expected)
        assert [each["group"] for each in usage["rows"]] == expected
        assert usage["total"] == row
        for field in USAGE_FIELDS[1:-1]:
            assert sum(each[field] for each in usage["rows"]) == usage["total"][field]


def test_usage_of_one_account_and_of_some_days(cli: CommandLine, ann: Customer, clock: Clock) -> None:
    ann.settle()
    clock.tick(DAY_MS)
    ann.settle()
    Customer.new(cli.database, clock, name="bob").settle()
    for arguments, calls in (
        (["--account", "ann"], 2),
        (["--account", "key_2"], 1),
        (["--since", "2026-11-19"], 2),
        (["--until", "2026-11-18"], 1),
        (["--since", "2026-11-18", "--until", "2026-11-19", "--account", "ann"], 2),
        (["--since", "2026-11-20"], 0),
    ):
        assert cli.json("usage", *arguments)["total"]["calls"] == calls, arguments


def test_usage_as_csv_is_the_rows(cli: CommandLine, ann: Customer) -> None:
    ann.settle()
    assert cli("usage", "--by", "model", "--csv").stdout == (
        "group,calls,credits,cost_usd,fal_cost_usd,margin_usd,margin_percent\n"
        f"{MODEL},1,26.25,0.02625,0.025,0.00125,4.76\n"
    )


def test_small_amounts_are_printed_without_exponents(cli: CommandLine, ann: Customer) -> None:
    call = ann.admit()
    ann.finish(call, Verdict("settled", ann.open_call(1).held_micros, "1", "fal", 12))
    assert cli("usage", "--csv").lines[1].endswith(",1,0.001,0.000001,0.000000012,0.000000988,98.8")
    assert "0.000000012" in cli("usage").stdout


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(
    "arguments",
    [["--since", "yesterday"], ["--until", "2026-02-30"], ["--since", "2026-11-02", "--until", "2026-11-01"]]
    + [["--by", "moon"], ["--csv", "--json"], ["--since", ""]],
)
def test_usage_of_what_is_no_time_is_wrong_usage(cli: CommandLine, arguments: list[str]) -> None:
    cli("usage", *arguments).misused()


# --- calls ------------------------------------------------------------------------------------------------------


def test_call_shape_is_the_contract_s_with_account_and_fal_cost(cli: CommandLine, ann: Customer) -> None:
    call_id = ids.call_text(ann.settle().call_id)
    listed = cli.json("calls", "list")
    assert list(listed) == ["calls", "next_cursor"]
    (shown,) = listed["calls"]
    assert shown == cli.json("calls", "show", call_id)
    assert [field for field in shown if field in CALL_FIELDS] == CALL_FIELDS
    assert (shown["call_id"], shown["account"], shown["key_id"]) == (call_id, "ann", "key_1")
    assert (shown["credits"], shown["fal_cost_usd"]) == (Decimal("26.25"), Decimal("0.025"))


def test_pages_of_calls_hold_each_call_once_newest_first(cli: CommandLine, ann: Customer, clock: Clock) -> None:
    bob = Customer.new(cli.database, clock, name="bob")
    made = [ids.call_text(customer.settle().call_id) for customer in (ann, ann, ann, bob)]
    assert cli("calls", "list", "--limit", "2").stderr == f"older ones: --cursor {made[2]}\n"
    seen, more = [], []
    while more is not None:
        page = cli.json("calls", "list", "--limit", "2", *more)
        seen += [call["call_id"] for call in page["calls"]]
        more = ["--cursor", page["next_cursor"]] if page["next_cursor"] else None
    assert seen == made[::-1]
    assert [call["call_id"] for call in cli.json("calls", "list", "--account", "ann")["calls"]] == made[2::-1]


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("arguments", [["--cursor", "7"], ["--cursor", "call_x"], ["--limit", "0"], ["--limit", "x"]])
def test_page_that_cannot_be_is_wrong_usage(cli: CommandLine, arguments: list[str]) -> None:
    cli("calls", "list", *arguments).misused()


@pytest.mark.engines("sqlite")
def test_unknown_call_is_refused(cli: CommandLine) -> None:
    assert "there is no call" in cli("calls", "show", ids.call_text(7)).refused()
    assert "is no call id" in cli("calls", "show", "7").refused()


def test_empty_lists_are_said_in_words(cli: CommandLine) -> None:
    for command in ("accounts list", "keys list", "calls list", "holds list", "usage", "prices list no-such-model"):
        done = cli(*command.split())
        assert (done.exit_code, done.stdout) == (0, "")
        assert done.stderr.startswith("no "), command


@pytest.mark.engines("sqlite")
def test_tables_fit_a_hundred_columns(cli: CommandLine, ann: Customer) -> None:
    ann.settle()
    ann.admit()
    for command in ("accounts list", "keys list", "calls list", "holds list", "usage", "ledger show ann"):
        lines = cli(*command.split()).lines
        assert len(lines) >= 2
        assert max(map(len, lines)) <= 100, command
    assert max(map(len, cli("prices", "list").lines)) <= 120  # full model names; a terminal has them cut


def test_table_is_cut_where_it_can_spare_something() -> None:
    """Ids and amounts stay whole on a narrow terminal, long texts do not."""
    rows = [{"call_id": "call_01", "model": "acme/a-model-with-a-long-name", "credits": Decimal("26.25"), "note": None}]
    columns = ("call_id", "model", "credits", "note")
    assert table(rows, columns).splitlines() == [
        "CALL ID  MODEL                          CREDITS  NOTE",
        "call_01  acme/a-model-with-a-long-name    26.25  -",
    ]
    assert table(rows, columns, width=45).splitlines() == [
        "CALL ID  MODEL                  CREDITS  NOTE",
        "call_01  acme/a-model-with-a-…    26.25  -",
    ]
    assert "call_01  acme/a-mode…    26.25" in table(rows, columns, width=10)


# --- ledger -----------------------------------------------------------------------------------------------------


def test_entries_are_shown_newest_first_in_pages(cli: CommandLine, ann: Customer) -> None:
    ann.settle()
    ann.topup(5, ref="invoice-1", note="five")
    shown = cli.json("ledger", "show", "ann", "--limit", "2")
    assert list(shown) == ["entries", "next_cursor"]
    assert [list(entry) for entry in shown["entries"]] == [ENTRY_FIELDS, ENTRY_FIELDS]
    assert [entry["kind"] for entry in shown["entries"]] == ["topup", "charge"]
    assert shown["entries"][0]["ref"] == "invoice-1"
    assert "older ones: --cursor 2" in cli("ledger", "show", "ann", "--limit", "2").stderr
    older = cli.json("ledger", "show", "ann", "--cursor", shown["next_cursor"])
    assert ([entry["seq"] for entry in older["entries"]], older["next_cursor"]) == ([1], None)
    cli("ledger", "show", "ann", "--cursor", "x").misused()


def test_export_is_every_entry_of_every_account(cli: CommandLine, ann: Customer, clock: Clock) -> None:
    ann.settle()
    ann.topup(5, note='a "quoted", note')
    Customer.new(cli.database, clock, name="bob")
    rows = list(csv.DictReader(io.StringIO(cli("ledger", "export").stdout)))
    objects = [json.loads(line, parse_float=Decimal) for line in cli("ledger", "export", "--json").lines]
    assert list(rows[0]) == ["account", *ENTRY_FIELDS[:6], *ENTRY_FIELDS[6:]]
    assert [(row["account"], row["seq"]) for row in rows] == [("ann", "1"), ("ann", "2"), ("ann", "3"), ("bob", "1")]
    assert rows[2]["note"] == 'a "quoted", note'
    assert len(rows) == len(objects)
    for row, entry in zip(rows, objects, strict=True):
        assert {field: "" if value is None else str(value) for field, value in entry.items()} == row


def test_export_is_printed_while_it_is_read(cli: CommandLine, ann: Customer) -> None:
    """A reader that goes away early ends it, without a traceback; so nothing is gathered first."""

    def fill(tx: Tx) -> None:
        for number in range(600):
            ledger.topup(tx, ann.account_id, Micros(1000), ref=None, note="x" * 100, now_ms=number)

    cli.database.write(fill)
    process = cli.start("ledger", "export")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("account,entry_id,")
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(20)


def test_verify_finds_the_ledger_in_order(cli: CommandLine, ann: Customer) -> None:
    ann.settle()
    assert cli.json("ledger", "verify") == {"ok": True, "accounts": 1, "entries": 2, "problems": []}
    assert cli("ledger", "verify").stdout == "ok: 2 entries of 1 accounts add up\n"


def test_verify_of_a_changed_ledger_fails_and_names_what_differs(cli: CommandLine, ann: Customer) -> None:
    ann.settle()
    connection = cli.database.connect()
    connection.execute("UPDATE accounts SET balance_micros = balance_micros + 1")
    connection.close()
    done = cli("ledger", "verify", "--json")
    assert (done.exit_code, done.json["ok"]) == (1, False)
    assert ["'ann'" in problem for problem in done.json["problems"]] == [True]
    assert "does not add up" in done.stderr
    assert cli("ledger", "verify").lines == done.json["problems"]


# --- prices -----------------------------------------------------------------------------------------------------


@pytest.mark.engines("sqlite")
def test_price_shapes_are_the_contract_s(cli: CommandLine) -> None:
    listed = cli.json("prices", "list")
    assert len(listed) == len(pricing.shipped_rules())
    assert all(list(price) == PRICE_FIELDS for price in listed)
    assert cli.json("prices", "show", MODEL) in listed
    assert {price["model"] for price in cli.json("prices", "list", "FLUX/dev")} == {MODEL}


def test_own_margin_holds_from_now_on(cli: CommandLine) -> None:
    made = cli.json("prices", "set", MODEL, "--margin", "0.2")
    assert made == cli.json("prices", "show", f"/{MODEL}/")
    assert (made["unit_price_usd"], made["margin"], made["source"]) == (Decimal("0.03"), Decimal("0.2"), "operator")
    assert cli.json("estimate", MODEL)["credits"] == 30


def test_model_without_a_price_is_given_one(cli: CommandLine) -> None:
    model = "acme/new-model"
    assert "has no price" in cli("estimate", model).refused()
    made = cli.json("prices", "set", model, "--unit-price", "0.04", "--unit", "images", "--hold", "80")
    assert (made["unit"], made["unit_price_usd"], made["fal_unit_price_usd"]) == ("images", Decimal("0.04"), None)
    assert cli.json("estimate", model)["credits"] == 80


def test_own_hold_stays_until_it_is_taken_back(cli: CommandLine) -> None:
    cli("prices", "set", MODEL, "--margin", "0.2", "--hold", "80")
    done = cli("prices", "set", MODEL, "--margin", "0.3")
    assert "holds 80 credits, as before" in done.stderr
    assert cli.json("estimate", MODEL)["credits"] == 80
    cli("prices", "set", MODEL, "--margin", "0.3", "--hold", "auto")
    assert cli.json("estimate", MODEL)["credits"] == Decimal("32.5")


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(
    "arguments",
    [[], ["--unit-price", "1"], ["--unit", "images"], ["--margin", "1", "--unit", "images"]]
    + [["--margin", "1", "--unit-price", "1", "--unit", "images"], ["--bogus"]]
    + [["--margin", text] for text in ("-1", "NaN", "1e3", "", "5%", "1000000")]
    + [["--unit-price", text, "--unit", "images"] for text in ("-1", "-0", "NaN", "Infinity", "0,04", "9999999", "")]
    + [["--margin", "0.1", "--hold", text] for text in ("0", "-5", "NaN", "0.0001", "")],
)
def test_price_that_is_none_is_wrong_usage_and_changes_nothing(cli: CommandLine, arguments: list[str]) -> None:
    cli("prices", "set", MODEL, *arguments).misused()
    assert cli.database.read(prices.own_prices) == []


def test_margin_over_an_unknown_price_is_refused(cli: CommandLine) -> None:
    assert "--unit-price" in cli("prices", "set", "acme/new-model", "--margin", "0.1").refused()
    cli("prices", "set", "acme/new-model", "--unit-price", "0.04", "--unit", "images")
    assert "--unit-price" in cli("prices", "set", "acme/new-model", "--margin", "0.1").refused()


@pytest.mark.engines("sqlite")
def test_price_a_hundred_times_as_high_needs_force(cli: CommandLine) -> None:
    arguments = ["prices", "set", MODEL, "--unit", "megapixels", "--unit-price"]
    refusal = cli(*arguments, "2.626").refused()
    assert "2.626 USD" in refusal
    assert "0.02625 USD" in refusal
    assert cli.json("prices", "show", MODEL)["source"] != "operator"
    assert cli(*arguments, "2.625").exit_code == 0
    assert cli(*arguments, "300", "--force").exit_code == 0


@pytest.mark.engines("sqlite")
def test_free_model_is_told(cli: CommandLine) -> None:
    assert "is free" in cli("prices", "set", MODEL, "--unit-price", "0", "--unit", "images").stderr


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("model", ["flux", "flux dev", "fal-ai/../keys", "https://fal.run/fal-ai/flux", "fal-ai//flux"])
def test_price_of_what_no_call_can_name_is_refused(cli: CommandLine, model: str) -> None:
    cli("prices", "set", model, "--unit-price", "1", "--unit", "images").refused()


@pytest.mark.engines("sqlite")
def test_price_of_a_stream_is_its_model_s(cli: CommandLine) -> None:
    assert f"set it for {MODEL}" in cli("prices", "set", f"{MODEL}/stream", "--margin", "0.1").refused()


@pytest.mark.engines("sqlite")
def test_estimate_is_what_a_call_would_hold(cli: CommandLine) -> None:
    made = cli.json("estimate", MODEL, "--input", '{"image_size": "square_hd", "num_images": 3}')
    assert list(made) == ["model", "credits", "basis"]
    assert (made["model"], made["credits"]) == (MODEL, Decimal("157.5"))


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("text", ["", "{", "nonsense", "[1]", "7", "null", '{"a": NaN}', "[" * 5000, "\udcff"])
def test_estimate_of_what_is_no_object_is_wrong_usage(cli: CommandLine, text: str) -> None:
    assert "--input" in cli("estimate", MODEL, "--input", text).misused()


@pytest.mark.engines("sqlite")
def test_unknown_model_is_refused_with_a_hint(cli: CommandLine) -> None:
    for command in (["prices", "show", "acme/nope"], ["estimate", "acme/nope"]):
        assert "`abhiapi prices list`" in cli(*command).refused()


def test_a_change_by_a_command_holds_in_a_process_that_has_read_before(cli: CommandLine, ann: Customer) -> None:
    """The server reads the key afresh for every call, so there is no moment of grace after a revocation."""
    assert cli.database.read(lambda tx: keys.find(tx, ann.key)) is not None
    assert finish(cli.start("keys", "revoke", "key_1")).exit_code == 0
    found = cli.database.read(lambda tx: keys.find(tx, ann.key))
    assert found is not None
    assert found.status == "revoked"
