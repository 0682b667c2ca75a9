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
    parse_credits_or_zero,
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
    from abhiapi.money import Micros
    from abhiapi.shapes import Json

COLUMNS = ("id", "account", "name", "masked", "status", "last_used_at", "expires_at")
LIMIT_COLUMNS = ("day_spent", "day_limit", "month_spent", "month_limit", "models")


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
@click.option("--day-limit", metavar="CREDITS", help="The most it may spend in a day (UTC).")
@click.option("--month-limit", metavar="CREDITS", help="The most it may spend in a month (UTC).")
@json_option
def create_key(
    account: str, name: str | None, expires: str | None, day_limit: str | None, month_limit: str | None, as_json: bool
) -> None:
    """Create a key and print it, once and never again.

    ACCOUNT is the account's name; a new account is made if there is none of that name. Without limits the key may
    spend what the account has.

    \b
    Examples:
      abhiapi keys create acme
      KEY=$(abhiapi keys create acme --name production --expires 90d)
      abhiapi keys create acme --name trial --day-limit 500 --month-limit 5000
    """
    now = session.now_ms()
    in_a_day, in_a_month = _limit("--day-limit", day_limit), _limit("--month-limit", month_limit)
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
        library.spending.set_limits(
            tx, row.key_id, day_limit_micros=in_a_day, month_limit_micros=in_a_month, now_ms=now
        )
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

    ACCOUNT, if given, is an account's name or one of its keys; without it all keys are listed. Where keys have
    spending limits or a list of models, these stand beside them, with what is spent today and this month.

    \b
    Examples:
      abhiapi keys list
      abhiapi keys list acme --json
    """

    now = session.now_ms()

    def op(tx: Tx) -> list[Json]:
        of_account = None if account is None else session.account(tx, account).account_id
        return [_shape(tx, row, now) for row in library.keys.listed(tx, of_account)]

    rows = session.read(op)
    print_rows(
        rows,
        (*COLUMNS, *(column for column in LIMIT_COLUMNS if any(row[column] is not None for row in rows))),
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


@keys.command("limit")
@key_argument
@click.option("--day", metavar="CREDITS|none", help="The most it may spend in a day (UTC).")
@click.option("--month", metavar="CREDITS|none", help="The most it may spend in a month (UTC).")
@json_option
def limit_key(key: str, day: str | None, month: str | None, as_json: bool) -> None:
    """Limit what a key may spend in a day and in a month; none lifts a limit.

    KEY is the key's id (key_1), or the key itself. What running calls hold counts until they end, then what they were
    charged, in the day in which they began; what the key has spent before counts too. A call that does not fit is
    refused with 402 key_limit_reached. A key made by `keys rotate` shares the limits of the one that it replaces.

    \b
    Examples:
      abhiapi keys limit key_1 --day 500 --month 5000
      abhiapi keys limit key_1 --day none
    """
    if day is None and month is None:
        raise click.UsageError("say what to limit: --day, --month or both")
    in_a_day, in_a_month = _limit("--day", day), _limit("--month", month)
    now = session.now_ms()

    def op(tx: Tx) -> Json:
        row = session.key(tx, key)
        was = library.spending.of_key(tx, row.key_id, now_ms=now)
        library.spending.set_limits(
            tx,
            row.key_id,
            day_limit_micros=in_a_day if day is not None or was is None else was.day_limit_micros,
            month_limit_micros=in_a_month if month is not None or was is None else was.month_limit_micros,
            now_ms=now,
        )
        return _shape(tx, row, now)

    print_one(session.write(op), as_json=as_json)


@keys.command("models")
@key_argument
@click.option("--allow", "patterns", multiple=True, metavar="PATTERN", help="A model, or fal-ai/flux/*; several times.")
@click.option("--any", "is_any", is_flag=True, help="Lift the list: any model.")
@json_option
def key_models(key: str, patterns: tuple[str, ...], is_any: bool, as_json: bool) -> None:
    """Say which models a key may call; the list replaces the one before.

    KEY is the key's id (key_1), or the key itself. In a PATTERN * stands for any text; others are refused with 403
    model_not_allowed. Without an option the list is shown. Results of jobs that were submitted before can be fetched.

    \b
    Examples:
      abhiapi keys models key_1 --allow fal-ai/flux/dev --allow 'fal-ai/kling-video/*'
      abhiapi keys models key_1 --any
    """
    if patterns and is_any:
        raise click.UsageError("choose one of --allow and --any")
    now = session.now_ms()

    def op(tx: Tx) -> Json:
        row = session.key(tx, key)
        if patterns or is_any:
            try:
                row = library.keys.set_models(tx, row, patterns)
            except BadRequest as error:
                raise usage_error("--allow", error) from error
        return _shape(tx, row, now)

    print_one(session.write(op) if patterns or is_any else session.read(op), as_json=as_json)


def _limit(option: str, text: str | None) -> Micros | None:
    """Micros of a limit; None for ``none`` and where none was given."""
    if text is None or text == "none":
        return None
    try:
        return parse_credits_or_zero(text)
    except BadRequest as error:
        raise usage_error(option, error) from error


def _shape(tx: Tx, row: Key, now_ms: int) -> Json:
    return library.shapes.key(row, now_ms=now_ms, limits=library.spending.of_key(tx, row.key_id, now_ms=now_ms))


def _set_status(text: str, status: str, *, as_json: bool) -> None:
    now = session.now_ms()

    def op(tx: Tx) -> Json:
        return _shape(tx, library.keys.set_status(tx, session.key(tx, text), status), now)

    print_one(session.write(op), as_json=as_json)
