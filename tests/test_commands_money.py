"""`topup`, `balance`, `refund`, `adjust` and `holds`: what operators type moves exactly that much, once, or nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from abhiapi import db_postgres, ids
from abhiapi.commands import session
from abhiapi.metering import Verdict
from tests.command_line import CommandLine, finish
from tests.harness import Clock, environment
from tests.rows import FLUX_MICROS, MINUTE_MS, Customer

pytestmark = pytest.mark.engines

ENTRY_FIELDS = [
    *("account", "entry_id", "seq", "kind", "credits", "balance_after"),
    *("call_id", "ref", "note", "created_at", "hash"),
]
TOPUP_FIELDS = ["account", "entry_id", "credits", "balance"]
PROCESSES, ROUNDS = 4, 13  # 52 top-ups under one reference


@pytest.fixture
def cli(tmp_path: Path, database_url: str) -> CommandLine:
    made = CommandLine(tmp_path, database_url)
    made("accounts", "create", "acme")
    return made


@pytest.fixture
def customer(cli: CommandLine) -> Customer:
    """The account ``ann`` with 1,000 credits, whose calls happen now, so that a living process may still serve them."""
    return Customer.new(cli.database, Clock(session.now_ms()))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that PostgreSQL's side has waited until it took a process for dead: they pass at once."""
    now = [0.0]

    def sleep(seconds: int) -> None:
        now[0] += seconds

    monkeypatch.setattr(db_postgres, "monotonic", lambda: now[0])
    monkeypatch.setattr(db_postgres, "sleep", sleep)
    return now


# --- topup ------------------------------------------------------------------------------------------------------


def test_topup_adds_credit(cli: CommandLine) -> None:
    made = cli.json("topup", "acme", "5000", "--note", "bank transfer")
    assert list(made) == TOPUP_FIELDS
    assert made == {"account": "acme", "entry_id": "entry_1_1", "credits": 5000, "balance": 5000}
    assert cli.json("topup", "acme", "26.25")["balance"] == Decimal("5026.25")
    assert cli.json("topup", "acme", "0.000001", "--usd")["credits"] == Decimal("0.001")
    assert cli.json("topup", "acme", "49.9", "--usd")["credits"] == 49900


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(
    "amount",
    [
        "abc",
        "-5",
        "0",
        "NaN",
        "1e999",
        "0.00001",
        "",
        "-0",
        "+-5",
        "5,000",
        "1_000",
        "0x10",
        "\u0665",
        "Infinity",
        "-inf",
    ]
    + [" 5", "5 ", "5\n", "1e3", ".", "-.5", "1" * 400, "1000000000000.001", "-NaN", "1/2", "5credits"],
)
def test_amount_that_is_none_is_one_line_and_changes_nothing(cli: CommandLine, amount: str) -> None:
    done = cli("topup", "acme", amount)
    assert done.exit_code in (1, 2)
    assert len(done.stderr.splitlines()) == 1
    assert len(done.stderr) < 200
    assert done.stdout == ""
    assert cli.entries() == 0


@pytest.mark.engines("sqlite")
def test_negative_amount_is_an_amount_wherever_it_stands(cli: CommandLine) -> None:
    for arguments in (["acme", "-5"], ["--json", "acme", "-5"], ["acme", "-5", "--ref", "7"], ["--", "acme", "-5"]):
        assert "negative" in cli("topup", *arguments).refused()


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize(
    "arguments",
    ["--bogus", "--bogus acme 5", "acme 5 --bogus", "acme --bogus 5", "acme --bogus", "-b acme 5"],
)
def test_unknown_option_beside_an_amount_is_named(cli: CommandLine, arguments: str) -> None:
    assert re.search("No such option '?(--bogus|-b)", cli("topup", *arguments.split()).misused())
    assert cli.entries() == 0


@pytest.mark.engines("sqlite")
def test_too_many_arguments_are_wrong_usage(cli: CommandLine) -> None:
    assert "(6)" in cli("topup", "acme", "5", "6").misused()
    assert cli.entries() == 0


