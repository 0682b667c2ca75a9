"""What happens when a customer begins an upload: the one way to fal without a hold (docs/decisions/0011).

    authenticate -> limits of its own -> credit left -> forward -> pass on

fal's answer is an address that the customer's client sends the file to, past this service. Uploads cost nothing at fal,
so nothing is held, charged or added to the answer. Who has no credit left may begin none: what is uploaded lies in the
operator's account.
"""

from __future__ import annotations

from abhiapi import accounts, admission, jsonbytes, settlement, wire
from abhiapi.admission import Reply, Request
from abhiapi.errors import AbhiError, InsufficientCredits, MethodNotAllowed, UpstreamError
from abhiapi.keys import Caller
from abhiapi.money import credits_text
from abhiapi.runtime import Runtime
from abhiapi.settlement import Seen

BODY_BYTES_MAX = 64 * 1024  # a name and a type, or the list of a large file's parts
ANSWER_BYTES_MAX = 256 * 1024


def run(rt: Runtime, request: Request) -> Reply:
    """Begin one upload at fal. Never raises an `AbhiError`: it answers with it."""
    key, dialect = wire.caller_key(request.headers)
    try:
        caller = rt.authenticate(key)
        rt.limits.allow_upload(caller.key_id)
        if request.method != "POST":
            raise MethodNotAllowed("an upload is begun with POST", allowed="POST")
        _require_credit(rt, caller)
        body = request.read_body()
        headers = wire.request_headers(request.headers.items())
        reply = rt.fal_rest.send("POST", f"{request.path}?{request.query}", headers, body.content)
        seen = settlement.read_whole(reply, ANSWER_BYTES_MAX)
        settlement.refuse_operators_trouble(rt, seen.status)
        if 200 <= seen.status < 300:
            rt.metrics.uploads.inc()
        return _passed(rt, seen, dialect)
    except AbhiError as error:
        # Whatever the dialect: an upload costs nothing, so a client that repeats a 502 or 504 does well.
        return admission.refusal(rt, error, "table")


def _require_credit(rt: Runtime, caller: Caller) -> None:
    available = rt.reader.read(lambda tx: accounts.by_id(tx, caller.account_id)).available_micros
    if available <= 0:
        raise InsufficientCredits(
            f"an upload needs some credit to be left, and {credits_text(available)} credits are available: "
            "top up your balance"
        )


def _passed(rt: Runtime, seen: Seen, dialect: wire.Dialect) -> Reply:
    """fal's answer byte for byte. Errors that are no JSON, and what shows the credential, get our words instead."""
    secret = wire.worth_hiding(rt.settings.fal_key)
    shows_secret = secret is not None and secret.encode() in seen.body
    status = wire.status_for(dialect, seen.status)
    if shows_secret or (status >= 400 and not jsonbytes.is_json(seen.body)):
        error = UpstreamError(f"fal answered with status {seen.status} and no explanation")
        status = status if status >= 400 else error.status
        body = wire.error_body(error, status=status)
        return Reply(status, admission.json_headers(body), body)
    headers = wire.response_headers(seen.headers, secret=secret)
    headers.append(("Content-Length", str(len(seen.body))))
    return Reply(status, headers, seen.body)
