"""One call as a program writes it, for curl, Python and JavaScript. Pure; a real key never comes in here."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

import simplejson

KEY = "sk-fal-your-key"


class Sample(NamedTuple):
    language: str
    text: str


def samples(base_url: str, model: str, call_input: Mapping[str, Any]) -> list[Sample]:
    url = f"{base_url}/{model}"
    return [
        Sample("curl", _curl(url, call_input)),
        Sample("Python", _python(url, call_input)),
        Sample("JavaScript", _javascript(url, call_input)),
    ]


def body_text(call_input: Mapping[str, Any]) -> str:
    """The JSON of a call, numbers as they were written."""
    return str(simplejson.dumps(call_input, use_decimal=True, ensure_ascii=False))


def _curl(url: str, call_input: Mapping[str, Any]) -> str:
    return (
        f"curl -X POST {url} \\\n"
        f'  -H "x-api-key: {KEY}" \\\n'
        '  -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(body_text(call_input))}"
    )


def _python(url: str, call_input: Mapping[str, Any]) -> str:
    return (
        "import requests\n\n"
        "answer = requests.post(\n"
        f'    "{url}",\n'
        f'    headers={{"x-api-key": "{KEY}"}},\n'
        f"    json={_literal(call_input, 4)},\n"
        "    timeout=900,\n"
        ").json()\n"
        'print(answer, answer["_billing"]["credits_used"])'
    )


def _javascript(url: str, call_input: Mapping[str, Any]) -> str:
    shown = simplejson.dumps(call_input, use_decimal=True, ensure_ascii=False, indent=2).replace("\n", "\n  ")
    return (
        f'const answer = await fetch("{url}", {{\n'
        '  method: "POST",\n'
        f'  headers: {{ "x-api-key": "{KEY}", "Content-Type": "application/json" }},\n'
        f"  body: JSON.stringify({shown}),\n"
        "}).then((response) => response.json());\n"
        "console.log(answer, answer._billing.credits_used);"
    )


def _literal(value: Any, indent: int) -> str:
    """A JSON value as Python writes it; its texts are JSON's, whose escapes Python reads alike."""
    inner, end = " " * (indent + 4), " " * indent
    if isinstance(value, Mapping):
        rows = [
            f"{inner}{json.dumps(name, ensure_ascii=False)}: {_literal(value[name], indent + 4)},\n" for name in value
        ]
        return "{\n" + "".join(rows) + end + "}" if rows else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(one, indent) for one in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value) if isinstance(value, Decimal) else repr(value)
