"""What commands begin with: the settings, the database, the time, and whom an ACCOUNT, KEY or CALL_ID means."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from abhiapi import ids
from abhiapi.commands import library
from abhiapi.commands.output import say
from abhiapi.errors import NotFound
from abhiapi.redaction import masked

if TYPE_CHECKING:
    from abhiapi.accounts import Account
    from abhiapi.db import Database, Tx
    from abhiapi.keys import Key
    from abhiapi.pricing import Catalogue
    from abhiapi.settings import Settings

T = TypeVar("T")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def settings() -> Settings:
    """The settings of this process's environment. Raises `SettingsError` with every problem."""
    return library.settings.Settings.from_env()


def open_database() -> Database:
    """The database of the settings; created or upgraded if need be, which is said on stderr."""
    database = library.db.database_at(settings().database_url)
    done = library.migrations.migrate(database)
    if done:
        say(done)
    return database


def write(op: Callable[[Tx], T]) -> T:
    """Run ``op`` in a short transaction that is on disk when this returns."""
    return open_database().write(op)


def read(op: Callable[[Tx], T]) -> T:
    return open_database().read(op)


def catalogue(tx: Tx) -> Catalogue:
    """The prices in force just now."""
    return library.prices.catalogue(tx, library.pricing.shipped_rules(), settings(), now_ms=now_ms())


def find_account(tx: Tx, text: str) -> Account | None:
    """An account by its name, or by one of its keys (the key itself or its id)."""
    found = library.accounts.find(tx, text)
    if found is None:
        key = library.keys.find(tx, text)
        found = library.accounts.by_id(tx, key.account_id) if key else None
    return found


def account(tx: Tx, text: str) -> Account:
    """The account that an ACCOUNT argument means. Raises `NotFound`."""
    found = find_account(tx, text)
    if found is not None:
        return found
    if looks_like_key(text):
        raise NotFound(f"no account has the key {masked(text)}: `abhiapi keys list` shows the keys there are")
    raise NotFound(
        f"there is no account {text!r}: `abhiapi accounts list` shows those there are, "
        "`abhiapi accounts create` makes a new one"
    )


def key(tx: Tx, text: str) -> Key:
    """The key that a KEY argument means: a key's id, or the key itself. Raises `NotFound`."""
    found = library.keys.find(tx, text)
    if found is None:
        raise NotFound(f"there is no key {masked(text)}: `abhiapi keys list` shows the ids of those there are")
    return found


def call_id(text: str) -> int:
    """The number of a CALL_ID argument. Raises `NotFound` for what is none."""
    number = ids.parse_call(text)
    if number is None:
        raise NotFound(
            f"{text!r} is no call id such as call_01jd3k9x2m4q7: `abhiapi calls list` and the header "
            "x-abhiapi-call-id of every answer show them"
        )
    return number


def no_such_call(text: str) -> NotFound:
    return NotFound(f"there is no call {text}: `abhiapi calls list` shows the newest")


def looks_like_key(text: str) -> bool:
    return text.startswith("sk-fal-") or ids.parse_key_id(text) is not None
