"""Keys: `sk-fal-` and 32 characters, of which the last 6 are a checksum; shown once, stored as a SHA-256.

Typing errors and guesses are told by the checksum alone, without the database. A key is looked up afresh for every
request, so a change by any process holds for the very next one (docs/decisions/0003).
"""

from __future__ import annotations

import hashlib
import re
import secrets
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import bindparam, func, insert, or_, select, update

from abhiapi import prices, spending, tables
from abhiapi.db import Row, Tx
from abhiapi.errors import (
    AccountSuspended,
    BadRequest,
    InvalidKey,
    KeyDisabled,
    KeyExpired,
    KeyRevoked,
    MissingKey,
    ModelNotAllowed,
    NotFound,
    Refused,
)
from abhiapi.ids import key_text, parse_key_id

PREFIX = "sk-fal-"
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PATTERN = re.compile(r"[A-Za-z0-9._~/*-]{1,200}")  # of the models that a key may call
_CHANCE, _CHECK = 26, 6  # 26 characters of base 62 are 154 bits; a CRC-32 fits 6
_SHAPE = re.compile(rf"{PREFIX}[0-9A-Za-z]{{{_CHANCE + _CHECK}}}")
LABEL_MAX = 64
LAST_USED_STEP_MS = 60_000  # last_used_at is kept to the minute, to spare a write on every call

_k = tables.keys.c
_a = tables.accounts.c
_COLUMNS = (
    _k.key_id,
    _k.account_id,
    _a.name.label("account"),
    _k.name,
    _k.last_four,
    _k.status,
    _k.created_at,
    _k.expires_at,
    _k.last_used_at,
    _k.models,
)
_JOINED = select(*_COLUMNS).join_from(tables.keys, tables.accounts, _k.account_id == _a.account_id)
_BY_ID = _JOINED.where(_k.key_id == bindparam("key"))
_BY_DIGEST = _JOINED.where(_k.digest == bindparam("of_digest"))
_OF_ACCOUNT = _JOINED.where(_k.account_id == bindparam("account")).order_by(_k.key_id)
_ALL = _JOINED.order_by(_k.key_id)
_CALLERS = select(
    _k.key_id,
    _k.account_id,
    _k.status,
    _k.expires_at,
    _k.last_used_at,
    _a.name,
    _a.plan,
    _a.status,
    *prices.NEWEST_ROWS,
    _k.models,
).join_from(tables.keys, tables.accounts, _k.account_id == _a.account_id)
_CALLER = _CALLERS.where(_k.digest == bindparam("of_digest"))
# By the account alone, and only its playground's key: what a process may ask for a customer who is signed in.
_CALLER_INSIDE = _CALLERS.join(tables.playground_keys, tables.playground_keys.c.key_id == _k.key_id).where(
    tables.playground_keys.c.account_id == bindparam("account")
)
_PLAYGROUNDS = select(tables.playground_keys.c.key_id).where(
    tables.playground_keys.c.account_id == bindparam("account")
)
_CREATE = insert(tables.keys).values(
    {
        name: bindparam(name)
        for name in ("account_id digest last_four name status created_at expires_at replaces_key_id models").split()
    }
)
_SET_STATUS = update(tables.keys).where(_k.key_id == bindparam("key")).values(status=bindparam("to_status"))
_SET_MODELS = update(tables.keys).where(_k.key_id == bindparam("key")).values(models=bindparam("patterns"))
_EXPIRE = (
    update(tables.keys)
    .where(_k.key_id == bindparam("key"), or_(_k.expires_at.is_(None), _k.expires_at > bindparam("at")))
    .values(expires_at=bindparam("at"))
)
_TOUCH = (
    update(tables.keys)
    .where(_k.key_id == bindparam("key"), func.coalesce(_k.last_used_at, 0) < bindparam("at"))
    .values(last_used_at=bindparam("at"))
)


