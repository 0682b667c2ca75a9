"""`accounts invite`, `accounts operator`, `accounts users`: who may sign in to the dashboard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import Text, account_argument, json_option
from abhiapi.commands.output import print_json, print_one, print_rows, say
from abhiapi.errors import NotFound
from abhiapi.ids import time_text

if TYPE_CHECKING:
    from abhiapi.db import Tx
    from abhiapi.users import Invite, User

COLUMNS = ("email", "account", "operator", "last_login_at", "created_at")
LOCAL_URL = "http://127.0.0.1:8000"
EMAIL = click.argument("email", metavar="EMAIL", type=Text(254))


@click.command("invite")
@account_argument
@EMAIL
@json_option
def invite_user(account: str, email: str, as_json: bool) -> None:
    """Invite somebody to an account's dashboard: print a link that sets their password.

    It works once, for 7 days; an earlier link to the same address stops working. For somebody who has a password
    already it is the way to a new one. ACCOUNT is the account's name, or one of its keys; EMAIL is what they will
    sign in with.

    \b
    Examples:
      abhiapi accounts invite acme ann@example.com
    """

    def op(tx: Tx) -> tuple[str, Invite]:
        owner = session.account(tx, account)
        address = library.users.normal_email(email)
        return library.users.invite(tx, address, account_id=owner.account_id, now_ms=session.now_ms())

    _print_invite(*session.write(op), as_json=as_json)


@click.command("operator")
@EMAIL
@click.option("--remove", is_flag=True, help="They are no operator any more.")
@json_option
def make_operator(email: str, remove: bool, as_json: bool) -> None:
    """Let somebody see and change all accounts on the dashboard.

    EMAIL is what they sign in with. Somebody who is no user yet is invited: their link is printed.

    \b
    Examples:
      abhiapi accounts operator me@example.com
      abhiapi accounts operator me@example.com --remove
    """

    def op(tx: Tx) -> User | tuple[str, Invite]:
        address = library.users.normal_email(email)
        known = library.users.find(tx, address)
        if known is not None:
            return library.users.set_operator(tx, known, not remove)
        if remove:
            raise NotFound(f"there is no user {address}: `abhiapi accounts users` shows those there are")
        return library.users.invite(tx, address, account_id=None, is_operator=True, now_ms=session.now_ms())

    done = session.write(op)
    if isinstance(done, tuple):
        _print_invite(*done, as_json=as_json)
    else:
        print_one(library.shapes.user(done), as_json=as_json)


@click.command("users")
@click.argument("account", required=False, type=Text())
@json_option
def list_users(account: str | None, as_json: bool) -> None:
    """List who may sign in to the dashboard.

    ACCOUNT, if given, is an account's name or one of its keys; without it all users are listed.

    \b
    Examples:
      abhiapi accounts users
      abhiapi accounts users acme --json
    """

    def op(tx: Tx) -> list[User]:
        return library.users.listed(tx, None if account is None else session.account(tx, account).account_id)

    print_rows(
        [library.shapes.user(row) for row in session.read(op)],
        COLUMNS,
        as_json=as_json,
        none="no users yet: `abhiapi accounts invite ACCOUNT EMAIL` makes a link for one",
    )


def _print_invite(token: str, made: Invite, *, as_json: bool) -> None:
    base_url = session.settings().public_url
    link = f"{base_url or LOCAL_URL}/dashboard/invite/{token}"
    whom = f"of {made.account!r}" if made.account is not None else "as an operator"
    say(f"for {made.email} {whom}: works once, until {time_text(made.expires_at)}; send it to nobody else")
    if base_url is None:
        say(f"ABHIAPI_PUBLIC_URL is not set: where people reach this service elsewhere, put that for {LOCAL_URL}")
    if as_json:
        print_json(library.shapes.invite(made, link))
    else:
        click.echo(link)
