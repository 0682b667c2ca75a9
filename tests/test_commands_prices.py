"""The commands about prices: `sync`, `diff`, `check`, `replay`, patterns, against a real simulator."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from abhiapi import costs, fal_prices
from abhiapi.commands import session
from abhiapi.price_terms import FalPrice
from tests.command_line import CommandLine, Done
from tests.harness import Clock
from tests.rows import FLUX_MICROS, MODEL, Customer, credit, settled
from tests.sandbox_client import RULES, Fal, sim, simulator_url

__all__ = ["sim", "simulator_url"]  # fixtures

KINDS = ("new", "changed", "gone", "refused", "placeholder", "unpriced")
KLING = "fal-ai/kling-video/v2.6/pro/text-to-video"


@pytest.fixture
def cli(tmp_path: Path, database_url: str, simulator_url: str) -> CommandLine:
    made = CommandLine(tmp_path, database_url)
    made.settings["ABHIAPI_FAL_API_URL"] = f"{simulator_url}/v1"
    return made


@pytest.fixture
def customer(cli: CommandLine) -> Customer:
    cli("prices", "list")
    return Customer.new(cli.database, Clock(session.now_ms()), credits=100_000)


def order(sim: Fal, times: int = 1, path: str = "v1/models/pricing", **weather: Any) -> None:
    sim.order(*[{"match": path, **weather}] * times).raise_for_status()


def counts(done: Done) -> dict[str, int]:
    return {kind: len(done.json[kind]) for kind in KINDS if done.json[kind]}


def words(cli: CommandLine) -> dict[str, FalPrice]:
    return {word.model: word for word in cli.database.read(fal_prices.newest)}


def append(cli: CommandLine, model: str, price: str | None, standing: Any = "priced", unit: str = "images") -> None:
    word = FalPrice(model, unit, None if price is None else Decimal(price), standing, "fal api", "")
    cli.database.write(lambda tx: fal_prices.append(tx, [word], now_ms=1))


@pytest.mark.engines
def test_sync_takes_all_prices_over_once(cli: CommandLine, sim: Fal) -> None:
    first = cli("prices", "sync", "--json")
    assert first.exit_code == 0
    assert (first.json["listed"], first.json["priced"], first.json["written"]) == (len(RULES),) * 3
    assert f"asked fal for the prices of {len(RULES)} models" in first.stderr
    assert set(words(cli)) == set(RULES)
    again = cli("prices", "sync", "--json")
    assert (again.exit_code, again.json["written"], counts(again)) == (0, 0, {})
    assert cli.json("prices", "show", MODEL)["source"] == "fal api"


@pytest.mark.engines
def test_diff_shows_what_a_sync_would_change_and_writes_nothing(cli: CommandLine, sim: Fal) -> None:
    cli("prices", "sync")
    before = cli.dump()
    order(sim, prices_factor="1.5")
    done = cli("prices", "diff", "--json")
    assert (done.exit_code, counts(done)) == (0, {"changed": len(RULES)})
    flux = next(row for row in done.json["changed"] if row["model"] == MODEL)
    assert (flux["before_usd"], flux["after_usd"]) == (Decimal("0.025"), Decimal("0.0375"))
    assert cli.dump() == before
    order(sim, prices_factor="1.5")
    assert any(line.split()[:2] == ["changed", MODEL] for line in cli("prices", "diff").lines)


@pytest.mark.engines
def test_a_price_that_jumped_is_refused_by_name_until_it_is_forced(cli: CommandLine, sim: Fal) -> None:
    cli("prices", "sync")
    order(sim, prices_factor="150")
    refused = cli("prices", "sync")
    assert refused.exit_code == 1
    assert "more than 100 times" in refused.stdout
    assert f"{len(RULES)} prices were refused" in refused.stderr
    assert cli.json("prices", "show", MODEL)["fal_unit_price_usd"] == Decimal("0.025")
    order(sim, prices_factor="150")
    assert cli("prices", "sync", "--force").exit_code == 0
    assert cli.json("prices", "show", MODEL)["fal_unit_price_usd"] == Decimal("3.75")
    fallen = cli("prices", "sync")  # back again, which is a fall to less than a hundredth
    assert fallen.exit_code == 1


@pytest.mark.parametrize(
    ("path", "weather"),
    [
        ("v1/models/pricing", {"prices": "currency"}),
        ("v1/models/pricing", {"prices": "negative"}),
        ("v1/models/pricing", {"prices": "placeholder"}),
        ("v1/models/pricing", {"prices": "shape"}),
        ("v1/models/pricing", {"prices": "partial"}),
        ("v1/models/pricing", {"body": "html"}),
        ("v1/models/pricing", {"body": "array"}),
        ("v1/models/pricing", {"body": "empty"}),
        ("v1/models/pricing", {"status": 403}),
        ("v1/models", {"prices": "repeat"}),
        ("v1/models", {"prices": "endless"}),
        ("v1/models", {"prices": "partial"}),
        ("v1/models", {"status": 401}),
        ("v1/models", {"body": "nested"}),
    ],
)
def test_a_bad_or_partial_answer_keeps_all_old_prices(
    cli: CommandLine, sim: Fal, path: str, weather: dict[str, Any]
) -> None:
    """failures.md 20: exit 1, the reason in a line, and not one row."""
    cli("prices", "sync")
    before = cli.dump()
    order(sim, 5, path, **weather)
    done = cli("prices", "sync")
    sim.session.delete(f"{sim.url}/_sandbox/weather", timeout=10)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert cli.dump() == before
    assert cli.json("prices", "show", MODEL)["unit_price_usd"] == Decimal("0.02625")


def test_without_a_credential_fal_is_not_asked(cli: CommandLine) -> None:
    done = cli("prices", "sync", FAL_KEY="")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "FAL_KEY" in done.stderr


@pytest.mark.engines
def test_own_prices_of_a_pattern(cli: CommandLine) -> None:
    changed = cli.json("prices", "set", "fal-ai/kling-video/*", "--margin", "0.2")
    assert len(changed) > 10
    assert all(row["model"].startswith("fal-ai/kling-video/") and row["margin"] == Decimal("0.2") for row in changed)
    assert cli.json("prices", "show", KLING)["unit_price_usd"] == Decimal("0.168")
    cli.json("prices", "set", KLING, "--margin", "0.5")
    cli.json("prices", "set", "fal-ai/kling-video/v2.6/*", "--margin", "0.3")
    cli.json("prices", "set", "*", "--margin", "0.4")
    assert cli.json("prices", "show", KLING)["margin"] == Decimal("0.5")
    assert cli.json("prices", "show", KLING.replace("text", "image"))["margin"] == Decimal("0.3")
    assert cli.json("prices", "show", MODEL)["margin"] == Decimal("0.4")
    assert [row["margin"] for row in cli.json("prices", "unset", KLING)] == [Decimal("0.3")]
    cli.json("prices", "unset", "fal-ai/kling-video/v2.6/*")
    assert cli.json("prices", "show", KLING)["margin"] == Decimal("0.2")
    cli("prices", "unset", "fal-ai/nothing/*").refused()


@pytest.mark.parametrize("pattern", ["fal-ai/*/x", "fal-ai/kling*", "**", "../*", "fal-ai//*", "fal-ai/ */*"])
def test_what_is_no_pattern_is_refused(cli: CommandLine, pattern: str) -> None:
    cli("prices", "list")
    assert "such as fal-ai/kling-video/*" in cli("prices", "set", pattern, "--margin", "0.2").refused()


@pytest.mark.engines
def test_a_pattern_that_raises_a_price_a_hundred_times_needs_a_word(cli: CommandLine) -> None:
    cli("prices", "list")
    arguments = ("prices", "set", "fal-ai/flux/*", "--unit-price", "9", "--unit", "megapixels")
    assert "fal-ai/flux/dev" in cli(*arguments).refused()
    assert cli.json("prices", "show", MODEL)["unit_price_usd"] == Decimal("0.02625")
    assert cli(*arguments, "--force").exit_code == 0


@pytest.mark.engines
def test_check_finds_nothing_wrong_with_fals_prices_and_our_margin(cli: CommandLine, sim: Fal) -> None:
    append(cli_ready(cli), "acme/fine", "0.04")
    cli("prices", "sync")
    problems = cli("prices", "check", "--json").json["problems"]
    assert {row["problem"] for row in problems} == {"placeholder"}  # those that ship as such, which it does not list
    assert all("placeholder" in row["what"] for row in problems)


def cli_ready(cli: CommandLine) -> CommandLine:
    assert cli("prices", "list").exit_code == 0
    return cli


@pytest.mark.engines
def test_check_lists_every_price_that_needs_the_operator(cli: CommandLine, customer: Customer) -> None:
    cli("prices", "set", MODEL, "--unit-price", "0.02", "--unit", "megapixels")
    append(cli, "acme/free", "0", "placeholder", "compute seconds")
    append(cli, "acme/silent", None, "unpriced", "")
    append(cli, "acme/gone", None, "gone")
    customer.settle(90_000)
    done = cli("prices", "check", "--json")
    assert (done.exit_code, done.json["ok"]) == (1, False)
    found = {(row["problem"], row["model"]) for row in done.json["problems"] if row["unit"] != "compute seconds"}
    assert found == {
        ("below cost", MODEL),
        ("hold too small", MODEL),
        ("placeholder", "acme/free"),
        ("without a price", "acme/silent"),
    }
    text = cli("prices", "check")
    assert text.exit_code == 1
    assert "held 26.25 credits and cost 90" in text.stdout
    cli("prices", "set", MODEL, "--margin", "0")
    cli("prices", "set", "acme/free", "--unit-price", "0.1", "--unit", "seconds")
    cli("prices", "set", "acme/silent", "--unit-price", "0.1", "--unit", "seconds")
    customer.settle(20_000)
    left = cli("prices", "check", "--json").json["problems"]
    assert {row["problem"] for row in left} == {"placeholder"}
    assert all(row["unit"] == "compute seconds" for row in left)


@pytest.mark.engines
def test_check_sees_a_fal_price_that_rose_above_ones_own(cli: CommandLine) -> None:
    cli("prices", "set", MODEL, "--unit-price", "0.03", "--unit", "megapixels")
    assert "below cost" not in cli("prices", "check").stdout
    append(cli, MODEL, "0.031", unit="megapixels")
    rows = [row for row in cli("prices", "check", "--json").json["problems"] if row["problem"] == "below cost"]
    assert [(row["model"], row["unit_price_usd"], row["fal_unit_price_usd"]) for row in rows] == [
        (MODEL, Decimal("0.03"), Decimal("0.031"))
    ]


@pytest.mark.engines
def test_replay_tells_what_another_margin_would_have_earned(cli: CommandLine, customer: Customer) -> None:
    for _ in range(3):
        customer.settle()
    customer.finish(customer.admit(), settled(10_000, None))
    customer.finish(customer.admit(), settled(7, 1))
    done = cli("prices", "replay", "--margin", "0.1", "--json")
    (row,) = done.json["rows"]
    cost = Decimal("0.075000001")
    assert row == {
        "group": MODEL,
        "calls": 5,
        "credits": Decimal("88.757"),
        "fal_cost_usd": cost,
        "cost_usd": Decimal("0.088757"),
        "margin_usd": Decimal("0.088757") - cost,
        "would_cost_usd": cost * Decimal("1.1"),
        "would_margin_usd": cost * Decimal("0.1"),
        "replayed": True,
    }
    assert done.json["total"]["would_margin_usd"] == cost * Decimal("0.1")
    assert FLUX_MICROS * 3 + 10_007 == 88_757
    assert MODEL in cli("prices", "replay", "--margin", "0.1").stdout
    assert cli.json("prices", "replay", "--margin", "0.1", "--since", "2999-01-01")["rows"] == []


@pytest.mark.engines
def test_usage_whose_cost_is_not_known_is_left_as_it_was(cli: CommandLine, customer: Customer) -> None:
    customer.finish(customer.admit(), settled(10_000, None))
    done = cli("prices", "replay", "--margin", "0.5")
    assert "not known" in done.stderr
    (row,) = cli.json("prices", "replay", "--margin", "0.5")["rows"]
    assert (row["would_cost_usd"], row["replayed"]) == (Decimal("0.01"), False)


@pytest.mark.parametrize("margin", ["-0.1", "10%", "1e3", "nan", ""])
def test_a_margin_that_is_none_is_wrong_usage(cli: CommandLine, margin: str) -> None:
    cli("prices", "list")
    assert "--margin" in cli("prices", "replay", "--margin", margin).misused()


def test_the_price_of_a_model_covers_its_stream(cli: CommandLine) -> None:
    """The address of a stream, pasted: what POST /v1/estimate answers, and what a call holds."""
    for command in (["estimate"], ["prices", "show"]):
        told = cli(*command, "fal-ai/flux/dev/stream", "--json")
        assert told.exit_code == 0
        assert told.stdout == cli(*command, "fal-ai/flux/dev", "--json").stdout


def test_estimate_tells_its_basis(cli: CommandLine, customer: Customer) -> None:
    """A guess, the dearest call, and what 99 of 100 cost: each says that it is."""
    guessed = "credits, a guess until 100 calls of this model have been charged"
    append(cli, "acme/new", "0.04", unit="whatever")
    told = cli("estimate", "acme/new", "--json", ABHIAPI_DEFAULT_HOLD="250").json
    assert told == {"model": "acme/new", "credits": 250, "basis": f"250 {guessed}"}
    call = customer.settle()

    def charge(credits: int) -> None:
        now = customer.clock.now_ms
        cli.database.write(
            lambda tx: costs.note(tx, "acme/new", call.call_id, credit(credits), held_micros=credit(250), now_ms=now)
        )

    charge(150)
    told = cli.json("estimate", "acme/new")
    assert (told["credits"], told["basis"]) == (159, "the dearest of 1 call of this model: up to 159 credits")
    for _ in range(199):
        charge(2)
    told = cli.json("estimate", "acme/new")
    assert (told["credits"], told["basis"]) == (
        2,
        "99 of 100 calls of this model cost up to 2 credits (200 calls seen)",
    )
    assert cli("estimate", "acme/new", "--json", ABHIAPI_LEARN_HOLDS="0").json["credits"] == 100
