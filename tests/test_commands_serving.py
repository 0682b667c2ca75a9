"""Commands beside a running server: what they do holds for the very next call, and they never get in its way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import CommandLine
from tests.harness import Server, until
from tests.postgres import Postgres

pytestmark = pytest.mark.engines

UPSCALER = "/fal-ai/creative-upscaler"  # billed in compute seconds, which only fal can know


@pytest.fixture
def server(engine: str, own_servers: Callable[[str], Server]) -> Server:
    return own_servers(engine)


@pytest.fixture
def cli(server: Server) -> CommandLine:
    return CommandLine(server.folder, server.env["ABHIAPI_DATABASE_URL"])


@pytest.mark.parametrize(
    ("refuse", "allow", "status"),
    [
        (["accounts", "suspend", "{account}"], ["accounts", "resume", "{account}"], 403),
        (["keys", "disable", "{key}"], ["keys", "enable", "{key}"], 403),
        (["adjust", "{account}", "-1000", "--note", "test"], ["adjust", "{account}", "1000", "--note", "test"], 402),
    ],
)
def test_change_holds_for_the_very_next_call(
    server: Server, cli: CommandLine, refuse: list[str], allow: list[str], status: int
) -> None:
    account, key = server.books.account(1000)
    for arguments, expected in ((refuse, status), (allow, 200)):
        words = [word.format(account=account, key=key) for word in arguments]
        assert cli(*words).exit_code == 0
        assert server.post(key).status_code == expected


def test_own_price_holds_for_the_very_next_call(server: Server, cli: CommandLine) -> None:
    _, key = server.books.account(1000)
    for price, credits in (("0.05", 50), ("0.07", 70)):
        cli("prices", "set", "fal-ai/flux/schnell", "--unit-price", price, "--unit", "megapixels")
        assert server.post(key, "/fal-ai/flux/schnell").json()["_billing"]["credits_used"] == credits


def test_rotated_key_serves_beside_the_new_one_until_its_grace_ends(server: Server, cli: CommandLine) -> None:
    _, old = server.books.account(1000)
    new = cli.json("keys", "rotate", old, "--grace", "1h")["key"]
    newest = cli.json("keys", "rotate", new)["key"]
    assert [server.post(key).status_code for key in (old, new, newest)] == [200, 403, 200]


def test_hold_of_unknown_cost_is_settled_beside_the_server(server: Server, cli: CommandLine) -> None:
    account, key = server.books.account(1000)
    body = {"image_url": "https://example.com/photo.jpg", "scale": 2}
    call_id = server.post(key, UPSCALER, body, weather="units=none").headers["x-abhiapi-call-id"]
    (hold,) = [hold for hold in cli.json("holds", "list")["holds"] if hold["account"] == account]
    assert (hold["call_id"], hold["reason"]) == (call_id, "no_units")
    assert cli("doctor").exit_code == 1
    assert cli.json("holds", "settle", call_id, "--credits", "12")["balance"] == 988
    shown = cli.json("calls", "show", call_id)
    assert (shown["status"], shown["state"], shown["usage_source"]) == (200, "settled", "operator")
    assert shown["fal_request_id"]
    assert cli("doctor").exit_code == 0


def test_backup_while_calls_are_served_adds_up_wherever_it_is_restored(
    server: Server, cli: CommandLine, engine: str, tmp_path: Path, postgres: Postgres
) -> None:
    """Each copy is of one moment under load, and a whole ledger: in a file, and in a database of PostgreSQL's."""
    account, key = server.books.account(100_000)
    enough = threading.Event()
    statuses: list[int] = []

    def call() -> None:
        while not enough.is_set():
            statuses.append(server.post(key).status_code)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    try:
        made = []
        for number in range(3):
            since = len(statuses)
            until(lambda since=since: len(statuses) > since, what="more calls have ended")  # type: ignore[misc]
            made.append(cli("backup", str(tmp_path / f"copy-{number}.db"), "--json"))
        refusal = cli("restore", str(tmp_path / "copy-0.db"))
    finally:
        enough.set()
        for caller in callers:
            caller.join()
    assert [done.exit_code for done in made] == [0] * 3
    assert {"sqlite": "a server is running", "postgresql": "is not empty"}[engine] in refusal.refused()
    assert set(statuses) == {200}
    assert len(server.books.calls(account)) == len(statuses)
    assert made[0].json["entries"] < made[2].json["entries"]
    with postgres.fresh(empty=True) as empty:
        for other in (CommandLine(tmp_path / "other"), CommandLine(tmp_path / "other", empty)):
            assert other.json("restore", str(tmp_path / "copy-2.db"))["entries"] == made[2].json["entries"]
            assert other.json("ledger", "verify")["ok"]
    assert cli.json("ledger", "verify")["ok"]
