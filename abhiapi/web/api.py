"""Our own routes for programs: /v1, /healthz, /metrics. Views only: they read, shape, and answer."""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping
from datetime import date
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from flask import Blueprint, Response, jsonify, request
from flask_limiter import Limiter

from abhiapi import (
    accounts,
    draining,
    ids,
    jsonbytes,
    pricing,
    reports,
    shapes,
    statement_forms,
    statements,
    webhook_intake,
)
from abhiapi.db import Tx
from abhiapi.errors import (
    AbhiError,
    BadRequest,
    BodyIncomplete,
    BodyTooLarge,
    InvalidKey,
    MalformedJson,
    MissingKey,
    NotFound,
    UnknownRoute,
)
from abhiapi.money import credits
from abhiapi.runtime import Runtime
from abhiapi.settings import STALL_S
from abhiapi.web.caller import caller, monitor, runtime

PAGE_MAX, PAGE_DEFAULT = 200, 50
BODY_BYTES_MAX = 1024 * 1024  # of a request to one of these routes
TOO_LARGE = f"a request to this route has at most {BODY_BYTES_MAX} bytes"
_LOOPBACK = ("127.0.0.1", "::1")
_OF_PROXIES = ("Forwarded", "Via", "X-Real-IP", *(f"X-Forwarded-{what}" for what in ("For", "Host", "Proto", "Port")))


def blueprint(limiter: Limiter, limit: str) -> Blueprint:
    """The routes; those under /v1 are limited per key."""
    routes = Blueprint("api", __name__)
    routes.get("/healthz")(healthz)
    routes.get("/metrics")(metrics)
    for method, rule, view in (
        ("GET", "/v1/account", account),
        ("GET", "/v1/calls", list_calls),
        ("GET", "/v1/calls/<call_id>", show_call),
        ("GET", "/v1/usage", usage),
        ("GET", "/v1/ledger", list_entries),
        ("GET", "/v1/statement", statement),
        ("GET", "/v1/prices", prices),
        ("POST", "/v1/estimate", estimate),
    ):
        routes.add_url_rule(rule, view_func=limiter.limit(limit)(view), methods=[method])
    # fal's deliveries are not limited: thousands of jobs may end at once, and each has a URL that nobody can guess.
    routes.post("/v1/webhooks/fal/<call_id>/<token>")(take_webhook)
    routes.get("/.well-known/jwks.json")(jwks)
    return routes


def healthz() -> Response:
    """200 while calls may come: the database takes writes (one is made to find out, at most once a second)."""
    error = monitor().trouble()
    reason = "this server is ending" if draining.is_under_way() else error and error.message
    if reason is not None:
        response = jsonify({"status": "unavailable", "reason": reason})
        response.status_code = 503
        response.headers["Retry-After"] = "2"
        return response
    return jsonify({"status": "ok"})


def metrics() -> Response:
    rt = runtime()
    token = rt.settings.metrics_token
    if token is None:
        if not _is_on_this_machine(rt):
            raise UnknownRoute("no such route here")
    elif "Authorization" not in request.headers:
        raise MissingKey("/metrics takes the bearer token of ABHIAPI_METRICS_TOKEN, and no key")
    elif not hmac.compare_digest(request.headers["Authorization"].encode(), f"Bearer {token}".encode()):
        raise InvalidKey("this is not the bearer token of ABHIAPI_METRICS_TOKEN")
    monitor().look()
    return Response(rt.metrics.text(), content_type="text/plain; version=0.0.4; charset=utf-8")


def _is_on_this_machine(rt: Runtime) -> bool:
    """Whether nobody else can have sent this. Behind a reverse proxy on this machine every peer is loopback, so any
    sign of one counts: the settings, a header that proxies add, a host that is not ours, and HTTP/1.0, which is what
    nginx speaks where it is told nothing else."""
    public_url = rt.settings.public_url or ""
    return (
        request.remote_addr in _LOOPBACK
        and rt.settings.trusted_proxies == 0
        and not public_url.startswith("https://")
        and not any(name in request.headers for name in _OF_PROXIES)
        and (urlsplit(f"//{request.host}").hostname or "") in (*_LOOPBACK, "localhost")
        and request.environ.get("SERVER_PROTOCOL") != "HTTP/1.0"
    )


def account() -> Response:
    me = caller()
    rt = runtime()
    row = rt.read_aside(lambda tx: accounts.by_id(tx, me.account_id))
    plan = rt.limits.plans[row.plan]
    shape = shapes.account(row)
    del shape["status"]
    shape["limits"] = {"requests_per_minute": plan.requests_per_minute, "concurrent": plan.concurrent}
    return jsonify(shape)


def list_calls() -> Response:
    me, most, cursor = caller(), _page_size(), request.args.get("cursor")
    before = reports.FIRST if cursor is None else ids.parse_call(cursor)
    if before is None:
        raise BadRequest("cursor is none of ours: pass next_cursor of the page before")
    rows = runtime().read_aside(
        lambda tx: reports.newest_calls(tx, account_id=me.account_id, before=before, most=most + 1)
    )
    page = rows[:most]
    more = ids.call_text(page[-1].call_id) if len(rows) > most else None
    return jsonify({"calls": [shapes.call(row) for row in page], "next_cursor": more})


def show_call(call_id: str) -> Response:
    me = caller()
    number = ids.parse_call(call_id)
    row = None if number is None else runtime().read_aside(lambda tx: reports.call(tx, number))
    if row is None or row.account != me.account:
        raise NotFound("no call of this account has that id")
    return jsonify(shapes.call(row))


