"""Our routes in OpenAPI 3.1: `description` is what `/openapi.json` answers. A test holds it against Flask's routes.

Calls to models are one path here, since their inputs and answers are fal's and fal describes them.
"""

from __future__ import annotations

from typing import Any

from abhiapi import __version__
from abhiapi.errors import STATUS_NAMES
from abhiapi.web.pages.openapi_schemas import CALL_ID, error_types, ref, schemas, text, whole

Json = dict[str, Any]

EXAMPLE_INPUT = {"prompt": "a futuristic city at night", "image_size": "landscape_4_3"}
_ANY_KEY: list[Json] = [{"ApiKey": []}, {"FalKey": []}, {"Bearer": []}]
_REFUSALS = (400, 401, 402, 403, 404, 405, 409, 410, 413, 422, 429, 500, 502, 503, 504)  # of a call
_LOOKS = (401, 403, 405, 429, 500, 503)  # of a route that only looks
_OURS_ONLY = (401, 402, 403, 413)  # for the rest fal's own words stand, where it sent any
_FAL_SAID: Json = {"application/json": {"schema": ref("Answer")}, "*/*": {}}
_CALL_HEADERS = {
    "x-abhiapi-call-id": "The id under which `/v1/calls` has it.",
    "x-abhiapi-credits-used": "The charge, where it is known when headers are sent.",
    "x-abhiapi-balance-remaining": "The balance after it, likewise.",
    "x-fal-request-id": "fal's id.",
    "X-RateLimit-Limit": "Calls a minute.",
    "X-RateLimit-Remaining": "Of them, left.",
    "X-RateLimit-Reset": "When the minute is over, unix time.",
}


