"""Load generators: wrk for small JSON, an asyncio client on raw sockets for large bodies and for many slow calls.

All are closed loops: each connection sends its next call when the last was answered. Above saturation their latency is
queueing, so latency is read at one connection.
"""

import asyncio
import json
import math
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

WRK_SCRIPT = Path(__file__).with_name("post.lua")
CONNECT_AT_ONCE = 64  # opening 2,000 connections in one burst would measure the SYN backlog
CALL_TIMEOUT_S = 120.0
READ_BYTES = 256 * 1024
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a load generator saw. `answered` counts every whole answer, `failed` what was not a whole 200."""

    answered: int
    failed: int
    seconds: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Request:
    """One POST, repeated."""

    port: int
    path: str
    headers: Mapping[str, str]
    body: bytes

    def head(self) -> bytes:
        lines = [f"POST {self.path} HTTP/1.1", f"host: 127.0.0.1:{self.port}", f"content-length: {len(self.body)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def wrk(request: Request, *, connections: int, seconds: float) -> Outcome:
    """As many calls as the connections get through in about `seconds`; wrk cuts those in flight at the end."""
    env = os.environ | {
        "BENCH_BODY": request.body.decode(),
        "BENCH_HEADERS": "".join(f"{name}: {value}\n" for name, value in request.headers.items()),
    }
    url = f"http://127.0.0.1:{request.port}{request.path}"
    duration = f"{max(1, round(seconds))}s"
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{duration}", "--timeout", "20s", "-s", str(WRK_SCRIPT), url]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    return Outcome(
        answered=report["requests"] - report["refused"],
        failed=report["refused"] + report["broken"],
        seconds=report["duration_us"] / 1e6,
        p50_ms=report["p50_us"] / 1e3,
        p99_ms=report["p99_us"] / 1e3,
    )


def calls(request: Request, *, connections: int, per_connection: int) -> Outcome:
    """Exactly `connections` x `per_connection` calls: all connections are opened first, then start together."""
    return asyncio.run(_calls(request, connections, per_connection))


async def _calls(request: Request, connections: int, per_connection: int) -> Outcome:
    gate = asyncio.Semaphore(CONNECT_AT_ONCE)
    sockets = await asyncio.gather(*(connect(request.port, gate) for _ in range(connections)))
    started = time.perf_counter()
    results = await asyncio.gather(*(_worker(sock, request, per_connection) for sock in sockets))
    seconds = time.perf_counter() - started
    for sock in sockets:
        sock.close()
    latencies = sorted(latency for worker in results for latency in worker)
    answered = len(latencies)
    return Outcome(
        answered=answered,
        failed=connections * per_connection - answered,
        seconds=seconds,
        p50_ms=percentile(latencies, 50) * 1e3,
        p99_ms=percentile(latencies, 99) * 1e3,
    )


def percentile(ordered: list[float], percent: int) -> float:
    """The nearest-rank percentile; not a number when there is nothing."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1] if ordered else math.nan


async def connect(port: int, gate: asyncio.Semaphore) -> socket.socket:
    async with gate:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return sock


async def _worker(sock: socket.socket, request: Request, count: int) -> list[float]:
    """Seconds of each call that got a whole 200; a broken connection fails the rest of its calls."""
    latencies = []
    for _ in range(count):
        started = time.perf_counter()
        try:
            status = await asyncio.wait_for(call(sock, request), CALL_TIMEOUT_S)
        except (OSError, EOFError):
            break
        if status == 200:
            latencies.append(time.perf_counter() - started)
    return latencies


async def call(sock: socket.socket, request: Request) -> int:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, request.head())
    await loop.sock_sendall(sock, request.body)
    answer = AnswerReader()
    while not answer.complete:
        piece = await loop.sock_recv(sock, READ_BYTES)
        if not piece:
            raise EOFError("the answer was cut")
        answer.feed(piece)
    return answer.status


class AnswerReader:
    """Finds the end of one answer without keeping its body."""

    def __init__(self) -> None:
        self.status = 0
        self.complete = False
        self._head: bytes | None = b""
        self._left: int | None = None  # None: chunked, the end shows in the tail
        self._tail = b""

    def feed(self, piece: bytes) -> None:
        if self._head is None:
            self._take(piece)
            return
        self._head += piece
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return
        head, rest = self._head[: end + 4], self._head[end + 4 :]
        self._head = None
        self.status = int(head[9:12])
        length = _LENGTH.search(head)
        self._left = int(length[1]) if length else None
        self._take(rest)

    def _take(self, piece: bytes) -> None:
        if self._left is not None:
            self._left -= len(piece)
            self.complete = self._left <= 0
            return
        # The bodies here are JSON, which holds no CR: the last chunk's frame cannot appear inside one.
        self._tail = (self._tail + piece[-7:])[-7:]
        self.complete = self._tail == b"\r\n0\r\n\r\n"
