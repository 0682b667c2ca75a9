"""What `doctor` looks at over the network: fal's word on the credential, its clock, and this service as others see it.

Two requests, which cost nothing and change nothing. What cannot be reached from here may be reachable from elsewhere,
so that alone is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from abhiapi import jsonbytes, metering
from abhiapi.commands import session
from abhiapi.commands.checks import Check
from abhiapi.commands.checks_place import LOOPBACK
from abhiapi.errors import UpstreamError, UpstreamTimeout, UpstreamUnreachable
from abhiapi.fal import Fal
from abhiapi.settings import Settings

TIMEOUT_S = 5
ASKED = "/models/pricing?endpoint_id=fal-ai/flux/dev"
SKEW_LARGE_MS, SKEW_LARGEST_MS = 5_000, 120_000
ANSWER_BYTES_MAX = 1024 * 1024


def examine(settings: Settings) -> Iterator[Check]:
    if settings.fal_key is not None:
        yield from _fal(settings.fal_api_url, settings.fal_key)
    yield _public_url(settings.public_url)


def _fal(url: str, credential: str) -> Iterator[Check]:
    """Whether fal takes the credential, by its price list; and how far our clocks are apart."""
    fal = Fal(url, credential, timeout_s=TIMEOUT_S)
    asked_ms = session.now_ms()
    try:
        reply = fal.send("GET", ASKED, [("accept", "application/json")], None)
        date = reply.value("date")
        reply.close()
    except UpstreamError as error:
        yield Check("fal", "warn", f"{url} does not answer from here: {error.message}")
        return
    finally:
        fal.close()
    host = urlsplit(url).hostname
    if reply.status in metering.OPERATOR_STATUSES:
        yield Check(
            "fal", "fail", f"{host} does not take FAL_KEY (status {reply.status}): no call can be served with it"
        )
    elif reply.status >= 400:
        yield Check("fal", "warn", f"{host} answered with status {reply.status}: whether it takes FAL_KEY is not known")
    else:
        yield Check("fal", "ok", f"{host} answers, and takes FAL_KEY")
    if date is not None:
        yield _clock(date, (asked_ms + session.now_ms()) // 2)


def _clock(date: str, now_ms: int) -> Check:
    try:
        apart_ms = abs(int(parsedate_to_datetime(date).timestamp()) * 1000 - now_ms)
    except ValueError:
        return Check("clock", "ok", "fal's answer names no time to compare with")
    message = f"{apart_ms // 1000} s from fal's"
    if apart_ms > SKEW_LARGEST_MS:
        return Check(
            "clock", "fail", f"{message}: fal's webhooks are refused, and days begin at the wrong time; use NTP"
        )
    if apart_ms > SKEW_LARGE_MS:
        return Check("clock", "warn", f"{message}: set it, best by NTP")
    return Check("clock", "ok", message)


def _reason(error: UpstreamError | ValueError) -> str:
    """Why our own address does not answer. What `Fal` says of a failure is for callers, and speaks of fal."""
    if isinstance(error, UpstreamTimeout):
        return f"no answer within {TIMEOUT_S} s"
    if not isinstance(error, UpstreamUnreachable):
        return "what answers there is something else"
    cause: BaseException = error.__cause__ or error
    return (getattr(cause, "strerror", None) or str(cause)).strip().rstrip(".") or "it cannot be reached"


def _public_url(url: str | None) -> Check:
    if url is None:
        return Check("public url", "ok", "taken from each request; fal's webhooks are not used")
    parts = urlsplit(url)
    is_near = (parts.hostname or "") in LOOPBACK
    service = Fal(url, None, timeout_s=TIMEOUT_S)
    try:
        reply = service.send("GET", "/healthz", [("accept", "application/json")], None)
        told = jsonbytes.parse_object(reply.read_whole(ANSWER_BYTES_MAX)) or {}
    except (UpstreamError, ValueError) as error:
        return Check(
            "public url", "warn", f"{url}/healthz does not answer from here as this service does: {_reason(error)}"
        )
    finally:
        service.close()
    if reply.status == 200 and told.get("status") != "ok":
        return Check(
            "public url", "warn", f"what answers at {url}/healthz is something else: it must lead to this service"
        )
    if reply.status != 200:
        return Check("public url", "warn", f"{url}/healthz answers with status {reply.status}: see the server's log")
    if parts.scheme == "http" and not is_near:
        return Check("public url", "warn", f"{url} is not encrypted: customers' keys can be read on the way; use https")
    return Check("public url", "ok", f"{url} answers")
