"""/openapi.json: valid, complete both ways, true of real answers; and what schemathesis makes of a live server."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from flask import Flask
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from abhiapi import queuewire, runtime, target
from abhiapi.settings import Settings
from abhiapi.web import create_app
from abhiapi.web.pages import openapi, openapi_schemas
from tests.harness import OPERATOR_KEY, Books, Fal, Server, environment
from tests.test_docs import API

BASE = "https://fal.example.com"
SPEC = openapi.description(BASE)
OPERATIONS = [
    (method, path)
    for path, item in SPEC["paths"].items()
    for method in ("get", "post", "put", "delete", "patch")
    if method in item
]
SCHEMATHESIS_S = 240
OWN_ROUTES = r"^/(v1/|healthz|metrics|openapi|\.well-known|docs|static|$)"
JOB = "/fal-ai/queue/requests/00000000-0000-4000-8000-000000000000"


def test_the_description_is_valid_openapi() -> None:
    OpenAPIV31SpecValidator(SPEC).validate()


def test_it_is_what_is_served_with_this_host(shared_server: Server) -> None:
    served = requests.get(f"{shared_server.url}/openapi.json", timeout=30)
    assert served.headers["Content-Type"] == "application/json"
    assert served.json() == openapi.description(shared_server.url)
    assert served.json()["servers"] == [{"url": shared_server.url}]


def routes_of(app: Flask) -> set[tuple[str, str]]:
    return {
        (method.lower(), re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Flask]:
    env = {"FAL_KEY": OPERATOR_KEY, "ABHIAPI_DATABASE_URL": f"sqlite:///{tmp_path / 'abhiapi.db'}"}
    rt = runtime.start(Settings.from_env(env))
    yield create_app(rt)
    rt.close()


def test_every_route_is_described_and_every_description_has_its_route(app: Flask) -> None:
    """Of the calls, which pass a door before Flask, the paths are the contract's."""
    calls = {path for path in SPEC["paths"] if path in ("/{path}", "/queue/{path}", target.DOCUMENTED_AT)}
    calls |= {path for path in SPEC["paths"] if path.startswith("/fal-ai/queue/")}
    described = {(method, path) for method, path in OPERATIONS if path not in calls}
    served = {(method, re.sub(r"^/static/.*", "/static/{file}", path)) for method, path in routes_of(app)}
    assert described == {(method, path) for method, path in served if not path.startswith("/dashboard")}
    assert {path.removeprefix("/fal-ai/queue/requests/{id}") for path in calls if path.startswith("/fal-ai")} == {
        "", "/status", "/status/stream", "/response", "/cancel",
    }  # fmt: skip
    assert {path for path in calls if path.startswith(queuewire.PREFIXES)} == calls - {"/{path}", target.DOCUMENTED_AT}


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [SPEC["paths"][path][method]["operationId"] for method, path in OPERATIONS]
    assert len(names) == len(set(names))


def test_every_error_that_customers_meet_is_in_it() -> None:
    """Those in the table of docs/api.md, with their codes."""
    documented = set()
    for code, types, when in re.findall(r"^\| (\d{3}) \| ([^|]+) \| ([^|]+) \|", API, re.MULTILINE):
        if "(command line)" not in when and "(to fal only)" not in when:
            documented |= {(int(code), name) for name in re.findall(r"`(\w+)`", types)}
    documented -= {(400, "bad_amount")}  # met where amounts are typed: at the command line
    told = {(code, name) for code, names in openapi_schemas.error_types().items() for name in names}
    assert told == documented


# --- true of real answers ---------------------------------------------------------------------------------------


def problems(schema: str, value: Any) -> list[str]:
    whole = {"$ref": f"#/components/schemas/{schema}", "components": SPEC["components"]}
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in
            Draft202012Validator(whole).iter_errors(value)]  # fmt: skip


