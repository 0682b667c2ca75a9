"""A customer's web server as webhooks meet it, and the check that fal publishes, written from its recipe alone."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ssl import SSLContext
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tests.harness import until


@dataclass(frozen=True)
class Delivery:
    """One POST as it came in. Header names in lower case."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Receiver:
    """Answers each delivery with the next of ``statuses``, then with 200; ``answer`` may say something else."""

    port: int = 0
    scheme: str = "http"
    statuses: list[int] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)
    location: str = ""
    hold: threading.Event | None = None
    body: bytes = b"ok"
    asked: int = 0  # GETs

    @classmethod
    @contextmanager
    def started(cls, context: SSLContext | None = None) -> Iterator[Receiver]:
        receiver = cls()
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(receiver))
        server.daemon_threads = True
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
            receiver.scheme = "https"
        receiver.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield receiver
        finally:
            if receiver.hold is not None:
                receiver.hold.set()
            server.shutdown()
            server.server_close()

    def url(self, path: str = "/hook", host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def of(self, request_id: str) -> list[Delivery]:
        return [one for one in self.deliveries if one.headers.get("x-fal-webhook-request-id") == request_id]

    def delivered(self, request_id: str, count: int = 1, *, within_s: float = 20) -> list[Delivery]:
        """A job's deliveries, once there are so many."""

        def look() -> list[Delivery]:
            found = self.of(request_id)
            return found if len(found) >= count else []

        return until(look, what=f"{count} deliveries", within_s=within_s)


def _handler(receiver: Receiver) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.deliveries.append(Delivery(self.path, headers, body))
            if receiver.hold is not None:
                receiver.hold.wait(60)
            self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
            if receiver.location:
                self.send_header("Location", receiver.location)
            self.send_header("Content-Length", str(len(receiver.body)))
            self.end_headers()
            try:
                self.wfile.write(receiver.body)
            except ConnectionError:
                pass  # whoever told it reads no more than the status

        def do_GET(self) -> None:
            receiver.asked += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(receiver.body)))
            self.end_headers()
            self.wfile.write(receiver.body)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    return Handler


def is_signed(jwks: Any, delivery: Delivery) -> bool:
    """fal's published check: the timestamp, then the four lines against any key of the set."""
    named = {name: delivery.headers[f"x-fal-webhook-{name}"] for name in ("request-id", "user-id", "timestamp")}
    if abs(time.time() - int(named["timestamp"])) > 300:
        return False
    message = "\n".join([*named.values(), hashlib.sha256(delivery.body).hexdigest()]).encode()
    signature = bytes.fromhex(delivery.headers["x-fal-webhook-signature"])
    for key in jwks["keys"]:
        raw = base64.urlsafe_b64decode(key["x"] + "=" * (-len(key["x"]) % 4))
        try:
            Ed25519PublicKey.from_public_bytes(raw).verify(signature, message)
        except InvalidSignature:
            continue
        return True
    return False
