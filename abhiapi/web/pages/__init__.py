"""The dashboard: server-rendered pages for customers and operators, under /dashboard (docs/architecture.md, Pages).

`install` hangs it on the application. A page group is a module with `add_to(desk)`; what a page may show is decided by
the role that its route is registered with (`desk`), so that a route without a role answers nobody.
"""

from __future__ import annotations

from typing import Any

from flask import Flask, Response
from flask_limiter import Limiter

from abhiapi.runtime import Runtime
from abhiapi.web.pages import (
    account,
    assets,
    calls,
    headers,
    jobs,
    keys,
    ledger,
    operator,
    operator_books,
    overview,
    playground,
    safety,
    sign_in,
    usage,
    words,
)
from abhiapi.web.pages.desk import Desk

PREFIX = "/dashboard"


def install(app: Flask, rt: Runtime, limiter: Limiter) -> Desk:
    """All pages, their static files, sessions and safety."""
    safety.set_up_sessions(app, rt)
    served = assets.Assets()
    app.jinja_env.globals["asset"] = served.url
    app.jinja_env.filters.update(words.FILTERS)
    app.register_blueprint(served.blueprint())
    desk = Desk(app, limiter)
    for group in (sign_in, overview, usage, calls, ledger, jobs, keys, playground, account, operator, operator_books):
        group.add_to(desk)
    app.register_blueprint(desk.blueprint, url_prefix=PREFIX)
    app.extensions["abhiapi-desk"] = desk
    return desk


def is_page(path: str) -> bool:
    """Whether whoever asks for this path is a person who wants to read the answer."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def error_page(app: Any, error: Exception) -> Response:
    """An error that happened before any page was found, or on none."""
    desk: Desk = app.extensions["abhiapi-desk"]
    desk.recognise()
    return headers.private(desk.error_page(error))
