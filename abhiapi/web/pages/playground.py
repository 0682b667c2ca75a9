"""The playground: a call made from a page, through the very pipeline of every call, and paid like any.

It is `gateway.run` with a request made here, for the account whose session it is; the key is the playground's own
(`abhiapi.playground`). A form that is sent twice (a reload, a second click, the way back) is one call: the form's
number and what it asks for are the call's Idempotency-Key.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import simplejson
from flask import Response, jsonify, request

from abhiapi import accounts, gateway, jsonbytes, playground, pricing
from abhiapi.admission import Reply as Answer
from abhiapi.admission import Request
from abhiapi.errors import AbhiError, BadRequest, MalformedJson
from abhiapi.price_terms import Price
from abhiapi.web.caller import base_url, runtime
from abhiapi.web.pages import answers, headers, words
from abhiapi.web.pages.answers import Media
from abhiapi.web.pages.desk import Desk, Reply, Role, go, must_not_be_suspended, render, visitor
from abhiapi.web.pages.samples import Sample, body_text, samples

FIRST_MODEL = "fal-ai/flux/dev"
FIRST_PROMPT = "a futuristic city at night"
ANSWER_BYTES_MAX = 1024 * 1024  # of an answer that is read on behalf of a page; the rest is read and dropped
SHOWN_CHARACTERS_MAX = 20_000
MODELS_MAX, SIMILAR_MAX = 1500, 30
PER_USER = "120 per minute"
_RUN = re.compile(r"[A-Za-z0-9_-]{16}")
_FORM_BYTES_MAX = 60 * 1024


@dataclass(frozen=True, slots=True)
class Form:
    """What is asked for, as it was typed, and what that means."""

    prompt: str
    more: str
    call_input: Mapping[str, Any]
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Body:
    content: bytes
    call_input: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """An answer as the page shows it."""

    status: int
    message: str | None  # why there is none, in words
    error_type: str | None
    call_id: str | None
    was_replayed: bool
    billing: Mapping[str, Any] | None
    media: list[Media]
    texts: list[str]
    document: str


def add_to(desk: Desk) -> None:
    desk.add(Role.CUSTOMER, "/playground", show, nav="Playground")
    by_user = ((PER_USER, _user),)
    desk.add(Role.CUSTOMER, "/playground/run", run, methods=("POST",), limits=by_user)
    desk.add(Role.CUSTOMER, "/playground/estimate", estimate, methods=("POST",), limits=by_user)
    desk.add(Role.CUSTOMER, "/playground/key", renew_key, methods=("POST",), limits=by_user)


def show() -> Reply:
    model = request.args.get("model", FIRST_MODEL).strip().strip("/")[:200]
    catalogue = runtime().catalogue()
    if model not in catalogue:
        return _page(None, None, model=model, status=200 if "model" not in request.args else 404)
    price = catalogue.price_of(model)
    more = simplejson.dumps(dict(price.estimate.defaults), use_decimal=True, indent=2)
    return _page(price, _form(price, FIRST_PROMPT if model == FIRST_MODEL else "", more), model=model)


def run() -> Reply:
    """Make the call, once for each form; the page shows the answer when it is there."""
    who, rt = visitor(), runtime()
    must_not_be_suspended()
    price, form, number = _asked()
    if form.problem is not None or request.form.get("do") == "estimate":
        return _page(price, form, model=price.model, status=422 if form.problem else 200)
    rt.write(lambda tx: playground.ensured(tx, who.account_id, now_ms=rt.now_ms()))
    body = Body(body_text(form.call_input).encode(), form.call_input)
    made = hashlib.sha256(price.model.encode() + b"\n" + body.content).hexdigest()[:40]
    answer = gateway.run(
        rt,
        Request(
            method="POST",
            path=f"/{price.model}",
            query="",
            headers={
                "content-type": "application/json",
                "accept": "application/json",
                "user-agent": "abhiapi-playground",
                "idempotency-key": f"playground-{number}-{made}",
            },
            read_body=lambda: body,
            base_url=base_url(),
            inside_account_id=who.account_id,
        ),
    )
    return _page(price, form, model=price.model, result=_result(answer, rt.settings.fal_run_url))


def estimate() -> Reply:
    """What the form as it stands would hold: for the script, which asks as one types."""
    price, form, _ = _asked()
    if form.problem is not None:
        return jsonify({"problem": form.problem})
    ceiling = pricing.ceiling(price, form.call_input)
    shown = samples(base_url(), price.model, form.call_input)
    return jsonify(
        {
            "credits": words.credits(ceiling.amount_micros),
            "basis": ceiling.basis,
            "samples": {sample.language: sample.text for sample in shown},
        }
    )


def renew_key() -> Reply:
    """Another key for the playground where the old one was revoked, by somebody who may make keys."""
    must_not_be_suspended()
    who, rt = visitor(), runtime()
    rt.write(lambda tx: playground.renewed(tx, who.account_id, now_ms=rt.now_ms()))
    return go("pages.playground_show", "The playground has a new key.")


def _user() -> str:
    return f"user:{visitor().user.user_id}"


def _asked() -> tuple[Price, Form, str]:
    """What a form says. Raises `BadRequest`, `UnpricedModel` for what no form of ours sends."""
    number = request.form.get("run", "")
    if not _RUN.fullmatch(number):
        raise BadRequest("This form is not one of ours. Open the playground again.")
    price = runtime().catalogue().price_of(request.form.get("model", "")[:200])
    form = _form(price, request.form.get("prompt", ""), request.form.get("more", ""))
    return price, form, number


def _form(price: Price, prompt: str, more: str) -> Form:
    """The prompt under the model's name for it, over the other parameters as JSON."""
    prompt, more = prompt.replace("\r\n", "\n"), more.replace("\r\n", "\n")
    try:
        if len(prompt) + len(more) > _FORM_BYTES_MAX:
            raise ValueError("that is more than this page takes: call by a program")
        parameters = jsonbytes.parse(more.encode()) if more.strip() else {}
        if not isinstance(parameters, dict):
            raise ValueError("they are not a JSON object")
        asked = {prompt_name(price): prompt, **parameters} if prompt.strip() else parameters
        if prompt.strip():
            asked[prompt_name(price)] = prompt
        "".join(sample.text for sample in samples("", price.model, asked)).encode()  # what cannot be written down
    except (ValueError, RecursionError, MalformedJson) as error:
        why = "they have half a character" if isinstance(error, UnicodeError) else str(error)
        return Form(prompt, more, {}, f"The other parameters cannot be read: {why[:300]}.")
    return Form(prompt, more, asked)


