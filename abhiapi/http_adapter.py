"""A lean `requests` adapter for one kind of neighbour: HTTP/1.1 over pooled, verified connections, under gevent.

Sole owner of sockets to fal. It exists because `requests`' own adapter costs four times as much CPU per call and may
send a request twice. Parsing is `http_parser`'s; connections, timeouts and the decision whether anything was sent are
ours, because that decision is about money:

- `UpstreamUnreachable`: no connection, or the kernel took not one byte of the request. fal cannot have started.
- `UpstreamBroken`, `UpstreamTimeout`: something was sent and no whole answer came. fal may have started.

A request is sent a second time only where a pooled connection turned out dead before it took the first byte.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from time import monotonic
from typing import IO, Any, Protocol

import certifi
import gevent
import gevent.socket
import gevent.ssl
from requests import PreparedRequest, Response
from requests.adapters import BaseAdapter
from requests.structures import CaseInsensitiveDict

from abhiapi.errors import UpstreamBroken, UpstreamTimeout, UpstreamUnreachable
from abhiapi.http_parser import HEAD_BYTES_MAX, Headers, HTTPParseError, Parser

CONNECT_TIMEOUT_S = 10
BLOCK_BYTES = 64 * 1024
YIELD_AFTER = 4  # reads of an answer in a row before others get their turn
IDLE_MAX_S = 15  # an older pooled connection is likely to be closed by fal while we send; a fresh one costs less
IDLE_CONNECTIONS_MAX = 512  # per host

__all__ = ["BLOCK_BYTES", "Body", "FileBody", "Headers", "LeanAdapter", "Raw"]


class Body(Protocol):
    """What can be sent as a request's body without being held in memory: read in slices, from its start."""

    length: int

    def slices(self) -> Iterator[bytes]: ...


