"""Requests to addresses that customers name: resolved, checked, and sent to the very address that was checked.

Sole owner of sockets to customers. A name may mean another address a moment later (DNS rebinding), so there is one
look-up for an attempt, all its addresses must be allowed, and the connection goes to one of them while Host header
and TLS stay the name's. No proxy of the environment, no redirect, no connection kept.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from functools import partial
from time import monotonic
from typing import Any
from weakref import WeakValueDictionary

import gevent
import gevent.socket
from gevent import monkey
from gevent.lock import Semaphore
from gevent.threadpool import ThreadPool

from abhiapi.db import assert_no_transaction
from abhiapi.errors import WebhookUrlRefused
from abhiapi.http_adapter import verifying_context
from abhiapi.http_parser import HEAD_BYTES_MAX, HTTPParseError, Parser
from abhiapi.webhookwire import Target

RESOLVE_S = 5
# Threads of their own. A look-up cannot be interrupted: one that nobody waits for any more keeps its thread until the
# system gives up, so an account may have a few of them only, or one dead name server would take them all.
RESOLVERS, RESOLVING_PER_ACCOUNT = 32, 4
CLOSE_S = 1  # how long threads that hang in a look-up are waited for when the process ends
CONNECT_S = 10  # for one address, the handshake of TLS included
ADDRESSES_MAX = 4  # of a name, that are tried one after the other
ANSWER_BYTES_MAX = 64 * 1024  # of an answer whose status is all we want
DRAIN_S = 1

Lookup = Callable[[str, int], list[str]]


class NotDelivered(Exception):
    """No answer came; says why, in words for the operator."""


def system_lookup(host: str, port: int) -> list[str]:
    """All addresses of a host, as the system resolves it; blocks. Raises OSError."""
    found = _getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


_getaddrinfo: Any = monkey.get_original("socket", "getaddrinfo")


class Outbound:
    """POSTs to allowed addresses. ``allowed`` decides about an address, ``lookup`` finds those of a host."""

    def __init__(self, allowed: Callable[[str], bool], lookup: Lookup = system_lookup) -> None:
        self._allowed = allowed
        self._lookup = lookup
        self._threads: ThreadPool | None = None  # made where it is used: it belongs to that thread's event loop
        self._free = Semaphore(RESOLVERS)
        # By account, as long as somebody waits or a thread is at work.
        self._free_of: WeakValueDictionary[str, Semaphore] = WeakValueDictionary()
        self._context: Any = None

    def resolve(self, target: Target, account: str = "") -> list[str]:
        """The addresses of a target, every one of them allowed. Raises `WebhookUrlRefused`, `NotDelivered`."""
        with gevent.Timeout(RESOLVE_S, NotDelivered(f"the name {target.host} was not resolved within {RESOLVE_S} s")):
            addresses, error = self._looked_up(target, account)
        if error is not None or not addresses:
            raise NotDelivered(f"the name {target.host} cannot be resolved") from error
        if not all(map(self._allowed, addresses)):
            raise WebhookUrlRefused(f"the webhook's host {target.host} is not at a public address")
        return list(addresses)

    def post(
        self,
        target: Target,
        headers: Iterable[tuple[str, str]],
        body: bytes,
        *,
        timeout_s: int,
        account: str = "",
    ) -> int:
        """POST once and tell the status. Raises `WebhookUrlRefused`, `NotDelivered`."""
        assert_no_transaction()
        addresses = self.resolve(target, account)
        lines = [
            f"POST {target.path} HTTP/1.1",
            f"Host: {target.authority}",
            "Connection: close",
            "Accept-Encoding: identity",
            "User-Agent: abhiapi-webhook",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers),
        ]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        try:
            with gevent.Timeout(timeout_s, NotDelivered(f"no answer within {timeout_s} s")):
                return self._exchange(target, addresses[:ADDRESSES_MAX], head + body)
        except (OSError, HTTPParseError) as error:
            raise NotDelivered(f"{type(error).__name__}: {error}"[:200]) from error

    def close(self) -> None:
        if self._threads is not None:
            gevent.spawn(self._threads.kill).join(CLOSE_S)

    def _looked_up(self, target: Target, account: str) -> tuple[list[str], BaseException | None]:
        """Look a name up in a thread. The places are taken until the thread has ended, whoever still waits for it."""
        if self._threads is None:
            self._threads = ThreadPool(RESOLVERS)
        free_of_account = self._free_of.setdefault(account, Semaphore(RESOLVING_PER_ACCOUNT))
        taken: list[Semaphore] = []

        def give_back(*_: object) -> None:
            while taken:
                taken.pop().release()

        try:
            for free in (free_of_account, self._free):
                free.acquire()
                taken.append(free)
            looking: Any = self._threads.spawn(_caught, partial(self._lookup, target.host, target.port))
        except BaseException:
            give_back()
            raise
        looking.rawlink(give_back)
        found: tuple[list[str], BaseException | None] = looking.get()
        return found

    def _exchange(self, target: Target, addresses: list[str], request: bytes) -> int:
        sock = self._connected(target, addresses)
        try:
            try:
                sock.sendall(request)
            except OSError:
                pass  # refused before it was read whole: the answer says why, or that there is none
            parser, received = Parser("POST"), 0
            while not parser.has_head:
                data = sock.recv(16 * 1024)
                if not data:
                    raise NotDelivered("the connection was closed without an answer")
                parser.parse(data)
                received += len(data)
                if received > HEAD_BYTES_MAX and parser.head_bytes() > HEAD_BYTES_MAX:
                    raise NotDelivered("the head of the answer is larger than HTTP servers allow")
            status: int = parser.get_code()
            _drain(sock, parser)
            return status
        finally:
            sock.close()

    def _connected(self, target: Target, addresses: list[str]) -> Any:
        """A connection to the first address that takes one; TLS is verified against the name."""
        for last, address in enumerate(addresses, start=1 - len(addresses)):
            try:
                sock = gevent.socket.create_connection((address, target.port), timeout=CONNECT_S)
            except OSError:
                if last == 0:
                    raise
                continue
            try:
                if target.scheme == "https":
                    self._context = self._context or verifying_context()
                    sock = self._context.wrap_socket(sock, server_hostname=target.host)
                sock.settimeout(None)  # from here on the whole exchange's limit counts
            except BaseException:
                sock.close()
                raise
            return sock
        raise AssertionError("unreachable")


def _drain(sock: Any, parser: Parser) -> None:
    """Read the rest of a short answer, so that its sender sees no reset. The status counts, whatever comes."""
    read, until = 0, monotonic() + DRAIN_S
    try:
        while not parser.is_whole and read < ANSWER_BYTES_MAX and monotonic() < until:
            sock.settimeout(DRAIN_S)
            data = sock.recv(16 * 1024)
            if not data:
                return
            read += len(data)
            parser.parse(data)
            parser.take()
    except (OSError, HTTPParseError):
        return


def _caught(lookup: Callable[[], list[str]]) -> tuple[list[str], BaseException | None]:
    """Errors as values: gevent prints those that a thread's task raises."""
    try:
        return lookup(), None
    except Exception as error:
        return [], error
