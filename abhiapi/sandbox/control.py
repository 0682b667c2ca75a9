"""The simulator's own pages under ``/_sandbox``: order weather, release what waits, see calls and bill.

The first of them, which says what is imitated, stands at ``/`` too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from abhiapi.sandbox import queue, replies, weather
from abhiapi.sandbox.records import CALLS_MAX
from abhiapi.sandbox.replies import Reply

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

    from abhiapi.sandbox.app import Sandbox

WAIT_MAX_S = 60
BODY_MAX_BYTES = 16 * 1024**2


class _BadControl(ValueError):
    """A control call that makes no sense; the message says why."""


def answer(sandbox: Sandbox, environ: WSGIEnvironment) -> Reply:
    page = environ["PATH_INFO"].removeprefix("/_sandbox").strip("/")
    methods = _PAGES.get(page)
    if methods is None:
        return replies.of_json(404, {"detail": f"no page {page!r}; there are {', '.join(_PAGES)}"})
    method = environ["REQUEST_METHOD"]
    if method not in methods:
        return replies.of_json(405, {"detail": "Method Not Allowed"}, (("allow", ", ".join(methods)),))
    try:
        return methods[method](sandbox, environ)
    except (_BadControl, weather.WeatherError) as error:
        return replies.of_json(400, {"detail": str(error)})


def _page(sandbox: Sandbox, environ: WSGIEnvironment) -> Reply:
    text = _TEXT.format(
        models="\n".join(f"    {model}" for model in sorted(sandbox.rules)), keys=", ".join(weather.KEYS)
    )
    return replies.of_bytes(200, text.encode(), "text/plain; charset=utf-8")


def _calls(sandbox: Sandbox, environ: WSGIEnvironment) -> Reply:
    query = parse_qs(environ.get("QUERY_STRING", ""))
    at_least = _number(query, "at_least", 0, CALLS_MAX * 1_000)
    sandbox.calls.wait_for(at_least, _number(query, "timeout_s", 10, WAIT_MAX_S))
    latest = sandbox.calls.latest(_number(query, "last", CALLS_MAX, CALLS_MAX), *query.get("contains", [])[-1:])
    totals = {"total": sandbox.calls.total, "posts": sandbox.calls.posts, "waiting": sandbox.gates.waiting}
    return replies.of_json(200, totals | {"calls": latest})


def _forget_calls(sandbox: Sandbox, environ: WSGIEnvironment) -> Reply:
    sandbox.calls.clear()
    return replies.of_json(200, {"total": 0})


def _coming(sandbox: Sandbox, environ: WSGIEnvironment) -> Reply:
    return replies.of_json(200, sandbox.forecast.as_json())


def _order(sandbox: Sandbox, environ: WSGIEnvironment) -> Reply:
    wanted = _body(environ)
    ordered = [weather.from_json(one) for one in (wanted if isinstance(wanted, list) else [wanted])]
    try:
        sandbox.forecast.add(ordered)
    except ValueError as error:
        raise _BadControl(str(error)) from error
    return _coming(sandbox, environ)


def _clear_up(sandbox: Sandbox, environ: WSGIEnvironment) -> Reply:
    sandbox.forecast.clear()
    return _coming(sandbox, environ)


def _release(sandbox: Sandbox, environ: WSGIEnvironment) -> Reply:
    wanted = _body(environ)
    name = wanted.get("name") if isinstance(wanted, dict) else None
    if not isinstance(name, str) or not name:
        raise _BadControl('say {"name": ...}')
    sandbox.gates.release(name)
    return replies.of_json(200, {"released": name})


def _bill(sandbox: Sandbox, environ: WSGIEnvironment) -> Reply:
    return replies.of_json(200, sandbox.bill.as_json())


def _forget_bill(sandbox: Sandbox, environ: WSGIEnvironment) -> Reply:
    sandbox.bill.clear()
    return _bill(sandbox, environ)


def _jobs(sandbox: Sandbox, environ: WSGIEnvironment) -> Reply:
    return replies.of_json(200, {"jobs": queue.listed(sandbox.queue.jobs.values())})


def _forget_jobs(sandbox: Sandbox, environ: WSGIEnvironment) -> Reply:
    sandbox.queue.jobs.clear()
    return _jobs(sandbox, environ)


def _body(environ: WSGIEnvironment) -> Any:
    raw = environ["wsgi.input"].read(BODY_MAX_BYTES + 1)
    if len(raw) > BODY_MAX_BYTES:
        raise _BadControl("the body is too large")
    try:
        return json.loads(raw, parse_float=Decimal)
    except ValueError as error:
        raise _BadControl(f"the body is no JSON: {error}") from error


def _number(query: dict[str, list[str]], name: str, otherwise: int, most: int) -> int:
    (text,) = query.get(name, [str(otherwise)])[-1:]
    if not (text.isascii() and text.isdecimal()) or len(text) > 12 or int(text) > most:
        raise _BadControl(f"{name}: not a whole number up to {most}")
    return int(text)


_Page = Callable[["Sandbox", "WSGIEnvironment"], Reply]
_PAGES: dict[str, dict[str, _Page]] = {
    "": {"GET": _page},
    "calls": {"GET": _calls, "DELETE": _forget_calls},
    "weather": {"GET": _coming, "POST": _order, "DELETE": _clear_up},
    "release": {"POST": _release},
    "bill": {"GET": _bill, "DELETE": _forget_bill},
    "jobs": {"GET": _jobs, "DELETE": _forget_jobs},
}

_TEXT = """\
A simulator of fal.ai's calls and its queue, for developing without spending. Nothing is generated: pictures are
gradients with the first words of the prompt, clips are moving colours. It never talks to fal.

