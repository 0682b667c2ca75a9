"""The way to fal with large bodies and slow people: early answers, both directions at once, whose time is used up."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import gevent
import gevent.event
import pytest

from abhiapi import http_adapter
from abhiapi.errors import UpstreamBroken, UpstreamTimeout, UpstreamUnreachable
from abhiapi.http_adapter import FileBody
from tests.test_http_adapter import OK, Peer, Talk, ask, fal_at, no_connection_outlives_its_test, peer, whole

__all__ = ["no_connection_outlives_its_test"]  # used here too, by itself

LARGE_BYTES = 20_000_000  # more than the kernel's buffers on both sides take


@pytest.fixture
def large(tmp_path: Path) -> Iterator[FileBody]:
    path = tmp_path / "large"
    path.write_bytes(bytes(LARGE_BYTES))
    with path.open("rb") as file:
        yield FileBody(file, LARGE_BYTES)


def wait(over: threading.Event) -> None:
    """Neither read nor answer until the test is over."""
    over.wait(20)


def refuse_and_read_no_further(over: threading.Event) -> Talk:
    def talk(connection: socket.socket) -> None:
        connection.recv(1024)
        connection.sendall(b"HTTP/1.1 422 Unprocessable Content\r\nContent-Length: 2\r\n\r\n{}")
        over.wait(20)

    return talk


@pytest.mark.parametrize("in_memory", [True, False], ids=["bytes", "file"])
def test_an_early_refusal_by_a_server_that_reads_no_further_is_taken_at_once(large: FileBody, in_memory: bool) -> None:
    """Nobody waits for the deadline to learn what was said already."""
    over = threading.Event()
    body = bytes(LARGE_BYTES) if in_memory else large
    with peer(refuse_and_read_no_further(over), OK) as server:
        fal = fal_at(server.url, timeout_s=20)
        reply = ask(server.url, fal=fal, body=body)
        assert (reply.status, whole(reply)) == (422, b"{}")
        over.set()
        # The connection, in the middle of a request, is not used for another one.
        assert whole(ask(server.url, fal=fal)) == b"{}"
    assert server.connections == 2


def test_an_early_answer_that_is_no_error_waits_for_the_rest_of_the_request(large: FileBody) -> None:
    """A server may begin to answer while it reads; cutting it off would lose what fal works on."""
    received: list[int] = []

    def answer_first(connection: socket.socket) -> None:
        received.append(len(connection.recv(1024)))
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while received[-1] and sum(received) < LARGE_BYTES:
            received.append(len(connection.recv(1 << 20)))
        connection.sendall(b"2\r\n{}\r\n0\r\n\r\n")

    with peer(answer_first) as server:
        assert whole(ask(server.url, body=large)) == b"{}"
    assert sum(received) > LARGE_BYTES


def test_a_request_that_nobody_reads_times_out(large: FileBody) -> None:
    over = threading.Event()
    with peer(lambda connection: wait(over)) as server:
        with pytest.raises(UpstreamTimeout):
            ask(server.url, body=large, timeout_s=0.3)
        over.set()


def test_a_connection_that_breaks_while_a_large_request_is_sent_is_not_asked_again(large: FileBody) -> None:
    def read_a_little(connection: socket.socket) -> None:
        connection.recv(1024)

    with peer(read_a_little, OK) as server:
        with pytest.raises(UpstreamBroken):
            ask(server.url, body=large)
        assert server.connections == 1
        whole(ask(server.url))


def test_a_body_that_cannot_be_read_ends_the_call_at_once(tmp_path: Path) -> None:
    """Our own temporary file fails: fal got half a request, and nobody waits for its answer."""
    path = tmp_path / "gone"
    path.write_bytes(bytes(LARGE_BYTES))
    file = path.open("rb")

    class Failing(FileBody):
        def slices(self) -> Iterator[bytes]:
            yield b"x" * 1000
            raise OSError(5, "Input/output error")

    over = threading.Event()
    with file, peer(lambda connection: wait(over)) as server:
        with pytest.raises(UpstreamBroken):
            ask(server.url, body=Failing(file, LARGE_BYTES), timeout_s=20)
        over.set()


def test_a_large_request_arrives_byte_for_byte_and_the_connection_is_used_again(tmp_path: Path) -> None:
    content = bytes(range(256)) * (LARGE_BYTES // 256)
    path = tmp_path / "large"
    path.write_bytes(content)
    with path.open("rb") as file, peer(OK, repeat=2) as server:
        fal = fal_at(server.url, timeout_s=30)
        for _ in range(2):
            assert whole(ask(server.url, fal=fal, body=FileBody(file, len(content)))) == b"{}"
    assert [request.split(b"\r\n\r\n", 1)[1] == content for request in server.requests] == [True, True]
    assert server.connections == 1


def test_a_slow_reader_of_ours_does_not_use_up_fals_time() -> None:
    """The answer is all there; the caller takes longer to read it than fal may take to give it."""
    size = 200_000
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size
    with peer(answer) as server:
        reply = ask(server.url, timeout_s=0.5)
        first = reply.read1()
        gevent.event.Event().wait(0.7)  # a caller who takes their time
        assert len(first + whole(reply)) == size


def test_an_event_stream_may_pause_but_not_for_longer_than_fal_has_time() -> None:
    go_on, over = threading.Event(), threading.Event()

    def stream(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        go_on.wait(20)
        connection.sendall(b"3\r\ntwo\r\n")
        over.wait(20)

    with peer(stream) as server:
        reply = ask(server.url, timeout_s=1)
        assert reply.read1() == b"one"
        go_on.set()
        assert reply.read1() == b"two"
        with pytest.raises(UpstreamTimeout):
            reply.read1()
        over.set()


def test_a_reply_that_is_closed_early_drops_its_connection() -> None:
    with peer(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", OK) as server:
        fal = fal_at(server.url)
        reply = ask(server.url, fal=fal)
        reply.close()
        reply.close()
        assert whole(ask(server.url, fal=fal)) == b"{}"
    assert server.connections == 2


def test_an_idle_connection_is_not_trusted_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_adapter, "IDLE_MAX_S", -1)
    with peer(OK, OK) as server:
        fal = fal_at(server.url)
        for _ in range(2):
            assert whole(ask(server.url, fal=fal)) == b"{}"
    assert server.connections == 2


def test_no_more_connections_are_kept_than_the_pool_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_adapter, "IDLE_CONNECTIONS_MAX", 1)
    with Both() as server:
        fal = fal_at(server.url)
        replies = [ask(server.url, fal=fal) for _ in range(2)]  # neither is read, so each has its own
        server.finish.set()
        assert [whole(reply) for reply in replies] == [b"{}"] * 2
        (pool,) = fal._session.get_adapter(server.url)._pools.values()  # type: ignore[attr-defined]
        assert len(pool._idle) == 1
        fal.close()


class Both:
    """A peer that answers two connections at the same time, their bodies when told."""

    def __init__(self) -> None:
        self.finish = threading.Event()
        self._peer = Peer(self._talk_twice)
        self.url = self._peer.url

    def _talk_twice(self, first: socket.socket) -> None:
        first.recv(65536)
        first.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        second, _ = self._peer._listener.accept()
        with second:
            second.recv(65536)
            second.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
            self.finish.wait(20)
            for connection in (first, second):
                connection.sendall(b"{}")
            first.recv(1)

    def __enter__(self) -> Both:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish.set()
        self._peer.close()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    key, made = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(made)],
        check=True,
        capture_output=True,
        timeout=30,
    )
    return made, key


def test_large_bodies_go_both_ways_over_tls(
    certificate: tuple[Path, Path], large: FileBody, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    received: list[int] = []

    def over_tls(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            while sum(received) < LARGE_BYTES:
                received.append(len(secure.recv(1 << 20)))
            secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LARGE_BYTES + bytes(LARGE_BYTES))

    with peer(over_tls) as server:
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        assert len(whole(ask(url, body=large, timeout_s=30))) == LARGE_BYTES


def test_a_handshake_that_never_ends_is_nobody_there() -> None:
    over = threading.Event()
    with peer(lambda connection: wait(over)) as server:
        with pytest.raises(UpstreamUnreachable):
            ask(server.url.replace("http://", "https://"), timeout_s=0.3)
        over.set()
