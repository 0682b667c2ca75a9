"""Traces by OTLP/HTTP, where the settings name a collector. Sole user of OpenTelemetry, which is an extra (`otel`).

Spans are made when a call is over, from times that were noted on its way: nothing is added to the call itself, and
without an endpoint nothing here is imported. They leave in batches from a greenlet of their own (the exporter waits in
`requests`, whose sockets gevent has patched); what a collector does not take is dropped, with a line in the log.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from abhiapi import __version__
from abhiapi.errors import SettingsError

EXPORT_TIMEOUT_S = 5
FLUSH_TIMEOUT_MS = 5_000


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time by the monotonic clock, and what is to be said of it."""

    name: str
    began: float
    ended: float
    attributes: Mapping[str, str | int]
    kind: Literal["server", "client", "internal"] = "internal"
    is_error: bool = False


class Tracer:
    """Sends spans to a collector. Raises `SettingsError` where the extra is not installed."""

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise SettingsError(
                [f"ABHIAPI_OTLP_ENDPOINT needs OpenTelemetry, `pip install -e '.[otel]'` in the checkout ({error})"]
            ) from error
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        resource = Resource.create({"service.name": "abhiapi", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces", timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("abhiapi", __version__)

    def record(self, whole: Span, parts: Iterable[Span], traceparent: str | None) -> None:
        """A span and the parts of it; under the caller's own, where their ``traceparent`` names one."""
        ahead_ns = time.time_ns() - time.monotonic_ns()
        above = self._propagator.extract({"traceparent": traceparent}) if traceparent else None
        span = self._begin(whole, above, ahead_ns)
        inside = self._trace.set_span_in_context(span)
        for part in parts:
            self._begin(part, inside, ahead_ns).end(_ns(part.ended, ahead_ns))
        span.end(_ns(whole.ended, ahead_ns))

    def _begin(self, span: Span, context: Any, ahead_ns: int) -> Any:
        kind = self._trace.SpanKind[span.kind.upper()]
        begun = self._tracer.start_span(
            span.name, context, kind, attributes=dict(span.attributes), start_time=_ns(span.began, ahead_ns)
        )
        if span.is_error:
            begun.set_status(self._trace.Status(self._trace.StatusCode.ERROR))
        return begun

    def close(self) -> None:
        self._provider.force_flush(FLUSH_TIMEOUT_MS)
        self._provider.shutdown()


def _ns(at_s: float, ahead_ns: int) -> int:
    return int(at_s * 1_000_000_000) + ahead_ns