class Raw:
    """The body of an answer as it comes (`requests.Response.raw`); gives its connection back when it ends."""

    def __init__(self, connection: _Connection, parser: Parser, deadline: float) -> None:
        self._connection: _Connection | None = connection
        self._parser = parser
        self._received = 0
        self._patience_s = _remaining(deadline)  # only waiting for fal uses it up, not a slow reader of ours
        self.header_items: Headers = parser.lines
        self._end_if_whole()

    def read1(self, amount: int = BLOCK_BYTES) -> bytes:
        """The next bytes as soon as there are any; b"" at the whole end. Raises `UpstreamBroken`, `UpstreamTimeout`."""
        while True:
            taken = self._parser.take()
            if taken or self._connection is None:
                return taken
            asked = monotonic()
            try:
                data = self._connection.receive(asked + self._patience_s, amount)
                self._parser.parse(data)
            except HTTPParseError as error:
                self.close()
                raise UpstreamBroken("fal's answer was cut or broken before its end") from error
            except BaseException:
                self.close()
                raise
            self._patience_s -= monotonic() - asked
            self._received += 1
            if self._received > YIELD_AFTER:
                gevent.sleep(0)  # a fast upstream would otherwise keep everybody else waiting
            self._end_if_whole()

    def close(self) -> None:
        """Drop the connection unless the answer had ended. May be called more than once."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    release_conn = close

    def _end_if_whole(self) -> None:
        if self._parser.is_whole and self._connection is not None:
            if self._parser.dirty or not self._parser.should_keep_alive():
                self._connection.close()
            else:
                self._connection.give_back()
            self._connection = None


class _Connection:
    def __init__(self, pool: _Pool, sock: Any) -> None:
        self._pool = pool
        self._sock = sock
        self.idle_since = 0.0

    def send_first(self, data: bytes, deadline: float) -> int:
        """Send the first bytes; how many the kernel took. Raises OSError when it took none."""
        self._sock.settimeout(_remaining(deadline))
        sent: int = self._sock.send(data)
        return sent

    def send(self, data: bytes | memoryview, deadline: float) -> None:
        self._sock.settimeout(_remaining(deadline))
        self._sock.sendall(data)

    def receive(self, deadline: float, amount: int) -> bytes:
        """Bytes from fal, b"" at the end of the connection. Raises `UpstreamTimeout`, `UpstreamBroken`."""
        try:
            self._sock.settimeout(_remaining(deadline))
            data: bytes = self._sock.recv(amount)
        except TimeoutError as error:
            raise UpstreamTimeout("fal did not answer in time") from error
        except OSError as error:
            raise UpstreamBroken("the connection to fal broke before its answer ended") from error
        return data

    def is_alive(self, now: float) -> bool:
        """Whether an idle connection can be used: young enough, not closed by the other side, nothing to read."""
        if now - self.idle_since > IDLE_MAX_S:
            return False
        try:
            self._sock.settimeout(0)
            self._sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            return False
        return False

    def give_back(self) -> None:
        self._pool.put(self)

    def close(self) -> None:
        self._sock.close()


class _Pool:
    """Connections to one origin; the most recently used first, so that idle ones age and go."""

    def __init__(self, host: str, port: int, context: Any) -> None:
        self._host, self._port = host, port
        self._context = context  # of TLS; None: plain
        self._idle: list[_Connection] = []

    def get(self, deadline: float) -> tuple[_Connection, bool]:
        """A connection and whether it was used before. Raises `UpstreamUnreachable`."""
        now = monotonic()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_alive(now):
                return connection, True
            connection.close()
        return self.connect(deadline), False

    def connect(self, deadline: float) -> _Connection:
        timeout_s = min(CONNECT_TIMEOUT_S, _remaining(deadline))  # of each step, the handshake of TLS included
        try:
            sock = gevent.socket.create_connection((self._host, self._port), timeout=timeout_s)
        except OSError as error:
            raise UpstreamUnreachable("fal cannot be reached just now: nothing was charged") from error
        try:
            sock.setsockopt(gevent.socket.IPPROTO_TCP, gevent.socket.TCP_NODELAY, 1)
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_hostname=self._host)
        except OSError as error:  # ssl.SSLError is one
            sock.close()
            raise UpstreamUnreachable("no secure connection to fal could be made: nothing was charged") from error
        return _Connection(self, sock)

    def put(self, connection: _Connection) -> None:
        if len(self._idle) >= IDLE_CONNECTIONS_MAX:
            connection.close()
            return
        connection.idle_since = monotonic()
        self._idle.append(connection)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


def verifying_context() -> Any:
    """A TLS context that trusts the system's authorities (or SSL_CERT_FILE) and certifi's, and verifies host names.

    gevent's own class by name: `create_default_context` makes one that blocks the event loop unless ssl was patched.
    """
    context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    context.load_verify_locations(certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context


class LeanAdapter(BaseAdapter):
    """Mounted on a `requests.Session`. Follows no redirect, knows no proxy, keeps no cookie, decodes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._pools: dict[tuple[str, str, int], _Pool] = {}

    def send(
        self,
        request: PreparedRequest,
        stream: bool = True,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Mapping[str, str] | None = None,
    ) -> Response:
        """Send a request; its answer once the head is there. ``timeout`` is the seconds the whole exchange may take.

        Only ``timeout`` is looked at: certificates are always verified, and bodies always stream.
        """
        deadline = monotonic() + (timeout or 900)
        method, url = request.method or "GET", request.url or ""
        scheme, host, port, target = _split(url)
        pool = self._pools.get((scheme, host, port))
        if pool is None:
            context = verifying_context() if scheme == "https" else None
            pool = self._pools[scheme, host, port] = _Pool(host, port, context)
        connection, parser = _exchange(pool, method, _head(method, target, request.headers), request.body, deadline)
        return _response(request, connection, parser, deadline)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def _exchange(pool: _Pool, method: str, head: bytes, body: Any, deadline: float) -> tuple[_Connection, Parser]:
    """Send and read the head of the answer, on a connection that is certainly asked only once."""
    first, rest = (head + body, None) if isinstance(body, bytes) else (head, body)
    connection, taken = _begin(pool, first, deadline)
    parser = Parser(method)
    try:
        if taken == len(first) and rest is None:
            _read_head(connection, parser, deadline)
        else:
            _send_rest_and_read_head(connection, parser, _blocks(first, taken, rest), deadline)
    except BaseException:
        connection.close()
        raise
    return connection, parser


