"""fal's queue on the wire: what its paths mean, whose URLs its answers hold, and what its answers say of a job.

Pure. Facts about fal name their place in fal-protocol.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl

from abhiapi import jsonbytes, metering, wire
from abhiapi.errors import ForbiddenPath, UnknownRoute

QUEUE, SHORT = "/queue", "/fal-ai/queue/requests/"
PREFIXES = (f"{QUEUE}/", SHORT)

Action = Literal["submit", "status", "stream", "result", "cancel"]
METHODS: dict[Action, str] = {"status": "GET", "stream": "GET", "result": "GET", "cancel": "PUT"}
_SUFFIXES: dict[Action, str] = {"result": "", "status": "/status", "stream": "/status/stream", "cancel": "/cancel"}
_ACTIONS: dict[tuple[str, ...], Action] = {
    (): "result",
    ("response",): "result",
    ("status",): "status",
    ("status", "stream"): "stream",
    ("cancel",): "cancel",
}
_SHORT_ACTIONS: dict[tuple[str, ...], Action] = _ACTIONS | {(): "status"}
_NAMESPACES = frozenset(("workflows", "comfy"))  # whose apps have three segments (fal-protocol 3.2)
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")  # fal's are UUIDs
PENDING = frozenset(("IN_QUEUE", "IN_PROGRESS"))  # the statuses of a job that has not ended (fal-protocol 3.3)
# Why a job failed at fal's own end: the request errors of fal-protocol 7.2 that are 5xx, which fal never bills.
_FAILURES = frozenset(
    """
    request_timeout startup_timeout runner_scheduling_failure runner_connection_timeout runner_disconnected
    runner_connection_refused runner_connection_error runner_incomplete_response runner_server_error internal_error
    """.split()
)
_FAILED = re.compile(r"Invalid status code: 5\d\d")
_URL_MEMBERS = {"status_url": "/status", "response_url": "", "cancel_url": "/cancel"}


@dataclass(frozen=True, slots=True)
class Route:
    """What a caller wants. ``target`` is the path at fal of a submit; everything else names a job."""

    action: Action
    request_id: str = ""
    target: str = ""


def parse(path: str) -> Route:
    """The meaning of a raw path under one of `PREFIXES`. Raises `ForbiddenPath`, `UnknownRoute`."""
    wire.check_path(path)
    if path.startswith(SHORT):
        request_id, *rest = path.removeprefix(SHORT).strip("/").split("/")
        if request_id and tuple(rest) in _SHORT_ACTIONS:
            return Route(_SHORT_ACTIONS[tuple(rest)], request_id)
        raise UnknownRoute("no such route here: a job's are its id alone, /status, /response and /cancel")
    target = path.removeprefix(QUEUE)
    if not path.startswith(PREFIXES[0]):
        raise ForbiddenPath("the path is not plainly one of the queue's: write /queue/{model} without any encoding")
    if not target.strip("/"):
        raise UnknownRoute("no such route here: a job is submitted at /queue/{model}, see /docs")
    segments = target.strip("/").split("/")
    for at in range(len(segments) - 2, -1, -1):
        if segments[at] == "requests" and tuple(segments[at + 2 :]) in _ACTIONS:
            return Route(_ACTIONS[tuple(segments[at + 2 :])], segments[at + 1])
    return Route("submit", target=target)


def job_path(model: str, request_id: str, action: Action) -> str:
    """Where a job is at fal, and below /queue here."""
    segments = model.split("/")
    app = "/".join(segments[: 3 if segments[0] in _NAMESPACES else 2])
    return f"/{app}/requests/{request_id}{_SUFFIXES[action]}"


def wants_logs(query: str) -> bool:
    """Whether a status is asked for with logs: clients write 1, true or True."""
    try:
        values = [value for name, value in parse_qsl(query, max_num_fields=100) if name == "logs"]
    except ValueError:
        return False
    return bool(values) and values[-1].lower() in ("1", "true")


def request_id_of(document: bytes) -> str | None:
    """The id of the job that fal accepted, or None where the answer names none."""
    answer = jsonbytes.parse_object(document)
    request_id = answer.get("request_id") if answer else None
    return request_id if isinstance(request_id, str) and _REQUEST_ID.fullmatch(request_id) else None


def status_of(document: bytes) -> str | None:
    """`IN_QUEUE`, `IN_PROGRESS`, `COMPLETED`, `NOT_FOUND` or whatever else stands there."""
    answer = jsonbytes.parse_object(document)
    status = answer.get("status") if answer else None
    return status if isinstance(status, str) else None


def has_failed(document: bytes) -> bool:
    """Whether a status tells of an end for which fal bills nothing, whatever its result then looks like."""
    answer = jsonbytes.parse_object(document) or {}
    error, kind = answer.get("error"), answer.get("error_type")
    is_failure = isinstance(error, str) and (
        _FAILED.fullmatch(error) is not None or (isinstance(kind, str) and kind in _FAILURES)
    )
    return is_failure and answer.get("status") == "COMPLETED"


def rewritten(document: bytes, *, fal_url: str, base_url: str, model: str, request_id: str) -> bytes:
    """A queue answer whose URLs lead here. Only the values of those members change, and no other byte."""

    def replace(name: str, value: str) -> str | None:
        if name not in _URL_MEMBERS:
            return None
        if value.startswith(fal_url + "/"):
            return base_url + QUEUE + value.removeprefix(fal_url)
        return f"{base_url}{QUEUE}{job_path(model, request_id, 'result')}{_URL_MEMBERS[name]}"  # never past us

    return jsonbytes.with_strings(document, replace)


Meaning = Literal["final", "pending", "gone", "retry"]


def meaning(status: int, unit_headers: Sequence[str], has_request_id: bool, head_of_body: bytes) -> Meaning:
    """What fal's answer to a result says of the job whose status was COMPLETED.

    final: the job's own answer (fal-protocol 3.5), which ends the hold. pending: not complete yet. gone: fal does not
    keep it, or never knew it. retry: trouble on the way that says nothing about the job.
    """
    if 200 <= status < 300:
        return "final"
    if metering.parse_units(unit_headers) is not None and 400 <= status < 500:
        return "final"
    if status == 400 and b"still in progress" in head_of_body:
        return "pending"
    if status == 404 and (not has_request_id or status_of(head_of_body) == "NOT_FOUND"):
        return "gone"
    if status in metering.OPERATOR_STATUSES or status in (408, 429) or not 400 <= status < 600:
        return "retry"
    # A job's own 5xx comes with its id; without one it is an ingress in front of the queue (fal-protocol 1.4).
    return "final" if status < 500 or has_request_id else "retry"
