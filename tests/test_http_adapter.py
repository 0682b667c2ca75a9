"""The way to fal, over real sockets: what was certainly not sent may be repeated, everything else never is."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from abhiapi.errors import UpstreamBroken, UpstreamTimeout, UpstreamUnreachable
from abhiapi.fal import Fal, FalReply
from abhiapi.http_adapter import FileBody

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
OPENED: list[Fal] = []
Talk = Callable[[socket.socket], None]


class Peer:
    """A server of plain sockets: each connection is handed to the next of its scripts."""

    def __init__(self, *scripts: Talk) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._scripts = list(scripts)
        self.requests: list[bytes] = []
        self.connections = 0
        self.ended = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for script in self._scripts:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                connection.settimeout(20)
                script(connection)
            self.ended.release()

    def request(self, connection: socket.socket) -> bytes:
        """Read one whole request (with its Content-Length) and remember it."""
        data = b""
        while b"\r\n\r\n" not in data:
            more = connection.recv(65536)
            if not more:
                return data
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        while len(body) < length:
            body += connection.recv(65536)
        self.requests.append(head + b"\r\n\r\n" + body)
        return self.requests[-1]

    def close(self) -> None:
        self._listener.close()
        self._thread.join(20)


@contextmanager
def peer(*answers: bytes | Talk, repeat: int = 1) -> Iterator[Peer]:
    """A peer whose connections each answer ``repeat`` requests with the bytes given, or do as the function says."""
    made: list[Peer] = []

    def script(answer: bytes | Talk) -> Talk:
        def talk(connection: socket.socket) -> None:
            if callable(answer):
                answer(connection)
                return
            for _ in range(repeat):
                if not made[0].request(connection):
                    return
                connection.sendall(answer)

        return talk

    made.append(Peer(*(script(answer) for answer in answers)))
    try:
        yield made[0]
    finally:
        made[0].close()


def ask(
    url: str, *, method: str = "POST", timeout_s: float = 10, fal: Fal | None = None, body: object = b"{}"
) -> FalReply:
    return (fal or fal_at(url, timeout_s=timeout_s)).send(method, "/fal-ai/flux/dev", [("accept", "*/*")], body)


@pytest.fixture(autouse=True)
def no_connection_outlives_its_test() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


def fal_at(url: str, *, timeout_s: float = 10) -> Fal:
    OPENED.append(Fal(url, "id:secret", timeout_s=timeout_s))
    return OPENED[-1]


def whole(reply: FalReply) -> bytes:
    pieces = []
    while piece := reply.read1():
        pieces.append(piece)
    return b"".join(pieces)


def test_a_request_goes_out_as_it_is(tmp_path: Path) -> None:
    with peer(OK) as server:
        fal = fal_at(server.url)
        assert whole(fal.send("POST", "/a%20b/c?x=%2F", [("x-fal-thing", "1")], b"body")) == b"{}"
    head, body = server.requests[0].split(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /a%20b/c?x=%2F HTTP/1.1"
    assert set(lines[1:]) == {
        f"Host: {server.url[7:]}",
        "Authorization: Key id:secret",
        "x-fal-thing: 1",
        "Content-Length: 4",
    }
    assert body == b"body"


def test_connections_are_kept_alive() -> None:
    with peer(OK, repeat=3) as server:
        fal = fal_at(server.url)
        assert [whole(ask(server.url, fal=fal)) for _ in range(3)] == [b"{}"] * 3
    assert (server.connections, len(server.requests)) == (1, 3)


def test_a_pooled_connection_that_died_is_replaced_and_the_request_sent_once() -> None:
    with peer(OK, OK) as server:  # each connection is closed after its answer
        fal = fal_at(server.url)
        assert whole(ask(server.url, fal=fal)) == b"{}"
        assert server.ended.acquire(timeout=10)
        assert whole(ask(server.url, fal=fal)) == b"{}"
    assert (server.connections, len(server.requests)) == (2, 2)


@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
def test_a_request_that_was_read_is_never_sent_again(method: str) -> None:
    """The connection closes without an answer: fal may have started, so nobody asks twice, whatever the method."""
    seen: list[bytes] = []

    def read_and_close(connection: socket.socket) -> None:
        seen.append(connection.recv(65536))

    with peer(read_and_close) as server, pytest.raises(UpstreamBroken):
        ask(server.url, method=method)
    assert len(seen) == 1


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_reused_connection_that_closes_after_reading_is_not_asked_again(method: str) -> None:
    def answer_once_then_close(connection: socket.socket) -> None:
        server.request(connection)
        connection.sendall(OK)
        server.request(connection)

    with peer(answer_once_then_close) as server:
        fal = fal_at(server.url)
        assert whole(ask(server.url, fal=fal)) == b"{}"
        with pytest.raises(UpstreamBroken):
            ask(server.url, fal=fal, method=method)
    assert len(server.requests) == 2


def test_nobody_there_is_told_apart_from_everything_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UpstreamUnreachable):
        ask(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nConten",
        b"\x16\x03\x01 this is no HTTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x-filler: " + b"x" * 100_000 + b"\r\n\r\n",
        b"",
    ],
    ids=[
        "short",
        "chunk cut",
        "bad chunk",
        "two lengths",
        "length and chunks",
        "head cut",
        "no HTTP",
        "huge head",
        "none",
    ],
)
def test_what_is_no_whole_answer_is_never_passed_off_as_one(answer: bytes) -> None:
    with peer(answer) as server, pytest.raises(UpstreamBroken):
        whole(ask(server.url))


def test_an_answer_longer_than_it_says_is_whole_and_its_connection_not_used_again() -> None:
    with peer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\n", OK) as server:
        fal = fal_at(server.url)
        assert whole(ask(server.url, fal=fal)) == b"{}"
        assert whole(ask(server.url, fal=fal)) == b"{}"
    assert server.connections == 2


@pytest.mark.parametrize(
    ("method", "answer", "status", "body"),
    [
        ("POST", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" + OK, 200, b"{}"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", 200, b""),
        ("POST", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        ("POST", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end", 200, b"until the end"),
        ("POST", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n", 200, b"{}"),
    ],
    ids=["interim", "HEAD", "204", "until close", "chunked"],
)
def test_every_framing_of_http_is_understood(method: str, answer: bytes, status: int, body: bytes) -> None:
    with peer(answer) as server:
        reply = ask(server.url, method=method)
        assert (reply.status, whole(reply)) == (status, body)
    assert ("link", "a") not in reply.headers


def test_headers_keep_their_order_spelling_and_repetition() -> None:
    lines = [b"HTTP/1.1 200 OK", b"B-x: 1", b"set-cookie: a=1", b"A: caf\xe9", b"set-cookie: b=2", b"Empty:"]
    head = b"\r\n".join([*lines, b"Content-Length: 0", b"", b""])
    with peer(head) as server:
        reply = ask(server.url)
    assert reply.headers[:5] == [
        ("B-x", "1"),
        ("set-cookie", "a=1"),
        ("A", "café"),
        ("set-cookie", "b=2"),
        ("Empty", ""),
    ]
    assert reply.values("set-cookie") == ["a=1", "b=2"]
    assert reply.value("b-x") == "1"
    assert reply.value("absent") is None


def test_blanks_around_a_headers_value_are_none_of_it() -> None:
    """RFC 9110, 5.5. "1 " would be no plain number of units, and the catalogue's guess would be charged instead."""
    with peer(b"HTTP/1.1 200 OK\r\nx-fal-billable-units: \t3 \t \r\nContent-Length: 0\r\n\r\n") as server:
        assert ask(server.url).headers[0] == ("x-fal-billable-units", "3")


