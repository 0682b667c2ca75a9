"""Weather: what shall go wrong with an answer, as asked for by a header or ahead of time.

Pure. One frozen `Weather` says it all; `from_header` and `from_json` make one and name everything in the text that
they do not know, because a misspelt weather that is quietly ignored makes a test that cannot fail.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, Literal

HEADER = "x-fal-sandbox"

BodyKind = Literal[
    "html", "empty", "object", "array", "text", "binary", "nested", "latin1", "whitespace", "escaped", "billing"
]
BODY_KINDS: tuple[BodyKind, ...] = (
    "html", "empty", "object", "array", "text", "binary", "nested", "latin1", "whitespace", "escaped", "billing",
)  # fmt: skip
DROPS = ("before_headers", "in_headers", "in_body")
LENGTHS = ("short", "long")
WEBHOOKS = ("none", "bad_signature", "stale", "twice")
PRICES = ("repeat", "endless", "partial", "shape", "currency", "negative", "placeholder")

DELAY_MAX_S = Decimal(600)
SIZE_MIN_BYTES = 64
SIZE_MAX_BYTES = 4 * 1024**3
EVENTS_MAX = 1_000_000


class WeatherError(ValueError):
    """Weather that cannot be made; the message names every problem."""


@dataclass(frozen=True, slots=True)
class Weather:
    """How one call is answered. Every default is fair weather."""

    delay_s: Decimal = Decimal(0)
    hold_until: str | None = None
    status: int | None = None
    units: str | None = None  # the raw header; "none" leaves it out, "twice" sends it two times
    units_factor: Decimal = Decimal(1)
    body: BodyKind | None = None
    encoding: str | None = None
    drop: str | None = None
    reset: bool = False
    length: str | None = None
    chunked: bool = False
    chunk_delay_s: Decimal = Decimal(0)
    garbage: bool = False
    huge_head: bool = False
    size_bytes: int | None = None
    echo: bool = False
    slow_head: Decimal | None = None
    queue_s: Decimal = Decimal("0.02")  # of queued jobs, as are all below
    run_s: Decimal = Decimal("0.03")
    queue_until: str | None = None
    ignores_cancel: bool = False
    webhook: str | None = None
    poll_delay_s: Decimal = Decimal(0)
    events: int = 4  # of a stream, as are all below
    event_delay_s: Decimal = Decimal(0)
    event_gate: str | None = None  # event n + 1 waits for the name and "-n"
    cut_after: int | None = None
    pings: bool = False
    split: bool = False
    unended: bool = False
    prices: str | None = None  # of the platform API's price list, as is the next
    prices_factor: Decimal = Decimal(1)

    @property
    def keeps_body(self) -> bool:
        """Whether the answer depends on what the request's body says, so that the body has to be held."""
        return not self.echo and self.size_bytes is None

    @property
    def answers_anything(self) -> bool:
        """Whether the answer is laid down here, so that the input is not validated."""
        return self.status is not None or self.body is not None or not self.keeps_body

    @property
    def breaks_http(self) -> bool:
        """Whether a client cannot get the answer whole."""
        return bool(self.drop or self.length or self.garbage or self.huge_head)

    @property
    def arrives_whole(self) -> bool:
        return not self.breaks_http and self.cut_after is None

    @property
    def needs_socket(self) -> bool:
        return self.breaks_http or self.chunked or self.slow_head is not None


FAIR = Weather()
KEYS = tuple(field.name for field in fields(Weather))


def from_header(text: str) -> Weather:
    """Weather of ``key=value; key=value``. Raises `WeatherError`."""
    wanted: dict[str, Any] = {}
    problems = []
    for part in text.split(";"):
        name, separator, value = part.strip().partition("=")
        if not name and not separator:
            continue
        if not separator:
            problems.append(f"{name!r} has no value")
        wanted[name] = value
    return _build(wanted, problems)


def from_json(value: Any) -> tuple[str | None, Weather]:
    """The endpoint id that a weather object is meant for (None: any) and the weather. Raises `WeatherError`."""
    if not isinstance(value, Mapping):
        raise WeatherError("a weather is a JSON object")
    wanted = dict(value)
    match = wanted.pop("match", None)
    if match is not None and not isinstance(match, str):
        raise WeatherError("match: not an endpoint id")
    return (match.strip("/") if match else None), _build(wanted, [])


