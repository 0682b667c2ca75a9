"""The stub upstream for slow answers and large uploads: reads a whole request, waits, answers like fal.

A script (`stub_server.py --port N`) on asyncio protocols, since it must hold thousands of connections cheaply.
`GET /delay/S` makes it wait S seconds before each answer from then on; `GET /stats` tells how many calls were in flight
at once since then.
"""

import argparse
import asyncio
import json
import re

from stub import ANSWER_BODY, ANSWER_HEADERS

BACKLOG = 4096
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class State:
    """Shared by all connections: how long to wait, and how many calls are waiting."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.in_flight = 0
        self.peak_in_flight = 0

    def enter(self) -> None:
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)

    def leave(self) -> None:
        self.in_flight -= 1

    def as_json(self) -> bytes:
        return json.dumps({"delay_s": self.delay_s, "peak_in_flight": self.peak_in_flight}).encode()


class StubProtocol(asyncio.Protocol):
    """One connection, kept alive; requests come one after the other, never pipelined."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._transport: asyncio.Transport
        self._head = b""
        self._body_left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._body_left:
            self._take_body(len(data))
            return
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return
        head, received = self._head[: end + 4], len(self._head) - end - 4
        self._head = b""
        self._begin(head, received)

    def _begin(self, head: bytes, body_received: int) -> None:
        if head.startswith(b"GET "):
            self._control(head.split(b" ", 2)[1])
            return
        length = _CONTENT_LENGTH.search(head)
        if length is None:
            self._answer(411, b'{"detail": "the stub wants a content-length"}')
            return
        self._state.enter()
        self._body_left = int(length[1])
        self._take_body(body_received)

    def _control(self, path: bytes) -> None:
        if path.startswith(b"/delay/"):
            self._state.delay_s = float(path.removeprefix(b"/delay/"))
            self._state.peak_in_flight = 0
        self._answer(200, self._state.as_json())

    def _take_body(self, size_bytes: int) -> None:
        self._body_left -= size_bytes
        if self._body_left == 0:
            asyncio.get_running_loop().call_later(self._state.delay_s, self._finish)

    def _finish(self) -> None:
        self._state.leave()
        self._answer(200, ANSWER_BODY)

    def _answer(self, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} Stub\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in ANSWER_HEADERS.items())
        self._transport.write(head.encode() + b"\r\n" + body)


async def serve(port: int) -> None:
    """Answer on 127.0.0.1 until the process is ended."""
    state = State()
    server = await asyncio.get_running_loop().create_server(
        lambda: StubProtocol(state), "127.0.0.1", port, backlog=BACKLOG
    )
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    asyncio.run(serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
