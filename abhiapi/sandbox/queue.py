"""The simulated queue under ``/queue``: submit, status, its stream, result and cancel (fal-protocol 3).

Owns jobs and their time. What a job answers and costs is worked out by `app`, when the job completes, whether or not
anybody asks for it; the answer is made anew for each fetch of the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import gevent
from gevent.event import Event

from abhiapi.sandbox import replies
from abhiapi.sandbox.records import Gates
from abhiapi.sandbox.replies import Reply
from abhiapi.sandbox.weather import Weather
from abhiapi.sandbox.webhooks import Webhooks

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

PREFIX = "/queue/"
JOBS_MAX = 100_000
GATE_MAX_S = 60
STREAM_STEP_S = 0.05  # an open status stream looks this often
STREAM_KEEPALIVE_S = 1.0
_NAMESPACES = ("workflows", "comfy")
_ACTIONS = {
    (): "result",
    ("response",): "result",
    ("status",): "status",
    ("status", "stream"): "stream",
    ("cancel",): "cancel",
}
_METHODS = {"result": "GET", "status": "GET", "stream": "GET", "cancel": "PUT"}
# What the job's own failure is called in its status (fal-protocol 7.2).
_ERRORS = {
    499: ("Request was cancelled", "client_cancelled"),
    503: ("No runner could be scheduled", "runner_scheduling_failure"),
    504: ("Request timed out", "request_timeout"),
}


@dataclass(slots=True)
class Job:
    """One submitted job. ``reply`` makes its answer; it is asked for only once the job is complete."""

    request_id: str
    endpoint_id: str
    host: str
    weather: Weather
    reply: Callable[[], Reply]
    completed: Callable[[], int]  # bills the job; the status of its answer
    status: str = "IN_QUEUE"
    result_status: int = 200
    cancelled: bool = False
    completed_at: datetime | None = None
    started: float = 0.0
    inference_s: float = 0.0
    logs: list[dict[str, str]] = field(default_factory=list)
    stop: Event = field(default_factory=Event)
    webhook: str | None = None

    @property
    def app(self) -> str:
        """What poll URLs name: two segments, three in some namespaces (fal-protocol 3.2)."""
        segments = self.endpoint_id.split("/")
        return "/".join(segments[: 3 if segments[0] in _NAMESPACES else 2])

    def answer(self) -> Reply:
        """What the result's address answers, once the job is complete."""
        return _cancelled(self) if self.cancelled else self.reply()