What it imitates
  POST /{{endpoint id}} with a JSON body, or GET with a query, and "Authorization: Key anything"
  the answers of image, video, upscaling, speech and text models, by family, with files that open
  x-fal-request-id, x-fal-served-from, and x-fal-billable-units by the price list's rates
  fal's validation errors for missing or wrong prompt, image_url, num_images, image_size, duration
  fal's error bodies by status (weather "status")
  the list of models and of their prices, GET /v1/models and /v1/models/pricing
  the queue under /queue: submit, status, status/stream, result, cancel, with and without a sub-path
  /stream of models that answer with pictures and their sizes, or with text: partial outputs, the complete one last.
    Which of fal's models stream is not published, nor whether their streams say units: here the head does
  uploads under /rest/storage/upload, whole and in parts, to signed addresses under /uploads, which browsers may use;
    a file of at most 256 MiB, the oldest making room for the newest; its URL does as a model's input
  fal_webhook on a submit: a signed POST when the job completes, to loopback addresses only, repeated four times
    within seconds; the key's public half is at /.well-known/jwks.json and /rest/.well-known/jwks.json
  the platform API's GET /v1/models/billing-events: a row for each billed call, as soon as it is billed

What it does not imitate
  WebSockets, the rest of the platform API; CORS
  anything that depends on what a picture or prompt shows: filters, refusals, the size of a remote image
    (which counts as 1024 x 1024, unless its URL is one of this simulator's), the real time a model takes
  parameters beyond those above; fal's exact rounding of megapixels, which fal does not publish
  compute seconds, and units of fal's own making: made-up numbers, the same for the same input
  JPEG and WebP: pictures are PNG, sounds WAV, whatever was asked for, and the answers say so; clips are silent,
    at most 4096 pixels a side and 60 s; sizes are null where fal's partners leave them null
  limits on concurrency, unless the weather says 429

Weather: how the next answers go wrong
  by header          x-fal-sandbox: status=503; delay_s=0.5
  ahead of time      POST /_sandbox/weather [{{"status": 503, "match": "fal-ai/flux/dev"}}, {{"drop": "in_body"}}]
                     each call without the header takes the first that fits it; GET shows, DELETE clears
  delay_s            seconds before the answer
  hold_until         wait until POST /_sandbox/release {{"name": "..."}} (at most 60 s; once released, always open)
  status             200 to 599, with fal's body for it
  units              the raw header, may be nonsense or empty; none: no header; twice: two of them
  units_factor       the units, multiplied
  body               html, empty, object, array, text, binary, nested, latin1, whitespace, escaped, billing
  encoding           gzip
  drop               before_headers, in_headers, in_body: the connection ends there; reset=1: by a reset
  length             short, long: content-length is 7 bytes less or more than what is sent
  chunked            1: transfer-encoding chunked; chunk_delay_s: seconds between chunks
  garbage            1: bytes that are no HTTP
  huge_head          1: a megabyte of headers
  slow_head          the head byte by byte, with so many seconds between
  size_bytes         a JSON object of that many bytes
  echo               1: the request body's sha256 and length
  queue_s, run_s     seconds a queued job waits, and runs; queue_until: waits until a name is released (hold_until:
                     runs until); ignores_cancel=1: once it runs, it finishes; poll_delay_s: seconds before each
                     answer about it. status, units, body and so on are the job's result's, the connection's weather
                     is the submit's. Ahead of time, a match of queue/status, queue/result or queue/cancel, with
                     /REQUEST_ID for one job's, is for the next such call:
                     status, body, delay_s, connection; one of storage/upload/initiate likewise: status, body
  webhook            none, bad_signature, stale (signed an hour ago), twice
  events             of a stream; event_delay_s: seconds between them; event_gate: event n + 1 waits until the name
                     and "-n" is released; cut_after: the connection ends after so many; pings=1: a comment before
                     each, with this machine's monotonic clock in nanoseconds; split=1: each in two chunks, cut inside a
                     character; unended=1: no line end after the last
  prices             repeat, endless, partial, shape, currency, negative, placeholder; prices_factor: multiplied. Only
                     ahead of time, with a match of v1/models or v1/models/pricing, as are status (429 asks to wait),
                     body, delay_s, connection of the platform API
  (with size_bytes and echo the input is not looked at, and the call is billed as 1 unit)
  all keys: {keys}

What it received and billed
  GET /_sandbox/calls   ?last=N; ?contains=TEXT in path, query, headers, body or request id; ?at_least=N&timeout_s=S
                        waits for the Nth call since DELETE /_sandbox/calls
  GET /_sandbox/jobs    the queue's jobs; DELETE forgets them, as fal does some time after they completed
  GET /_sandbox/bill    by fal's rules: 2xx; 4xx with units; never 5xx, 401, 402, 403. DELETE forgets it.
                        delivered is false where the weather broke the answer on its way: fal did the work all the same

Models
{models}
"""
