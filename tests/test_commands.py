"""The command line as a whole: help, exit statuses, settings, what goes where; accounts and keys."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from abhiapi import __version__, keys
from abhiapi.commands import options
from abhiapi.errors import BadRequest
from abhiapi.migrations import migrate
from tests.command_line import CommandLine, finish, tree
from tests.harness import Clock, environment
from tests.rows import Customer

COMMANDS = [pytest.param(path, command, id=" ".join(path) or "abhiapi") for path, command in tree()]
ACCOUNT_FIELDS = ["account", "plan", "status", "balance", "held", "available"]
KEY_FIELDS = ["id", "account", "name", "masked", "status", "created_at", "last_used_at", "expires_at",
    "day_limit", "month_limit", "day_spent", "month_spent", "models",
]  # fmt: skip
NEW_KEY_FIELDS = ["key", "id", "account", "name", "expires_at"]
NOT_A_DATABASE = "this is a letter and no database, and long enough to be taken for neither\n" * 100


@pytest.fixture
def cli(tmp_path: Path, database_url: str) -> CommandLine:
    return CommandLine(tmp_path, database_url)


# --- the whole --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_every_help_has_a_summary_and_examples_that_name_the_command(
    cli: CommandLine, path: tuple[str, ...], command: click.Command
) -> None:
    done = cli(*path, "--help")
    assert done.exit_code == 0
    assert re.search(r"\n  [A-Z][^\n]+[.:]\n", done.stdout), "no summary"
    block = done.stdout.split("  Examples:\n")[1].split("\n\n")[0]
    assert " ".join(("abhiapi", *path)) in block
    for argument in (param for param in command.params if isinstance(param, click.Argument)):
        words = argument.human_readable_name
        assert words in done.stdout.split("\n\n", 1)[1].replace(block, ""), f"{words} is not explained"


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_every_option_of_an_example_exists(cli: CommandLine, path: tuple[str, ...], command: click.Command) -> None:
    """An example that cannot be pasted is worse than none."""
    commands = dict(tree())
    for line in (command.help or "").split("Examples:")[-1].splitlines():
        for words in re.findall(r"abhiapi ([^|>)]+)", line):
            named: tuple[str, ...] = ()
            for word in words.split():
                if (*named, word) not in commands:
                    break
                named = (*named, word)
            known = {option for param in commands[named].params for option in param.opts} | {"--help"}
            assert named, line
            assert set(re.findall(r"(?<!\S)--[a-z-]+", words)) <= known, line


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_every_command_that_prints_takes_json(cli: CommandLine, path: tuple[str, ...], command: click.Command) -> None:
    if not isinstance(command, click.Group) and path not in {("serve",), ("sandbox",)}:
        assert "--json" in [option for param in command.params for option in param.opts]


def test_help_of_the_program_tells_of_shell_completion(cli: CommandLine) -> None:
    shown = cli("--help").stdout
    for shell in ("bash", "zsh", "fish"):
        assert f"_ABHIAPI_COMPLETE={shell}_source abhiapi" in shown


def test_completion_completes_commands_without_a_database(cli: CommandLine) -> None:
    done = finish(cli.start(_ABHIAPI_COMPLETE="bash_complete", COMP_WORDS="abhiapi le", COMP_CWORD="1"))
    assert done.stdout.split() == ["plain,ledger"]
    assert not cli.path.exists()


def test_version_is_the_package_s(cli: CommandLine) -> None:
    assert cli("--version").stdout == f"abhiapi {__version__}\n"


def test_help_starts_without_the_heavy_libraries(tmp_path: Path) -> None:
    """Shell completion asks at every Tab."""
    code = "import sys, abhiapi.commands; print(*sys.modules)"
    script = tmp_path / "modules.py"
    script.write_text(code)
    loaded = finish(_python(script)).stdout.split()
    assert "abhiapi.commands" in loaded
    assert not {"flask", "gevent", "requests", "sqlalchemy"} & set(loaded)


def test_commands_start_without_a_server_s_libraries(cli: CommandLine, tmp_path: Path) -> None:
    script = tmp_path / "modules.py"
    script.write_text(
        "import sys\nfrom abhiapi.commands import main\n"
        "main(['topup', 'acme', '5'], standalone_mode=False)\nprint(*sys.modules)"
    )
    cli("accounts", "create", "acme")
    done = finish(_python(script, **cli.settings))
    assert "abhiapi.ledger" in done.stdout.split(), done.stderr
    assert not {"flask", "gevent", "requests"} & set(done.stdout.split())


def test_new_database_is_created_and_named_on_stderr(tmp_path: Path) -> None:
    cli = CommandLine(tmp_path / "new" / "folder")
    done = cli("accounts", "list", "--json")
    assert (done.exit_code, done.json) == (0, [])
    assert done.stderr == f"created the database {cli.path}\n"
    assert cli("accounts", "list", "--json").stderr == ""


def test_every_bad_setting_is_told_at_once_with_status_2(cli: CommandLine) -> None:
    done = cli("balance", "acme", ABHIAPI_MARGIN="much", ABHIAPI_CONCURRENCY="0", FAL_KEY="two words")
    assert done.exit_code == 2
    assert [line.split()[1] for line in done.stderr.splitlines()] == [
        "FAL_KEY",
        "ABHIAPI_MARGIN",
        "ABHIAPI_CONCURRENCY",
    ]
    assert "two words" not in done.stderr
    assert not cli.path.exists()


def test_file_that_is_no_database_is_refused_and_left_alone(cli: CommandLine) -> None:
    cli.path.write_text(NOT_A_DATABASE)
    assert "is not a database" in cli("accounts", "list").refused()
    assert cli.path.read_text() == NOT_A_DATABASE


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["keys", "nonsense"], ["topup"], ["accounts", "list", "--nonsense"]]
)
def test_wrong_usage_exits_with_2(cli: CommandLine, arguments: list[str]) -> None:
    assert "Try 'abhiapi" in cli(*arguments).misused()


def test_bugs_keep_their_traceback(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("abhiapi.accounts.everyone", broken)
    with pytest.raises(ZeroDivisionError):
        cli("accounts", "list")


@pytest.mark.engines
def test_tables_keep_terminals_safe_from_what_is_in_them(cli: CommandLine, clock: Clock) -> None:
    """A row written by another program cannot move the cursor."""
    migrate(cli.database)
    customer = Customer.new(cli.database, clock, name="acme")
    customer.topup(5, note="\x1b[2Jgone\n")
    assert r"\x1b[2Jgone\n" in cli("ledger", "show", "acme").stdout


# --- accounts ---------------------------------------------------------------------------------------------------


@pytest.mark.engines
def test_account_shapes_are_the_contract_s(cli: CommandLine) -> None:
    made = cli.json("accounts", "create", "acme", "--plan", "pro")
    assert list(made) == ACCOUNT_FIELDS
    assert made == {"account": "acme", "plan": "pro", "status": "active", "balance": 0, "held": 0, "available": 0}
    assert cli.json("accounts", "show", "acme") == made
    assert cli.json("accounts", "list") == [made]
    assert cli.json("accounts", "suspend", "acme") == made | {"status": "suspended"}
    assert cli.json("accounts", "resume", "acme") == made
    assert cli.json("accounts", "plan", "acme", "free") == made | {"plan": "free"}
    assert list(cli.json("balance", "acme")) == ["account", "balance", "held", "available"]


@pytest.mark.engines
def test_account_is_known_by_name_by_key_and_by_key_id(cli: CommandLine) -> None:
    key = cli.json("keys", "create", "acme")["key"]
    for text in ("acme", key, "key_1"):
        assert cli.json("balance", text)["account"] == "acme"


@pytest.mark.engines
def test_account_exists_once(cli: CommandLine) -> None:
    cli("accounts", "create", "acme")
    assert "'acme'" in cli("accounts", "create", "acme").refused()
    assert len(cli.json("accounts", "list")) == 1


@pytest.mark.parametrize("name", ["key_7", "sk-fal-mine", " acme", "a" * 65])
def test_account_cannot_have_a_name_that_is_mistaken_for_something_else(cli: CommandLine, name: str) -> None:
    cli("accounts", "create", name).refused()
    assert cli.json("accounts", "list") == []


@pytest.mark.engines
@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "\x1b[2J", "\udcff"])
def test_account_s_name_is_a_line_of_text(cli: CommandLine, name: str) -> None:
    assert "it " in cli("accounts", "create", name).misused()


@pytest.mark.engines
@pytest.mark.parametrize("command", ["accounts show", "accounts suspend", "balance", "ledger show", "keys list"])
def test_unknown_account_is_named_with_a_hint(cli: CommandLine, command: str) -> None:
    refusal = cli(*command.split(), "acem").refused()
    assert "'acem'" in refusal
    assert "`abhiapi accounts list`" in refusal


def test_unknown_plan_is_wrong_usage(cli: CommandLine) -> None:
    cli("accounts", "create", "acme", "--plan", "gold").misused()


# --- keys -------------------------------------------------------------------------------------------------------


@pytest.mark.engines
def test_new_key_is_alone_on_stdout_and_works(cli: CommandLine, clock: Clock) -> None:
    done = cli("keys", "create", "acme")
    (key,) = done.lines
    assert "created the account 'acme'" in done.stderr
    assert key not in done.stderr
    caller = cli.database.read(lambda tx: keys.authenticate(tx, key, now_ms=clock.now_ms))
    assert caller.account == "acme"
    assert "created the account" not in cli("keys", "create", "acme").stderr


@pytest.mark.engines
def test_key_shapes_are_the_contract_s(cli: CommandLine) -> None:
    made = cli.json("keys", "create", "acme", "--name", "production", "--expires", "2099-12-31")
    assert list(made) == NEW_KEY_FIELDS
    assert made | {"key": ""} == {
        "key": "",
        "id": "key_1",
        "account": "acme",
        "name": "production",
        "expires_at": "2099-12-31T23:59:59.999Z",
    }
    (listed,) = cli.json("keys", "list", "acme")
    assert list(listed) == KEY_FIELDS
    assert listed["masked"] == f"sk-fal-...{made['key'][-4:]}"
    for command, status in (("disable", "disabled"), ("enable", "active"), ("revoke", "revoked")):
        assert cli.json("keys", command, "key_1") == listed | {"status": status}


@pytest.mark.engines
def test_keys_are_listed_of_one_account_or_of_all(cli: CommandLine) -> None:
    for account in ("acme", "bolt", "acme"):
        cli("keys", "create", account)
    assert [row["id"] for row in cli.json("keys", "list")] == ["key_1", "key_2", "key_3"]
    assert [row["id"] for row in cli.json("keys", "list", "acme")] == ["key_1", "key_3"]
    assert [row["id"] for row in cli.json("keys", "list", "key_2")] == ["key_2"]


@pytest.mark.engines
def test_revoked_key_never_comes_back(cli: CommandLine) -> None:
    cli("keys", "create", "acme")
    cli("keys", "revoke", "key_1")
    assert "never comes back" in cli("keys", "enable", "key_1").refused()
    assert "revoked" in cli("keys", "rotate", "key_1").refused()


@pytest.mark.engines
def test_rotated_key_works_for_its_grace(cli: CommandLine) -> None:
    old = cli.json("keys", "create", "acme", "--name", "production")
    new = cli.json("keys", "rotate", old["key"], "--grace", "24h")
    assert list(new)[: len(NEW_KEY_FIELDS)] == NEW_KEY_FIELDS
    assert (new["id"], new["account"], new["name"], new["status"]) == ("key_2", "acme", "production", "active")
    assert new["key"] != old["key"]
    before, after = cli.json("keys", "list")
    assert before == new["replaces"]
    assert (before["status"], after["status"]) == ("active", "active")
    assert before["expires_at"] is not None
    assert after["expires_at"] is None


@pytest.mark.engines
def test_rotated_key_without_grace_stops_at_once(cli: CommandLine) -> None:
    cli("keys", "create", "acme")
    done = cli("keys", "rotate", "key_1")
    assert "key_1 has stopped working" in done.stderr
    assert [row["status"] for row in cli.json("keys", "list")] == ["expired", "active"]
    assert [line for line in done.lines if keys.is_well_formed(line)] == done.lines


@pytest.mark.engines
def test_key_is_shown_once_and_stored_nowhere(cli: CommandLine) -> None:
    """Neither lists, messages, refusals nor a dump of the database hold a key."""
    first = cli("keys", "create", "acme").lines[0]
    second = cli("keys", "rotate", first, "--grace", "1h").lines[0]
    stranger = keys.new_key()
    cli("topup", second, "5")
    said = [
        cli(*arguments)
        for key in (first, second, stranger)
        for arguments in (
            ["keys", "list"],
            ["keys", "list", key, "--json"],
            ["keys", "create", stranger],
            ["keys", "disable", key],
            ["keys", "revoke", stranger],
            ["accounts", "create", key],
            ["accounts", "show", key],
            ["balance", key, key],
            [key],
            ["topup", key, key],
            ["calls", "show", key],
            ["estimate", key],
            ["usage", "--since", key],
            ["keys", "create", "acme", "--expires", key],
            ["ledger", "export"],
        )
    ]
    everything = "".join(done.stdout + done.stderr for done in said) + cli.dump()
    for key in (first, second, stranger):
        assert key not in everything
        assert key[7:] not in everything
    assert len(cli.json("accounts", "list")) == 1


@pytest.mark.engines
@pytest.mark.parametrize("text", ["key_9", "9", "sk-fal-short", "", "\udcff"])
def test_unknown_key_is_refused(cli: CommandLine, text: str) -> None:
    done = cli("keys", "revoke", text)
    assert done.exit_code == (1 if text.strip() and text.isprintable() else 2)
    assert done.stdout == ""


@pytest.mark.parametrize("text", ["soon", "90", "90x", "-90d", "0d", "2020-01-01", "2026-13-01", "999999w", ""])
def test_expiry_that_means_nothing_is_wrong_usage(cli: CommandLine, text: str) -> None:
    assert "--expires" in cli("keys", "create", "acme", "--expires", text).misused()
    assert cli.json("accounts", "list") == []


@pytest.mark.parametrize("text", ["", "24", "tomorrow", "-1h"])
def test_grace_that_means_nothing_is_wrong_usage(cli: CommandLine, text: str) -> None:
    cli("keys", "create", "acme")
    assert "--grace" in cli("keys", "rotate", "key_1", "--grace", text).misused()
    assert [row["status"] for row in cli.json("keys", "list")] == ["active"]


@pytest.mark.engines
def test_key_works_through_the_day_on_which_it_expires(cli: CommandLine) -> None:
    assert cli.json("keys", "create", "acme", "--expires", "9999-12-31")["expires_at"] == "9999-12-31T23:59:59.999Z"


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("30s", 30_000), ("15m", 900_000), ("24h", 86_400_000), ("90d", 7_776_000_000), ("2w", 1_209_600_000), ("0", 0)],
)
def test_duration_is_a_number_and_a_unit(text: str, milliseconds: int) -> None:
    assert options.parse_duration_ms(text) == milliseconds


@pytest.mark.parametrize("parse", [options.parse_duration_ms, lambda text: options.parse_expiry_ms(text, now_ms=0)])
@pytest.mark.parametrize("text", ["24", "h", "1.5h", "24 h", "24H", "-1h", "\uff11h", "36501d", "9" * 5000 + "d"])
def test_duration_that_is_none_is_refused_with_the_spelling_expected(parse: Callable[[str], int], text: str) -> None:
    with pytest.raises(BadRequest, match=r"write a|hundred years"):
        parse(text)


def _python(script: Path, **settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(script)],
        env=environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
