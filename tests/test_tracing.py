"""Traces: what a collector receives of a call, and what it never does."""

from __future__ import annotations

import gzip
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.harness import OPERATOR_KEY, ROOT, Fal, Server, environment, until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """A real HTTP collector of ours: keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.paths.add(self.path)
                outer.bodies.append(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server: socketserver.BaseServer = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"  # type: ignore[index]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def spans(self, call_id: str) -> dict[str, Any]:
        """The spans of a call by name: the one that names it, and its parts."""
        every = [
            span
            for body in list(self.bodies)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        (whole,) = [span for span in every if attributes(span).get("abhiapi.call_id") == call_id] or (None,)
        if whole is None:
            return {}
        return {span.name.split(" ")[0]: span for span in every if whole.span_id in (span.span_id, span.parent_span_id)}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    return {pair.key: pair.value.string_value or pair.value.int_value for pair in span.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(fal: Fal, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"ABHIAPI_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with Server.started(tmp_path_factory.mktemp("traced"), fal.url, **settings) as running:
        yield running


def traced(server: Server, collector: Collector, response: requests.Response) -> dict[str, Any]:
    call_id = response.headers["x-abhiapi-call-id"]
    return until(lambda: collector.spans(call_id), what="the collector has the call")


def test_a_call_is_a_trace_with_its_parts(server: Server, collector: Collector) -> None:
    """The caller's own trace goes on; the parts follow each other, and the time at fal is fal's."""
    name, key = server.books.account(1000)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    response = server.post(key, weather="delay_s=0.2", headers=headers)
    spans = traced(server, collector, response)
    assert spans.keys() == {"call", "hold", "fal", "settle"}
    whole = spans["call"]
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (TRACE, PARENT)
    told = attributes(whole)
    expected = {
        "abhiapi.account": name, "abhiapi.model": "fal-ai/flux/dev", "abhiapi.mode": "sync",
        "abhiapi.outcome": "settled", "abhiapi.charged_micros": 26_250, "http.response.status_code": 200,
    }  # fmt: skip
    assert {member: told[member] for member in expected} == expected
    assert spans["fal"].end_time_unix_nano - spans["fal"].start_time_unix_nano >= 200_000_000
    times = [whole.start_time_unix_nano]
    for part in ("hold", "fal", "settle"):
        times += [spans[part].start_time_unix_nano, spans[part].end_time_unix_nano]
    times.append(whole.end_time_unix_nano)
    assert times == sorted(times)
    assert collector.paths == {"/v1/traces"}


def test_a_trace_without_a_caller_of_its_own_begins_here(server: Server, collector: Collector) -> None:
    _, key = server.books.account(1000)
    for header in ({}, {"traceparent": "nonsense"}):
        spans = traced(server, collector, server.post(key, weather="status=500", headers=header))
        assert spans["call"].parent_span_id == b""
        assert spans["call"].status.code == 2  # an error
        assert attributes(spans["call"])["abhiapi.outcome"] == "released"


def test_what_a_caller_says_of_their_trace_does_not_reach_fal(server: Server, fal: Fal, collector: Collector) -> None:
    _, key = server.books.account(1000)
    marker = f"traced {server.folder.name}"
    server.post(key, body={"prompt": marker}, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    (call,) = fal.calls(marker)
    assert TRACE not in str(call)


def test_no_span_holds_a_body_or_a_key(server: Server, collector: Collector) -> None:
    _, key = server.books.account(1000)
    traced(server, collector, server.post(key, body={"prompt": "a secret wish"}, weather="delay_s=0.01"))
    everything = b"".join(collector.bodies)
    for secret in (key, OPERATOR_KEY, OPERATOR_KEY.partition(":")[2], "a secret wish"):
        assert secret.encode() not in everything


def test_a_collector_that_is_gone_stops_nobody(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = {"ABHIAPI_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with Server.started(tmp_path_factory.mktemp("untraced"), fal.url, **settings) as server:
        _, key = server.books.account(1000)
        assert [server.post(key).status_code for _ in range(5)] == [200] * 5
        until(lambda: "opentelemetry" in server.process.output(), what="the log says that nobody took it")
        assert server.post(key).status_code == 200


def test_without_an_endpoint_nothing_of_opentelemetry_is_loaded() -> None:
    code = (
        "import sys, abhiapi.telemetry, abhiapi.gateway, abhiapi.web;"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True, timeout=60)
