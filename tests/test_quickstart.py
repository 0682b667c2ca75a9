"""The three quick-start calls of the API reference, as a newcomer pastes them, and the books after them."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.command_line import CommandLine
from tests.harness import Fal, Server

HOST, KEY = "https://fal.abhibots.com", "sk-fal-your-key"
COMMANDS = {
    "fal-ai/flux/dev": """\
curl -X POST https://fal.abhibots.com/fal-ai/flux/dev \\
  -H "x-api-key: sk-fal-your-key" \\
  -H "Content-Type: application/json" \\
  -d '{"prompt": "a futuristic city at night", "image_size": "landscape_4_3"}'
""",
    "fal-ai/kling-video/v2/master/text-to-video": """\
curl -X POST https://fal.abhibots.com/fal-ai/kling-video/v2/master/text-to-video \\
  -H "x-api-key: sk-fal-your-key" \\
  -H "Content-Type: application/json" \\
  -d '{"prompt": "drone shot over mountains", "duration": "5"}'
""",
    "fal-ai/creative-upscaler": """\
curl -X POST https://fal.abhibots.com/fal-ai/creative-upscaler \\
  -H "x-api-key: sk-fal-your-key" \\
  -H "Content-Type: application/json" \\
  -d '{"image_url": "https://example.com/photo.jpg", "scale": 4}'
""",
}


def pasted(command: str, server: Server, key: str) -> bytes:
    """What a command prints, with only its host and key replaced; without curl, what its words mean."""
    command = command.replace(HOST, server.url).replace(KEY, key)
    if shutil.which("curl"):
        return subprocess.run(["sh", "-c", command], check=True, capture_output=True, timeout=60).stdout
    words = shlex.split(command.replace("\\\n", ""))
    options = [(name, value) for name, value in pairwise(words) if name in ("-X", "-H", "-d")]
    headers = dict(value.split(": ", 1) for name, value in options if name == "-H")
    (method,), (data,) = ([value for name, value in options if name == wanted] for wanted in ("-X", "-d"))
    (url,) = [word for word in words if word.startswith(server.url)]
    return requests.request(method, url, headers=headers, data=data, timeout=60).content


@pytest.fixture
def abhiapi(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path)


def test_the_quick_start_works_and_the_books_agree(fal: Fal, tmp_path: Path, abhiapi: CommandLine) -> None:
    key = abhiapi("keys", "create", "newcomer").stdout.strip()
    abhiapi.json("topup", "newcomer", "5000")
    with Server.started(tmp_path, fal.url) as server:
        answers = {
            model: json.loads(pasted(command, server, key), parse_float=Decimal) for model, command in COMMANDS.items()
        }
        picture, clip, upscaled = answers.values()
        assert requests.get(picture["images"][0]["url"], timeout=30).content.startswith(b"\x89PNG")
        assert requests.get(clip["video"]["url"], timeout=30).content[4:8] == b"ftyp"
        assert upscaled["image"]["width"] > 1024
        used = {model: answer["_billing"]["credits_used"] for model, answer in answers.items()}
        assert [answer["_billing"]["model"] for answer in answers.values()] == list(COMMANDS)
        assert list(used.values())[:2] == [Decimal("26.25"), 1470]
        assert 0 < used["fal-ai/creative-upscaler"] < 100
        total = sum(used.values())
        left = 5000 - total
        assert upscaled["_billing"]["balance_remaining"] == left
        assert_the_customer_sees(server, key, used, total)
        assert_the_operator_sees(abhiapi, fal, used, total)


def assert_the_customer_sees(server: Server, key: str, used: dict[str, Any], total: Decimal) -> None:
    def get(path: str) -> Any:
        response = requests.get(server.url + path, headers={"x-api-key": key}, timeout=30)
        return json.loads(response.content, parse_float=Decimal)

    usage = get("/v1/usage?by=model")
    assert {row["group"]: row["credits"] for row in usage["rows"]} == used
    assert (usage["total"]["calls"], usage["total"]["credits"]) == (3, total)
    assert usage["total"]["cost_usd"] * 1000 == total
    entries = get("/v1/ledger")["entries"]
    assert [entry["credits"] for entry in entries] == [*(-credits for credits in reversed(used.values())), 5000]
    assert get("/v1/account")["available"] == 5000 - total
    assert {call["model"]: call["credits"] for call in get("/v1/calls")["calls"]} == used


def assert_the_operator_sees(abhiapi: CommandLine, fal: Fal, used: dict[str, Any], total: Decimal) -> None:
    usage = abhiapi.json("usage", "--by", "model")
    assert {row["group"]: row["credits"] for row in usage["rows"]} == used
    assert usage["total"]["credits"] == total
    bill = requests.get(f"{fal.url}/_sandbox/bill", timeout=30).json()["billed"]
    request_ids = {call["fal_request_id"] for call in abhiapi.json("calls", "list", "--account", "newcomer")["calls"]}
    nanos = sum(billed["cost_nano_usd"] for billed in bill if billed["request_id"] in request_ids)
    assert usage["total"]["fal_cost_usd"] * 1_000_000_000 == nanos
    entries = abhiapi.json("ledger", "show", "newcomer")["entries"]
    assert sum(entry["credits"] for entry in entries) == entries[0]["balance_after"] == 5000 - total
    verified = abhiapi.json("ledger", "verify")
    assert (verified["ok"], verified["entries"], verified["problems"]) == (True, 4, [])
    assert abhiapi.json("balance", "newcomer")["balance"] == 5000 - total
    assert abhiapi.json("holds", "list")["holds"] == []
