"""What the simulator remembers: calls received, calls billed, weather to come, and the names calls wait for.

All of it in memory and bounded. Waiting is done on gevent events, so everything here belongs to one hub: programs in
another thread or process ask over HTTP.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from decimal import Decimal
from time import monotonic
from typing import Any

from gevent.event import Event

from abhiapi.money import product_nanos
from abhiapi.pricing import PriceRule, decimal_text
from abhiapi.sandbox.weather import Weather, as_json

CALLS_MAX = 10_000
BODY_TEXT_MAX_BYTES = 64 * 1024
BODY_TEXTS_MAX_BYTES = 64 * 1024**2
BILLED_MAX = 100_000
FORECAST_MAX = 10_000
NAMES_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Received:
    """One call as it came in. ``body`` is None where it is too long, is no UTF-8, or had to make room."""

    request_id: str
    received_at: str
    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    body_length: int
    body_sha256: str
    body: str | None
    complete: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def words(self) -> str:
        """All that identifies it but its body, in one text."""
        return "\n".join((self.request_id, self.path, self.query, *map(": ".join, self.headers)))


class CallLog:
    """The latest calls, newest last. Texts of bodies are dropped, oldest first, when they add up to too much."""

    def __init__(self) -> None:
        self.total = self.posts = 0
        self._calls: deque[Received] = deque(maxlen=CALLS_MAX)
        self._texts: dict[str, str] = {}  # by request id, oldest first
        self._text_bytes = 0
        self._arrived = Event()

    def add(self, call: Received) -> None:
        if len(self._calls) == CALLS_MAX:
            self._forget_text(self._calls[0].request_id)
        if call.body is not None:
            self._texts[call.request_id] = call.body
            self._text_bytes += len(call.body)
        self._calls.append(_without_text(call))
        while self._text_bytes > BODY_TEXTS_MAX_BYTES:
            self._forget_text(next(iter(self._texts)))
        self.total += 1
        self.posts += call.method == "POST"
        arrived, self._arrived = self._arrived, Event()
        arrived.set()

    def wait_for(self, count: int, timeout_s: float) -> None:
        """Return when this many calls have come since the log was last cleared, or the time is up."""
        deadline = monotonic() + timeout_s
        while self.total < count:
            left_s = deadline - monotonic()
            if left_s <= 0 or not self._arrived.wait(left_s):
                return

    def latest(self, count: int, contains: str = "") -> list[dict[str, Any]]:
        """So many of the newest calls that have a text in their path, query, headers, body or request id."""
        found: list[dict[str, Any]] = []
        for call in reversed(self._calls):
            if len(found) == count:
                break
            body = self._texts.get(call.request_id)
            if contains in call.words() or (body is not None and contains in body):
                found.append({**call.as_json(), "body": body})
        return found[::-1]

    def clear(self) -> None:
        self.total = self.posts = 0
        self._calls.clear()
        self._texts.clear()
        self._text_bytes = 0

    def _forget_text(self, request_id: str) -> None:
        self._text_bytes -= len(self._texts.pop(request_id, ""))


def _without_text(call: Received) -> Received:
    if call.body is None:
        return call
    return Received(
        call.request_id, call.received_at, call.method, call.path, call.query, call.headers,
        call.body_length, call.body_sha256, None, call.complete,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Billed:
    """One billed call. ``delivered`` is false where the weather kept the answer from arriving whole."""

    request_id: str
    endpoint_id: str
    status: int
    units: Decimal
    unit_price_usd: Decimal
    cost_nano_usd: int
    delivered: bool
    at: datetime


class Bill:
    """What fal would have on its books: whole nano-USD, each call rounded up once."""

    def __init__(self) -> None:
        self.calls = 0
        self.cost_nano_usd = 0
        self._billed: deque[Billed] = deque(maxlen=BILLED_MAX)

    def add(
        self, request_id: str, rule: PriceRule, status: int, units: Decimal, *, delivered: bool, at: datetime
    ) -> None:
        price = rule.fal_unit_price_usd
        cost = product_nanos(units, price)
        self._billed.append(Billed(request_id, rule.model, status, units, price, cost, delivered, at))
        self.calls += 1
        self.cost_nano_usd += cost

    def latest(self) -> list[Billed]:
        """The billed calls, oldest first."""
        return list(self._billed)

    def as_json(self) -> dict[str, Any]:
        billed = [
            {
                "request_id": one.request_id, "endpoint_id": one.endpoint_id, "status": one.status,
                "units": decimal_text(one.units), "unit_price": decimal_text(one.unit_price_usd),
                "cost_nano_usd": one.cost_nano_usd, "delivered": one.delivered,
            }
            for one in self._billed
        ]  # fmt: skip
        return {"calls": self.calls, "billed": billed, "cost_nano_usd": self.cost_nano_usd}

    def clear(self) -> None:
        self.calls = self.cost_nano_usd = 0
        self._billed.clear()


class Forecast:
    """Weather that was ordered ahead: each call takes the first that fits it."""

    def __init__(self) -> None:
        self._coming: list[tuple[str | None, Weather]] = []

    def add(self, ordered: list[tuple[str | None, Weather]]) -> None:
        if len(self._coming) + len(ordered) > FORECAST_MAX:
            raise ValueError(f"no more than {FORECAST_MAX} weathers can be ordered ahead")
        self._coming += ordered

    def take(self, endpoint_id: str) -> Weather | None:
        for place, (match, weather) in enumerate(self._coming):
            if match in (None, endpoint_id):
                del self._coming[place]
                return weather
        return None

    def take_meant_for(self, target: str) -> Weather | None:
        """The first that was ordered for this very target, never one for any."""
        for place, (match, weather) in enumerate(self._coming):
            if match == target:
                del self._coming[place]
                return weather
        return None

    def as_json(self) -> list[Mapping[str, Any]]:
        return [as_json(match, weather) for match, weather in self._coming]

    def clear(self) -> None:
        self._coming.clear()


class Gates:
    """Names that calls wait for. A name once released stays open, so it does not matter who comes first."""

    def __init__(self) -> None:
        self._gates: dict[str, Event] = {}
        self.waiting = 0

    def release(self, name: str) -> None:
        self.gate(name).set()

    def wait(self, name: str, timeout_s: float) -> bool:
        """Whether the name was released in time."""
        gate = self.gate(name)
        self.waiting += 1
        try:
            return bool(gate.wait(timeout_s))
        finally:
            self.waiting -= 1

    def gate(self, name: str) -> Event:
        """What is set when the name is released."""
        if name not in self._gates and len(self._gates) >= NAMES_MAX:
            self._gates.pop(next(iter(self._gates))).set()  # the oldest; whoever still waits for it goes on
        return self._gates.setdefault(name, Event())
