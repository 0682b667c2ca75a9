"""The web application: Flask for our own pages and the /v1 routes, and before it the WSGI door for calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import Any

import simplejson
from flask import Flask, Response, current_app, request
from flask.json.provider import JSONProvider
from flask_limiter import Limiter
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix

from abhiapi import gateway, queue_gateway, queuewire, target, wire
from abhiapi.errors import STATUS_NAMES, AbhiError, BodyTooLarge, MethodNotAllowed, RateLimited, UnknownRoute
from abhiapi.monitoring import Monitor
from abhiapi.runtime import Runtime
from abhiapi.web import api, cors, pages, proxy
from abhiapi.web.caller import request_key
from abhiapi.web.pages import reference

# What Flask serves, or refuses: everything else is a call. The refused ones mint credentials at fal or reach into
# the operator's account (contract 3.1), or are the queue's.
_OWN_PATHS = frozenset(("/", "/healthz", "/metrics", "/openapi.json", "/favicon.ico", "/robots.txt"))
_OWN_ROOTS = frozenset(("v1", "docs", "dashboard", "static", "queue", "api", "tokens", "storage", ".well-known"))

# Far above what any client does: the other routes are cheap, and counted apart from calls.
V1_LIMIT = "600 per minute"

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class ExactJson(JSONProvider):
    """JSON whose amounts are exact: Decimals printed as the numbers they are."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return simplejson.dumps(obj, use_decimal=True, **kwargs)

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        return simplejson.loads(s, use_decimal=True, **kwargs)


def create_app(rt: Runtime) -> Flask:
    """The application over a runtime."""
    app = Flask("abhiapi", static_folder=None)
    app.json = ExactJson(app)
    app.config["MAX_CONTENT_LENGTH"] = api.BODY_BYTES_MAX + 1  # by which a route tells what is too large
    app.extensions["abhiapi"] = rt
    app.extensions["abhiapi_monitor"] = Monitor(rt)
    limiter = Limiter(
        request_key,
        app=app,
        storage_uri=rt.limits.storage_uri,
        storage_options=rt.limits.storage_options,
        strategy="moving-window",
        headers_enabled=False,
    )
    app.register_blueprint(api.blueprint(limiter, V1_LIMIT))
    app.register_blueprint(reference.blueprint())
    pages.install(app, rt, limiter)
    app.register_error_handler(AbhiError, _error_reply)
    app.register_error_handler(HTTPException, _http_error_reply)
    hops = rt.settings.trusted_proxies
    flask_app: WsgiApp = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops, x_host=hops) if hops else app.wsgi_app
    door = _door(rt, flask_app)
    origins = rt.settings.cors_origins
    app.wsgi_app = cors.allowing(origins, door) if origins else door  # type: ignore[assignment, method-assign]
    return app


def is_own_path(path: str) -> bool:
    """Whether a path is one of ours rather than a model's at fal."""
    return path in _OWN_PATHS or path.split("/", 2)[1] in _OWN_ROOTS or path.startswith("/fal-ai/queue/")


def _door(rt: Runtime, flask_app: WsgiApp) -> WsgiApp:
    """Calls go to the proxy, everything else to Flask."""

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path: str = environ.get("PATH_INFO") or "/"
        if "HTTP_X_FORWARDED_FOR" in environ and rt.settings.trusted_proxies == 0:
            _watch_for_proxy(rt, environ.get("REMOTE_ADDR", ""))
        if proxy.TARGET_VARIABLE in environ or path.rstrip("/") == target.DOCUMENTED_AT:
            return proxy.serve_target(rt, environ, start_response)
        if path.startswith(queuewire.PREFIXES):
            return proxy.serve(rt, environ, start_response, queue_gateway.run)
        if path.startswith("/") and is_own_path(path):
            return flask_app(environ, start_response)
        return proxy.serve(rt, environ, start_response, gateway.run)

    return application


def _watch_for_proxy(rt: Runtime, peer: str) -> None:
    """Tell the operator, once, of a reverse proxy nearby that the settings do not know of: all its visitors have one
    address here, and links begin with http://. A header sent from afar says nothing."""
    try:
        is_near = ip_address(peer).is_private
    except ValueError:
        return
    if is_near:
        rt.proxy_seen_at = rt.now_ms()
        rt.alert(
            "unexpected_proxy",
            "proxy",
            f"requests come through a proxy at {peer} (X-Forwarded-For), and ABHIAPI_TRUSTED_PROXIES is 0: "
            "say there how many proxies are in front",
        )


def _error_reply(error: AbhiError) -> Response:
    response = Response(wire.error_body(error), status=error.status, content_type="application/json")
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, MethodNotAllowed):
        response.headers["Allow"] = error.allowed
    return response


def _http_error_reply(error: HTTPException) -> Response:
    code = error.code or 500
    if pages.is_page(request.path):
        return pages.error_page(current_app, error)
    if code == 404:
        page = reference.missing()
        if page is not None:
            return page
        return _error_reply(UnknownRoute("no such route here: models are called at /{any-fal-path}, see /docs"))
    if code == 405:
        allowed = ", ".join(sorted(getattr(error, "valid_methods", None) or ()))
        return _error_reply(MethodNotAllowed("this route does not take that method, see /docs", allowed=allowed))
    if code == 413:
        return _error_reply(BodyTooLarge(api.TOO_LARGE))
    if code == 429:
        return _error_reply(RateLimited("too many requests to this route: slow down", retry_after_s=5))
    plain = AbhiError(error.description or STATUS_NAMES.get(code, "Error"))
    return Response(wire.error_body(plain, status=code), status=code, content_type="application/json")