def take_webhook(call_id: str, token: str) -> Response:
    """A delivery of fal's: 200 once nothing of it can be lost."""
    rt = runtime()
    request.max_content_length = webhook_intake.BODY_BYTES_MAX
    sock = request.environ.get("gunicorn.socket")
    if sock is not None:
        sock.settimeout(STALL_S)
    headers = {name.lower(): value for name, value in request.headers.items()}
    status = 500
    try:
        webhook_intake.receive(rt, call_id, token, headers, request.stream.read)
        status = 200
    except AbhiError as error:
        status = error.status
        raise
    except OSError as error:
        status = BodyIncomplete.status
        raise BodyIncomplete("the delivery broke off") from error
    finally:
        rt.metrics.webhooks_received.labels(str(status)).inc()
    return jsonify({"status": "ok"})


def jwks() -> Response:
    """The public key of what we deliver."""
    response = jsonify(runtime().webhook_key.jwks())
    response.headers["Cache-Control"] = "public, max-age=3600"
    return response


def usage() -> Response:
    me = caller()
    by = request.args.get("by", "day")
    if by not in ("day", "model", "key"):
        raise BadRequest("by is one of: day, model, key")
    since, until = _day("since"), _day("until")
    rows = runtime().read_aside(
        lambda tx: reports.usage(tx, by, account_id=me.account_id, since=since, until=until)  # type: ignore[arg-type]
    )
    return jsonify({"rows": [shapes.usage(row) for row in rows], "total": _without_group(reports.total(rows))})


def list_entries() -> Response:
    me, most, cursor = caller(), _page_size(), request.args.get("cursor")
    if cursor is not None and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise BadRequest("cursor is none of ours: pass next_cursor of the page before")
    before = reports.FIRST if cursor is None else int(cursor)
    rows = runtime().read_aside(lambda tx: reports.newest_entries(tx, me.account_id, before=before, most=most + 1))
    page = rows[:most]
    more = str(page[-1].seq) if len(rows) > most else None
    return jsonify({"entries": [shapes.entry(row) for row in page], "next_cursor": more})


def statement() -> Response:
    """A month of the account, as JSON or with ``format=csv`` as CSV; sent page by page, at any length."""
    me, rt = caller(), runtime()
    month, form = request.args.get("month", ""), request.args.get("format", "json")
    if form not in ("json", "csv"):
        raise BadRequest("format is one of: json, csv")

    def find(tx: Tx) -> statements.Statement:
        try:
            return statements.of_month(tx, me.account_id, month)
        except ValueError as error:
            raise BadRequest(f"month: {error}") from error

    found = rt.read_aside(find)

    def lines() -> Iterator[statements.Line]:
        after = found.first_seq - 1
        while rows := rt.read_aside(partial(statements.page, statement=found, after_seq=after)):
            yield from rows
            after = rows[-1].seq

    if form == "csv":
        name = f"attachment; filename=statement-{found.month}.csv"
        return Response(
            statement_forms.as_csv(found, lines()),
            content_type="text/csv; charset=utf-8",
            headers={"Content-Disposition": name},
        )
    return Response(statement_forms.as_json(found, lines()), content_type="application/json")


def prices() -> Response:
    """The price list; printed once for each catalogue, since nobody needs a key to ask for a thousand prices."""
    rt = runtime()
    catalogue = rt.catalogue()
    if rt.price_list is None or rt.price_list[0] is not catalogue:
        page: bytes = jsonify({"prices": [shapes.price(price) for price in catalogue]}).get_data()
        rt.price_list = (catalogue, page)
    return Response(rt.price_list[1], content_type="application/json")


def estimate() -> Response:
    """What a call would hold."""
    caller()
    body = request.get_data(cache=False)
    if len(body) > BODY_BYTES_MAX:
        raise BodyTooLarge(TOO_LARGE)
    try:
        wanted = jsonbytes.parse(body)
    except ValueError as error:
        raise MalformedJson(f"the body is not JSON: {error}") from error
    if not isinstance(wanted, dict) or not isinstance(wanted.get("model"), str):
        raise BadRequest('send {"model": "fal-ai/flux/dev", "input": {...}}')
    call_input = wanted.get("input", {})
    if not isinstance(call_input, Mapping):
        raise BadRequest("input is the JSON object that the call would send")
    unknown = set(wanted) - {"model", "input"}
    if unknown:
        raise BadRequest(f"unknown fields: {', '.join(sorted(unknown))}")
    price = runtime().catalogue().price_of(wanted["model"].strip("/").removesuffix("/stream"))
    ceiling = pricing.ceiling(price, call_input)
    return jsonify({"model": price.model, "credits": credits(ceiling.amount_micros), "basis": ceiling.basis})


def _without_group(row: reports.UsageRow) -> dict[str, Any]:
    shape = shapes.usage(row)
    del shape["group"]
    return shape


def _page_size() -> int:
    text = request.args.get("limit", str(PAGE_DEFAULT))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= PAGE_MAX):
        raise BadRequest(f"limit is a whole number from 1 to {PAGE_MAX}")
    return int(text)


def _day(name: str) -> date | None:
    text = request.args.get(name)
    if text is None:
        return None
    try:
        return reports.parse_day(text)
    except ValueError as error:
        raise BadRequest(f"{name}: {error}") from error
