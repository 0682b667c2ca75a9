"""A client of the fal simulator for tests: its small price list, its few calls, and readers of its files."""

from __future__ import annotations

import io
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests

from abhiapi import pricing
from abhiapi.sandbox import Sandbox, create_sandbox
from abhiapi.sandbox.server import running
from tests.plain_session import PlainSession

PRICES = """
[[model]]
id = "fal-ai/flux/dev"
unit = "megapixels"
unit_price_usd = "0.025"
source = "test"
seen = "2026-11-22"
estimate = { kind = "megapixels", maximum = "4", defaults = { image_size = "landscape_4_3" } }

[[model]]
ids = ["fal-ai/nano-banana", "fal-ai/nano-banana/edit"]
unit = "images"
unit_price_usd = "0.039"
source = "test"
seen = "2026-11-22"
estimate = { kind = "images" }

[[model]]
ids = ["fal-ai/kling-video/v2.6/pro/text-to-video", "fal-ai/kling-video/v2.6/pro/image-to-video"]
unit = "seconds"
unit_price_usd = "0.14"
source = "test"
seen = "2026-11-22"
[model.estimate]
kind = "seconds"
maximum = "10"
defaults = { duration = "5", generate_audio = true }
rates = [{ units = "0.5", when = { generate_audio = false } }, { units = "1", when = { generate_audio = true } }]

[[model]]
id = "fal-ai/sora-2/text-to-video"
unit = "seconds"
unit_price_usd = "0.10"
source = "test"
seen = "2026-11-22"
estimate = { kind = "seconds", maximum = "20", defaults = { duration = "4" } }

[[model]]
id = "bytedance/seedance-2.0/text-to-video"
unit = "1000 tokens"
unit_price_usd = "0.014"
source = "test"
seen = "2026-11-22"
[model.estimate]
kind = "tokens"
maximum = "15"
defaults = { resolution = "720p", duration = "auto" }
size_by_resolution = { 480p = "864x496", 720p = "1280x720" }

[[model]]
id = "fal-ai/clarity-upscaler"
unit = "megapixels"
unit_price_usd = "0.03"
source = "test"
seen = "2026-11-22"
estimate = { kind = "output_megapixels", maximum = "16" }

[[model]]
id = "fal-ai/creative-upscaler"
unit = "compute seconds"
unit_price_usd = "0.0011"
source = "test"
seen = "2026-11-22"
estimate = { kind = "none", maximum = "60" }

[[model]]
id = "fal-ai/kokoro/american-english"
unit = "1000 characters"
unit_price_usd = "0.02"
source = "test"
seen = "2026-11-22"
estimate = { kind = "characters", maximum = "5", text_param = "prompt" }
"""
RULES = {rule.model: rule for rule in pricing.load_rules(PRICES)}

FLUX = "/fal-ai/flux/dev"
KLING = "/fal-ai/kling-video/v2.6/pro/text-to-video"
CAT = {"prompt": "a cat"}
TIMEOUT_S = 10


