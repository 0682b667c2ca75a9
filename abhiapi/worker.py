"""gunicorn's gevent worker with less to do for each request: one send for head and first bytes, no access log.

Everything that decides (parsing, keep-alive, timeouts, shutting down, reloading) is gunicorn's own; what is left out
are hooks and measurements that we do not use (docs/decisions/0010). What gunicorn cannot read is refused in our words:
its own page and log line repeat what was sent, and that may be a key.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from email.utils import formatdate
from http.client import responses
from typing import Any

import gevent
from gevent import GreenletExit
from gunicorn.http import errors as http_errors
from gunicorn.http import wsgi
from gunicorn.workers.ggevent import GeventWorker

from abhiapi import logs, wire
from abhiapi.errors import AbhiError, BadRequest, DatabaseUnavailable

log = logging.getLogger("abhiapi")

WAIT_S = 1  # before a process that cannot start yet tries again

# What gunicorn refuses by another status than 400.
_REFUSALS = (
    (http_errors.LimitRequestLine, 414, "the request's path and query are too long: send large inputs in the body"),
    (http_errors.LimitRequestHeaders, 431, "the request's headers are too many or too large"),
    (http_errors.UnsupportedTransferCoding, 501, "the request's transfer coding is not known here: use chunked"),
    (http_errors.ExpectationFailed, 417, "the request expects something that is not done here"),
)


class OneSendResponse(wsgi.Response):  # type: ignore[misc]  # gunicorn has no types
    """A response whose head waits for the first bytes of its body, so that both leave together."""

    headers_sent: bool
    _head = b""
    _date = (0, "")  # the second it was made in, and the text

    def default_headers(self) -> list[str]:
        second = int(time.time())
        if OneSendResponse._date[0] != second:
            OneSendResponse._date = (second, formatdate(second, usegmt=True))
        major, minor = self.req.version
        lines = [
            f"HTTP/{major}.{minor} {self.status}\r\n",
            f"Server: {self.version}\r\n",
            f"Date: {OneSendResponse._date[1]}\r\n",
            f"Connection: {'close' if self.should_close() else 'keep-alive'}\r\n",
        ]
        if self.chunked:
            lines.append("Transfer-Encoding: chunked\r\n")
        return lines

    def send_headers(self) -> None:
        if not self.headers_sent:
            lines = [*self.default_headers(), *(f"{name}: {value}\r\n" for name, value in self.headers), "\r\n"]
            self._head = "".join(lines).encode("latin-1")
            self.headers_sent = True

    def write(self, arg: bytes) -> None:
        """Send a piece of the body. An empty one sends the head by itself."""
        super().write(arg)
        if not arg and self._head:
            head, self._head = self._head, b""
            self.sock.sendall(head)

    def _emit_body(self, data: bytes) -> None:
        head, self._head = self._head, b""
        if self.chunked:
            self.sock.sendall(b"%s%X\r\n%s\r\n" % (head, len(data), data))
        else:
            self.sock.sendall(head + data if head else data)

    def close(self) -> None:
        self.send_headers()
        rest = self._head + (b"0\r\n\r\n" if self.chunked else b"")
        if rest:
            self.sock.sendall(rest)


class LeanWorker(GeventWorker):  # type: ignore[misc]
    """The gevent worker, handling one request with `OneSendResponse`."""

    def load_wsgi(self) -> None:
        """One of the first processes that cannot start ends the server, which says why; one that replaces another
        waits for its database instead, since gunicorn would end all those that still live with it."""
        while True:
            try:
                super().load_wsgi()
                return
            except DatabaseUnavailable as error:
                if self.age <= self.cfg.workers:
                    raise
                log.warning("this process waits for the database: %s", error.message)
            self.notify()  # or gunicorn would take it for one that hangs
            gevent.sleep(WAIT_S)
            if not self.alive or os.getppid() != self.ppid:
                sys.exit(0)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> bool:
        """Answer one request. Raises StopIteration when the connection is to be closed, as gunicorn expects."""
        response, environ = wsgi.create(req, sock, addr, listener_name, self.cfg, response_class=OneSendResponse)
        environ["wsgi.multithread"] = True
        if not self.alive:
            response.force_close()
        try:
            pieces = self.wsgi(environ, response.start_response)
            try:
                for piece in pieces:
                    response.write(piece)
                response.close()
            finally:
                if hasattr(pieces, "close"):
                    pieces.close()
                logs.in_call.set(None)  # the connection's next request is another call, or none
        except (OSError, GreenletExit):
            raise
        except Exception:
            if not response.headers_sent:
                raise  # gunicorn answers with 500
            self.log.exception("an answer broke off")
            _cut(sock)
            raise StopIteration from None
        if response.should_close():
            raise StopIteration
        return True

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer what could not be read, or failed before its answer began, in our words; nothing is repeated."""
        status, error = _refusal(exc)
        if status == 500:
            self.log.error("a request failed", exc_info=exc)
        else:
            self.log.info("a request was no HTTP: %s", type(exc).__name__)
        body = wire.error_body(error, status=status)
        head = (
            f"HTTP/1.1 {status} {responses.get(status, 'Error')}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            client.sendall(head.encode() + body)
        except OSError:
            pass  # the caller is gone


def _refusal(exc: BaseException) -> tuple[int, AbhiError]:
    """What a request that gunicorn gave up is answered with."""
    is_ours = isinstance(exc, http_errors.InvalidResponseHeader | http_errors.InvalidResponseHeaderName)
    if is_ours or not isinstance(exc, http_errors.ParseException):
        return 500, AbhiError("something went wrong here: tell the operator of this service")
    for kind, status, message in _REFUSALS:
        if isinstance(exc, kind):
            return status, BadRequest(message)
    return 400, BadRequest("the request is no HTTP that this server can read: nothing was forwarded")


def _cut(sock: Any) -> None:
    """End a connection whose answer cannot be finished, so that nobody takes the part for the whole."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
        sock.close()
    except OSError:
        pass  # the other side was faster
