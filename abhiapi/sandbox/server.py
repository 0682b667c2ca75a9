"""The simulator behind real sockets: `serve` for a program that runs gevent, `running` for one that does not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer

from abhiapi.sandbox.app import Sandbox

BACKLOG = 4_096


class _Handler(WSGIHandler):  # type: ignore[misc, unused-ignore]  # gevent may come without types
    """Hands the client's socket and the headers as they came to the simulator; keeps no log."""

    def handle(self) -> None:
        # Head and body leave in two writes; without this the second waits 40 ms for the first one's acknowledgement.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().handle()

    def get_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environ()
        environ["sandbox.socket"] = self.socket
        environ["sandbox.headers"] = tuple(self.headers.items())
        return environ

    def log_request(self) -> None:
        """Nothing: formatting the line costs more than some answers."""


def serve(bind_host: str, port: int, sandbox: Sandbox) -> WSGIServer:
    """A started server; with port 0 its ``server_port`` tells which one it got. ``serve_forever()`` blocks."""
    return serve_on((bind_host, port), sandbox)


def serve_on(listener: Any, sandbox: Sandbox) -> WSGIServer:
    """As `serve`, on an address or on a gevent socket that listens already."""
    backlog = BACKLOG if isinstance(listener, tuple) else None  # a listening socket has its own
    server = WSGIServer(
        listener, sandbox, backlog=backlog, spawn=Pool(), log=None, error_log=None, handler_class=_Handler
    )
    server.start()
    return server


@contextmanager
def running(sandbox: Sandbox, bind_host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve from a thread with an event loop of its own, and give the base URL; stops at the end of the block.

    For tests and scripts without gevent. The sandbox then belongs to that thread: ask it over HTTP.
    """
    ready = threading.Event()
    told: list[int | None] = []
    failed: list[BaseException] = []
    stop: list[Callable[[], None]] = []

    def run() -> None:
        hub = gevent.get_hub()
        stopped = hub.loop.async_()
        try:
            server = serve(bind_host, port, sandbox)
        except BaseException as error:  # handed to the thread that waits
            failed.append(error)
            ready.set()
            return
        stop.append(stopped.send)
        told.append(server.server_port)
        ready.set()
        hub.wait(stopped)
        server.stop(timeout=0)
        hub.destroy(destroy_loop=True)

    thread = threading.Thread(target=run, name="fal-sandbox", daemon=True)
    thread.start()
    ready.wait()
    if failed:
        raise failed[0]
    try:
        yield f"http://{bind_host}:{told[0]}"
    finally:
        stop[0]()
        thread.join(10)
