"""The values of our routes in JSON Schema: what `shapes` makes and `errors` says, for `/openapi.json`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from abhiapi.errors import STATUS_NAMES, AbhiError

Json = dict[str, Any]

# Met at the command line only, or said to fal only.
_NOT_CUSTOMERS = frozenset(
    "bad_settings bad_price_file bad_schema fal_api_error refused call_ended bad_amount".split()
    + "webhook_signature_invalid webhook_not_taken".split()
)
CALL_ID = "^call_[0-7][0-9a-hjkmnp-tv-z]{12}$"
EXAMPLE_CALL = "call_01jd9x8k2m4p7"


def ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def text(description: str = "", **more: Any) -> Json:
    return {"type": "string", **({"description": description} if description else {}), **more}


def nullable(schema: Json) -> Json:
    return {**schema, "type": [schema["type"], "null"]}


def credits(description: str) -> Json:
    return {"type": "number", "description": f"{description} In credits (0.001 USD), exact, at most 3 decimals."}


def usd(description: str) -> Json:
    return {"type": "number", "description": f"{description} In US dollars, exact."}


def whole(description: str = "", **more: Any) -> Json:
    return {"type": "integer", **({"description": description} if description else {}), **more}


def record(description: str, members: Json, *, optional: tuple[str, ...] = ()) -> Json:
    """An object with just these members."""
    required = [name for name in members if name not in optional]
    return {
        "type": "object",
        "description": description,
        "properties": members,
        "required": required,
        "additionalProperties": False,
    }


TIME = text("UTC, as in 2026-11-22T19:59:44.123Z.", format="date-time")
CURSOR = nullable(text("Pass it as `cursor` for the next page; null on the last."))


def rows(item: str) -> Json:
    return {"type": "array", "items": ref(item)}


def error_types() -> dict[int, list[str]]:
    """The types of the errors that a customer can meet, by status."""
    found: dict[int, set[str]] = {}
    for error in _errors(AbhiError):
        if error.type not in _NOT_CUSTOMERS:
            found.setdefault(error.status, set()).add(error.type)
    return {status: sorted(types) for status, types in sorted(found.items())}


def error(status: int) -> Json:
    """Our error with this status."""
    types = error_types().get(status, []) + (["internal_error"] if status != 500 else [])
    own = {"code": {"const": status}, "name": {"const": STATUS_NAMES[status]}, "type": {"enum": types}}
    return {"allOf": [ref("Error"), {"properties": {"error": {"properties": own}}}]}


def schemas() -> Json:
    """Everything that `ref` can name."""
    own = {f"Error{status}": error(status) for status in error_types()}
    return _of_calls() | _of_money() | _of_figures() | _of_the_service() | own


def _of_calls() -> Json:
    """What calls answer, and what is told of them."""
    return {
        "Billing": record(
            "What a call cost: the last member of every JSON object that fal answers.",
            {
                "model": text(),
                "credits_used": credits("The charge; 0 where the call was free."),
                "cost_usd": usd("The same."),
                "balance_remaining": credits("The balance after this charge."),
            },
        ),
        "Answer": {
            "type": "object",
            "description": "fal's answer, byte for byte, and `_billing`.",
            "properties": {"_billing": ref("Billing")},
        },
        "Call": record(
            "One request to fal.",
            {
                "call_id": text(pattern=CALL_ID),
                "key_id": text(),
                "model": text(),
                "mode": text(enum=["sync", "stream", "queue"]),
                "state": text(enum=["held", "sent", "settled", "released", "unknown"]),
                "status": nullable(whole("fal's.")),
                "held": credits("Set aside when it began."),
                "credits": credits("The charge."),
                "units": nullable(text("Billable units, a decimal.")),
                "unit_price_usd": usd("Per unit, when it was admitted."),
                "usage_source": nullable(text("Where the units come from.")),
                "fal_request_id": nullable(text()),
                "created_at": TIME,
                "finished_at": nullable(TIME),
                "adjusted": credits("Corrected later."),
                "refunded": credits("Given back."),
            },
            optional=("adjusted", "refunded"),
        ),
        "Calls": record("A page of calls.", {"calls": rows("Call"), "next_cursor": CURSOR}),
    }


def _of_money() -> Json:
    """The account, its ledger and its statements."""
    return {
        "Account": record(
            "The account of the key.",
            {
                "account": text(),
                "plan": text(),
                "balance": credits("The sum of the ledger."),
                "held": credits("Set aside for calls that run."),
                "available": credits("What can be spent."),
                "limits": record("Per key.", {"requests_per_minute": whole(), "concurrent": whole()}),
            },
        ),
        "Entry": record(
            "A movement of credit.",
            {
                "entry_id": text(),
                "seq": whole(minimum=1),
                "kind": text(),
                "credits": credits("Negative where it was spent."),
                "balance_after": credits("The balance after it."),
                "call_id": nullable(text()),
                "ref": nullable(text()),
                "note": nullable(text()),
                "created_at": TIME,
                "hash": text("Chained to the entry before.", pattern="^[0-9a-f]{64}$"),
            },
        ),
        "Ledger": record("A page of entries.", {"entries": rows("Entry"), "next_cursor": CURSOR}),
        "StatementLine": record(
            "An entry of a statement.",
            {
                "created_at": TIME,
                "kind": text(),
                "model": nullable(text()),
                "call_id": nullable(text()),
                "ref": nullable(text()),
                "note": nullable(text()),
                "credits": credits("Negative where it was spent."),
                "balance": credits("The balance after it."),
            },
        ),
        "Statement": record(
            "One month, which foots: opening + entries = closing.",
            {
                "account": text(),
                "month": text(pattern="^[0-9]{4}-[0-9]{2}$"),
                "opening_balance": credits("Before the month's first entry."),
                "closing_balance": credits("After its last."),
                "totals": {"type": "object", "description": "By kind: how many entries, and their sum."},
                "entries": rows("StatementLine"),
            },
        ),
    }


def _of_figures() -> Json:
    """Usage, prices and estimates."""
    usage = {"calls": whole(), "credits": credits("Charges less refunds."), "cost_usd": usd("The same.")}
    return {
        "UsageRow": record("Ended calls of a group.", {"group": text(), **usage}),
        "Usage": record("Usage by group.", {"rows": rows("UsageRow"), "total": record("All of them.", usage)}),
        "Price": record(
            "What a unit of a model costs here.",
            {
                "model": text(),
                "unit": text("What fal calls the unit."),
                "unit_price_usd": usd("Our price."),
                "fal_unit_price_usd": {"type": ["number", "null"], "description": "fal's price."},
                "margin": {"type": ["number", "null"], "description": "0.05 is 5 percent."},
                "source": text(),
                "updated_at": nullable(text()),
            },
        ),
        "Prices": record("The price list.", {"prices": rows("Price")}),
        "EstimateRequest": record(
            "A call that is not made.",
            {
                "model": text("A path of fal's."),
                "input": {"type": "object", "description": "What the call would send."},
            },
            optional=("input",),
        ),
        "Estimate": record(
            "What a call would hold.",
            {"model": text(), "credits": credits("The hold."), "basis": text("How it came about.")},
        ),
    }


def _of_the_service() -> Json:
    """Its errors, its health and its keys."""
    return {
        "Error": record(
            "An error of this service. `detail` is what fal's Python client shows, `message` what its JavaScript "
            "client shows.",
            {
                "error": record(
                    "What went wrong.",
                    {
                        "code": whole("The status."),
                        "name": text("The status in words."),
                        "type": text("Stable: what to tell errors apart by.", enum=_all_types()),
                        "message": text("For people."),
                    },
                ),
                "detail": text(),
                "message": text(),
                "_billing": ref("Billing"),
            },
            optional=("_billing",),
        ),
        "Health": record("While it can serve.", {"status": {"const": "ok"}}),
        "Sickness": record("Why it cannot.", {"status": {"const": "unavailable"}, "reason": text()}),
        "Jwks": record(
            "A JSON Web Key Set.",
            {
                "keys": {
                    "type": "array",
                    "items": record(
                        "An ED25519 key (RFC 8037).",
                        {name: text() for name in ("kty", "crv", "use", "alg", "kid", "x")},
                    ),
                }
            },
        ),
    }


def _all_types() -> list[str]:
    return sorted({name for types in error_types().values() for name in types})


def _errors(of: type[AbhiError]) -> Iterator[type[AbhiError]]:
    yield of
    for sub in of.__subclasses__():
        yield from _errors(sub)
