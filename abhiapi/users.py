"""People who sign in to the dashboard, and the one-time links that let them set a password.

A user belongs to one account, or is an operator, or both. Passwords come and go as hashes (`passwords`), tokens as
digests. Every session names the epoch it began in: raising the user's epoch ends them all, for the next request.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import bindparam, delete, insert, select, update

from abhiapi import accounts, tables
from abhiapi.db import Row, Tx
from abhiapi.errors import BadRequest, NotFound, Refused

INVITE_MS = 7 * 86_400_000
INVITE_GONE = "this link is not valid any more: ask for a new one"
_EMAIL = re.compile(r"[^\s@<>\"',;:\\()\[\]]{1,64}@[a-z0-9](?:[a-z0-9.-]{0,187})[a-z0-9]")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")

_u = tables.users.c
_i = tables.invites.c
_a = tables.accounts.c
_COLUMNS = (
    _u.user_id,
    _u.account_id,
    _a.name.label("account"),
    _u.email,
    _u.is_operator,
    _u.session_epoch,
    _u.created_at,
    _u.last_login_at,
)
_JOINED = select(*_COLUMNS).join_from(tables.users, tables.accounts, _u.account_id == _a.account_id, isouter=True)
_BY_ID = _JOINED.where(_u.user_id == bindparam("user"))
_BY_EMAIL = _JOINED.where(_u.email == bindparam("of_email"))
_ALL = _JOINED.order_by(_u.email)
_OF_ACCOUNT = _JOINED.where(_u.account_id == bindparam("account")).order_by(_u.email)
_HASH_OF = select(_u.password_hash).where(_u.user_id == bindparam("user"))
_CREATE = insert(tables.users).values(
    account_id=bindparam("account"),
    email=bindparam("of_email"),
    password_hash=bindparam("with_hash"),
    is_operator=bindparam("as_operator"),
    session_epoch=1,
    created_at=bindparam("now"),
)
_SET_PASSWORD = (
    update(tables.users)
    .where(_u.user_id == bindparam("user"))
    .values(password_hash=bindparam("with_hash"), session_epoch=_u.session_epoch + 1)
)
_REHASH = (
    update(tables.users)
    .where(_u.user_id == bindparam("user"), _u.password_hash == bindparam("old_hash"))
    .values(password_hash=bindparam("with_hash"))
)
_END_SESSIONS = update(tables.users).where(_u.user_id == bindparam("user")).values(session_epoch=_u.session_epoch + 1)
_SIGNED_IN = update(tables.users).where(_u.user_id == bindparam("user")).values(last_login_at=bindparam("now"))
_SET_ACCOUNT = update(tables.users).where(_u.user_id == bindparam("user")).values(account_id=bindparam("account"))
_SET_OPERATOR = update(tables.users).where(_u.user_id == bindparam("user")).values(is_operator=bindparam("to"))
_INVITE = insert(tables.invites).values(
    {name: bindparam(name) for name in "digest email account_id is_operator purpose created_at expires_at".split()}
)
_VOID = delete(tables.invites).where(_i.email == bindparam("of_email"), _i.used_at.is_(None))
_FIND_INVITE = (
    select(_i.digest, _i.email, _i.account_id, _a.name, _i.is_operator, _i.purpose, _i.expires_at)
    .join_from(tables.invites, tables.accounts, _i.account_id == _a.account_id, isouter=True)
    .where(_i.digest == bindparam("of_digest"), _i.used_at.is_(None), _i.expires_at > bindparam("now"))
)
_USE = (
    update(tables.invites)
    .where(_i.digest == bindparam("of_digest"), _i.used_at.is_(None))
    .values(used_at=bindparam("now"))
)


@dataclass(frozen=True, slots=True)
class User:
    user_id: int
    account_id: int | None
    account: str | None  # its name
    email: str
    is_operator: bool
    session_epoch: int
    created_at: int
    last_login_at: int | None


@dataclass(frozen=True, slots=True)
class Invite:
    digest: bytes
    email: str
    account_id: int | None
    account: str | None
    is_operator: bool
    purpose: str
    expires_at: int


def normal_email(text: str) -> str:
    """An address as it is stored and compared: lower case, without spaces around it. Raises `BadRequest`."""
    email = text.strip().lower()
    if len(email) > 254 or not email.isascii() or not email.isprintable() or not _EMAIL.fullmatch(email):
        raise BadRequest("this is no e-mail address such as ann@example.com")
    return email


def by_id(tx: Tx, user_id: int) -> User | None:
    row = tx.one(_BY_ID, user=user_id)
    return _user(row) if row else None


def find(tx: Tx, email: str) -> User | None:
    row = tx.one(_BY_EMAIL, of_email=email)
    return _user(row) if row else None


def listed(tx: Tx, account_id: int | None = None) -> list[User]:
    rows = tx.all(_ALL) if account_id is None else tx.all(_OF_ACCOUNT, account=account_id)
    return [_user(row) for row in rows]


def password_hash(tx: Tx, user_id: int) -> str | None:
    row = tx.one(_HASH_OF, user=user_id)
    return row[0] if row else None


def create(
    tx: Tx, email: str, *, account_id: int | None, is_operator: bool, password_hash: str | None, now_ms: int
) -> User:
    """A new user. Raises `Refused` where the address is taken."""
    if find(tx, email) is not None:
        raise Refused(f"there is a user {email} already")
    user_id = tx.insert(
        _CREATE, account=account_id, of_email=email, with_hash=password_hash, as_operator=int(is_operator), now=now_ms
    )
    return _must_exist(by_id(tx, user_id))


def set_password(tx: Tx, user_id: int, password_hash: str) -> User:
    """A new password; every session of the user's is over."""
    tx.run(_SET_PASSWORD, user=user_id, with_hash=password_hash)
    return _must_exist(by_id(tx, user_id))