class Fal:
    """The simulator's address, with the few calls that tests make of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host = url.removeprefix("http://")
        self.session = PlainSession()
        self.session.trust_env = False
        self.session.headers["Authorization"] = "Key id:secret"

    def post(self, path: str, call_input: Any = None, weather: str = "", **options: Any) -> requests.Response:
        headers = {"x-fal-sandbox": weather} if weather else {}
        if call_input is not None:
            options["json"] = call_input
        options.setdefault("headers", headers)
        return self.session.post(self.url + path, timeout=TIMEOUT_S, allow_redirects=False, **options)

    def get(self, path: str) -> requests.Response:
        return self.session.get(path if path.startswith("http") else self.url + path, timeout=TIMEOUT_S)

    def order(self, *weather: dict[str, Any]) -> requests.Response:
        return self.session.post(self.url + "/_sandbox/weather", json=list(weather), timeout=TIMEOUT_S)

    def bill(self) -> dict[str, Any]:
        return dict(self.get("/_sandbox/bill").json())

    def calls(self, query: str = "") -> list[dict[str, Any]]:
        return list(self.get(f"/_sandbox/calls{query}").json()["calls"])

    def raw(self, weather: str, body: bytes = b'{"prompt":"a cat"}') -> tuple[bytes, bool]:
        """Everything the server sends for one call, and whether it ended the connection with a reset."""
        head = (
            f"POST {FLUX} HTTP/1.1\r\nHost: {self.host}\r\nAuthorization: Key k\r\nConnection: close\r\n"
            f"x-fal-sandbox: {weather}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        received = b""
        with self.connect() as client:
            client.sendall(head.encode() + body)
            try:
                while piece := client.recv(65536):
                    received += piece
            except ConnectionResetError:
                return received, True
        return received, False

    def connect(self) -> socket.socket:
        name, _, port = self.host.partition(":")
        return socket.create_connection((name, int(port)), timeout=TIMEOUT_S)


@contextmanager
def simulator() -> Iterator[str]:
    """The base URL of a simulator with these models."""
    with running(create_sandbox(RULES.values())) as url:
        yield url


@contextmanager
def fresh(url: str) -> Iterator[Fal]:
    """A client of a simulator that remembers nothing."""
    fal = Fal(url)
    for page in ("calls", "bill", "weather"):
        fal.session.delete(f"{url}/_sandbox/{page}", timeout=TIMEOUT_S).raise_for_status()
    try:
        yield fal
    finally:
        fal.session.close()


@pytest.fixture(scope="module")
def simulator_url() -> Iterator[str]:
    """One simulator for a module's tests: imported by it beside `sim`."""
    with simulator() as url:
        yield url


@pytest.fixture
def sim(simulator_url: str) -> Iterator[Fal]:
    with fresh(simulator_url) as client:
        yield client


def wsgi_call(sandbox: Sandbox, path: str, body: bytes, **environ: str) -> tuple[str, dict[str, str], bytes]:
    """Status line, headers and body of a call without a server."""
    told: list[Any] = []
    answer = b"".join(sandbox(_environ(path, body) | environ, _start(told)))
    return told[0], dict(told[1]), answer


def _environ(path: str, body: bytes) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": "POST", "PATH_INFO": path, "HTTP_AUTHORIZATION": "Key k", "SERVER_NAME": "fal.test",
        "SERVER_PORT": "80", "CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body),
    }  # fmt: skip


def _start(told: list[Any]) -> Callable[..., Any]:
    return lambda status, headers, *rest: told.extend((status, headers))


def request_id(reply: requests.Response) -> str:
    return reply.headers["x-fal-request-id"]


def read_png(content: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height and rows of a PNG, every chunk of it checked."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: list[tuple[bytes, bytes]] = []
    at = 8
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        kind, payload = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", content, at + 8 + length)[0] == zlib.crc32(kind + payload)
        chunks.append((kind, payload))
        at += 12 + length
    assert at == len(content)
    assert [chunks[0][0], chunks[1][0], chunks[-1][0]] == [b"IHDR", b"PLTE", b"IEND"]
    width, height, depth, colour_type, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, colour_type, rest) == (8, 3, [0, 0, 0])
    assert len(chunks[1][1]) == 3 * 256
    data = zlib.decompress(b"".join(payload for kind, payload in chunks if kind == b"IDAT"))
    assert len(data) == height * (width + 1)
    rows = [data[start : start + width + 1] for start in range(0, len(data), width + 1)]
    assert all(row[0] == 0 for row in rows)
    return width, height, [row[1:] for row in rows]


def read_boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        assert 8 <= length <= len(content) - at
        yield content[at + 4 : at + 8], content[at + 8 : at + length]
        at += length


def read_inside(content: bytes, *path: bytes) -> dict[bytes, bytes]:
    for kind in path:
        content = dict(read_boxes(content))[kind]
    return dict(read_boxes(content))