def _begin(pool: _Pool, first: bytes, deadline: float) -> tuple[_Connection, int]:
    """A connection that took the first bytes, and how many. Raises `UpstreamUnreachable`."""
    connection, used_before = pool.get(deadline)
    while True:
        try:
            return connection, connection.send_first(first, deadline)
        except OSError as error:
            connection.close()
            if not used_before:
                raise UpstreamUnreachable("fal closed the connection at once: nothing was charged") from error
        connection, used_before = pool.connect(deadline), False  # the pooled one was dead and took not one byte


def _blocks(first: bytes, taken: int, rest: Body | None) -> Iterator[bytes | memoryview]:
    if taken < len(first):
        yield memoryview(first)[taken:]
    if rest is not None:
        yield from rest.slices()


def _send_rest_and_read_head(
    connection: _Connection, parser: Parser, blocks: Iterator[bytes | memoryview], deadline: float
) -> None:
    """Send while listening: fal may refuse a large request before it has all of it, and then read no further.

    An error ends the sending (RFC 9112, 9.5); any other answer waits for the rest.
    """
    sender = gevent.spawn(_send_blocks, connection, blocks, deadline)
    sender.link_exception(lambda _: connection.close())  # our own file cannot be read: nobody waits for an answer
    try:
        _read_head(connection, parser, deadline)
        if parser.get_code() < 400:
            sender.join(_remaining(deadline))
    finally:
        parser.dirty |= sender.value is not True
        sender.kill()


def _send_blocks(connection: _Connection, blocks: Iterator[bytes | memoryview], deadline: float) -> bool:
    """Whether all was sent. If not, the answer, or its absence, is found out by reading."""
    for block in blocks:
        try:
            connection.send(block, deadline)
        except OSError:
            return False
    return True


def _read_head(connection: _Connection, parser: Parser, deadline: float) -> None:
    received = 0
    while not parser.has_head:
        data = connection.receive(deadline, BLOCK_BYTES)
        received += len(data)
        if not data:
            raise UpstreamBroken("fal closed the connection without an answer")
        try:
            parser.parse(data)
        except HTTPParseError as error:
            raise UpstreamBroken("fal's answer is not what HTTP allows") from error
        if received > HEAD_BYTES_MAX and parser.head_bytes() > HEAD_BYTES_MAX:
            raise UpstreamBroken("the head of fal's answer is larger than HTTP servers allow")


def _head(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {target} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _split(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and request target of an absolute URL, the target byte for byte."""
    scheme, _, rest = url.partition("://")
    authority, slash, target = rest.partition("/")
    host, colon, port = authority.rpartition(":") if not authority.endswith("]") else ("", "", "")
    if not colon:
        host, port = authority, "443" if scheme == "https" else "80"
    return scheme, host.strip("[]"), int(port), slash + target or "/"


class LeanResponse(Response):
    """A `requests.Response` without the cookie jar, and with headers made when asked for: they cost more than the rest.

    Whoever cares for order and spelling reads ``raw.header_items``.
    """

    def __init__(self) -> None:
        self._content = False  # type: ignore[assignment]  # as requests itself does
        self._content_consumed = False
        self._next = None
        self.history = []
        self.encoding = None

    @property
    def headers(self) -> CaseInsensitiveDict[str]:  # type: ignore[override]
        raw: Any = self.raw
        return CaseInsensitiveDict(raw.header_items)


def _response(request: PreparedRequest, connection: _Connection, parser: Parser, deadline: float) -> Response:
    response = LeanResponse()
    response.status_code = parser.get_code()
    response.reason = parser.status_message or ""
    response.url = request.url or ""
    response.request = request
    response.raw = Raw(connection, parser, deadline)
    return response


def _remaining(deadline: float) -> float:
    return max(0.001, deadline - monotonic())


class FileBody:
    """A request body that lies in a file."""

    def __init__(self, file: IO[bytes], length: int) -> None:
        self._file = file
        self.length = length

    def slices(self) -> Iterator[bytes]:
        self._file.seek(0)
        while block := self._file.read(4 * BLOCK_BYTES):
            yield block