@dataclass(frozen=True, slots=True)
class Key:
    """A key as an operator or its owner may see it: never the key itself."""

    key_id: int
    account_id: int
    account: str
    name: str | None
    last_four: str
    status: str
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    models: str | None  # patterns with a space between; None: any

    @property
    def masked(self) -> str:
        return f"{PREFIX}...{self.last_four}"

    def status_at(self, now_ms: int) -> str:
        """active, disabled, revoked or expired."""
        if self.status == "active" and self.expires_at is not None and self.expires_at <= now_ms:
            return "expired"
        return self.status


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling: an active key of an active account, read from the database for this very request."""

    key_id: int
    account_id: int
    account: str
    plan: str
    price_version: prices.Version  # read together with the key: tells whether the catalogue is up to date
    last_used_at: int
    models: str | None = None  # the only models that it may call, patterns with a space between


def new_key(chance: Callable[[int], int] = secrets.randbelow) -> str:
    """A fresh key."""
    random_part = "".join(_BASE62[chance(62)] for _ in range(_CHANCE))
    return PREFIX + random_part + _checksum(random_part)


def is_well_formed(key: str) -> bool:
    """Whether text has a key's shape and its checksum is right."""
    if not _SHAPE.fullmatch(key):
        return False
    random_part = key[len(PREFIX) : -_CHECK]
    return key[-_CHECK:] == _checksum(random_part)


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("ascii")).digest()


def authenticate(tx: Tx, key: str | None, *, now_ms: int, may_be_suspended: bool = False) -> Caller:
    """Who owns this key. Raises `MissingKey`, `InvalidKey` (401) or why it may not be used (403)."""
    if not key:
        raise MissingKey("no API key: send it in the header 'x-api-key: sk-fal-...'")
    if not is_well_formed(key):
        raise InvalidKey("this is not an AbhiAPI key: keys start with 'sk-fal-' and have 32 characters after that")
    row = tx.one(_CALLER, of_digest=digest_of(key))
    if row is None:
        raise InvalidKey("this API key is not known here")
    return _checked(row, now_ms=now_ms, may_be_suspended=may_be_suspended)


def authenticate_inside(tx: Tx, account_id: int, *, now_ms: int) -> Caller:
    """The key of an account's playground, for a caller whom this process has told by their session.

    No request over the wire comes here: those are told by the text of a key alone. Raises as `authenticate` does.
    """
    row = tx.one(_CALLER_INSIDE, account=account_id)
    if row is None:
        raise InvalidKey("this account has no key for its playground")
    return _checked(row, now_ms=now_ms, may_be_suspended=False)


def _checked(row: Row, *, now_ms: int, may_be_suspended: bool) -> Caller:
    """Raises why a key that was found may not be used (403)."""
    key_id, account_id, status, expires_at, last_used_at, account, plan, account_status, *newest_rows, models = row
    if status == "revoked":
        raise KeyRevoked("this API key was revoked: use another key of the account")
    if status == "disabled":
        raise KeyDisabled("this API key is disabled")
    if expires_at is not None and expires_at <= now_ms:
        raise KeyExpired("this API key has expired: use another key of the account")
    if account_status != "active" and not may_be_suspended:
        raise AccountSuspended("this account is suspended: ask the operator")
    version = prices.version_from(newest_rows)
    return Caller(key_id, account_id, account, plan, version, last_used_at or 0, models)


def create(
    tx: Tx,
    account_id: int,
    *,
    name: str | None,
    expires_at: int | None,
    now_ms: int,
    replaces: int | None = None,
    key: str | None = None,
    models: str | None = None,
) -> tuple[str, Key]:
    """A new key: its text, which nobody can read again, and what is stored of it."""
    key = key or new_key()
    row = {"last_four": key[-4:], "name": name, "expires_at": expires_at, "replaces_key_id": replaces, "models": models}
    return key, _create(tx, account_id, digest_of(key), now_ms, **row)


def create_hidden(tx: Tx, account_id: int, *, name: str, digest: bytes, now_ms: int) -> Key:
    """A key without a text: nobody can send it (`playground`)."""
    return _create(
        tx, account_id, digest, now_ms, last_four="none", name=name, expires_at=None, replaces_key_id=None, models=None
    )


def _create(tx: Tx, account_id: int, digest: bytes, now_ms: int, **row: Any) -> Key:
    key_id = tx.insert(_CREATE, account_id=account_id, digest=digest, status="active", created_at=now_ms, **row)
    return by_id(tx, key_id)


def by_id(tx: Tx, key_id: int) -> Key:
    row = tx.one(_BY_ID, key=key_id)
    if row is None:
        raise NotFound(f"no key has the id {key_text(key_id)}")
    return _key(row)