def description(base_url: str) -> Json:
    """The whole description, of the service at this address."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "AbhiAPI",
            "version": __version__,
            "summary": "A transparent, prepaid proxy in front of fal.ai.",
            "description": "Replace `https://fal.run` by this address, send your key, keep everything else. The "
            "models' own inputs and answers are fal's: see https://fal.ai/models.",
        },
        "servers": [{"url": base_url}],
        "externalDocs": {"url": f"{base_url}/docs", "description": "The reference for people"},
        "tags": [
            {"name": "Models", "description": "Calls that are forwarded to fal and charged."},
            {"name": "Queue", "description": "Jobs in fal's queue."},
            {"name": "Account", "description": "What your account has and did."},
            {"name": "Prices", "description": "What calls cost."},
            {"name": "Service", "description": "For operators and tools."},
        ],
        "security": _ANY_KEY,
        "paths": {**_models(), **_queue(), **_account(), **_prices(), **_service(), **_pages()},
        "components": {
            "securitySchemes": {
                "ApiKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "`sk-fal-...`"},
                "FalKey": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": "`Key sk-fal-...`, as fal's own clients send it. Errors are then fal's own.",
                },
                "Bearer": {"type": "http", "scheme": "bearer", "description": "`Bearer sk-fal-...`"},
            },
            "schemas": schemas(),
            "responses": {
                **{f"Error{status}": _error(status) for status in error_types()},
                **{f"Call{status}": _call_error(status) for status in _REFUSALS},
                "Answer": {"description": "fal's answer.", "headers": _headers(_CALL_HEADERS), "content": _FAL_SAID},
                "OtherAnswer": {"description": "Whatever else fal says.", "content": _FAL_SAID},
            },
        },
    }


def _models() -> Json:
    path = _path(
        "path", "A model's path at fal, slashes included, `/stream` behind it for a stream.", "fal-ai/flux/dev"
    )
    named = [
        {
            "name": "x-fal-target-url",
            "in": "header",
            "required": True,
            "description": "Where the request was meant to go, at fal.run, queue.fal.run or rest.fal.ai.",
            "schema": text(),
            "example": "https://fal.run/fal-ai/flux/dev",
        }
    ]
    return {
        "/{path}": {
            "parameters": [path],
            "post": _call("callModel", "Call a model", "Models", with_body=True),
            "get": _call("callModelByQuery", "Call a model by its query", "Models"),
        },
        "/api/fal/proxy": {
            "parameters": named,
            "post": _call("proxyPost", "The proxy protocol of fal's JavaScript client", "Models", with_body=True),
            "get": _call("proxyGet", "The same, for a status or a result", "Models"),
            "put": _call("proxyPut", "The same, to cancel a job", "Models"),
        },
    }


def _queue() -> Json:
    path = _path("path", "A model's path to submit; `{app}/requests/{id}` and what is under it", "fal-ai/flux/dev")
    job = _path("id", "The `request_id` of a submit.", "00000000-0000-4000-8000-000000000000")
    by_id = "/fal-ai/queue/requests/{id}"
    names = {
        "": ("pollJob", "Status of a job by its id"),
        "/status": ("jobStatus", "Status of a job"),
        "/status/stream": ("jobStatusStream", "Status of a job as server-sent events, until its end"),
        "/response": ("jobResult", "Result of a job"),
    }
    return {
        "/queue/{path}": {
            "parameters": [path],
            "post": _call("submitJob", "Submit a job", "Queue", with_body=True),
            "get": _call("readJob", "Status or result of a job", "Queue"),
            "put": _call("cancelJob", "Cancel a job", "Queue"),
        },
        **{
            by_id + end: {"parameters": [job], "get": _call(name, summary, "Queue")}
            for end, (name, summary) in names.items()
        },
        f"{by_id}/cancel": {"parameters": [job], "put": _call("cancelJobById", "Cancel a job by its id", "Queue")},
    }


def _account() -> Json:
    limit = _query("limit", "Rows of a page.", whole(minimum=1, maximum=200, default=50))
    day = {"anyOf": [text(format="date"), text(pattern="^[0-9]{1,4}d$")]}
    call_id = _path("call_id", "As in `x-abhiapi-call-id`.", "call_01jd9x8k2m4p7") | {"schema": text(pattern=CALL_ID)}
    return {
        "/v1/account": {"get": _look("getAccount", "Balance, plan and limits", "Account")},
        "/v1/calls": {
            "get": _look("listCalls", "Calls, newest first", "Calls", 400)
            | {"parameters": [limit, _query("cursor", "`next_cursor` of the page before.", text(pattern=CALL_ID))]}
        },
        "/v1/calls/{call_id}": {"get": _look("getCall", "One call", "Call", 404) | {"parameters": [call_id]}},
        "/v1/usage": {
            "get": _look("getUsage", "Usage by day, model or key", "Usage", 400)
            | {
                "parameters": [
                    _query("by", "What to group by.", text(enum=["day", "model", "key"], default="day")),
                    _query("since", "First day (UTC), or days back such as `7d`.", day),
                    _query("until", "Last day (UTC), included.", day),
                ]
            }
        },
        "/v1/ledger": {
            "get": _look("listEntries", "Movements of credit, newest first", "Ledger", 400)
            | {
                "parameters": [
                    limit,
                    _query("cursor", "`next_cursor` of the page before.", text(pattern="^[0-9]{1,18}$")),
                ]
            }
        },
        "/v1/statement": {"get": _statement()},
    }


def _statement() -> Json:
    made = _look("getStatement", "A month of the account", "Statement", 400)
    made["responses"]["200"]["content"]["text/csv"] = {"schema": text()}
    month = text(pattern="^(19[7-9][0-9]|20[0-9]{2})-(0[1-9]|1[0-2])$")
    made["parameters"] = [
        _query("month", "In UTC, as 2026-11.", month, required=True),
        _query("format", "`csv` for a table.", text(enum=["json", "csv"])),
    ]
    return made


def _prices() -> Json:
    asked = {"model": "fal-ai/flux/dev", "input": EXAMPLE_INPUT}
    return {
        "/v1/prices": {
            "get": _look("listPrices", "The price of every model", "Prices", codes=(405, 429, 500, 503), tag="Prices")
            | {"security": []}
        },
        "/v1/estimate": {
            "post": _look("estimate", "What a call would hold", "Estimate", 400, 404, 413, tag="Prices")
            | {"requestBody": {"required": True, "content": _json(ref("EstimateRequest"), asked)}}
        },
    }


def _service() -> Json:
    sick = {"description": "The database takes no write.", "content": _json(ref("Sickness"))}
    health = _look("health", "Whether it can serve", "Health", codes=(405, 500), tag="Service") | {"security": []}
    health["responses"]["503"] = sick
    metrics = _document("metrics", "Prometheus text, for the operator", "text/plain", 401, 404)
    delivered = [
        _path("call_id", "The job's call.", "call_01jd9x8k2m4p7"),
        _path("token", "Known to fal only.", "x"),
    ]
    return {
        "/healthz": {"get": health},
        "/metrics": {"get": metrics | {"security": []}},
        "/.well-known/jwks.json": {
            "get": _look("webhookKeys", "The public key of our webhooks", "Jwks", codes=(405, 500), tag="Service")
            | {"security": []}
        },
        "/v1/webhooks/fal/{call_id}/{token}": {
            "post": _look("takeWebhook", "For fal: where it delivers", "Health", codes=(), tag="Service")
            | {
                "security": [],
                "parameters": delivered,
                "responses": {
                    "200": _ok("Taken.", "Health"),
                    "4XX": {"description": "Not a delivery of fal's.", "content": _json(ref("Error"))},
                    "5XX": {"description": "fal delivers again.", "content": _json(ref("Error"))},
                },
            }
        },
    }


def _pages() -> Json:
    query = _query("q", "Words to find models by.", text())
    number = _query("page", "Of the models found; what is no number is the first.", text())
    part = _query("part", "`prices`: the price list alone.", text())
    page = _path("page", "One of the guides.", "clients")
    spec = _look("getOpenapi", "This description", "Answer", codes=(405, 500), tag="Service") | {"security": []}
    spec["responses"]["200"] = {"description": "OpenAPI 3.1.", "content": _json({"type": "object"})}
    found = {"security": [], "parameters": [query, number, part]}
    return {
        "/": {"get": _document("reference", "The reference", "text/html", 503) | found},
        "/docs": {"get": _document("docs", "The same", "text/html", 503) | found},
        "/docs/{page}": {
            "get": _document("guide", "A guide", "text/html", 404) | {"security": [], "parameters": [page]}
        },
        "/static/{file}": {
            "get": _document("staticFile", "A file of the pages", "text/css", 404)
            | {"security": [], "parameters": [_path("file", "Its name.", "reference.css")]}
        },
        "/openapi.json": {"get": spec},
    }


def _call(name: str, summary: str, tag: str, *, with_body: bool = False) -> Json:
    """An operation whose answer is fal's, in fal's own words where it failed there."""
    made: Json = {
        "operationId": name,
        "summary": summary,
        "tags": [tag],
        "responses": {
            "2XX": _response("Answer"),
            **{str(status): _response(f"Call{status}") for status in _REFUSALS},
            "default": _response("OtherAnswer"),
        },
    }
    if with_body:
        body = {"schema": {"type": "object"}, "example": EXAMPLE_INPUT}
        made["requestBody"] = {"description": "The model's input.", "content": {"application/json": body}}
        key = _header("Idempotency-Key", "Runs the request once.", text(pattern="^[!-~]{1,255}$"))
        made["parameters"] = [key]
    return made


def _look(
    name: str, summary: str, schema: str, *more: int, codes: tuple[int, ...] = _LOOKS, tag: str = "Account"
) -> Json:
    """An operation that answers with one of our own values."""
    refused = {str(code): _response(f"Error{code}") for code in sorted({*codes, *more})}
    return {
        "operationId": name,
        "summary": summary,
        "tags": [tag],
        "responses": {"200": _ok(f"{summary}.", schema), **refused},
    }


def _document(name: str, summary: str, media_type: str, *more: int) -> Json:
    made = _look(name, summary, "Answer", *more, codes=(405, 500), tag="Service")
    made["responses"]["200"] = {"description": f"{summary}.", "content": {media_type: {"schema": text()}}}
    return made


def _ok(description: str, schema: str) -> Json:
    return {"description": description, "content": _json(ref(schema))}


def _error(status: int) -> Json:
    headers = _headers({"Retry-After": "Seconds."}) if status in (429, 503) else {}
    made: Json = {"description": STATUS_NAMES[status], "content": _json(ref(f"Error{status}"))}
    return made | ({"headers": headers} if headers else {})


def _call_error(status: int) -> Json:
    if status in _OURS_ONLY:
        return _error(status)
    either = {"anyOf": [ref(f"Error{status}"), ref("Answer")]}
    words = f"{STATUS_NAMES[status]}: this service's, or fal's own with `_billing`."
    return {"description": words, "content": {"application/json": {"schema": either}, "*/*": {}}}


def _response(name: str) -> Json:
    return {"$ref": f"#/components/responses/{name}"}


def _json(schema: Json, example: Json | None = None) -> Json:
    return {"application/json": {"schema": schema} | ({"example": example} if example else {})}


def _headers(named: dict[str, str]) -> Json:
    return {name: {"description": words, "schema": text()} for name, words in named.items()}


def _path(name: str, words: str, example: str) -> Json:
    return {"name": name, "in": "path", "required": True, "description": words, "schema": text(), "example": example}


def _query(name: str, words: str, schema: Json, *, required: bool = False) -> Json:
    made = {"name": name, "in": "query", "description": words, "schema": schema}
    return made | ({"required": True} if required else {})


def _header(name: str, words: str, schema: Json) -> Json:
    return {"name": name, "in": "header", "description": words, "schema": schema}
