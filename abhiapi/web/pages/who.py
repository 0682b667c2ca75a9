"""Who is asking for a page: read from the database for every request, by what the session's cookie says."""

from __future__ import annotations

import re

from abhiapi import accounts, users
from abhiapi.accounts import Account
from abhiapi.db import Tx
from abhiapi.users import User
from abhiapi.web.caller import runtime

_SESSION = re.compile(r"([1-9]\d{0,17}):(\d{1,18})")


class Visitor:
    """A user who has signed in, and their account as they both are just now (what Flask-Login calls a user)."""

    is_authenticated = True
    is_active = True
    is_anonymous = False

    def __init__(self, user: User, account: Account | None) -> None:
        self.user = user
        self._account = account

    @property
    def has_account(self) -> bool:
        return self._account is not None

    @property
    def account(self) -> Account:
        if self._account is None:
            raise AssertionError("a page of customers was opened by somebody without an account")
        return self._account

    @property
    def account_id(self) -> int:
        return self.account.account_id

    @property
    def is_operator(self) -> bool:
        return self.user.is_operator

    @property
    def is_suspended(self) -> bool:
        return self._account is not None and self._account.status != "active"

    def get_id(self) -> str:
        """What the session keeps of them: nothing but the user and the epoch."""
        return f"{self.user.user_id}:{self.user.session_epoch}"


def of_session(kept: str) -> Visitor | None:
    """Who a session belongs to; None where it is over."""
    match = _SESSION.fullmatch(kept)
    if match is None:
        return None
    found = runtime().reader.read(lambda tx: load(tx, int(match[1])))
    return found if found is not None and found.user.session_epoch == int(match[2]) else None


def load(tx: Tx, user_id: int) -> Visitor | None:
    user = users.by_id(tx, user_id)
    if user is None:
        return None
    return Visitor(user, None if user.account_id is None else accounts.by_id(tx, user.account_id))
