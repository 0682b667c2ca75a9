"""fal.ai as a neighbour: the one way a request leaves this process. Sorts failures by whether fal can have started.

Owns the operator's credential. Sole user of `requests`. Raises the `Upstream*` errors of `errors`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import requests
from requests import PreparedRequest

from abhiapi.db import assert_no_transaction
from abhiapi.errors import UpstreamBroken
from abhiapi.http_adapter import BLOCK_BYTES, Headers, LeanAdapter


@dataclass(slots=True)
class FalReply:
    """fal's answer: the head as it came, and the body still to be read. Close it when done."""

    status: int
    headers: Headers
    _raw: Any

    def values(self, name: str) -> list[str]:
        """All values of a header, in order; ``name`` in lower case."""
        return [value for header, value in self.headers if header.lower() == name]

    def value(self, name: str) -> str | None:
        found = self.values(name)
        return found[0] if found else None

    def read1(self) -> bytes:
        """The next bytes as they come; b"" at the whole end. Raises `UpstreamBroken`, `UpstreamTimeout`."""
        data: bytes = self._raw.read1(BLOCK_BYTES)
        return data

    def read_whole(self, most: int) -> bytes:
        """All of the body, and close. Raises `UpstreamBroken` (larger than ``most`` bytes, too), `UpstreamTimeout`."""
        pieces, size = [], 0
        try:
            while piece := self.read1():
                pieces.append(piece)
                size += len(piece)
                if size > most:
                    raise UpstreamBroken("fal's answer is larger than any of its kind")
        finally:
            self.close()
        return b"".join(pieces)

    def close(self) -> None:
        self._raw.close()


class Fal:
    """Requests to one of fal's hosts, with the operator's credential (None: to a page that needs none)."""

    def __init__(self, base_url: str, credential: str | None, *, timeout_s: float) -> None:
        self._base_url = base_url
        self._host = base_url.split("://", 1)[1].split("/", 1)[0]
        self._credential = credential
        self._timeout_s = timeout_s
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.mount("http://", LeanAdapter())
        self._session.mount("https://", LeanAdapter())

    def send(
        self,
        method: str,
        target: str,
        headers: Iterable[tuple[str, str]],
        body: Any,
        *,
        timeout_s: float | None = None,
    ) -> FalReply:
        """Send one request, once. ``target`` is the raw path and query; ``body`` bytes, a `Body`, or None.

        Raises `UpstreamUnreachable`, `UpstreamBroken` or `UpstreamTimeout`.
        """
        assert_no_transaction()
        request = PreparedRequest()
        request.method = method
        request.url = self._base_url + target
        # Prepared by hand: `requests` would re-quote the path and guess at headers, and the caller's bytes count.
        request.headers = {"Host": self._host}  # type: ignore[assignment]
        if self._credential is not None:
            request.headers["Authorization"] = f"Key {self._credential}"
        request.headers.update(headers)
        request.body = body
        if body is not None or method in ("POST", "PUT", "PATCH"):
            length = 0 if body is None else len(body) if isinstance(body, bytes) else body.length
            request.headers["Content-Length"] = str(length)
        adapter = self._session.get_adapter(request.url)
        response = adapter.send(request, stream=True, timeout=timeout_s or self._timeout_s)
        items = getattr(response.raw, "header_items", None)
        return FalReply(response.status_code, items or list(response.headers.items()), response.raw)

    def close(self) -> None:
        self._session.close()
