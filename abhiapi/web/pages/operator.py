"""The operator's view: all accounts."""

from __future__ import annotations

from abhiapi import accounts
from abhiapi.web.caller import runtime
from abhiapi.web.pages.desk import Desk, Reply, Role, render


def add_to(desk: Desk) -> None:
    desk.add(Role.OPERATOR, "/operator", list_accounts, nav="All accounts")


def list_accounts() -> Reply:
    return render("operator.html", rows=runtime().read_aside(accounts.everyone))