def as_json(match: str | None, weather: Weather) -> dict[str, Any]:
    """What differs from fair weather, for people who look at what is still to come."""
    shown = {key: getattr(weather, key) for key in KEYS if getattr(weather, key) != getattr(FAIR, key)}
    texts = {key: str(value) if isinstance(value, Decimal) else value for key, value in shown.items()}
    return {"match": match, **texts} if match else texts


def _build(wanted: Mapping[str, Any], problems: list[str]) -> Weather:
    unknown = sorted(name for name in wanted if name not in KEYS)
    if unknown:
        problems.append(f"unknown weather: {', '.join(unknown)} (known: {', '.join(KEYS)})")
    values: dict[str, Any] = {}
    for name, value in wanted.items():
        if name in KEYS:
            try:
                values[name] = _PARSERS[name](value)
            except ValueError as error:
                problems.append(f"{name}: {error}")
    for name, other in (("reset", "drop"), ("chunk_delay_s", "chunked")):
        if values.get(name) and not values.get(other):
            problems.append(f"{name}: only together with {other}")
    if values.get("length") and values.get("chunked"):
        problems.append("length: chunked answers have none")
    if problems:
        raise WeatherError("; ".join(problems))
    return Weather(**values)


def _decimal(value: Any, most: Decimal = Decimal(1_000_000)) -> Decimal:
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,7}(\.\d{1,9})?", text):
        raise ValueError(f"{text!r} is not a plain non-negative decimal")
    if Decimal(text) > most:
        raise ValueError(f"{text} is more than {most}")
    return Decimal(text)


def _seconds(value: Any) -> Decimal:
    return _decimal(value, DELAY_MAX_S)


def _whole(value: Any, least: int, most: int) -> int:
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,12}", text) or not least <= int(text) <= most:
        raise ValueError(f"{text!r} is not a whole number from {least} to {most}")
    return int(text)


def _flag(value: Any) -> bool:
    text = str(value).lower()
    if text not in ("0", "1", "true", "false"):
        raise ValueError(f"{text!r} is neither 0 nor 1")
    return text in ("1", "true")


def _text(value: Any) -> str:
    """Any text that a header can carry; it may be empty."""
    if not isinstance(value, str | int | Decimal) or isinstance(value, bool):
        raise ValueError("not a text")
    text = str(value)
    if len(text) > 4_096 or not all(" " <= character <= "\xff" and character != "\x7f" for character in text):
        raise ValueError("too long, or not fit for a header")
    return text


def _name(value: Any) -> str:
    if not _text(value):
        raise ValueError("a name is missing")
    return _text(value)


def _one_of(value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return str(value)


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "delay_s": _seconds,
    "hold_until": _name,
    "status": lambda value: _whole(value, 200, 599),
    "units": _text,
    "units_factor": _decimal,
    "body": lambda value: _one_of(value, BODY_KINDS),
    "encoding": lambda value: _one_of(value, ("gzip",)),
    "drop": lambda value: _one_of(value, DROPS),
    "reset": _flag,
    "length": lambda value: _one_of(value, LENGTHS),
    "chunked": _flag,
    "chunk_delay_s": _seconds,
    "garbage": _flag,
    "huge_head": _flag,
    "size_bytes": lambda value: _whole(value, SIZE_MIN_BYTES, SIZE_MAX_BYTES),
    "echo": _flag,
    "slow_head": _seconds,
    "queue_s": _seconds,
    "run_s": _seconds,
    "queue_until": _name,
    "ignores_cancel": _flag,
    "poll_delay_s": _seconds,
    "events": lambda value: _whole(value, 1, EVENTS_MAX),
    "event_delay_s": _seconds,
    "event_gate": _name,
    "cut_after": lambda value: _whole(value, 0, EVENTS_MAX),
    "pings": _flag,
    "split": _flag,
    "unended": _flag,
    "webhook": lambda value: _one_of(value, WEBHOOKS),
    "prices": lambda value: _one_of(value, PRICES),
    "prices_factor": _decimal,
}
