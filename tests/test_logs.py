"""The log: whose line it is, one line for each call, and never a secret in any of them."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests

from abhiapi import logs
from abhiapi.redaction import HIDDEN, Redactor, masked
from abhiapi.settings import Settings
from tests.harness import OPERATOR_KEY, Fal, Server, until

ADMIN, TOKEN = "admin-id:fedcba9876543210-admin-secret", "metrics-token-0123456789"
SESSION = "session-secret-0123456789-0123456789"
HOOK = base64.b64encode(bytes(range(32))).decode()
SECRETS = (OPERATOR_KEY, OPERATOR_KEY.partition(":")[2], ADMIN, TOKEN, SESSION, HOOK)


@pytest.fixture(scope="module")
def server(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {
        "ABHIAPI_LOG_FORMAT": "json",
        "ABHIAPI_LOG_LEVEL": "debug",
        "FAL_ADMIN_KEY": ADMIN,
        "ABHIAPI_METRICS_TOKEN": TOKEN,
        "ABHIAPI_SECRET_KEY": SESSION,
        "ABHIAPI_WEBHOOK_KEY": HOOK,
    }
    with Server.started(tmp_path_factory.mktemp("logs"), fal.url, **settings) as running:
        yield running


def lines(server: Server) -> list[dict[str, Any]]:
    """Every line so far. Each is one object: nothing else is ever written in this format."""
    return [json.loads(line) for line in server.process.output().splitlines()]


def line_of(server: Server, response: requests.Response) -> dict[str, Any]:
    """The line of a call, which comes a moment after its answer."""
    call_id = response.headers["x-abhiapi-call-id"]

    def found() -> list[dict[str, Any]]:
        return [line for line in lines(server) if line["logger"] == "abhiapi.calls" and line["call_id"] == call_id]

    (line,) = until(found, what=f"the line of {call_id}")
    return line


def test_each_call_is_one_line_when_it_has_ended(server: Server) -> None:
    name, key = server.books.account(1000)
    line = line_of(server, server.post(key, weather="delay_s=0.2"))
    expected = {"account": name, "model": "fal-ai/flux/dev", "mode": "sync", "status": 200, "outcome": "settled"}
    assert {member: line[member] for member in expected} == expected
    assert line["credits"] == "26.25"
    assert re.fullmatch(r"key_\d+", line["key_id"])
    assert line["fal_ms"] >= 200
    assert line["added_ms"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["at"])
    released = line_of(server, server.post(key, weather="status=500"))
    assert (released["outcome"], released["status"], released["credits"]) == ("released", 500, "0")
    streamed = line_of(server, server.post(key, "/fal-ai/flux/dev/stream"))
    assert (streamed["mode"], streamed["outcome"]) == ("stream", "settled")


def test_a_job_is_a_line_at_its_submit_and_one_at_its_end(server: Server) -> None:
    _, key = server.books.account(1000)
    submitted = server.post(key, "/queue/fal-ai/flux/dev", weather="run_s=0.1")
    call_id = submitted.headers["x-abhiapi-call-id"]

    def ends() -> list[str]:
        of_call = [line for line in lines(server) if line["logger"] == "abhiapi.calls" and line["call_id"] == call_id]
        return [line["outcome"] for line in of_call]

    until(lambda: ends() == ["sent", "settled"], what="both lines are there")


def test_a_refused_call_is_a_line_with_what_it_was_told(server: Server) -> None:
    name, key = server.books.account(0)
    line = line_of(server, server.post(key))
    assert (line["outcome"], line["status"], line["type"]) == ("refused", 402, "insufficient_credits")
    assert line["account"] == name
    unknown = line_of(server, server.post("sk-fal-nobody"))
    assert (unknown["status"], unknown["type"]) == (401, "invalid_key")
    assert "account" not in unknown


def test_lines_within_a_call_are_its_own(server: Server) -> None:
    """What is logged on the way bears the call's id, and not that of the connection's call before."""
    name, key = server.books.account(1000)
    with requests.Session() as session:  # one connection, and so one greenlet
        headers = {"x-api-key": key}
        first = session.post(server.url + "/fal-ai/flux/dev", json={"prompt": "x"}, headers=headers, timeout=30)
        dear = headers | {"x-fal-sandbox": "units=900"}
        second = session.post(server.url + "/fal-ai/flux/dev", json={"prompt": "x"}, headers=dear, timeout=30)
    until(lambda: "cost more than its hold" in server.process.output(), what="the warning is there")
    (warned,) = [line for line in lines(server) if "cost more than its hold" in line["message"]]
    assert warned["call_id"] == second.headers["x-abhiapi-call-id"] != first.headers["x-abhiapi-call-id"]
    assert (warned["level"], warned["account"]) == ("warning", name)


def test_no_line_of_a_scripted_load_holds_a_secret(server: Server) -> None:
    """#65: keys in places where no key belongs, fal in every kind of trouble, at the most talkative level."""
    _, key = server.books.account(100_000)
    wrong = "sk-fal-" + "A" * 32
    for weather in ("status=401", "status=403", "status=500", "status=422", "cut", "units=none", "units=x", "redirect"):
        server.post(key, weather=weather)
        server.post(key, "/queue/fal-ai/flux/dev", weather=weather)
    for path in (f"/{key}/x", f"/fal-ai/{key}", f"/queue/{key}/requests/1", f"/v1/calls/{key}", f"/dashboard/{key}"):
        server.post(key, path)
        server.post(wrong, path + f"?key={key}")
    server.post(key, body={"prompt": key, "image_url": f"https://example.com/{OPERATOR_KEY}"})
    for headers in ({"Authorization": f"Key {OPERATOR_KEY}"}, {"Idempotency-Key": key}, {"X-Forwarded-For": key}):
        server.post(wrong, headers=headers)
    requests.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30)
    last = server.post(key)
    line_of(server, last)  # and with it all before
    output = server.process.output()
    assert output.count("\n") > 30
    for secret in (*SECRETS, key, wrong):
        assert secret not in output
        assert quote(secret, safe="") not in output