def test_an_answer_that_never_begins_or_never_ends_times_out() -> None:
    over = threading.Event()

    def nothing(connection: socket.socket) -> None:
        over.wait(20)

    def half(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")
        over.wait(20)

    with peer(nothing) as silent, peer(half) as stalling:
        with pytest.raises(UpstreamTimeout):
            ask(silent.url, timeout_s=0.2)
        reply = ask(stalling.url, timeout_s=0.5)
        with pytest.raises(UpstreamTimeout):
            whole(reply)
        over.set()


def test_an_early_answer_to_a_large_request_is_taken(tmp_path: Path) -> None:
    """A server may refuse 20 MB after the first few and stop listening; its answer counts, not the broken pipe."""

    def refuse_early(connection: socket.socket) -> None:
        connection.recv(1024)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 20):
            pass

    path = tmp_path / "large"
    path.write_bytes(bytes(20_000_000))
    with peer(refuse_early) as server, path.open("rb") as file:
        reply = ask(server.url, body=FileBody(file, 20_000_000))
        assert (reply.status, whole(reply)) == (413, b"{}")


def test_certificates_are_verified(tmp_path: Path) -> None:
    """A certificate that nobody vouches for is refused; with its authority in SSL_CERT_FILE it is taken."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        + ["-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
        timeout=30,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def over_tls(connection: socket.socket) -> None:
        try:
            with context.wrap_socket(connection, server_side=True) as secure:
                secure.recv(65536)
                secure.sendall(OK)
        except OSError:
            return  # refused by the client, as it should be in the first case

    with peer(over_tls, over_tls) as server:
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        with pytest.raises(UpstreamUnreachable):
            ask(url)
        code = (
            "import sys; from abhiapi.fal import Fal\n"
            "print(Fal(sys.argv[1], 'a:b', timeout_s=10).send('POST', '/x', [], b'{}').status)"
        )
        trusted = subprocess.run(
            [sys.executable, "-c", code, url],
            env=os.environ | {"SSL_CERT_FILE": str(certificate)},
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    assert trusted.stdout == "200\n", trusted.stderr