@pytest.fixture(scope="module")
def tried_server(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own: hundreds of requests without a key use up the minute of this machine's address."""
    with Server.started(tmp_path_factory.mktemp("tried"), fal.url) as running:
        yield running


@pytest.fixture(scope="module")
def spender(shared_servers: Callable[[str], Server]) -> str:
    return busy_key(shared_servers("sqlite"))


def busy_key(server: Server) -> str:
    """A key whose account has calls of all kinds: paid, free, streamed, queued, refused."""
    _, key = server.books.account(5000)
    assert server.post(key).status_code == 200
    assert server.post(key, body={"prompt": 1}).status_code == 400
    assert server.post(key, "/fal-ai/flux/dev/stream").status_code == 200
    assert server.post(key, "/queue/fal-ai/flux/dev").status_code == 200
    assert server.post(key, weather="status=500").status_code == 502
    return key


@pytest.mark.parametrize(
    ("path", "schema"),
    [
        ("/v1/account", "Account"),
        ("/v1/calls", "Calls"),
        ("/v1/ledger", "Ledger"),
        ("/v1/usage?by=model", "Usage"),
        ("/v1/prices", "Prices"),
        ("/healthz", "Health"),
        ("/.well-known/jwks.json", "Jwks"),
        ("/v1/calls/call_0000000000000", "Error404"),
        ("/v1/calls?limit=0", "Error400"),
    ],
)
def test_answers_are_as_described(shared_server: Server, spender: str, path: str, schema: str) -> None:
    """With every member described and none besides."""
    answer = requests.get(shared_server.url + path, headers={"x-api-key": spender}, timeout=30).json()
    assert problems(schema, answer) == []
    assert problems("Estimate", answer) != []


def test_one_call_and_an_estimate_are_as_described(shared_server: Server, spender: str) -> None:
    headers = {"x-api-key": spender}
    listed = requests.get(f"{shared_server.url}/v1/calls", headers=headers, timeout=30).json()["calls"]
    assert {call["mode"] for call in listed} == {"sync", "stream", "queue"}
    for call in listed:
        one = requests.get(f"{shared_server.url}/v1/calls/{call['call_id']}", headers=headers, timeout=30).json()
        assert problems("Call", one) == []
    body = {"model": "fal-ai/flux/dev", "input": {}}
    estimate = requests.post(f"{shared_server.url}/v1/estimate", json=body, headers=headers, timeout=30).json()
    assert problems("Estimate", estimate) == []


def test_answers_of_models_and_their_errors_are_as_described(shared_server: Server, books: Books) -> None:
    _, key = books.account()
    _, poor = books.account(0)
    assert problems("Answer", shared_server.post(key).json()) == []
    assert problems("Error402", shared_server.post(poor).json()) == []
    assert problems("Error404", shared_server.post(key, "/fal-ai/no-such-model").json()) == []
    assert problems("Error401", shared_server.post("").json()) == []
    assert problems("Error400", shared_server.post(key, data=b"{", body="", headers={}).json()) != []


# --- schemathesis -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v1/account", "GET, HEAD, OPTIONS"),
        ("GET", "/v1/estimate", "OPTIONS, POST"),
        ("TRACE", "/healthz", "GET, HEAD, OPTIONS"),
        ("DELETE", "/", "GET, HEAD, OPTIONS"),
        ("POST", JOB, "GET"),
        ("GET", f"{JOB}/cancel", "PUT"),
        ("OPTIONS", "/queue/fal-ai/flux/dev", "POST"),
    ],
)
def test_a_refused_method_is_told_which_are_taken(
    shared_server: Server, books: Books, method: str, path: str, allowed: str
) -> None:
    """RFC 9110 15.5.6: a 405 has an `Allow`. Found by schemathesis."""
    _, key = books.account()
    refused = requests.request(method, shared_server.url + path, headers={"x-api-key": key}, timeout=30)
    assert (refused.status_code, refused.headers["Allow"]) == (405, allowed)


def schemathesis(server: Server, key: str, folder: Path, *options: str) -> str:
    """A run against this server that finds nothing wrong; what it printed."""
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", "--seed", "1",
            "--checks", "all", "-H", f"x-api-key: {key}", "--generation-deterministic",
            "--continue-on-failure", "--no-color", *options,
        ],
        cwd=folder, env=environment(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1"),
        capture_output=True, text=True, timeout=SCHEMATHESIS_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_schemathesis_finds_nothing_in_our_own_routes(tried_server: Server, tmp_path: Path) -> None:
    """Valid and invalid requests, wrong methods, missing keys: no answer that is not described, no 5xx."""
    phases, key = "examples,coverage,fuzzing,stateful", busy_key(tried_server)
    said = schemathesis(tried_server, key, tmp_path, "--include-path-regex", OWN_ROUTES, "--phases", phases, "-n", "10")
    assert re.search(r"Tested: 1\d", said), said


def test_schemathesis_finds_nothing_in_calls(tried_server: Server, tmp_path: Path) -> None:
    """A few calls by each route; the books are right after them. What models take is fal's to describe."""
    books = tried_server.books
    name, key = books.account(100_000)
    schemathesis(
        tried_server, key, tmp_path, "--exclude-path-regex", OWN_ROUTES, "--phases", "examples,fuzzing", "-n", "3",
        "--exclude-checks", "positive_data_acceptance,negative_data_rejection,missing_required_header",
    )  # fmt: skip
    calls = books.calls(name)
    assert [call for call in calls if call.charged_micros]
    assert books.verify().problems == []
