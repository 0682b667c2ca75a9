"""Answers that no well-behaved server would send, written straight to the client's socket.

Everything that `Weather.needs_socket` names: wrong lengths, chunks, connections that end too early, no HTTP at all.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NoReturn

import gevent

from abhiapi.sandbox.replies import Reply
from abhiapi.sandbox.weather import Weather

_GARBAGE = b"\x16\x03\x01\x02\x00 this is not HTTP \x00\xff\xfe\r\n\r\n{}\r\n"
_LENGTH_ERROR_BYTES = 7
_CHUNKS = 8
_CHUNK_MAX_BYTES = 64 * 1024
_FILLERS, _FILLER_BYTES = 1_024, 1_000


class Hangup(BrokenPipeError):
    """Ends the connection here and now. The server takes it for a client that went away, so it closes and is silent."""

    def __init__(self) -> None:
        super().__init__(errno.EPIPE, "the connection ends here")


def send(client: socket.socket, reply: Reply, weather: Weather) -> None:
    """Write the reply as the weather has it. Raises `Hangup` where the connection cannot be used any further."""
    if weather.garbage:
        client.sendall(_GARBAGE)
        raise Hangup
    if weather.drop == "before_headers":
        _drop(client, weather)
    if weather.length is not None and reply.length is None:
        whole = b"".join(reply.body)
        reply = replace(reply, body=(whole,), length=len(whole))
    head = _head(reply, weather)
    if weather.drop == "in_headers":
        client.sendall(head[: len(head) * 2 // 3])
        _drop(client, weather)
    _send_head(client, head, weather)
    body = reply.body if weather.drop is None else _first_half(reply)
    if _is_chunked(reply, weather):
        _send_chunks(client, body, reply.length, weather)
    else:
        for piece in body:
            client.sendall(piece)
    if weather.drop is not None:
        _drop(client, weather)
    if weather.length == "long":
        raise Hangup
    # A body longer than announced leaves its last bytes on a connection that stays open: the worst case for a client.


def _drop(client: socket.socket, weather: Weather) -> NoReturn:
    if weather.reset:  # with a linger time of 0, closing sends a reset
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise Hangup


def _is_chunked(reply: Reply, weather: Weather) -> bool:
    return weather.chunked or reply.length is None


def _head(reply: Reply, weather: Weather) -> bytes:
    headers = reply.head()
    if weather.huge_head:
        headers += [(f"x-fal-filler-{number}", "x" * _FILLER_BYTES) for number in range(_FILLERS)]
    if _is_chunked(reply, weather):
        headers.append(("transfer-encoding", "chunked"))
    else:
        off_by = {"short": -_LENGTH_ERROR_BYTES, "long": _LENGTH_ERROR_BYTES}.get(weather.length or "", 0)
        headers.append(("content-length", str(max(0, (reply.length or 0) + off_by))))
    lines = [f"HTTP/1.1 {reply.status_line}", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def _send_head(client: socket.socket, head: bytes, weather: Weather) -> None:
    if weather.slow_head is None:
        client.sendall(head)
        return
    for at in range(len(head)):
        client.sendall(head[at : at + 1])
        gevent.sleep(float(weather.slow_head))


def _first_half(reply: Reply) -> Iterator[bytes]:
    """The first half of the body, but never nothing of a body that has something."""
    left = None if reply.length is None else max(1, reply.length // 2)
    for piece in reply.body:
        if not piece:
            continue
        if left is None:
            left = max(1, len(piece) // 2)
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return


def _send_chunks(client: socket.socket, body: Iterable[bytes], length: int | None, weather: Weather) -> None:
    size = _CHUNK_MAX_BYTES if length is None else max(1, min(_CHUNK_MAX_BYTES, -(-length // _CHUNKS)))
    for piece in body:
        for at in range(0, len(piece), size):
            chunk = piece[at : at + size]
            client.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            if weather.chunk_delay_s:
                gevent.sleep(float(weather.chunk_delay_s))
    if weather.drop is None:
        client.sendall(b"0\r\n\r\n")
