"""HTTP below the level of any library: a customer that sends odd bytes, and a fal that is scripted line by line."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

TIMEOUT_S = 20
Script = Callable[[socket.socket, "Received"], None]


def connect(url: str) -> socket.socket:
    """A connection to ``http://host:port``."""
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def request_bytes(
    key: str, *, target: str = "/fal-ai/flux/dev", body: bytes = b'{"prompt":"x"}', **headers: str
) -> bytes:
    """A whole call; header names with underscores for dashes."""
    lines = [f"POST {target} HTTP/1.1", "Host: proxy", f"x-api-key: {key}", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if not headers.keys() & {"Transfer_Encoding", "Content_Length"}:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@dataclass
class Answer:
    """What came back over a raw connection."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    whole: bool  # as far as its length or its last chunk says

    def value(self, name: str) -> str | None:
        return next((value for header, value in self.headers if header.lower() == name), None)


def exchange(url: str, data: bytes) -> Answer:
    """Send bytes on a new connection and read one answer, or what there is of it."""
    with connect(url) as sock:
        sock.sendall(data)
        return read_answer(sock)


def exchange_unread(url: str, data: bytes) -> Answer | None:
    """As `exchange`; None where the server ended the connection while it was still being sent to."""
    try:
        answer = exchange(url, data)
    except ConnectionError:
        return None
    return answer if answer.status else None


def read_answer(sock: socket.socket) -> Answer:
    """One answer from a connection, chunks undone."""
    stream = sock.makefile("rb")
    status = int((stream.readline().split(b" ") + [b"0", b"0"])[1])
    headers = []
    while (line := stream.readline()) not in (b"\r\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers.append((name, value.strip()))
    answer = Answer(status, headers, b"", True)
    length = "0" if status in (204, 304) else answer.value("content-length")
    if answer.value("transfer-encoding") == "chunked":
        answer.body, answer.whole = _dechunked(stream.readline, stream.read)
    elif length is not None:
        answer.body = stream.read(int(length))
        answer.whole = len(answer.body) == int(length)
    else:
        answer.body = stream.read()
    return answer


def _dechunked(readline: Callable[[], bytes], read: Callable[[int], bytes]) -> tuple[bytes, bool]:
    pieces = []
    try:
        while size := int(readline(), 16):
            pieces.append(read(size))
            readline()
    except (ValueError, OSError):  # the connection ended before the last chunk
        return b"".join(pieces), False
    return b"".join(pieces), readline() == b"\r\n"


@dataclass
class Received:
    """A request as it came over the wire."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class Upstream:
    """A fal whose answer to each connection's one request is a function that writes to the socket."""

    url: str
    script: Script = field(default=lambda sock, received: None)
    received: list[Received] = field(default_factory=list)

    def answer(self, head: str, body: bytes) -> None:
        """From now on, send these bytes: lines of a head without its end, and a body. The connection ends with them."""
        data = head.replace("\n", "\r\n").encode("latin-1") + b"\r\nConnection: close\r\n\r\n" + body
        self.script = lambda sock, received: sock.sendall(data)


@contextmanager
def upstream() -> Iterator[Upstream]:
    """Serve from threads until the end of the block."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    made = Upstream(f"http://127.0.0.1:{listener.getsockname()[1]}")
    threading.Thread(target=_accept, args=(listener, made), daemon=True).start()
    try:
        yield made
    finally:
        listener.close()


def _accept(listener: socket.socket, made: Upstream) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve_one, args=(sock, made), daemon=True).start()


def _serve_one(sock: socket.socket, made: Upstream) -> None:
    sock.settimeout(TIMEOUT_S)
    with sock, sock.makefile("rb") as stream:
        try:
            line = stream.readline().decode("latin-1").rstrip("\r\n")
            headers = []
            while (text := stream.readline().decode("latin-1").rstrip("\r\n")) != "":
                name, _, value = text.partition(":")
                headers.append((name.lower(), value.strip()))
            body = stream.read(int(dict(headers).get("content-length", "0")))
            received = Received(line, headers, body)
            made.received.append(received)
            made.script(sock, received)
        except OSError:
            return


_BILLING = re.compile(rb'(?:, )?"_billing": (\{[^{}]*\})(?=\}[ \t\r\n]*\Z)')


def without_billing(body: bytes) -> bytes:
    """An object that was spliced, as it was before: exactly the one member at its end taken out."""
    taken_out, count = _BILLING.subn(b"", body)
    assert count == 1, body[-300:]
    return taken_out
