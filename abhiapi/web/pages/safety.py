"""Sessions in a signed cookie, and where a visitor may be sent to after signing in. Headers are `headers`'.

The cookie is for /dashboard only: no call carries it, and a call would not look at it (`web.caller` reads keys).
"""

from __future__ import annotations

import re
from datetime import timedelta

from flask import Flask, request, session
from flask.sessions import SecureCookieSessionInterface
from flask_login import LoginManager, login_user, logout_user

from abhiapi.runtime import Runtime
from abhiapi.web.pages import who

COOKIE = "abhiapi_session"
SESSION_DAYS = 14
_OWN_PAGE = re.compile(r"/dashboard(?:/[A-Za-z0-9_-]+)*/?(?:\?[A-Za-z0-9_.~%=&+:,/-]*)?")


class _Sessions(SecureCookieSessionInterface):
    """Flask's own, with `Secure` wherever the visitor's connection is: plain http is for this machine."""

    def __init__(self, public_url: str | None) -> None:
        self._is_public_secure = public_url is not None and public_url.startswith("https://")

    def get_cookie_secure(self, app: Flask) -> bool:
        return request.is_secure or self._is_public_secure


def set_up_sessions(app: Flask, rt: Runtime) -> None:
    app.secret_key = rt.settings.secret_key or rt.webhook_key.session_secret
    app.session_interface = _Sessions(rt.settings.public_url)
    app.config.update(
        SESSION_COOKIE_NAME=COOKIE,
        SESSION_COOKIE_PATH="/dashboard",
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_REFRESH_EACH_REQUEST=False,  # it ends so many days after the log-in, however busy
        PERMANENT_SESSION_LIFETIME=timedelta(days=SESSION_DAYS),
        WTF_CSRF_CHECK_DEFAULT=False,  # of pages, by the desk; calls and /v1 carry keys and no cookie
        WTF_CSRF_TIME_LIMIT=None,  # as long as the session
    )
    manager = LoginManager(app, add_context_processor=False)  # an error page must not ask the database again
    manager.session_protection = None
    manager.user_loader(who.of_session)


def begin_session(seen: who.Visitor) -> None:
    """Sign somebody in, in a session of their own: nothing of the one before is kept (session fixation)."""
    session.clear()
    session.permanent = True
    login_user(seen)


def end_session() -> None:
    logout_user()
    session.clear()


def page_or(text: str | None, otherwise: str) -> str:
    """Where to go after signing in: one of our own pages, whatever ``?next=`` says."""
    if text is None or len(text) > 500 or not _OWN_PAGE.fullmatch(text):
        return otherwise
    return text
