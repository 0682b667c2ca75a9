"""The key that an account's playground calls with: a row like any key's, so that it is limited, listed and revoked.

Its digest is chance and no text's digest, so no request over the wire can ever present it. A customer who is signed in
calls with it inside the serving process (`admission.Request.inside_account_id`). Functions take an open transaction.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from sqlalchemy import bindparam, insert, update

from abhiapi import keys, tables
from abhiapi.db import Tx
from abhiapi.errors import Refused
from abhiapi.keys import Key

NAME = "playground"

_p = tables.playground_keys.c
_FIRST = insert(tables.playground_keys).values(account_id=bindparam("account"), key_id=bindparam("key"))
_REPLACE = (
    update(tables.playground_keys).where(_p.account_id == bindparam("account")).values(key_id=bindparam("to_key"))
)


def find(tx: Tx, account_id: int) -> Key | None:
    key_id = keys.playground_key_id(tx, account_id)
    return keys.by_id(tx, key_id) if key_id is not None else None


def ensured(tx: Tx, account_id: int, *, now_ms: int, chance: Callable[[int], bytes] = secrets.token_bytes) -> Key:
    """The account's key, made at the first call. One that was stopped since then stays so."""
    found = find(tx, account_id)
    if found is not None:
        return found
    made = keys.create_hidden(tx, account_id, name=NAME, digest=chance(32), now_ms=now_ms)
    tx.run(_FIRST, account=account_id, key=made.key_id)
    return made


def renewed(tx: Tx, account_id: int, *, now_ms: int, chance: Callable[[int], bytes] = secrets.token_bytes) -> Key:
    """Another key in the place of one that never comes back. Raises `Refused` while the old one may."""
    found = ensured(tx, account_id, now_ms=now_ms, chance=chance)
    if found.status_at(now_ms) == "disabled":
        raise Refused("the playground's key is disabled: enable it under Keys")
    if found.status_at(now_ms) == "active":
        return found
    made = keys.create_hidden(tx, account_id, name=NAME, digest=chance(32), now_ms=now_ms)
    tx.run(_REPLACE, account=account_id, to_key=made.key_id)
    return made
