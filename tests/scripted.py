"""A fal in the place of `fal.Fal` that says what it is told, and the runtime around it, for tests of the pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from abhiapi import gateway, runtime
from abhiapi.db import assert_no_transaction
from abhiapi.fal import FalReply
from tests.harness import Books

FLUX = "/fal-ai/flux/dev"
PICTURE = b'{"images":[{"url":"x","width":1024,"height":768}]}'
JSON, UNITS = ("content-type", "application/json"), ("x-fal-billable-units", "1")

Piece = bytes | Exception


@dataclass
class Raw:
    """The body of a scripted answer: pieces, and what goes wrong between them."""

    pieces: list[Piece]
    closed: int = 0

    def read1(self, amount: int) -> bytes:
        piece = self.pieces.pop(0) if self.pieces else b""
        if isinstance(piece, Exception):
            raise piece
        return piece

    def close(self) -> None:
        self.closed += 1


@dataclass
class ScriptedFal:
    """In the place of `fal.Fal`: says one thing, and keeps what it was asked."""

    answer: FalReply | BaseException = field(default_factory=lambda: answer([PICTURE]))
    sent: list[tuple[str, str, list[tuple[str, str]], Any]] = field(default_factory=list)
    when_sent: Any = lambda: None

    def send(self, method: str, target: str, headers: Any, body: Any) -> FalReply:
        assert_no_transaction()
        self.sent.append((method, target, list(headers), body))
        self.when_sent()
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Body:
    content: Any
    call_input: Mapping[str, Any]


@dataclass
class House:
    """A runtime with a scripted fal, and the books behind it."""

    rt: runtime.Runtime
    fal: ScriptedFal
    books: Books
    account: str
    key: str

    def call(self, path: str = FLUX, *, query: str = "", body: bytes = b'{"prompt":"a cat"}', **headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()} or {"x-api-key": self.key}
        read = Body(body, json.loads(body) if body else {})
        return gateway.run(self.rt, gateway.Request("POST", path, query, named, lambda: read))

    def last(self) -> Any:
        return self.books.calls(self.account)[0]

    def standing(self) -> tuple[int, int]:
        return self.books.standing(self.account)

    def at_once(self) -> int:
        return self.rt.limits.in_flight()


def answer(pieces: list[Any], *headers: tuple[str, str], status: int = 200) -> FalReply:
    return FalReply(status, [*(headers or (JSON, UNITS)), ("x-fal-request-id", "r-1")], Raw([*pieces]))


def in_pieces(body: bytes, size: int) -> list[Piece]:
    return [body[start : start + size] for start in range(0, len(body), size)]
