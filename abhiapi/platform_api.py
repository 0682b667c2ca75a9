"""fal's platform API (fal-protocol 8.3 to 8.5) as a neighbour: pages read to their end, politely, and strictly.

Gets JSON, never sends any. Numbers are Decimals made from their text. Raises `PlatformError` in plain words for
everything that fal may do wrong; no error holds the credential. Knows nothing of what the answers are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from time import monotonic
from typing import Any
from urllib.parse import quote as quoted
from urllib.parse import urlencode

import gevent

from abhiapi import jsonbytes, wire
from abhiapi.encodings import BrotliReader, DecodingReader
from abhiapi.errors import PlatformError, PlatformNotFound, UpstreamError
from abhiapi.fal import Fal, FalReply
from abhiapi.price_sync import Quote

TRIES = 5
PAUSE_FIRST_S = 1  # doubled from try to try
PAUSE_MAX_S = 60  # however long fal asks us to wait
ANSWER_TIMEOUT_S = 30
WHOLE_TIMEOUT_S = 900
BODY_BYTES_MAX = 32 * 1024 * 1024
PAGES_MAX = 10_000
PAGE_SIZE = 100
MODELS_PER_CALL = 50
UNKNOWN_MAX = 200  # models that are listed and then not known: more of them, and the answer is no answer
_TEXT_MAX = 200

Json = Mapping[str, Any]


class PlatformApi:
    """One look at the API: its time limit holds from the first request on."""

    def __init__(
        self,
        base_url: str,
        credential: str,
        *,
        sleep: Callable[[int], object] = gevent.sleep,
        timeout_s: int = WHOLE_TIMEOUT_S,
    ) -> None:
        self._fal = Fal(base_url, credential, timeout_s=ANSWER_TIMEOUT_S)
        self._hidden = [part for part in credential.split(":") if wire.worth_hiding(part)]
        self._sleep = sleep
        self._timeout_s = timeout_s
        self._unknown = 0
        self._deadline: float | None = None

    def models(self) -> Iterator[list[str]]:
        """The ids of all models, page by page."""
        seen: set[str] = set()
        for rows in self.pages("/models", [("limit", str(PAGE_SIZE))], "models"):
            ids = [_text(row, "endpoint_id", "a model") for row in rows]
            fresh = [model for model in dict.fromkeys(ids) if model not in seen]
            if ids and not fresh:
                raise PlatformError("fal's list of models repeats a page")
            seen.update(fresh)
            yield fresh

    def prices(self, models: Sequence[str]) -> list[Quote]:
        """What fal says of the prices of some models, at most `MODELS_PER_CALL`; those it does not know are left out.

        One id that fal does not know makes the whole call a 404, so that a batch is halved until it is found.
        """
        asked = [("endpoint_id", model) for model in models]
        try:
            rows = [row for page in self.pages("/models/pricing", asked, "prices") for row in page]
        except PlatformNotFound:
            if len(models) > 1:
                half = len(models) // 2
                return self.prices(models[:half]) + self.prices(models[half:])
            self._unknown += 1
            if self._unknown > UNKNOWN_MAX:
                raise PlatformError("fal knows no price of too many of the models that it lists") from None
            return []
        quotes: dict[str, Quote] = {}
        for row in rows:
            one = _quote(row)
            if one.model not in models:
                raise PlatformError(f"fal names the price of {one.model[:_TEXT_MAX]!r}, which nobody asked for")
            if quotes.setdefault(one.model, one) != one:
                raise PlatformError(f"fal names two prices of {one.model!r}")
        return list(quotes.values())

    def pages(self, path: str, query: Iterable[tuple[str, str]], member: str) -> Iterator[list[Json]]:
        """The rows of a list, page by page, by its cursors. Raises `PlatformError` for a list that goes in circles."""
        asked, cursors = list(query), set[str]()
        cursor: str | None = None
        for _ in range(PAGES_MAX):
            page = self.get(path, asked + ([("cursor", cursor)] if cursor is not None else []))
            rows = page.get(member)
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise PlatformError(f"fal's answer to {path} has no list of {member}")
            yield rows
            cursor = _next_cursor(page, path)
            if cursor is None:
                return
            if cursor in cursors:
                raise PlatformError(f"fal's pages of {member} go in circles: the cursor {cursor[:40]!r} came twice")
            cursors.add(cursor)
        raise PlatformError(f"fal's pages of {member} do not end")

    def get(self, path: str, query: Iterable[tuple[str, str]] = ()) -> Json:
        """The JSON object at a path. Raises `PlatformError`, `PlatformNotFound`."""
        text = urlencode(list(query), quote_via=quoted)
        target = path + (f"?{text}" if text else "")
        if self._deadline is None:
            self._deadline = monotonic() + self._timeout_s
        if monotonic() > self._deadline:
            raise PlatformError(f"fal's API took longer than {self._timeout_s} s for all that was asked")
        pause_s = PAUSE_FIRST_S
        for attempt in range(1, TRIES + 1):
            wait_s, trouble = self._attempt(target)
            if not isinstance(trouble, str):
                return trouble
            if attempt == TRIES or monotonic() > self._deadline:
                break
            self._sleep(min(PAUSE_MAX_S, max(pause_s, wait_s)))
            pause_s *= 2
        raise PlatformError(f"fal's API did not answer {path}: {trouble} ({attempt} tries)")

    def close(self) -> None:
        self._fal.close()

    def _attempt(self, target: str) -> tuple[int, Json | str]:
        """The answer; or what is wrong for the moment, and how long fal asks us to wait."""
        path = target.partition("?")[0]
        try:
            reply = self._fal.send(
                "GET", target, [("Accept", "application/json"), ("Accept-Encoding", "gzip, br")], None
            )
            body = _read_whole(reply)
        except UpstreamError as error:
            return 0, error.message
        if reply.status == 429 or reply.status >= 500:
            return _retry_after_s(reply), f"status {reply.status}{self._explained(body)}"
        if reply.status == 404:
            raise PlatformNotFound(f"fal's API does not know what was asked of {path}{self._explained(body)}")
        if reply.status in (401, 403):
            raise PlatformError(
                f"fal's API refused the operator's credential at {path} with status {reply.status}"
                f"{self._explained(body)}: check FAL_KEY"
            )
        if reply.status != 200:
            raise PlatformError(f"fal's API answered {path} with status {reply.status}{self._explained(body)}")
        try:
            answer = jsonbytes.parse(body)
        except ValueError as error:
            raise PlatformError(f"fal's API answered {path} with what is no JSON: {error}") from error
        if not isinstance(answer, dict):
            raise PlatformError(f"fal's API answered {path} with JSON that is no object")
        return 0, answer

    def _explained(self, body: bytes) -> str:
        """What fal says about an error, in a few words; nothing that may hold the credential."""
        answer = jsonbytes.parse_object(body) or {}
        error = answer.get("error")
        said = error.get("message") if isinstance(error, dict) else answer.get("detail")
        if not isinstance(said, str) or not said or any(part in said for part in self._hidden):
            return ""
        return f" ({' '.join(said.split())[:_TEXT_MAX]})"


def _read_whole(reply: FalReply) -> bytes:
    """A body, unpacked. Raises `UpstreamBroken` and the like, `PlatformError` for one that is too large."""
    encoding = (reply.value("content-encoding") or "identity").strip().lower()
    read: Callable[[], bytes] = reply.read1
    if encoding == "br":
        read = BrotliReader(reply.read1)
    elif encoding in ("gzip", "x-gzip", "deflate"):
        read = DecodingReader(reply.read1)
    elif encoding != "identity":
        reply.close()
        raise PlatformError("fal's API answered in an encoding that nobody asked for")
    pieces, size = [], 0
    try:
        while piece := read():
            pieces.append(piece)
            size += len(piece)
            if size > BODY_BYTES_MAX:
                raise PlatformError("fal's API sent a page larger than any list")
    finally:
        reply.close()
    return b"".join(pieces)


def _retry_after_s(reply: FalReply) -> int:
    text = reply.value("retry-after") or ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0


def _next_cursor(page: Json, path: str) -> str | None:
    cursor, has_more = page.get("next_cursor"), page.get("has_more")
    if has_more not in (None, True, False) or not (cursor is None or isinstance(cursor, str)):
        raise PlatformError(f"fal's answer to {path} does not say in its own way whether there is more")
    if has_more and not cursor:
        raise PlatformError(f"fal's answer to {path} says that there is more, and not where")
    return cursor if cursor and has_more is not False else None


def _text(row: Json, name: str, of: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise PlatformError(f"fal's answer has {of} without {name}")
    return value


def _quote(row: Json) -> Quote:
    model = _text(row, "endpoint_id", "a price")
    price = row.get("unit_price")
    if isinstance(price, bool) or not isinstance(price, int | Decimal):
        raise PlatformError(f"fal's price of {model[:_TEXT_MAX]!r} is no number")
    return Quote(model, _text(row, "unit", "a price"), Decimal(price), _text(row, "currency", "a price"))
