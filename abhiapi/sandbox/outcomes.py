"""What the simulated fal answers to one call, and what the work is worth: the model's answer, or the weather's.

Pure, but for the pictures' names. What is then done with an outcome (waiting, billing, sending) is `app`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qsl

from abhiapi.pricing import PriceRule, decimal_text
from abhiapi.sandbox import answers, replies, streams, validation
from abhiapi.sandbox.models import model_of
from abhiapi.sandbox.records import Received
from abhiapi.sandbox.replies import Reply
from abhiapi.sandbox.usage import billed_units
from abhiapi.sandbox.weather import Weather


@dataclass(frozen=True, slots=True)
class Call:
    """A call as far as the answer needs it. ``body`` is None where the weather does without it, or it is too long."""

    received: Received
    endpoint_id: str
    path: str
    host: str
    body: bytes | None
    start_timeout: bool
    is_stream: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer before weather touched its headers. ``units`` is what the work is worth; None where none was done."""

    reply: Reply
    units: Decimal | None
    rule: PriceRule | None = None
    events: tuple[bytes, ...] = ()  # in the reply's place, where a stream was asked for


def outcome_of(call: Call, wanted: Weather, rule: PriceRule) -> Outcome:
    """What the model answers, or the answer that the weather lays down in its place."""
    if not wanted.keeps_body:
        status = wanted.status or 200
        if wanted.size_bytes is not None:
            return Outcome(replies.sized(status, wanted.size_bytes), Decimal(1), rule)
        told = {"sha256": call.received.body_sha256, "length": call.received.body_length}
        return Outcome(replies.of_json(status, told), Decimal(1), rule)
    if call.body is None:
        return Outcome(replies.of_json(413, {"detail": "Request body too large"}), None)
    call_input, problems = _input(call)
    model = model_of(rule)
    if not wanted.answers_anything:
        problems = problems or validation.problems(model, rule.estimate, call_input, call.received.body_length)
        if problems:
            return Outcome(replies.of_json(422, {"detail": problems}), Decimal(0), rule)
    status = wanted.status or 200
    if not 200 <= status < 300:
        reply = replies.error(status, call.path, call.host)
        if wanted.body is not None:
            reply = replies.odd(status, wanted.body)
        if status == 504 and call.start_timeout:
            reply = reply.with_headers(("x-fal-request-timeout-type", "user"))
        return Outcome(reply, Decimal(0) if status == 404 else None, rule)
    fingerprint = hashlib.sha256(f"{rule.model}\n{call.received.query}\n{call.received.body_sha256}".encode())
    request = answers.Request(rule, model, call_input, call.host, fingerprint.hexdigest()[:32])
    answer, work = answers.answer(request)
    reply = replies.odd(status, wanted.body) if wanted.body is not None else replies.of_json(status, answer)
    if status == 204:
        reply = replies.of_bytes(status, b"")
    is_stream = call.is_stream and wanted.body is None and status != 204
    events = tuple(streams.events(request, answer, wanted.events)) if is_stream else ()
    return Outcome(reply, billed_units(rule, call_input, work), rule, events)


def _input(call: Call) -> tuple[Mapping[str, Any], list[validation.Problem]]:
    if call.received.method == "POST":
        return validation.parsed(call.body or b"")
    gathered: dict[str, Any] = {}
    for name, value in parse_qsl(call.received.query, keep_blank_values=True):
        gathered[name] = value
    return gathered, []


def unit_texts(worth: Decimal | None, wanted: Weather) -> list[str]:
    """The values of the units header, each of which is sent."""
    plain = [] if worth is None else [decimal_text(worth)]
    match wanted.units:
        case None:
            return plain
        case "none":
            return []
        case "twice":
            return (plain or ["1"]) * 2
        case raw:
            return [raw]


def is_billed(status: int, units: Decimal) -> bool:
    """fal's rules: never 5xx, nor what its gateway refused; errors only for units."""
    return 200 <= status < 300 or (400 <= status < 500 and status not in (401, 402, 403) and units > 0)