def test_topup_of_an_unknown_account_swallows_no_money(cli: CommandLine) -> None:
    assert "`abhiapi accounts create`" in cli("topup", "amce", "5").refused()
    assert [row["account"] for row in cli.json("accounts", "list")] == ["acme"]


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("option", ["--ref", "--note"])
@pytest.mark.parametrize("text", ["", " ", "two\nlines", "x" * 501, "\udcff"])
def test_reference_and_note_are_a_line_of_text(cli: CommandLine, option: str, text: str) -> None:
    """An empty reference is a script's unset variable: taking it for none would make the top-up unsafe to repeat."""
    assert option in cli("topup", "acme", "5", option, text).misused()
    assert cli.entries() == 0


def test_repeated_reference_changes_nothing_and_says_so(cli: CommandLine) -> None:
    first = cli.json("topup", "acme", "5000", "--ref", "invoice-1")
    cli("topup", "acme", "7", "--ref", "invoice-2")
    again = cli("topup", "acme", "5", "--usd", "--ref", "invoice-1", "--json")
    assert (again.exit_code, again.json) == (0, first | {"balance": 5007})
    assert "nothing changed" in again.stderr
    assert "'invoice-1'" in cli("topup", "acme", "5001", "--ref", "invoice-1").refused()
    assert cli.entries() == 2


def test_reference_is_the_account_s_own(cli: CommandLine) -> None:
    cli("accounts", "create", "bolt")
    for account in ("acme", "bolt"):
        assert cli.json("topup", account, "5", "--ref", "invoice-1")["balance"] == 5


def test_topup_of_a_suspended_account_is_taken_and_told(cli: CommandLine) -> None:
    cli("accounts", "suspend", "acme")
    done = cli("topup", "acme", "5")
    assert done.exit_code == 0
    assert "suspended" in done.stderr


def test_two_processes_that_top_up_at_once_both_land(cli: CommandLine) -> None:
    started = [cli.start("topup", "acme", amount) for amount in ("5", "7")]
    assert [finish(process).exit_code for process in started] == [0, 0]
    assert cli.json("balance", "acme")["balance"] == 12
    assert cli.entries() == 2


