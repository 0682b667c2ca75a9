"""What is told of a call once its hold has ended, or it was refused: figures, one line in the log, one trace.

Plain values in; no decision of a call's depends on anything here. Never a body, a key or a credential: the account, the
key's id and the call's are what one looks a call up by.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from time import monotonic
from typing import Any

from abhiapi import logs
from abhiapi.calls import OpenCall
from abhiapi.errors import AbhiError
from abhiapi.ids import call_text, key_text
from abhiapi.money import Micros, credits_text
from abhiapi.runtime import Runtime
from abhiapi.tracing import Span

log = logging.getLogger("abhiapi.calls")


@dataclass(slots=True)
class Times:
    """When a call reached what, by the monotonic clock, and what trace of its caller's it belongs to.

    ``arrived`` is moved by the time that the caller took to send the body, which is not spent here.
    """

    arrived: float
    held_from: float
    sent: float = 0
    answered: float = 0  # fal's answer was at its end
    settled: float = 0
    traceparent: str | None = None

    def without(self, waited_s: float) -> None:
        """Leave out what a call waited for its turn at fal before its hold: others' calls took it, not this service."""
        self.arrived += waited_s
        self.held_from += waited_s

    @property
    def fal_s(self) -> float:
        return self.answered - self.sent

    @property
    def added_s(self) -> float:
        return self.sent - self.arrived + self.settled - self.answered


def entered(call_id: int) -> logs.InCall:
    """From now on this greenlet's lines are this call's."""
    of = logs.InCall(call_id)
    logs.in_call.set(of)
    return of


def ended(
    rt: Runtime,
    model: str,
    mode: str,
    times: Times,
    end: str,
    charge_micros: Micros,
    *,
    status: int | None,
    reason: str | None,
) -> None:
    """A call whose hold has ended, or stands as unknown; or a submit that fal took (``sent``)."""
    rt.metrics.fal_seconds.observe(times.fal_s)
    rt.metrics.added_seconds.observe(times.added_s)
    of = logs.in_call.get()
    if of is not None:
        of.is_told = True
    if rt.log_calls and log.isEnabledFor(logging.INFO):
        _write_line(of, model, mode, status, end, charge_micros, reason, times.fal_s, times.added_s)
    if rt.tracer is not None and of is not None:
        about = _about(of, model, mode, end, charge_micros, status)
        rt.tracer.record(
            Span(f"call {model}", times.arrived, times.settled, about, "server", status is None or status >= 500),
            (
                Span("hold", times.held_from, times.sent, {}),
                Span("fal", times.sent, times.answered, {"http.response.status_code": status or 0}, "client"),
                Span("settle", times.answered, times.settled, {}),
            ),
            times.traceparent,
        )


def job_ended(rt: Runtime, call: OpenCall, end: str, charge_micros: Micros, *, age_ms: int, reason: str | None) -> None:
    """A queued job whose hold has ended, by whoever saw it first."""
    of = logs.InCall(call.call_id, "", call.key_id)
    if rt.log_calls and log.isEnabledFor(logging.INFO):
        _write_line(of, call.model, "queue", None, end, charge_micros, reason, age_ms / 1000, 0)
    if rt.tracer is not None:
        now = monotonic()
        about = _about(of, call.model, "queue", end, charge_micros, None)
        rt.tracer.record(Span(f"job {call.model}", now - age_ms / 1000, now, about), (), None)


def refused(rt: Runtime, error: AbhiError) -> None:
    """A call that came to no hold."""
    of = logs.in_call.get()
    if of is None or of.is_told:
        return
    of.is_told = True
    if rt.log_calls and log.isEnabledFor(logging.INFO):
        logs.tell(log, "call", _whose(of) | {"outcome": "refused", "status": error.status, "type": error.type})


def _write_line(
    of: logs.InCall | None,
    model: str,
    mode: str,
    status: int | None,
    end: str,
    charge_micros: Micros,
    reason: str | None,
    fal_s: float,
    added_s: float,
) -> None:
    fields = {} if of is None else _whose(of)
    fields |= {
        "model": model, "mode": mode, "outcome": end, "status": status, "credits": credits_text(charge_micros),
        "fal_ms": round(fal_s * 1000, 1), "added_ms": round(added_s * 1000, 2),
    }  # fmt: skip
    if reason is not None:
        fields["reason"] = reason
    logs.tell(log, "call", fields)


def _whose(of: logs.InCall) -> dict[str, Any]:
    whose: dict[str, Any] = {"call_id": call_text(of.call_id)}
    if of.account:
        whose["account"] = of.account
    if of.key_id:
        whose["key_id"] = key_text(of.key_id)
    return whose


def _about(
    of: logs.InCall, model: str, mode: str, end: str, charge_micros: Micros, status: int | None
) -> dict[str, str | int]:
    about: dict[str, str | int] = {
        "abhiapi.call_id": call_text(of.call_id),
        "abhiapi.key_id": key_text(of.key_id),
        "abhiapi.model": model,
        "abhiapi.mode": mode,
        "abhiapi.outcome": end,
        "abhiapi.charged_micros": charge_micros,
    }
    if of.account:
        about["abhiapi.account"] = of.account
    if status is not None:
        about["http.response.status_code"] = status
    return about