def test_a_secret_is_hidden_in_each_form_in_which_a_line_may_show_it() -> None:
    hidden = Redactor(['id:s3cret/+with"quote', "short", "plain-secret"])
    for shown in ('id:s3cret/+with"quote', 's3cret/+with"quote', "s3cret%2F%2Bwith%22quote", 's3cret/+with\\"quote'):
        assert hidden(f"before {shown} after") == f"before {HIDDEN} after"
    assert hidden("a short word") == "a short word"
    assert hidden("sk-fal-0123456789 and plain-secret") == f"sk-fal-...6789 and {HIDDEN}"
    assert masked("nothing to see") == "nothing to see"


def test_every_secret_setting_is_one_that_is_hidden() -> None:
    """A new secret cannot be forgotten, nor the password in a URL."""
    from dataclasses import fields

    marks = {item.metadata["variable"].name for item in fields(Settings) if not item.repr}
    secrets = {name: HOOK if name == "ABHIAPI_WEBHOOK_KEY" else f"https://h/{name}-{'x' * 32}" for name in marks}
    secrets |= {"ABHIAPI_DATABASE_URL": "of-the-database", "ABHIAPI_LIMITS_URL": "of-the-limits"}
    urls = {
        "ABHIAPI_DATABASE_URL": "postgresql://me:of-the-database@h/n",
        "ABHIAPI_LIMITS_URL": "redis://:of-the-limits@h/0",
    }
    hidden = Redactor(Settings.from_env(secrets | urls).secrets)
    for name, value in secrets.items():
        assert value not in hidden(f"it is {value}"), name


@pytest.fixture
def written() -> Iterator[tuple[logging.Logger, io.FileIO]]:
    """A logger whose lines come out of a pipe."""
    out, into = os.pipe()
    log = logging.Logger("test")
    handler = logs.Lines([OPERATOR_KEY], fd=into)
    handler.setFormatter(logs.TextLines())
    log.addHandler(handler)
    with open(out, "rb", buffering=0) as reader:
        yield log, reader
    os.close(into)


def test_nothing_from_outside_begins_a_line_of_its_own(written: tuple[logging.Logger, io.FileIO]) -> None:
    log, reader = written
    log.info("a model named %s", "x\n2026-01-01 ERROR abhiapi: forged\x1b[31m")
    text = reader.read(10_000).decode()
    assert text.count("\n") == 1
    assert "x\\n2026-01-01 ERROR abhiapi: forged\\x1b[31m" in text


def test_a_line_that_cannot_be_made_shows_nothing_of_its_arguments(written: tuple[logging.Logger, io.FileIO]) -> None:
    log, reader = written
    log.warning("%d of them", OPERATOR_KEY)
    text = reader.read(10_000).decode()
    assert "could not be made" in text
    assert "operator" not in text


def test_a_traceback_is_cleared_of_secrets(written: tuple[logging.Logger, io.FileIO]) -> None:
    log, reader = written
    try:
        raise ValueError(f"no such thing: {OPERATOR_KEY}")
    except ValueError:
        log.exception("it failed")
    text = reader.read(10_000).decode()
    assert f"ValueError: no such thing: {HIDDEN}" in text


def test_a_log_that_nobody_reads_stops_nobody(written: tuple[logging.Logger, io.FileIO]) -> None:
    log, reader = written
    reader.close()
    log.error("to nobody")  # the pipe is broken


def test_the_line_of_a_call_can_be_switched_off(fal: Fal, tmp_path: Path) -> None:
    settings = {"ABHIAPI_LOG_CALLS": "0", "ABHIAPI_LOG_LEVEL": "warning"}
    with Server.started(tmp_path, fal.url, **settings) as server:
        _, key = server.books.account(1000)
        call_id = server.post(key).headers["x-abhiapi-call-id"]
        dear = server.post(key, weather="units=900").headers["x-abhiapi-call-id"]
        until(lambda: dear in server.process.output(), what="the warning of the second call")
        assert call_id not in server.process.output()
