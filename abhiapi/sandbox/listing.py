"""The simulator's share of fal's platform API: which models there are and what their units cost.

``GET /v1/models`` and ``GET /v1/models/pricing``, paged by cursor, with prices that are the very Decimals of the
simulator's own bill (fal-protocol 8.3 and 8.4, seen 2026-11-22). Only weather ordered for ``v1/models`` or
``v1/models/pricing`` touches them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import simplejson

from abhiapi.pricing import PriceRule, decimal_text
from abhiapi.sandbox import replies
from abhiapi.sandbox.replies import Reply
from abhiapi.sandbox.weather import FAIR, Weather

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

PATHS = ("/v1/models", "/v1/models/pricing")
PAGE_DEFAULT, PAGE_MAX = 50, 100
IDS_MAX = 50

_ERRORS = {
    400: "validation_error",
    401: "authorization_error",
    403: "authorization_error",
    404: "not_found",
    429: "rate_limited",
}


def answer(
    rules: Mapping[str, PriceRule], environ: WSGIEnvironment, weather: Weather | None, *, is_authorized: bool
) -> Reply:
    """What fal's platform API says to a GET of one of `PATHS`."""
    wanted = weather or FAIR
    if environ["REQUEST_METHOD"] != "GET":
        return _error(405, "Method not allowed")
    if wanted.body is not None:
        return replies.odd(wanted.status or 200, wanted.body)
    if wanted.status is not None and wanted.status != 200:
        pause = (("retry-after", "1"),) if wanted.status == 429 else ()
        return _error(wanted.status, "as the weather has it").with_headers(*pause)
    query = parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    ids = [one for name, value in query if name == "endpoint_id" for one in value.split(",")]
    if environ["PATH_INFO"] == "/v1/models":
        return _models(rules, ids, dict(query), wanted)
    if not is_authorized:
        return _error(401, "Authentication is required")
    return _prices(rules, ids, wanted)


def _models(rules: Mapping[str, PriceRule], ids: Sequence[str], query: Mapping[str, str], weather: Weather) -> Reply:
    listed = [model for model in sorted(rules) if not ids or model in ids]
    if weather.prices == "partial":
        listed = listed[: len(listed) // 3]
    limit, cursor = query.get("limit", str(PAGE_DEFAULT)), query.get("cursor")
    start = 0 if cursor is None else _start(cursor)
    if not limit.isdecimal() or not 1 <= int(limit) <= PAGE_MAX or start is None:
        return _error(400, "Invalid request parameters")
    end = start + int(limit)
    models = [{"endpoint_id": model, "metadata": _metadata(model)} for model in listed[start:end]]
    has_more = end < len(listed)
    after = _cursor(end) if has_more else None
    if weather.prices == "repeat":  # the same page for ever
        has_more, after = True, _cursor(start)
    elif weather.prices == "endless":  # the first page under ever new cursors
        has_more, after = True, _cursor(end)
        models = [{"endpoint_id": model, "metadata": _metadata(model)} for model in listed[: int(limit)]]
    elif weather.prices == "shape":
        return _json({"items": models})
    return _json({"models": models, "next_cursor": after, "has_more": has_more})


def _prices(rules: Mapping[str, PriceRule], ids: Sequence[str], weather: Weather) -> Reply:
    if not 1 <= len(ids) <= IDS_MAX:
        return _error(400, f"endpoint_id must be given 1 to {IDS_MAX} times")
    if unknown := [model for model in ids if model not in rules]:
        return _error(404, f"Endpoint {unknown[0]} not found")
    asked = list(dict.fromkeys(ids))
    if weather.prices == "partial":
        asked = asked[: len(asked) // 3]
    prices = [_price(rules[model], weather) for model in asked]
    if weather.prices == "shape":
        return _json({"prices": {"price": prices}})
    return _json({"prices": prices, "next_cursor": None, "has_more": False})


def _price(rule: PriceRule, weather: Weather) -> dict[str, Any]:
    price, unit, currency = rule.fal_unit_price_usd * weather.prices_factor, rule.unit, "USD"
    match weather.prices:
        case "negative":
            price = -price
        case "currency":
            currency = "EUR"
        case "placeholder":
            price, unit = price * 0, "compute seconds"
    # printed with all its digits and no exponent, as a number: simplejson keeps a Decimal's text
    return {
        "endpoint_id": rule.model,
        "unit_price": type(price)(decimal_text(price)),
        "unit": unit,
        "currency": currency,
    }


def _metadata(model: str) -> dict[str, Any]:
    return {"display_name": model.rpartition("/")[2], "category": "simulated", "status": "active"}


def _cursor(start: int) -> str:
    return base64.urlsafe_b64encode(str(start).encode()).decode().rstrip("=")


def _start(cursor: str) -> int | None:
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
    except ValueError:
        return None
    return int(text) if text.isdecimal() else None


def _error(status: int, message: str) -> Reply:
    kind = _ERRORS.get(status, "server_error")
    return replies.of_json(status, {"error": {"type": kind, "message": message}})


def _json(value: Any) -> Reply:
    return replies.of_bytes(200, simplejson.dumps(value, use_decimal=True, separators=(",", ":")).encode())
