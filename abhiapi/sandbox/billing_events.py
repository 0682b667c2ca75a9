"""The simulated platform API's billing events: fal's books, a row for each billed request (fal-protocol 8.5).

`GET /v1/models/billing-events` with start, end, request_id, endpoint_id, limit and cursor. A credential that starts
with ``api-only`` has no ADMIN scope and gets fal's 403.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import simplejson

from abhiapi.sandbox import replies
from abhiapi.sandbox.records import Bill, Billed
from abhiapi.sandbox.replies import Reply
from abhiapi.sandbox.weather import Weather

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

PATH = "/v1/models/billing-events"
LIMIT_MAX, LIMIT = 10_000, 1_000
IDS_MAX = 50
SPAN_MAX = timedelta(days=90)
SPAN = timedelta(days=1)


class _Invalid(ValueError):
    """A parameter that fal would refuse; the message says why."""


def answer(bill: Bill, environ: WSGIEnvironment, now: datetime, wanted: Weather | None) -> Reply:
    """A page of the bill, or what the weather makes of it (``status``, ``body``)."""
    if wanted is not None and wanted.status is not None:
        return _error(wanted.status, "server_error", "Something went wrong")
    if wanted is not None and wanted.body is not None:
        return replies.odd(200, wanted.body)
    scheme, _, credential = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme != "Key" or not credential.strip():
        return _error(401, "authorization_error", "Authentication is required")
    if credential.strip().startswith("api-only"):
        return _error(403, "authorization_error", "This endpoint requires an ADMIN key")
    try:
        query = parse_qs(environ.get("QUERY_STRING", ""), strict_parsing=bool(environ.get("QUERY_STRING")))
        page, cursor = _page(bill, query, now)
    except ValueError as error:
        return _error(400, "validation_error", str(error))
    document = {"billing_events": page, "next_cursor": cursor, "has_more": cursor is not None}
    return replies.of_bytes(200, simplejson.dumps(document, use_decimal=True).encode())


def _page(bill: Bill, query: Mapping[str, list[str]], now: datetime) -> tuple[list[dict[str, Any]], str | None]:
    end = _time(query, "end") or now + timedelta(seconds=1)
    start = _time(query, "start") or end - SPAN
    if end - start > SPAN_MAX:
        raise _Invalid("the time range may not exceed 90 days")
    limit = _number(query, "limit", LIMIT)
    if not 1 <= limit <= LIMIT_MAX:
        raise _Invalid(f"limit must be from 1 to {LIMIT_MAX}")
    offset = _number(query, "cursor", 0)
    wanted = {name: set(_list(query, name)) for name in ("request_id", "endpoint_id")}
    found: list[dict[str, Any]] = []
    for place, one in enumerate(_within(bill, start, end, wanted)):
        if place < offset:
            continue
        if len(found) == limit:
            return found, str(offset + limit)
        found.append(_event(one))
    return found, None


def _within(bill: Bill, start: datetime, end: datetime, wanted: Mapping[str, set[str]]) -> Iterator[Billed]:
    for one in bill.latest():
        if not start <= one.at < end:
            continue
        if wanted["request_id"] and one.request_id not in wanted["request_id"]:
            continue
        if wanted["endpoint_id"] and one.endpoint_id not in wanted["endpoint_id"]:
            continue
        yield one


def _event(one: Billed) -> dict[str, Any]:
    cost = Decimal(one.cost_nano_usd).scaleb(-9)
    return {
        "request_id": one.request_id,
        "endpoint_id": one.endpoint_id,
        "timestamp": one.at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "output_units": one.units,
        "unit_price": one.unit_price_usd,
        "percent_discount": 0,
        "cost_subtotal": cost,
        "cost_discount": 0,
        "cost_total": cost,
        "cost_estimate_nano_usd": one.cost_nano_usd,
    }


def _time(query: Mapping[str, list[str]], name: str) -> datetime | None:
    if name not in query:
        return None
    try:
        at = datetime.fromisoformat(query[name][-1])
    except ValueError as error:
        raise _Invalid(f"{name} is no ISO 8601 time") from error
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _number(query: Mapping[str, list[str]], name: str, otherwise: int) -> int:
    text = query.get(name, [str(otherwise)])[-1]
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise _Invalid(f"{name} is no whole number")
    return int(text)


def _list(query: Mapping[str, list[str]], name: str) -> list[str]:
    values = [part for text in query.get(name, []) for part in text.split(",")]
    if len(values) > IDS_MAX:
        raise _Invalid(f"at most {IDS_MAX} values of {name}")
    return values


def _error(status: int, kind: str, message: str) -> Reply:
    return replies.of_json(status, {"error": {"type": kind, "message": message}})
