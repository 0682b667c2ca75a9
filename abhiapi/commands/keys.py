"""`keys`: who may call. A key is printed once, when it is made; afterwards only its mask is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import (
    Text,
    account_argument,
    json_option,
    key_argument,
    parse_duration_ms,
    parse_expiry_ms,
    usage_error,
)
from abhiapi.commands.output import print_json, print_one, print_rows, say
from abhiapi.errors import BadRequest
from abhiapi.ids import key_text, time_text

if TYPE_CHECKING:
    from abhiapi.db import Tx
    from abhiapi.keys import Key

COLUMNS = ("id", "account", "name", "masked", "status", "last_used_at", "expires_at")


@click.group()
def keys() -> None:
    """Keys: who may call, and on whose credit.

    A key is shown once, when it is created. Every change holds for the very next request of a running server.

    \b
    Examples:
      abhiapi keys create acme --name production
      abhiapi keys list acme
      abhiapi keys rotate key_1 --grace 24h
    """


@keys.command("create")
@account_argument
@click.option("--name", type=Text(64), help="A label, to tell the account's keys apart.")
@click.option("--expires", metavar="WHEN", help="90d, 12h ... from now, or the last day it works: 2026-12-31 (UTC).")
@json_option
def create_key(account: str, name: str | None, expires: str | None, as_json: bool) -> None:
    """Create a key and print it, once and never again.

    ACCOUNT is the account's name; a new account is made if there is none of that name.

    \b
    Examples:
      abhiapi keys create acme
      KEY=$(abhiapi keys create acme --name production --expires 90d)
    """
    now = session.now_ms()
    expires_at = None
    if expires is not None:
        try:
            expires_at = parse_expiry_ms(expires, now_ms=now)
        except BadRequest as error:
            raise usage_error("--expires", error) from error

    def op(tx: Tx) -> tuple[str, Key, bool]:
        known = session.account if session.looks_like_key(account) else session.find_account
        owner = known(tx, account)
        is_new = owner is None
        if owner is None:
            owner = library.accounts.create(tx, account, now_ms=now)
        made, row = library.keys.create(tx, owner.account_id, name=name, expires_at=expires_at, now_ms=now)
        return made, row, is_new

    made, row, is_new = session.write(op)
    if is_new:
        say(f"created the account {row.account!r}; it has no credit yet (abhiapi topup)")
    say(f"{key_text(row.key_id)} of {row.account!r}: shown this once, keep it safe")
    if as_json:
        print_json(library.shapes.new_key(made, row))
    else:
        click.echo(made)


@keys.command("list")
@click.argument("account", required=False, type=Text())
@json_option
def list_keys(account: str | None, as_json: bool) -> None:
    """List keys, masked.

    ACCOUNT, if given, is an account's name or one of its keys; without it all keys are listed.

    \b
    Examples:
      abhiapi keys list
      abhiapi keys list acme --json
    """

    def op(tx: Tx) -> list[Key]:
        return library.keys.listed(tx, None if account is None else session.account(tx, account).account_id)

    rows = session.read(op)
    now = session.now_ms()
    print_rows(
        [library.shapes.key(row, now_ms=now) for row in rows],
        COLUMNS,
        as_json=as_json,
        none="no keys yet: `abhiapi keys create ACCOUNT` makes one",
    )


@keys.command("disable")
@key_argument
@json_option
def disable_key(key: str, as_json: bool) -> None:
    """Refuse a key with 403 until it is enabled again.

    KEY is the key's id (key_1), or the key itself.

    \b
    Examples:
      abhiapi keys disable key_1
    """
    _set_status(key, "disabled", as_json=as_json)


@keys.command("enable")
@key_argument
@json_option
def enable_key(key: str, as_json: bool) -> None:
    """Let a disabled key call again.

    KEY is the key's id (key_1), or the key itself.

    \b
    Examples:
      abhiapi keys enable key_1
    """
    _set_status(key, "active", as_json=as_json)


@keys.command("revoke")
@key_argument
@json_option
def revoke_key(key: str, as_json: bool) -> None:
    """Refuse a key for ever; this cannot be undone.

    KEY is the key's id (key_1), or the key itself. The account's credit stays.

    \b
    Examples:
      abhiapi keys revoke key_1
    """
    _set_status(key, "revoked", as_json=as_json)


@keys.command("rotate")
@key_argument
@click.option(
    "--grace", metavar="DURATION", default="0", help="How long the old key still works: 24h. Default: not at all."
)
@json_option
def rotate_key(key: str, grace: str, as_json: bool) -> None:
    """Replace a key by a new one, and print that, once and never again.

    KEY is the old key's id (key_1), or the old key itself. The new one has its account, label and expiry; the
    account's credit is not touched. Without --grace the old key stops working at once.

    \b
    Examples:
      abhiapi keys rotate key_1 --grace 24h
    """
    try:
        grace_ms = parse_duration_ms(grace)
    except BadRequest as error:
        raise usage_error("--grace", error) from error
    now = session.now_ms()

    def op(tx: Tx) -> tuple[str, Key, Key]:
        old = session.key(tx, key)
        made, row = library.keys.rotate(tx, old, grace_ms=grace_ms, now_ms=now)
        return made, row, library.keys.by_id(tx, old.key_id)

    made, row, old = session.write(op)
    until = "has stopped working" if not grace_ms else f"works until {time_text(old.expires_at)}"
    say(f"{key_text(row.key_id)} of {row.account!r}: shown this once, keep it safe; {key_text(old.key_id)} {until}")
    if as_json:
        replaced: dict[str, Any] = {"replaces": library.shapes.key(old, now_ms=now)}
        print_json(library.shapes.new_key(made, row) | library.shapes.key(row, now_ms=now) | replaced)
    else:
        click.echo(made)


def _set_status(text: str, status: str, *, as_json: bool) -> None:
    row = session.write(lambda tx: library.keys.set_status(tx, session.key(tx, text), status))
    print_one(library.shapes.key(row, now_ms=session.now_ms()), as_json=as_json)
