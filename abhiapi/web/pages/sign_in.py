"""Signing in and out, links of invitations, and signing up where the operator allows it.

Says the same, after the same work, to somebody unknown and to a wrong password.
"""

from __future__ import annotations

import hashlib
import ipaddress

from flask import current_app, redirect, request, url_for
from flask_limiter import RequestLimit

from abhiapi import passwords, users
from abhiapi.db import Tx
from abhiapi.errors import BadRequest, NotFound, Refused
from abhiapi.users import User
from abhiapi.web.caller import runtime
from abhiapi.web.pages import safety
from abhiapi.web.pages.desk import Desk, Reply, Role, go, render
from abhiapi.web.pages.who import load

PER_ADDRESS, PER_EMAIL = "20 per minute; 200 per hour", "10 per 15 minutes"
WRONG = "That e-mail address and password do not go together."


def add_to(desk: Desk) -> None:
    current = desk.blueprint
    hasher = passwords.Passwords()
    current.record_once(lambda state: state.app.extensions.setdefault("abhiapi-passwords", hasher))
    both = ((PER_ADDRESS, address), (PER_EMAIL, email_given))
    desk.add(Role.ANYBODY, "/sign-in", sign_in, methods=("GET", "POST"), limits=both, on_breach=_throttled)
    desk.add(Role.ANYBODY, "/sign-up", sign_up, methods=("GET", "POST"), limits=both)
    desk.add(Role.ANYBODY, "/invite/<token>", accept, methods=("GET", "POST"), limits=((PER_ADDRESS, address),))
    desk.add(Role.ANYBODY, "/demo/<token>", enter_demo)
    desk.add(Role.USER, "/sign-out", sign_out, methods=("POST",))


def address() -> str:
    """Where a request comes from, for counting tries; all of an IPv6 customer's addresses are one."""
    text = request.remote_addr or "nobody"
    try:
        given = ipaddress.ip_address(text)
    except ValueError:
        return text
    return str(ipaddress.ip_network(f"{given}/64", strict=False)) if given.version == 6 else text


def email_given() -> str:
    """Whose password is tried, known or not; as a digest, since it is only counted by."""
    return "email:" + hashlib.sha256(request.form.get("email", "").strip().lower().encode()).hexdigest()


def sign_in() -> Reply:
    wanted = request.args.get("next")
    if request.method == "GET":
        return render("sign_in.html", email="", problem=None)
    text = request.form.get("email", "")
    user = _known(text, request.form.get("password", ""))
    counted = runtime().metrics.sign_ins
    counted["failed" if user is None else "done"].inc()
    if user is None:
        return render("sign_in.html", status=401, email=text[:254], problem=WRONG)
    _begin(user)
    return redirect(safety.page_or(wanted, url_for("pages.overview_overview")), 303)


def _throttled(_: RequestLimit) -> None:
    runtime().metrics.sign_ins["throttled"].inc()


def sign_out() -> Reply:
    safety.end_session()
    return go("pages.sign_in_sign_in", "You have signed out.")


def accept(token: str) -> Reply:
    """A link of an invitation: choose a password, and be in."""
    rt = runtime()
    found = rt.reader.read(lambda tx: users.find_invite(tx, token, now_ms=rt.now_ms()))
    if found is None or found.purpose != "password":
        raise NotFound(_capital(users.INVITE_GONE))
    if request.method == "GET":
        return render("invite.html", invite=found, problem=None)
    password = request.form.get("password", "")
    problem = new_password_problem(password, request.form.get("again", ""), found.email)
    if problem is not None:
        return render("invite.html", status=422, invite=found, problem=problem)
    made = hashing().hashed(password)
    try:
        user = rt.write(lambda tx: users.accept(tx, token, made, now_ms=rt.now_ms()))
    except NotFound as error:  # somebody else was faster
        raise NotFound(_capital(error.message)) from error
    _begin(user)
    return go("pages.overview_overview", "Welcome. Your password is set.")


def enter_demo(token: str) -> Reply:
    """The link that `serve --sandbox --demo` prints: play money, so that it may sign in by itself."""
    rt = runtime()

    def read(tx: Tx) -> User | None:
        found = users.find_invite(tx, token, now_ms=rt.now_ms())
        return users.find(tx, found.email) if found is not None and found.purpose == "demo" else None

    user = rt.reader.read(read)
    if user is None:
        raise NotFound(_capital(users.INVITE_GONE))
    _begin(user)
    return go("pages.overview_overview")


def sign_up() -> Reply:
    rt = runtime()
    if not rt.settings.open_signup:
        raise NotFound("There is no such page.")
    if request.method == "GET":
        return render("sign_up.html", email="", problem=None)
    text, password = request.form.get("email", ""), request.form.get("password", "")
    try:
        email = users.normal_email(text)
        problem = new_password_problem(password, request.form.get("again", ""), email)
        if problem is not None:
            raise BadRequest(problem)
        made = hashing().hashed(password)
        user = rt.write(lambda tx: users.sign_up(tx, email, made, now_ms=rt.now_ms()))
    except (BadRequest, Refused) as error:
        return render("sign_up.html", status=422, email=text[:254], problem=_capital(error.message))
    _begin(user)
    return go("pages.overview_overview", "Welcome. Ask the operator for credit, then make a key.")


def hashing() -> passwords.Passwords:
    made: passwords.Passwords = current_app.extensions["abhiapi-passwords"]
    return made


def new_password_problem(password: str, again: str, email: str) -> str | None:
    if password != again:
        return "The two passwords differ."
    return passwords.problem(password, email)


def _known(text: str, password: str) -> User | None:
    """The user of this address, if the password is theirs. Takes as long either way."""
    rt = runtime()

    def read(tx: Tx) -> tuple[User, str | None] | None:
        user = users.find(tx, text.strip().lower()) if len(text) <= 254 and text.isprintable() else None
        return (user, users.password_hash(tx, user.user_id)) if user is not None else None

    found = rt.reader.read(read)
    if not hashing().matches(found[1] if found else None, password) or found is None:
        return None
    user, known = found
    if known is not None and hashing().is_outdated(known):
        renewed = hashing().hashed(password)
        rt.write(lambda tx: users.rehash(tx, user.user_id, old=known, new=renewed))
    return user


def _begin(user: User) -> None:
    """Sign in the user as they were when the password was looked at: a change since then has ended this, too."""
    rt = runtime()
    rt.write(lambda tx: users.signed_in(tx, user.user_id, rt.now_ms()))
    seen = rt.reader.read(lambda tx: load(tx, user.user_id))
    if seen is None or seen.user.session_epoch != user.session_epoch:
        raise NotFound("Your password was changed just now: sign in again.")
    safety.begin_session(seen)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