class Queue:
    """The jobs, and how each goes through its states."""

    def __init__(self, gates: Gates, now: Callable[[], datetime], webhooks: Webhooks) -> None:
        self._webhooks = webhooks
        self.jobs: dict[str, Job] = {}
        self._gates = gates
        self._now = now

    def submit(self, job: Job) -> Reply:
        if len(self.jobs) >= JOBS_MAX:
            del self.jobs[next(iter(self.jobs))]
        self.jobs[job.request_id] = job
        gevent.spawn(self._live, job)
        return replies.of_json(200, _described(job, self._position(job), with_logs=False))

    def poll_delay_s(self, request_id: str) -> Decimal:
        job = self.jobs.get(request_id)
        return job.weather.poll_delay_s if job else Decimal(0)

    def answer(self, environ: WSGIEnvironment, action: str, request_id: str) -> Reply:
        """Everything but a submit."""
        job = self.jobs.get(request_id)
        if job is None:
            return replies.of_json(404, {"status": "NOT_FOUND"})
        if environ["REQUEST_METHOD"] != _METHODS[action]:
            return replies.of_json(405, {"detail": "Method Not Allowed"}, (("allow", _METHODS[action]),))
        with_logs = parse_qs(environ.get("QUERY_STRING", "")).get("logs", ["0"])[-1].lower() in ("1", "true")
        if action == "status":
            status = 200 if job.status == "COMPLETED" else 202
            return replies.of_json(status, _described(job, self._position(job), with_logs=with_logs))
        if action == "stream":
            return Reply(200, "text/event-stream; charset=utf-8", self._events(job, with_logs), None)
        if action == "cancel":
            return self._cancel(job)
        if job.status != "COMPLETED":
            return replies.of_json(400, {"detail": "Request is still in progress"})
        return job.answer()

    def _live(self, job: Job) -> None:
        """A job's life: waits its turn, runs, completes."""
        wanted = job.weather
        self._wait(job, float(wanted.queue_s), wanted.queue_until)
        if not job.cancelled:
            job.status, job.started = "IN_PROGRESS", monotonic()
            self._log(job, "started")
            self._wait(job, float(wanted.run_s), wanted.hold_until)
        if job.cancelled:
            job.result_status = 499
        else:
            job.result_status = job.completed()
            job.inference_s = monotonic() - job.started
            self._log(job, "done")
        job.status, job.completed_at = "COMPLETED", self._now()
        self._webhooks.deliver(job)

    def _wait(self, job: Job, seconds: float, gate: str | None) -> None:
        job.stop.wait(seconds)
        if gate is not None:
            gevent.wait([self._gates.gate(gate), job.stop], GATE_MAX_S, 1)

    def _cancel(self, job: Job) -> Reply:
        if job.status == "COMPLETED":
            return replies.of_json(400, {"status": "ALREADY_COMPLETED"})
        if job.status == "IN_QUEUE" or not job.weather.ignores_cancel:
            job.cancelled = True
            job.stop.set()
        return replies.of_json(202, {"status": "CANCELLATION_REQUESTED"})

    def _events(self, job: Job, with_logs: bool) -> Iterator[bytes]:
        """A status object for each change; a comment now and then, as fal's keep-alive; the end after COMPLETED."""
        shown, quiet_since = b"", monotonic()
        while True:
            described = json.dumps(_described(job, self._position(job), with_logs=with_logs)).encode()
            if described != shown:
                shown, quiet_since = described, monotonic()
                yield b"data: " + described + b"\n\n"
            elif monotonic() - quiet_since > STREAM_KEEPALIVE_S:
                quiet_since = monotonic()
                yield b": ping\n\n"
            if b'"COMPLETED"' in described:
                return
            gevent.sleep(STREAM_STEP_S)

    def _position(self, job: Job) -> int:
        return 0 if job.status != "IN_QUEUE" else 1

    def _log(self, job: Job, message: str) -> None:
        timestamp = self._now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        job.logs.append({"message": message, "level": "INFO", "source": "USER", "timestamp": timestamp})


def parsed(path: str) -> tuple[str, str] | None:
    """The action and request id of a path below the prefix; None: a submit."""
    segments = path.strip("/").split("/")
    for at in range(len(segments) - 2, 0, -1):
        if segments[at] == "requests" and tuple(segments[at + 2 :]) in _ACTIONS:
            return _ACTIONS[tuple(segments[at + 2 :])], segments[at + 1]
    return None


def _described(job: Job, position: int, *, with_logs: bool) -> dict[str, Any]:
    base = f"http://{job.host}{PREFIX}{job.app}/requests/{job.request_id}"
    described: dict[str, Any] = {
        "status": job.status,
        "request_id": job.request_id,
        "response_url": base,
        "status_url": f"{base}/status",
        "cancel_url": f"{base}/cancel",
    }
    if job.status == "IN_QUEUE":
        return described | {"queue_position": position}
    described["logs"] = job.logs if with_logs else None
    if job.status == "COMPLETED":
        described["metrics"] = {"inference_time": round(job.inference_s, 3)} if not job.cancelled else {}
        if job.result_status >= 400:
            text, kind = _ERRORS.get(job.result_status, (f"Invalid status code: {job.result_status}", ""))
            described |= {"error": text} | ({"error_type": kind} if kind else {})
    return described


def _cancelled(job: Job) -> Reply:
    headers = (("x-fal-request-id", job.request_id), ("x-fal-error-type", "client_cancelled"))
    return replies.of_json(499, {"detail": "Request was cancelled", "error_type": "client_cancelled"}, headers)


def listed(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """What the control page shows of jobs."""
    return [
        {
            "request_id": job.request_id, "endpoint_id": job.endpoint_id, "status": job.status,
            "completed_at": job.completed_at and job.completed_at.isoformat(),
        }
        for job in jobs
    ]  # fmt: skip
