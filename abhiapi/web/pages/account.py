"""A user's own affairs: their password, and ending their sessions everywhere."""

from __future__ import annotations

from flask import request

from abhiapi import users
from abhiapi.web.caller import runtime
from abhiapi.web.pages import safety
from abhiapi.web.pages.desk import Desk, Reply, Role, go, render, visitor
from abhiapi.web.pages.sign_in import hashing, new_password_problem
from abhiapi.web.pages.who import load

TRIES = "10 per 15 minutes"


def add_to(desk: Desk) -> None:
    desk.add(Role.USER, "/account", show, nav="Account")
    desk.add(Role.USER, "/account/password", change_password, methods=("POST",), limits=((TRIES, _by_user),))
    desk.add(Role.USER, "/account/sign-out-everywhere", sign_out_everywhere, methods=("POST",))


def _by_user() -> str:
    return f"user:{visitor().user.user_id}"


def show() -> Reply:
    return render("account.html", problem=None)


def change_password() -> Reply:
    rt, user = runtime(), visitor().user
    password = request.form.get("password", "")
    known = rt.reader.read(lambda tx: users.password_hash(tx, user.user_id))
    problem = new_password_problem(password, request.form.get("again", ""), user.email)
    if not hashing().matches(known, request.form.get("current", "")):
        problem = "That is not your current password."
    if problem is not None:
        return render("account.html", status=422, problem=problem)
    made = hashing().hashed(password)
    changed = rt.write(lambda tx: users.set_password(tx, user.user_id, made))
    seen = rt.reader.read(lambda tx: load(tx, changed.user_id))
    if seen is None:
        raise AssertionError("a user just written is gone")
    safety.begin_session(seen)
    return go("pages.account_show", "Your password is changed. All your other sessions have ended.")


def sign_out_everywhere() -> Reply:
    user_id = visitor().user.user_id
    runtime().write(lambda tx: users.end_sessions(tx, user_id))
    safety.end_session()
    return go("pages.sign_in_sign_in", "You have signed out everywhere.")
