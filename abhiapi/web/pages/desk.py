"""What every page goes through: its role, the visitor, CSRF, the navigation, errors as pages. Knows no page itself.

desk.add(Role.CUSTOMER, "/keys", list_keys, nav="Keys")
desk.add(Role.CUSTOMER, "/keys/new", create_key, methods=("POST",))

def list_keys() -> Reply:
    who = visitor()                       # the person; who.account is their account
    rows = runtime().read_aside(lambda tx: ...)
    return render("keys.html", rows=rows)
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Flask, Response, flash, g, make_response, redirect, render_template, request, url_for
from flask_limiter import Limiter, RequestLimit
from flask_login import current_user
from flask_wtf.csrf import CSRFError, CSRFProtect
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as WerkzeugResponse

from abhiapi.errors import STATUS_NAMES, AbhiError, AccountSuspended, NotFound
from abhiapi.web.caller import runtime
from abhiapi.web.pages import headers
from abhiapi.web.pages.who import Visitor

Reply = str | WerkzeugResponse
FORM_BYTES_MAX = 64 * 1024


class Role(enum.Enum):
    """Who may open a page. Everybody else: sent to sign in, or told that there is no such page."""

    ANYBODY = "anybody"
    USER = "user"  # whoever is signed in
    CUSTOMER = "customer"  # whoever is signed in and has an account
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class NavEntry:
    endpoint: str
    label: str
    role: Role


class Desk:
    """The blueprint of all pages, and who may open which."""

    def __init__(self, app: Flask, limiter: Limiter) -> None:
        self.blueprint = Blueprint("pages", __name__, template_folder="../templates")
        self.limiter = limiter
        self.roles: dict[str, Role] = {}
        self.nav: list[NavEntry] = []
        self._under: dict[str, str] = {}  # endpoint: the label of the entry that its page stands under
        self._first: dict[str, str] = {}  # module: the label of its first entry
        self._csrf = CSRFProtect()
        self._csrf.init_app(app)
        self.blueprint.before_request(self._let_in)
        self.blueprint.after_request(headers.private)
        self.blueprint.app_context_processor(self._context)  # also for what is found by no route
        for expected in (AbhiError, HTTPException):
            self.blueprint.register_error_handler(expected, self.error_page)

    def add(
        self,
        role: Role,
        rule: str,
        view: Callable[..., Reply],
        *,
        methods: Sequence[str] = ("GET",),
        nav: str | None = None,
        nav_for: Role | None = None,
        under: str | None = None,
        limits: Sequence[tuple[str, Callable[[], str]]] = (),
        on_breach: Callable[[RequestLimit], None] | None = None,
    ) -> None:
        """A page or an action: its path under /dashboard, who may, and its entry in the navigation if it has one.

        ``nav_for``: who sees that entry, where not everybody who may.
        ``under``: the entry that a page without one stands under; else the first of its module.
        ``limits``: how often its POST may be asked for, and by what that is counted; ``on_breach`` hears of too many.
        """
        module = view.__module__.rpartition(".")[2]
        endpoint = f"{module}_{view.__name__}"
        self.roles[f"pages.{endpoint}"] = role
        if nav is not None:
            self.nav.append(NavEntry(f"pages.{endpoint}", nav, nav_for or role))
            self._first.setdefault(module, nav)
        self._under[f"pages.{endpoint}"] = nav or under or self._first.get(module, "")
        for limit, counted_by in limits:
            counted = self.limiter.limit(limit, key_func=counted_by, methods=["POST"], on_breach=on_breach)
            view = counted(view)
        self.blueprint.add_url_rule(rule, endpoint, view, methods=list(methods))

    def _let_in(self) -> WerkzeugResponse | None:
        """Before every page: the form's token, then who is asking, then whether they may."""
        request.max_content_length = FORM_BYTES_MAX
        g.visitor = current_user._get_current_object() if current_user.is_authenticated else None
        role = self.roles.get(request.endpoint or "")
        if role is not Role.ANYBODY and g.visitor is None:
            where = request.full_path.rstrip("?") if request.method == "GET" else None
            return redirect(url_for("pages.sign_in_sign_in", next=where))
        if role is None or not _may(g.visitor, role):
            raise NotFound("There is no such page.")
        self._csrf.protect()
        return None

    def _context(self) -> dict[str, Any]:
        seen: Visitor | None = g.get("visitor")
        shown = [entry for entry in self.nav if seen is not None and _may(seen, entry.role)]
        return {
            "visitor": seen,
            "nav": shown,
            "nav_under": self._under.get(request.endpoint or ""),
            "open_signup": runtime().settings.open_signup,
        }

    def recognise(self) -> None:
        """Who is asking, where no page was found that would have wanted to know: their navigation stays."""
        try:
            g.visitor = current_user._get_current_object() if current_user.is_authenticated else None
        except AbhiError:  # of the database: what there is to say can be said to nobody in particular
            g.visitor = None

    def error_page(self, error: Exception) -> Response:
        """A page that says what went wrong, and what can be done."""
        if isinstance(error, CSRFError):
            status, message = 400, "This form is too old, or did not come from this page. Go back, reload, try again."
        elif isinstance(error, AbhiError):
            status, message = error.status, error.message
        elif isinstance(error, HTTPException) and error.response is not None:
            return make_response(error.response)
        else:
            status = getattr(error, "code", None) or 500
            message = _MESSAGES.get(status, "This did not work.")
        page = render_template("error.html", status=status, name=STATUS_NAMES.get(status, "Error"), message=message)
        response = make_response(page, status)
        if status == 429:
            response.headers["Retry-After"] = "60"
        return response


def visitor() -> Visitor:
    """The person who asks; only for pages of users, customers and operators."""
    seen: Visitor = g.visitor
    return seen


def render(template: str, *, status: int = 200, **context: Any) -> Response:
    return make_response(render_template(template, **context), status)


def go(endpoint: str, said: str | None = None, **values: Any) -> WerkzeugResponse:
    """After an action: on to a page, which shows once what was done."""
    if said is not None:
        flash(said)
    return redirect(url_for(endpoint, **values), 303)


def must_not_be_suspended() -> None:
    """Suspended accounts may look, and stop things, but neither spend nor prepare to. Raises `AccountSuspended`."""
    if visitor().account.status != "active":
        raise AccountSuspended("This account is suspended: you can look at everything, and ask the operator.")


def _may(seen: Visitor | None, role: Role) -> bool:
    if role is Role.ANYBODY:
        return True
    if seen is None:
        return False
    return {Role.USER: True, Role.CUSTOMER: seen.has_account, Role.OPERATOR: seen.is_operator}[role]


_MESSAGES = {
    404: "There is no such page.",
    405: "This page does not take that kind of request.",
    413: "That is more than a form here takes.",
    429: "Too many tries. Wait a few minutes and try again.",
}