def test_reference_repeated_by_many_processes_at_once_is_one_entry(cli: CommandLine, tmp_path: Path) -> None:
    script = tmp_path / "repeat.py"
    script.write_text(
        "from abhiapi.commands import main\n"
        f"for _ in range({ROUNDS}):\n"
        "    main(['topup', 'acme', '5', '--ref', 'invoice-1', '--json'], standalone_mode=False)\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=environment(**cli.settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    done = [finish(process) for process in started]
    assert [each.exit_code for each in done] == [0] * PROCESSES
    assert {line for each in done for line in each.lines} == {
        '{"account": "acme", "entry_id": "entry_1_1", "credits": 5, "balance": 5}'
    }
    assert sum(len(each.lines) for each in done) == PROCESSES * ROUNDS
    assert sum(each.stderr.count("nothing changed") for each in done) == PROCESSES * ROUNDS - 1
    assert cli.entries() == 1


def test_locked_database_is_one_line(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    for write in ("abhiapi.db.Database.write", "abhiapi.db_postgres.PostgresDatabase.write"):
        monkeypatch.setattr(f"{write}.__kwdefaults__", {"patience_s": 0})
    other = cli.database.session(patience_s=5)
    try:
        other.begin()
        assert "locked" in cli("topup", "acme", "5").refused()
    finally:
        other.close()
    assert cli.entries() == 0


# --- refund and adjust ------------------------------------------------------------------------------------------


def test_refund_gives_back_what_was_charged(cli: CommandLine, customer: Customer) -> None:
    call_id = ids.call_text(customer.settle().call_id)
    made = cli.json("refund", call_id)
    assert list(made) == ENTRY_FIELDS
    assert (made["account"], made["kind"], made["call_id"]) == ("ann", "refund", call_id)
    assert (made["credits"], made["balance_after"]) == (Decimal("26.25"), 1000)
    assert cli.json("calls", "show", call_id)["refunded"] == Decimal("26.25")
    cli.entries()


def test_refunds_together_never_pass_the_charge(cli: CommandLine, customer: Customer) -> None:
    call_id = ids.call_text(customer.settle().call_id)
    assert cli.json("refund", call_id, "--credits", "20")["credits"] == 20
    assert "cannot be refunded" in cli("refund", call_id, "--credits", "6.251").refused()
    assert cli.json("refund", call_id)["credits"] == Decimal("6.25")
    assert "all refunded" in cli("refund", call_id).refused()
    assert customer.standing() == (1_000_000, 0)


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("amount", ["0", "-5", "NaN", "abc", "1e5", ""])
def test_refund_of_no_amount_changes_nothing(cli: CommandLine, customer: Customer, amount: str) -> None:
    call_id = ids.call_text(customer.settle().call_id)
    cli("refund", call_id, "--credits", amount).refused()
    assert customer.standing() == (1_000_000 - FLUX_MICROS, 0)


def test_refund_says_why_there_is_nothing_to_give_back(cli: CommandLine, customer: Customer) -> None:
    free, running = customer.settle(0), customer.admit()
    assert "charged nothing" in cli("refund", ids.call_text(free.call_id)).refused()
    assert "has not ended" in cli("refund", ids.call_text(running.call_id)).refused()
    assert "there is no call" in cli("refund", ids.call_text(77)).refused()
    assert "is no call id" in cli("refund", "77").refused()


def test_adjust_moves_a_balance_either_way(cli: CommandLine) -> None:
    made = cli.json("adjust", "acme", "100", "--note", "goodwill")
    assert list(made) == ENTRY_FIELDS
    assert (made["kind"], made["credits"], made["note"]) == ("adjustment", 100, "goodwill")
    assert cli.json("adjust", "acme", "-0.5", "--note", "typing error")["balance_after"] == Decimal("99.5")
    done = cli("adjust", "acme", "-1", "--usd", "--note", "chargeback", "--json")
    assert done.json["balance_after"] == Decimal("-900.5")
    assert "below zero" in done.stderr
    assert cli.entries() == 3


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("note", [[], ["--note", ""], ["--note", "  "]])
def test_adjust_needs_a_reason(cli: CommandLine, note: list[str]) -> None:
    assert "--note" in cli("adjust", "acme", "5", *note).misused()
    assert cli.entries() == 0


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("amount", ["0", "-0", "abc", "1e5", "0.0001", "1000000000001"])
def test_adjust_by_no_amount_changes_nothing(cli: CommandLine, amount: str) -> None:
    cli("adjust", "acme", amount, "--note", "why").refused()
    assert cli.entries() == 0


# --- holds ------------------------------------------------------------------------------------------------------


def test_holds_are_listed_with_why_they_stand(cli: CommandLine, customer: Customer) -> None:
    assert cli.json("holds", "list") == {"holds": []}
    unknown = customer.admit()
    customer.finish(unknown, Verdict("unknown", units="-5", reason="bad_units"))
    running = customer.admit(deadline_in_ms=MINUTE_MS)
    first, second = cli.json("holds", "list")["holds"]
    assert list(first) == ["call_id", "account", "model", "credits", "age_s", "reason"]
    assert (first["call_id"], first["reason"]) == (ids.call_text(unknown.call_id), "bad_units")
    assert (first["account"], first["credits"]) == ("ann", Decimal("26.25"))
    assert (second["call_id"], second["reason"]) == (ids.call_text(running.call_id), "running")


def test_hold_of_unknown_cost_is_settled_by_the_operator(cli: CommandLine, customer: Customer) -> None:
    call = customer.admit()
    customer.finish(call, Verdict("unknown", units="-5", reason="bad_units"))
    call_id = ids.call_text(call.call_id)
    assert cli.json("holds", "settle", call_id, "--credits", "12.5") == {
        "call_id": call_id,
        "account": "ann",
        "model": "fal-ai/flux/dev",
        "state": "settled",
        "credits": Decimal("12.5"),
        "entry_id": "entry_2_2",
        "balance": Decimal("987.5"),
    }
    shown = cli.json("calls", "show", call_id)
    assert (shown["usage_source"], shown["units"], shown["reason"]) == ("operator", "-5", "operator")
    assert customer.standing() == (987_500, 0)
    assert "already ended" in cli("holds", "settle", call_id, "--credits", "12.5").refused()
    assert "already ended" in cli("holds", "release", call_id).refused()
    cli.entries()


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("amount", ["0", "0.000", "00"])
def test_hold_may_be_settled_for_nothing(cli: CommandLine, customer: Customer, amount: str) -> None:
    call_id = ids.call_text(customer.admit().call_id)
    made = cli.json("holds", "settle", call_id, "--credits", amount)
    assert (made["state"], made["credits"], made["entry_id"], made["balance"]) == ("settled", 0, None, 1000)
    assert customer.standing() == (1_000_000, 0)
    cli.entries()


@pytest.mark.engines("sqlite")
@pytest.mark.parametrize("amount", ["-5", "NaN", "abc", "0.0001", "-0", "1e9"])
def test_hold_is_not_settled_for_what_is_no_amount(cli: CommandLine, customer: Customer, amount: str) -> None:
    call_id = ids.call_text(customer.admit().call_id)
    cli("holds", "settle", call_id, "--credits", amount).refused()
    assert customer.standing() == (1_000_000, FLUX_MICROS)


def test_charge_above_the_hold_is_taken_in_full_and_told(cli: CommandLine, customer: Customer) -> None:
    done = cli("holds", "settle", ids.call_text(customer.admit().call_id), "--credits", "1500", "--json")
    assert done.json["balance"] == -500
    assert "below zero" in done.stderr


def test_released_hold_is_given_back(cli: CommandLine, customer: Customer) -> None:
    call = customer.admit()
    made = cli.json("holds", "release", ids.call_text(call.call_id))
    assert (made["state"], made["credits"], made["entry_id"], made["balance"]) == ("released", 0, None, 1000)
    assert customer.standing() == (1_000_000, 0)
    assert cli.call(call.call_id).usage_source is None
    cli.entries()


@pytest.mark.parametrize("arguments", [["settle", "--credits", "1"], ["release"]])
def test_hold_of_a_call_that_is_being_served_needs_force(
    cli: CommandLine, customer: Customer, arguments: list[str]
) -> None:
    lock = cli.database.process_lock()
    lock.take_place(customer.process_id)
    call_id = ids.call_text(customer.admit().call_id)
    try:
        refusal = cli("holds", *arguments, call_id).refused()
        assert "still being served" in refusal
        assert "--force" in refusal
        assert customer.standing() == (1_000_000, FLUX_MICROS)
        assert cli("holds", *arguments, call_id, "--force").exit_code == 0
        assert customer.standing()[1] == 0
    finally:
        lock.release()


def test_hold_past_its_deadline_or_of_unknown_cost_needs_no_force(cli: CommandLine, customer: Customer) -> None:
    """The process that served it lives, but has nothing more to say about it."""
    lock = cli.database.process_lock()
    lock.take_place(customer.process_id)
    try:
        late = customer.admit(deadline_in_ms=-1)
        unknown = customer.admit()
        customer.finish(unknown, Verdict("unknown", reason="no_units"))
        for call in (late, unknown):
            assert cli("holds", "release", ids.call_text(call.call_id)).exit_code == 0
    finally:
        lock.release()


def test_the_wait_for_the_certainty_that_a_process_is_dead_is_told_and_not_made_in_vain(
    cli: CommandLine, customer: Customer, engine: str, soon: list[float]
) -> None:
    """On PostgreSQL a restarted server frees the locks of the living, who take them again: so one looks for a while."""
    late = cli("holds", "release", ids.call_text(customer.admit(deadline_in_ms=-1).call_id))
    assert (late.exit_code, late.stderr, soon) == (0, "", [0.0])
    orphaned = cli("holds", "release", ids.call_text(customer.admit().call_id))
    assert orphaned.exit_code == 0
    if engine == "sqlite":  # the kernel knows at once
        assert (orphaned.stderr, soon) == ("", [0.0])
    else:
        assert (orphaned.stderr, soon) == (
            "making sure that nobody serves the call any more (up to 20 s; --force does not wait)\n",
            [20.0],
        )


def test_hold_of_an_unknown_call_is_refused(cli: CommandLine) -> None:
    assert "there is no call" in cli("holds", "release", ids.call_text(77)).refused()
    assert "is no call id" in cli("holds", "settle", "call_77", "--credits", "1").refused()
    cli("holds", "settle", ids.call_text(77)).misused()
