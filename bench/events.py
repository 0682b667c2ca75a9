"""The load generator of streams: many at once on raw sockets, and how old each event is when it arrives.

The simulator writes its monotonic clock before each event (weather ``pings``), which on one machine is everybody's.
"""

import asyncio
import re
import socket
import time
from dataclasses import dataclass, field

import load

STREAM_TIMEOUT_S = 120.0
_SENT = re.compile(rb": ping (\d+)\n")


@dataclass(slots=True)
class Streams:
    """What came of many streams: the age of every event in seconds, in order, and how many streams were not whole."""

    ages_s: list[float] = field(default_factory=list)
    whole: int = 0
    failed: int = 0


def streams(request: load.Request, *, count: int, events: int, interval_s: float) -> Streams:
    """Open ``count`` streams, evenly over one interval so that events do not come in bursts, and read them all."""
    return asyncio.run(_streams(request, count, events, interval_s))


async def _streams(request: load.Request, count: int, events: int, interval_s: float) -> Streams:
    gate = asyncio.Semaphore(load.CONNECT_AT_ONCE)
    sockets = await asyncio.gather(*(load.connect(request.port, gate) for _ in range(count)))
    total = Streams()
    readers = [_read(sock, request, number * interval_s / count) for number, sock in enumerate(sockets)]
    for ages in await asyncio.gather(*readers):
        if len(ages) == events:
            total.whole += 1
        else:
            total.failed += 1
        total.ages_s += ages
    for sock in sockets:
        sock.close()
    total.ages_s.sort()
    return total


async def _read(sock: socket.socket, request: load.Request, start_in_s: float) -> list[float]:
    """The ages of one stream's events; of a broken one, of those that came."""
    await asyncio.sleep(start_in_s)
    ages: list[float] = []
    try:
        await asyncio.wait_for(_receive(sock, request, ages), STREAM_TIMEOUT_S)
    except (OSError, EOFError):
        return ages[:-1]
    return ages


async def _receive(sock: socket.socket, request: load.Request, ages: list[float]) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, request.head() + request.body)
    rest = b""
    while not rest.endswith(b"\r\n0\r\n\r\n"):
        piece = await loop.sock_recv(sock, load.READ_BYTES)
        if not piece:
            raise EOFError("the stream was cut")
        arrived_ns = time.monotonic_ns()
        rest += piece
        last = 0
        for found in _SENT.finditer(rest):
            ages.append((arrived_ns - int(found[1])) / 1e9)
            last = found.end()
        rest = rest[last:] if last else rest