def rehash(tx: Tx, user_id: int, *, old: str, new: str) -> None:
    """The same password under today's parameters, unless it was changed meanwhile."""
    tx.run(_REHASH, user=user_id, old_hash=old, with_hash=new)


def end_sessions(tx: Tx, user_id: int) -> None:
    tx.run(_END_SESSIONS, user=user_id)


def signed_in(tx: Tx, user_id: int, now_ms: int) -> None:
    tx.run(_SIGNED_IN, user=user_id, now=now_ms)


def set_operator(tx: Tx, user: User, is_operator: bool) -> User:
    """Raises `Refused` for a user who would then be nobody: an operator without an account."""
    if not is_operator and user.account_id is None:
        raise Refused(f"{user.email} has no account and is nothing but an operator: invite them to an account first")
    tx.run(_SET_OPERATOR, user=user.user_id, to=int(is_operator))
    return _must_exist(by_id(tx, user.user_id))


def invite(
    tx: Tx,
    email: str,
    *,
    account_id: int | None,
    is_operator: bool = False,
    purpose: str = "password",
    now_ms: int,
    chance: Callable[[int], str] = secrets.token_urlsafe,
) -> tuple[str, Invite]:
    """The token of a link to set a password with, and what is stored of it; earlier links to the address are void.

    For a user who has signed in before it is the way to a new password. Raises `Refused` for a user of another account.
    """
    known = find(tx, email)
    if known is not None and account_id is not None and known.account_id not in (None, account_id):
        raise Refused(f"{email} is a user of another account, {known.account!r}: a user has one account")
    token = chance(32)
    tx.run(_VOID, of_email=email)
    tx.run(
        _INVITE,
        digest=digest_of(token),
        email=email,
        account_id=account_id,
        is_operator=int(is_operator),
        purpose=purpose,
        created_at=now_ms,
        expires_at=now_ms + INVITE_MS,
    )
    made = find_invite(tx, token, now_ms=now_ms)
    if made is None:
        raise AssertionError("an invitation just made is gone")
    return token, made


def find_invite(tx: Tx, token: str, *, now_ms: int) -> Invite | None:
    """The invitation of a link that may still be used."""
    row = tx.one(_FIND_INVITE, of_digest=digest_of(token), now=now_ms) if _TOKEN.fullmatch(token) else None
    return Invite(row[0], row[1], row[2], row[3], bool(row[4]), row[5], row[6]) if row else None


def accept(tx: Tx, token: str, password_hash: str, *, now_ms: int) -> User:
    """Use a link: the user it invites, made if there is none, with this password. Raises `NotFound`, the second time.

    A user who was there keeps what they are, and may become an operator, or get an account, by it.
    """
    found = find_invite(tx, token, now_ms=now_ms)
    if found is None or found.purpose != "password" or not tx.run(_USE, of_digest=found.digest, now=now_ms):
        raise NotFound(INVITE_GONE)
    user = find(tx, found.email)
    if user is None:
        return create(
            tx,
            found.email,
            account_id=found.account_id,
            is_operator=found.is_operator,
            password_hash=password_hash,
            now_ms=now_ms,
        )
    if found.account_id is not None and user.account_id is None:
        tx.run(_SET_ACCOUNT, user=user.user_id, account=found.account_id)
    elif found.account_id is not None and user.account_id != found.account_id:
        raise NotFound(INVITE_GONE)  # they joined another account after the link was made
    if found.is_operator:
        set_operator(tx, user, True)
    return set_password(tx, user.user_id, password_hash)


def sign_up(tx: Tx, email: str, password_hash: str, *, now_ms: int) -> User:
    """A new account named by its first user's address, without credit. Raises `Refused` where there is either."""
    if find(tx, email) is not None or accounts.find(tx, email) is not None:
        raise Refused("this address cannot be used to sign up: sign in, or ask the operator for a link")
    account = accounts.create(tx, email, now_ms=now_ms)
    return create(
        tx, email, account_id=account.account_id, is_operator=False, password_hash=password_hash, now_ms=now_ms
    )


def digest_of(token: str) -> bytes:
    return hashlib.sha256(token.encode("ascii")).digest()


def _must_exist(user: User | None) -> User:
    if user is None:
        raise AssertionError("a user just written is gone")
    return user


def _user(row: Row) -> User:
    user_id, account_id, account, email, is_operator, *rest = row
    return User(user_id, account_id, account, email, bool(is_operator), *rest)
