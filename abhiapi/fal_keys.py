"""fal's public keys for webhooks: fetched, kept for a day at most, and asked again when a signature fits none.

Talks to fal's key page only, without the operator's credential. The page is the same for all customers of fal, so a
valid signature proves that fal sent something, not that it was meant for us (see `webhook_intake`).
"""

from __future__ import annotations

import logging

from abhiapi import jsonbytes, signing
from abhiapi.errors import UpstreamBroken, UpstreamError
from abhiapi.fal import Fal
from abhiapi.ids import NowMs
from abhiapi.polls import Shared

log = logging.getLogger("abhiapi")

PATH = "/.well-known/jwks.json"
KEPT_MS = 86_400_000  # fal-protocol 3.8
AGAIN_MS = 60_000  # a stranger's signatures make us ask no more often than this
FETCH_S = 10
PAGE_BYTES_MAX = 256 * 1024


class FalKeys:
    """The keys of one serving process."""

    def __init__(self, fal: Fal, now_ms: NowMs) -> None:
        self._fal = fal
        self._now_ms = now_ms
        self._keys: list[bytes] = []
        self._fetched_at: int | None = None
        self._tried_at: int | None = None
        self._shared: Shared[None] = Shared(0)

    def have_signed(self, signature: bytes, message: bytes) -> bool:
        """Whether one of fal's keys made the signature. Raises `UpstreamError` where no keys can be had."""
        now = self._now_ms()
        is_stale = self._fetched_at is None or now - self._fetched_at > KEPT_MS
        if not is_stale and self._fits(signature, message):
            return True
        if is_stale or self._tried_at is None or now - self._tried_at > AGAIN_MS:
            try:
                self._shared.get("keys", self._fetch)
            except UpstreamError as error:
                log.warning("fal's keys for webhooks cannot be fetched: %s", error.message)
                if is_stale:
                    raise
        return self._fits(signature, message)

    def close(self) -> None:
        self._fal.close()

    def _fits(self, signature: bytes, message: bytes) -> bool:
        return any(signing.is_signed_by(key, signature, message) for key in self._keys)

    def _fetch(self) -> None:
        self._tried_at = self._now_ms()
        reply = self._fal.send("GET", PATH, [("accept", "application/json"), ("accept-encoding", "identity")], None)
        page = reply.read_whole(PAGE_BYTES_MAX)
        keys = signing.public_keys(jsonbytes.parse_object(page)) if reply.status == 200 else []
        if not keys:
            raise UpstreamBroken(f"fal's page of keys has none (status {reply.status})")
        self._keys, self._fetched_at = keys, self._now_ms()
