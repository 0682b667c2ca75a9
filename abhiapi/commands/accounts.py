"""`accounts`: who owns credit, on which plan, and whether it may be spent."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import Text, account_argument, json_option, parse_credits_or_zero, usage_error
from abhiapi.commands.output import print_one, print_rows
from abhiapi.errors import BadRequest
from abhiapi.money import credits

if TYPE_CHECKING:
    from abhiapi.accounts import Account
    from abhiapi.db import Tx
    from abhiapi.shapes import Json

COLUMNS = ("account", "plan", "status", "balance", "held", "available")
PLAN = click.Choice(("free", "pro"))


@click.group()
def accounts() -> None:
    """Accounts: who owns credit.

    An account has a balance, any number of keys, and a plan that says how many calls it may make.

    \b
    Examples:
      abhiapi accounts create acme --plan pro
      abhiapi accounts list
      abhiapi accounts suspend acme
    """


@accounts.command("create")
@click.argument("name", type=Text())
@click.option("--plan", type=PLAN, default="free", show_default=True, help="Decides the limits of its keys.")
@json_option
def create_account(name: str, plan: str, as_json: bool) -> None:
    """Create an account, without credit or keys.

    NAME is what you will call it: 1 to 64 characters, such as a customer's name or number.

    \b
    Examples:
      abhiapi accounts create acme
      abhiapi accounts create acme --plan pro --json
    """
    row = session.write(lambda tx: library.accounts.create(tx, name, plan=plan, now_ms=session.now_ms()))
    print_one(library.shapes.account(row), as_json=as_json)


@accounts.command("list")
@json_option
def list_accounts(as_json: bool) -> None:
    """List all accounts with their balances, in credits.

    \b
    Examples:
      abhiapi accounts list
      abhiapi accounts list --json | jq '.[] | select(.available < 100)'
    """
    rows = session.read(library.accounts.everyone)
    print_rows(
        [library.shapes.account(row) for row in rows],
        COLUMNS,
        as_json=as_json,
        none="no accounts yet: `abhiapi accounts create` or `abhiapi keys create` makes one",
    )


@accounts.command("show")
@account_argument
@json_option
def show_account(account: str, as_json: bool) -> None:
    """Show one account.

    ACCOUNT is its name, or one of its keys.

    \b
    Examples:
      abhiapi accounts show acme
      abhiapi accounts show key_3 --json
    """
    row = session.read(lambda tx: session.account(tx, account))
    print_one(library.shapes.account(row), as_json=as_json)


@accounts.command("suspend")
@account_argument
@json_option
def suspend_account(account: str, as_json: bool) -> None:
    """Refuse an account's calls from now on.

    They get 403; its credit and its keys stay. Calls that are already running are finished and charged. ACCOUNT is
    its name, or one of its keys.

    \b
    Examples:
      abhiapi accounts suspend acme
    """
    _change(account, lambda tx, row: library.accounts.set_status(tx, row.account_id, "suspended"), as_json=as_json)


@accounts.command("resume")
@account_argument
@json_option
def resume_account(account: str, as_json: bool) -> None:
    """Let a suspended account call again.

    ACCOUNT is its name, or one of its keys.

    \b
    Examples:
      abhiapi accounts resume acme
    """
    _change(account, lambda tx, row: library.accounts.set_status(tx, row.account_id, "active"), as_json=as_json)


@accounts.command("plan")
@account_argument
@click.argument("plan", type=PLAN)
@json_option
def change_plan(account: str, plan: str, as_json: bool) -> None:
    """Put an account on another plan, from its next call on.

    ACCOUNT is its name, or one of its keys. PLAN is free or pro; what they allow is set by ABHIAPI_RATE_PER_MINUTE,
    ABHIAPI_CONCURRENCY and their ABHIAPI_PRO_ twins.

    \b
    Examples:
      abhiapi accounts plan acme pro
    """
    _change(account, lambda tx, row: library.accounts.set_plan(tx, row.account_id, plan), as_json=as_json)


@accounts.command("alert")
@account_argument
@click.option("--below", required=True, metavar="CREDITS|none", help="The balance below which you want to hear of it.")
@json_option
def alert_account(account: str, below: str, as_json: bool) -> None:
    """Tell the operator when an account's balance falls below a threshold.

    ACCOUNT is its name, or one of its keys. You are told once, in the log, in /metrics and at
    ABHIAPI_ALERT_WEBHOOK_URL; again only after the balance has been above the threshold in between.

    \b
    Examples:
      abhiapi accounts alert acme --below 500
      abhiapi accounts alert acme --below none
    """
    try:
        below_micros = None if below == "none" else parse_credits_or_zero(below)
    except BadRequest as error:
        raise usage_error("--below", error) from error
    now = session.now_ms()

    def op(tx: Tx) -> Json:
        row = session.account(tx, account)
        library.alerts.set_threshold(tx, row.account_id, row.name, row.balance_micros, below_micros, now_ms=now)
        threshold = None if below_micros is None else credits(below_micros)
        return {**library.shapes.account(row), "alert_below": threshold}

    print_one(session.write(op), as_json=as_json)


def _change(text: str, change: Callable[[Tx, Account], None], *, as_json: bool) -> None:
    """Change the account that ``text`` means, and print it as it is now."""

    def op(tx: Tx) -> Account:
        row = session.account(tx, text)
        change(tx, row)
        return library.accounts.by_id(tx, row.account_id)

    print_one(library.shapes.account(session.write(op)), as_json=as_json)
