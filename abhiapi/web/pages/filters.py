"""What a page's address asks for: days, a model, a key, a state. Every page of figures reads them by these."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from flask import request

from abhiapi import ids, reports
from abhiapi.errors import BadRequest, NotFound
from abhiapi.web.caller import runtime

MODEL_MAX = 300


@dataclass(frozen=True, slots=True)
class Days:
    since: date
    until: date

    @property
    def number(self) -> int:
        return (self.until - self.since).days + 1


def today() -> date:
    return datetime.fromtimestamp(runtime().now_ms() // 1000, UTC).date()


def days(*, usual: int, most: int) -> Days:
    """``?since=&until=``, both included; the last so many days where nothing is said. Raises `BadRequest`."""
    until = day("until") or today()
    since = day("since") or until - timedelta(days=usual - 1)
    if since > until:
        raise BadRequest(f"The first day, {since}, is after the last, {until}.")
    if (until - since).days >= most:
        raise BadRequest(f"From {since} to {until} is more than the {most} days that are shown at once.")
    return Days(since, until)


def day(name: str) -> date | None:
    """A day of the address; None where it names none. Raises `BadRequest`."""
    text = request.args.get(name, "")
    try:
        found = reports.parse_day(text, today=today()) if text else None
    except ValueError as error:
        raise BadRequest(f"{name}: {error}.") from error
    if found is not None and not 1970 < found.year < 9000:
        raise BadRequest(f"{name}: {found} is outside of what is kept here.")
    return found


def model() -> str | None:
    """``?model=fal-ai/flux/dev``; one that nobody calls is one without calls. Raises `BadRequest`."""
    text = request.args.get("model", "").strip()[:MODEL_MAX]
    if not text.isprintable():
        raise BadRequest("model: a name such as fal-ai/flux/dev is expected.")
    return text or None


def key_id() -> int | None:
    """``?key=key_7``; a key of somebody else's is one without calls here. Raises `BadRequest`."""
    text = request.args.get("key", "")
    number = ids.parse_key_id(text)
    if text and number is None:
        raise BadRequest("key: an id such as key_7 is expected.")
    return number


def choice(name: str, allowed: tuple[str, ...]) -> str | None:
    """One of a few words, None where the address names none. Raises `BadRequest`."""
    text = request.args.get(name, "")
    if text and text not in allowed:
        raise BadRequest(f"{name} is one of: {', '.join(allowed)}.")
    return text or None


def cursor() -> int:
    """``?before=call_...``: where the page before ended. Raises `NotFound`."""
    text = request.args.get("before", "")
    number = ids.parse_call(text) if text else reports.FIRST
    if number is None:
        raise NotFound("There is no such page.")
    return number


def given(**more: str | int | None) -> dict[str, str]:
    """The filters of this address, less those that are empty, with others in their place."""
    kept = {name: request.args.get(name, "") for name in ("by", "since", "until", "model", "key", "state")}
    kept |= {name: "" if value is None else str(value) for name, value in more.items()}
    return {name: value for name, value in kept.items() if value}