def find(tx: Tx, text: str) -> Key | None:
    """A key by its id or by itself."""
    key_id = parse_key_id(text)
    if key_id is not None:
        row = tx.one(_BY_ID, key=key_id)
    elif is_well_formed(text):
        row = tx.one(_BY_DIGEST, of_digest=digest_of(text))
    else:
        return None
    return _key(row) if row else None


def label(text: str) -> str | None:
    """A key's label as it was typed; None for a blank one. Raises `BadRequest`."""
    text = text.strip()
    if len(text) > LABEL_MAX or not text.isprintable():
        raise BadRequest(f"a key's name has at most {LABEL_MAX} printable characters")
    return text or None


def listed(tx: Tx, account_id: int | None = None) -> list[Key]:
    rows = tx.all(_ALL) if account_id is None else tx.all(_OF_ACCOUNT, account=account_id)
    return [_key(row) for row in rows]


def set_status(tx: Tx, key: Key, status: str) -> Key:
    """Disable, enable or revoke. A revoked key never comes back: raises `Refused`."""
    if key.status == "revoked" and status != "revoked":
        raise Refused(f"{key_text(key.key_id)} is revoked, and a revoked key never comes back: create a new one")
    tx.run(_SET_STATUS, key=key.key_id, to_status=status)
    return by_id(tx, key.key_id)


def rotate(tx: Tx, key: Key, *, grace_ms: int, now_ms: int) -> tuple[str, Key]:
    """A new key in place of an old one, which works on for the grace period. Credit is the account's and stays.

    Its models are the old one's, and so are its spending limits: both spend under the same ones until the old key ends.
    """
    if key.status_at(now_ms) != "active":
        raise Refused(f"{key_text(key.key_id)} is {key.status_at(now_ms)}: only an active key is rotated")
    if playground_key_id(tx, key.account_id) == key.key_id:
        raise Refused(f"{key_text(key.key_id)} is the playground's own, which nobody can send: revoke it instead")
    made = create(
        tx,
        key.account_id,
        name=key.name,
        expires_at=key.expires_at,
        now_ms=now_ms,
        replaces=key.key_id,
        models=key.models,
    )
    spending.share(tx, key.key_id, made[1].key_id)
    tx.run(_EXPIRE, key=key.key_id, at=now_ms + grace_ms)
    return made


def playground_key_id(tx: Tx, account_id: int) -> int | None:
    """The key that the account's playground calls with (decisions/0017), if it ever did."""
    row = tx.one(_PLAYGROUNDS, account=account_id)
    return row[0] if row else None


def set_models(tx: Tx, key: Key, patterns: Sequence[str]) -> Key:
    """Let a key call only the models that match one of these; none of them: any. Raises `BadRequest`.

    A model may be pasted as an address has it: a slash at its ends or ``/stream`` would match no call.
    """
    patterns = [pattern.strip("/").removesuffix("/stream") for pattern in patterns]
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern):
            raise BadRequest(f"{pattern[:60]!r} is no model or pattern such as fal-ai/flux/dev or fal-ai/flux/*")
    tx.run(_SET_MODELS, key=key.key_id, patterns=" ".join(dict.fromkeys(patterns)) or None)
    return by_id(tx, key.key_id)


def check_model(caller: Caller, model: str) -> None:
    """Raises `ModelNotAllowed` where the key may call other models only."""
    if caller.models is not None and not any(_matches(pattern, model) for pattern in caller.models.split(" ")):
        raise ModelNotAllowed(f"this API key may not call {model[:200]!r}: use another key of the account")


@lru_cache(maxsize=1024)
def _matches(pattern: str, model: str) -> bool:
    """Whether a model's id is the pattern's; ``*`` stands for any text, slashes too, and nothing else is special."""
    return re.fullmatch(".*".join(re.escape(part) for part in pattern.split("*")), model) is not None


def touch(tx: Tx, key_id: int, now_ms: int) -> None:
    """Note that a key was used."""
    tx.run(_TOUCH, key=key_id, at=now_ms)


def _checksum(random_part: str) -> str:
    value = zlib.crc32(random_part.encode("ascii"))
    digits = []
    for _ in range(_CHECK):
        value, digit = divmod(value, 62)
        digits.append(_BASE62[digit])
    return "".join(reversed(digits))


def _key(row: Row) -> Key:
    return Key(*row)
