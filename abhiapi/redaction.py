"""What stands in the place of a secret wherever text leaves this service: of a key its last four characters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from urllib.parse import quote

HIDDEN = "[hidden]"
SHORTEST = 8  # what is shorter is no secret, and hiding it would make lines unreadable
_MARK = "sk-fal-"
_KEY = re.compile(r"sk-fal-[0-9A-Za-z]{5,}")


def masked(text: str) -> str:
    """Text with every key in it reduced to its last four characters."""
    return _KEY.sub(lambda match: f"sk-fal-...{match[0][-4:]}", text) if _MARK in text else text


class Redactor:
    """Hides keys, and the secrets that it was made with in each form in which a line may show them."""

    def __init__(self, secrets: Iterable[str]) -> None:
        forms = {form for secret in secrets for form in _forms(secret) if len(form) >= SHORTEST}
        self._forms = sorted(forms, key=len, reverse=True)  # the whole before its parts

    def __call__(self, text: str) -> str:
        for form in self._forms:
            if form in text:
                text = text.replace(form, HIDDEN)
        return masked(text)


def _forms(secret: str) -> Iterable[str]:
    """A secret, and the half after the colon that is one by itself; as it is, in a URL, in JSON and in a ``repr``."""
    for part in (secret, secret.partition(":")[2]):
        yield from (part, quote(part, safe=""), json.dumps(part)[1:-1], repr(part)[1:-1])
