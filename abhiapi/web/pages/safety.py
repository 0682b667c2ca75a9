"""What keeps the pages safe: sessions in a signed cookie, security headers, and where a visitor may be sent to.

The cookie is for /dashboard only: no call carries it, and a call would not look at it (`web.caller` reads keys).
"""

from __future__ import annotations

import re
from datetime import timedelta

from flask import Flask, Response, request, session
from flask.sessions import SecureCookieSessionInterface
from flask_login import LoginManager, login_user, logout_user

from abhiapi.runtime import Runtime
from abhiapi.web.pages import who

COOKIE = "abhiapi_session"
SESSION_DAYS = 14
# Pictures come from this service too; a page that shows others' says so by `allow_pictures_from`.
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "media-src": "'self'",
    "connect-src": "'self'",
    "form-action": "'self'",
    "base-uri": "'none'",
    "frame-ancestors": "'none'",
}
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
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


def secured(response: Response) -> Response:
    """Headers of every page. A page is never kept: it may show figures, or a key."""
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    if "Content-Security-Policy" not in response.headers:
        response.headers["Content-Security-Policy"] = policy()
    response.headers.setdefault("Cache-Control", "no-store")
    if request.is_secure:
        response.headers.setdefault("Strict-Transport-Security", "max-age=31536000")
    return response


def allow_pictures_from(response: Response, sources: str) -> Response:
    """Let one page show pictures and films of these sources, such as ``https:``."""
    response.headers["Content-Security-Policy"] = policy(pictures=sources)
    return response


def policy(*, pictures: str = "") -> str:
    extra = {"img-src": f"'self' {pictures}", "media-src": f"'self' {pictures}"} if pictures else {}
    return "; ".join(f"{name} {value}" for name, value in (_POLICY | extra).items())