def prompt_name(price: Price) -> str:
    return price.estimate.text_param if price.estimate.kind == "characters" else "prompt"


def _page(
    price: Price | None, form: Form | None, *, model: str, result: Result | None = None, status: int = 200
) -> Response:
    rt, who = runtime(), visitor()
    catalogue = rt.catalogue()
    ceiling = pricing.ceiling(price, form.call_input) if price and form and form.problem is None else None
    shown: list[Sample] = samples(base_url(), price.model, form.call_input) if price and form and ceiling else []
    key, account = rt.reader.read(lambda tx: (playground.find(tx, who.account_id), accounts.by_id(tx, who.account_id)))
    response = render(
        "playground.html",
        status=status,
        price=price,
        unit_price=pricing.decimal_text(price.unit_price_usd) if price else "",
        form=form,
        model=model,
        models=[each.model for each in islice(catalogue, MODELS_MAX)],
        similar=[] if price else _similar(model, [each.model for each in catalogue]),
        ceiling=ceiling,
        available_micros=account.available_micros,
        samples=shown,
        result=result,
        key_status=key.status_at(rt.now_ms()) if key else None,
        run=secrets.token_urlsafe(12),
    )
    return headers.allow_pictures_from(response, answers.picture_sources(rt.settings.fal_run_url))


def _similar(text: str, models: list[str]) -> list[str]:
    """Models that have every word of what was typed."""
    parts = re.findall(r"[a-z0-9.]+", text.lower())
    return [model for model in models if parts and all(part in model.lower() for part in parts)][:SIMILAR_MAX]


def _result(answer: Answer, fal_run_url: str) -> Result:
    named = {name.lower(): value for name, value in answer.headers}
    content, message = _read(answer)
    parsed = jsonbytes.parse_object(content)
    billing = parsed.get("_billing") if parsed else None
    error = parsed.get("error") if parsed and answer.status >= 400 else None
    if answer.status >= 400 and message is None:
        message = (
            str(error.get("message")) if isinstance(error, Mapping) else "fal refused this call, and says why below."
        )
    return Result(
        status=answer.status,
        message=message,
        error_type=str(error.get("type")) if isinstance(error, Mapping) else None,
        call_id=named.get("x-abhiapi-call-id"),
        was_replayed="idempotency-replayed" in named,
        billing=billing if isinstance(billing, Mapping) else None,
        media=answers.media(parsed, fal_run_url) if answer.status < 400 else [],
        texts=answers.texts(parsed) if answer.status < 400 else [],
        document=_document(content, parsed),
    )


def _read(answer: Answer) -> tuple[bytes, str | None]:
    """The answer's body up to a bound, read to its end whatever its size, so that it is settled; and what broke it."""
    if isinstance(answer.body, bytes):
        return answer.body, None
    kept = bytearray()
    try:
        for piece in answer.body:
            kept += piece[: max(0, ANSWER_BYTES_MAX - len(kept))]
    except AbhiError as error:
        return b"", f"The answer broke off: {error.message}."
    finally:
        answer.body.close()
    return bytes(kept), None


def _document(content: bytes, parsed: Mapping[str, Any] | None) -> str:
    text = content.decode("utf-8", "replace")
    if parsed is not None:
        text = str(simplejson.dumps(parsed, use_decimal=True, ensure_ascii=False, indent=2))
        text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= SHOWN_CHARACTERS_MAX else text[:SHOWN_CHARACTERS_MAX] + "\n[the rest is left out here]"
