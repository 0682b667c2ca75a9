"""The pipeline itself, over a real database and a scripted fal: every way a call can end ends its hold once."""

from __future__ import annotations

import json
import sqlite3
from decimal import Decimal
from typing import Any

import gevent
import psycopg
import pytest
from sqlalchemy import text

from abhiapi import admission, calls, errors, gateway, runtime
from abhiapi.db import Tx
from abhiapi.db_base import Session
from abhiapi.metering import Verdict, released
from abhiapi.money import Micros
from tests.harness import OPERATOR_KEY
from tests.scripted import JSON, PICTURE, UNITS, House, Piece, answer, in_pieces

MEGAPIXEL = 26_250  # micros: 0.025 USD and a margin of 5 percent
START = 1_000_000
LARGE = b'{"image":{"content":"' + b"x" * 300_000 + b'"}}'


def billing(body: bytes) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(body, parse_float=Decimal)["_billing"]
    return shown


# --- ordinary ends ----------------------------------------------------------------------------------------------


@pytest.mark.engines
def test_a_small_answer_is_charged_before_its_first_byte_leaves(house: House) -> None:
    reply = house.call(query="a=1&fal_jwt_token=x", body=b'{"prompt": "a  cat"}')
    assert reply.status == 200
    assert reply.body.startswith(PICTURE[:-1])
    assert billing(reply.body) == {
        "model": "fal-ai/flux/dev", "credits_used": Decimal("26.25"), "cost_usd": Decimal("0.02625"),
        "balance_remaining": Decimal("973.75"),
    }  # fmt: skip
    headers = dict(reply.headers)
    assert headers["x-abhiapi-credits-used"] == "26.25"
    assert headers["x-abhiapi-balance-remaining"] == "973.75"
    assert int(headers["Content-Length"]) == len(reply.body)
    assert house.fal.sent == [
        ("POST", "/fal-ai/flux/dev?a=1", [("accept-encoding", "identity")], b'{"prompt": "a  cat"}')
    ]
    call = house.last()
    assert (call.state, call.charged_micros, call.units, call.usage_source) == ("settled", MEGAPIXEL, "1", "fal")
    assert (call.fal_request_id, call.fal_cost_nano_usd, call.status) == ("r-1", 25_000_000, 200)
    assert house.standing() == (START - MEGAPIXEL, 0)


@pytest.mark.engines
def test_the_hold_is_written_before_fal_hears_of_the_call(house: House) -> None:
    seen = []
    house.fal.when_sent = lambda: seen.append((house.last().state, *house.standing()))
    house.call()
    assert seen == [("held", START, MEGAPIXEL)]


@pytest.mark.parametrize("pieces", [[LARGE], [LARGE[:-1], b"}"], in_pieces(LARGE, 70_000), in_pieces(LARGE, 999)])
def test_a_large_answer_is_charged_before_its_last_byte_leaves(house: House, pieces: list[bytes]) -> None:
    house.fal.answer = answer(pieces)
    reply = house.call()
    assert "content-length" not in {name.lower() for name, _ in reply.headers}
    received = b""
    for piece in reply.body:
        if piece.endswith(b"}") and len(received) + len(piece) > len(LARGE):
            assert house.last().state == "settled"
        else:
            assert house.last().state == "held"
        received += piece
    reply.body.close()
    start = received.rindex(b', "_billing"')
    assert received[:start] + b"}" == LARGE
    assert billing(received)["credits_used"] == Decimal("26.25")
    assert house.standing() == (START - MEGAPIXEL, 0)


@pytest.mark.parametrize("content_type", ["audio/mpeg", "text/plain", "application/octet-stream"])
def test_what_is_no_json_passes_untouched_and_is_charged_before_its_last_byte(house: House, content_type: str) -> None:
    house.fal.answer = answer([b"ab", b"cd", b"}"], ("content-type", content_type), UNITS, ("etag", '"e"'))
    reply = house.call()
    assert ("etag", '"e"') in reply.headers
    received = []
    for piece in reply.body:
        received.append(piece)
        assert house.last().state == ("settled" if b"".join(received) == b"abcd}" else "held")
    reply.body.close()
    assert b"".join(received) == b"abcd}"


def test_a_digest_of_the_body_is_not_passed_on_when_the_body_grows(house: House) -> None:
    house.fal.answer = answer([b"{}"], JSON, UNITS, ("etag", '"e"'), ("Content-MD5", "x"), ("digest", "sha=x"))
    assert not {"etag", "content-md5", "digest"} & {name.lower() for name, _ in house.call().headers}


@pytest.mark.engines
def test_an_outcome_that_nobody_can_compute_leaves_the_hold_to_the_operator(house: House) -> None:
    house.fal.answer = answer([b'{"images":[]}'], JSON)
    reply = house.call("/fal-ai/creative-upscaler", body=b'{"image_url":"x"}')
    assert (reply.status, billing(reply.body)["credits_used"]) == (200, 0)
    call = house.last()
    assert (call.state, call.charged_micros, call.reason) == ("unknown", 0, "no_units")
    assert house.standing() == (START, call.held_micros)


def test_a_large_answer_without_units_is_computed_from_its_small_copy(house: House) -> None:
    content = b'"' + b"y" * 400_000 + b'"'
    picture = b'{"images":[{"content":%b,"width":2000,"height":1500},{"width":10,"height":10}]}' % content
    house.fal.answer = answer(in_pieces(picture, 5000), JSON)
    reply = house.call()
    assert billing(b"".join(reply.body))["credits_used"] * 1000 == 4 * MEGAPIXEL
    reply.body.close()
    assert (house.last().usage_source, house.last().units) == ("catalogue", "4")


def test_a_large_answer_that_is_no_json_after_all_is_not_computed(house: House) -> None:
    house.fal.answer = answer([b'{"images":[{"width":1024,"height":768}],', b"x" * 100_000, b"}"], JSON)
    reply = house.call()
    b"".join(reply.body)
    reply.body.close()
    assert house.last().state == "unknown"


# --- a caller who hangs up --------------------------------------------------------------------------------------


@pytest.mark.engines
@pytest.mark.parametrize("read", [0, 1, 3])
def test_a_hang_up_changes_nothing(house: House, read: int) -> None:
    """fal's answer is read to its end, and charged; closing again does nothing."""
    house.fal.answer = of_fal = answer(in_pieces(LARGE, 50_000))
    reply = house.call()
    assert house.at_once() == 1
    for _, _piece in zip(range(read), reply.body, strict=False):
        pass
    assert house.last().state == "held"
    reply.body.close()
    reply.body.close()
    assert (house.last().state, house.last().charged_micros) == ("settled", MEGAPIXEL)
    assert house.at_once() == 0
    assert of_fal._raw.closed


@pytest.mark.engines
def test_an_answer_that_breaks_off_after_the_hang_up_costs_nothing(house: House) -> None:
    house.fal.answer = answer([LARGE, errors.UpstreamBroken("cut")])
    reply = house.call()
    next(iter(reply.body))
    reply.body.close()
    assert (house.last().state, house.last().reason) == ("released", "upstream_broken")


@pytest.mark.engines
def test_a_caller_who_takes_for_ever_is_cut_off_and_charged(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SLOW_CALLER_S", -10_000)
    house.fal.answer = answer([LARGE, b" ", b" "])
    reply = house.call()
    with pytest.raises(errors.BodyIncomplete):
        b"".join(reply.body)
    reply.body.close()
    assert house.last().charged_micros == MEGAPIXEL


# --- bad days of fal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "in_table", "in_fal"),
    [
        (errors.UpstreamUnreachable("no"), (502, "upstream_unreachable"), (502, "upstream_unreachable")),
        (errors.UpstreamBroken("cut"), (502, "upstream_broken"), (500, "upstream_outcome_unknown")),
        (errors.UpstreamTimeout("late"), (504, "upstream_timeout"), (500, "upstream_outcome_unknown")),
    ],
)
def test_no_answer_costs_nothing(
    house: House, error: errors.UpstreamError, in_table: tuple[int, str], in_fal: tuple[int, str]
) -> None:
    house.fal.answer = error
    for headers, expected in (({"x_api_key": house.key}, in_table), ({"authorization": f"Key {house.key}"}, in_fal)):
        reply = house.call(**headers)
        body = json.loads(reply.body)
        assert (reply.status, body["error"]["type"]) == expected
        assert body["_billing"]["credits_used"] == 0
        assert (house.last().state, house.last().reason) == ("released", error.type)
    assert house.standing() == (START, 0)


@pytest.mark.parametrize("pieces", [[errors.UpstreamBroken("cut")], [PICTURE[:9], errors.UpstreamTimeout("late")]])
def test_a_small_answer_cut_short_is_not_shown(house: House, pieces: list[Piece]) -> None:
    house.fal.answer = answer(pieces)
    reply = house.call()
    assert reply.status in (502, 504)
    assert b"images" not in reply.body
    assert house.standing() == (START, 0)


def test_a_large_answer_cut_short_breaks_the_callers_connection_too(house: House) -> None:
    house.fal.answer = answer([LARGE[:200_000], errors.UpstreamBroken("cut")])
    reply = house.call()
    assert reply.status == 200
    with pytest.raises(errors.UpstreamBroken):
        b"".join(reply.body)
    reply.body.close()
    assert house.last().state == "released"
    assert house.standing() == (START, 0)


@pytest.mark.parametrize("status", [401, 402, 403])
def test_trouble_with_the_operators_account_is_nobodys_business(house: House, status: int) -> None:
    of_fal = answer([b'{"detail":"User is locked"}'], JSON, UNITS, ("x-note", "locked"), status=status)
    house.fal.answer = of_fal
    reply = house.call(authorization=f"Key {house.key}")
    assert (reply.status, json.loads(reply.body)["error"]["type"]) == (502, "upstream_refused")
    assert b"locked" not in reply.body
    assert "x-note" not in dict(reply.headers)
    assert of_fal._raw.closed
    assert (house.last().status, house.last().charged_micros) == (status, 0)


@pytest.mark.parametrize(("status", "shown"), [(200, 502), (302, 502), (400, 400), (500, 502)])
def test_an_answer_that_shows_the_credential_is_told_in_our_words(house: House, status: int, shown: int) -> None:
    body = json.dumps({"detail": f"Key {OPERATOR_KEY} is bad"}).encode()
    house.fal.answer = answer([body], JSON, ("x-echo", OPERATOR_KEY), status=status)
    reply = house.call()
    assert (reply.status, json.loads(reply.body)["error"]["code"]) == (shown, shown)
    assert OPERATOR_KEY.encode() not in reply.body
    assert not any(OPERATOR_KEY in value for _, value in reply.headers)


# --- bad days of ours -------------------------------------------------------------------------------------------


@pytest.mark.engines
@pytest.mark.parametrize("error", [RuntimeError("a bug"), gevent.GreenletExit(), KeyboardInterrupt()])
def test_a_bug_leaves_no_hold_and_no_place_taken(house: House, error: BaseException) -> None:
    house.fal.answer = error
    with pytest.raises(type(error)):
        house.call()
    assert (house.last().state, house.last().reason) == ("released", "interrupted")
    assert house.standing() == (START, 0)


@pytest.mark.engines
@pytest.mark.parametrize(
    ("why", "status", "answered"),
    [("process_died", 200, 500), ("overdue", 200, 500), ("process_died", 422, 400), ("operator", 200, 200)],
)
def test_a_hold_that_somebody_else_has_given_back_is_not_ended_again(
    house: House, why: str, status: int, answered: int
) -> None:
    """A process that was cut off for long is taken for dead: what it hears of fal after that would leave for nothing.

    The operator's word is another matter: it was said of this very call.
    """

    def give_back() -> None:
        call_id = house.last().call_id
        house.books.write(
            lambda tx: calls.finish(tx, calls.open_call(tx, call_id), released(why), now_ms=house.books.clock())
        )

    house.fal.answer = answer([PICTURE], JSON, *([UNITS] if status == 200 else []), status=status)
    house.fal.when_sent = give_back
    reply = house.call()
    assert reply.status == answered
    assert (b"images" in reply.body) == (answered != 500)
    if answered == 500:
        assert json.loads(reply.body)["error"]["type"] == "charge_not_recorded"
    else:
        assert billing(reply.body)["credits_used"] == 0
    assert (house.last().state, house.last().reason) == ("released", why)
    assert house.standing() == (START, 0)
    assert house.rt.working_on == set()


def locked(house: House) -> Session:
    """The database while another process writes to it."""
    other = house.rt.database.session(patience_s=10)
    other.begin()
    return other


@pytest.mark.engines
def test_a_call_that_cannot_be_written_down_is_not_forwarded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "HOLD_PATIENCE_S", 0)
    monkeypatch.setattr(runtime.Runtime.write, "__kwdefaults__", {"patience_s": 0})
    other = locked(house)
    reply = house.call()
    assert (reply.status, json.loads(reply.body)["error"]["type"]) == (503, "database_unavailable")
    assert int(dict(reply.headers)["Retry-After"]) > 0
    other.roll_back()
    other.close()
    assert house.fal.sent == []
    assert house.books.calls(house.account) == []
    assert house.call().status == 200


@pytest.mark.engines
@pytest.mark.parametrize("pieces", [[PICTURE], [LARGE[:200_000], LARGE[200_000:]]])
def test_a_charge_that_cannot_be_written_down_withholds_the_answer_and_is_written_later(
    house: House, monkeypatch: pytest.MonkeyPatch, pieces: list[Piece]
) -> None:
    monkeypatch.setattr(admission, "SETTLE_PATIENCE_S", 0)
    others: list[Session] = []
    house.fal.when_sent = lambda: others.append(locked(house))
    house.fal.answer = answer(pieces)
    reply = house.call()
    if isinstance(reply.body, bytes):
        assert (reply.status, json.loads(reply.body)["error"]["type"]) == (500, "charge_not_recorded")
        assert b"images" not in reply.body
    else:
        with pytest.raises(errors.ChargeNotRecorded):
            b"".join(reply.body)
        reply.body.close()
    assert house.standing() == (START, MEGAPIXEL)
    gevent.idle()  # the charge is being tried again now
    others[0].roll_back()
    others[0].close()
    house.rt.write(lambda tx: None)  # what was waiting before it is written before it
    assert house.standing() == (START - MEGAPIXEL, 0)
    assert (house.last().state, house.last().charged_micros) == ("settled", MEGAPIXEL)


@pytest.mark.parametrize("troubled_by", ["the charge", "the operator's word"])
def test_a_charge_that_the_ledger_refuses_is_the_operators_however_late(
    house: House, monkeypatch: pytest.MonkeyPatch, troubled_by: str
) -> None:
    """The database is away while the charge is written, or while it is written that nobody can charge it."""
    finish, is_away = calls.finish, True

    def refusing(tx: Tx, call: calls.OpenCall, verdict: Verdict, **more: Any) -> Micros:
        if is_away and (verdict.end == "unknown") == (troubled_by == "the operator's word"):
            raise errors.DatabaseUnavailable("away", retry_after_s=1)
        if verdict.end == "settled":
            raise errors.BadAmount("too much")
        return finish(tx, call, verdict, **more)

    monkeypatch.setattr(calls, "finish", refusing)
    monkeypatch.setattr(admission, "SETTLE_PATIENCE_S", 0)
    reply = house.call()
    assert (reply.status, json.loads(reply.body)["error"]["type"]) == (500, "charge_not_recorded")
    assert (house.rt.parked, len(house.rt.working_on)) == (1, 1)
    is_away = False
    with gevent.Timeout(20):
        while house.rt.working_on:
            gevent.sleep(0.01)
    assert house.rt.parked == 0
    assert (house.last().state, house.last().reason) == ("unknown", "charge_refused")
    assert house.standing() == (START, MEGAPIXEL)


@pytest.mark.engines
def test_a_statement_that_the_database_does_not_know_is_a_bug_and_no_trouble(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised on, to be logged and answered with 500: a 503 would tell callers and operators to wait."""
    monkeypatch.setattr(calls, "_ADMIT", text("INSERT INTO calls (colour) VALUES (1)"))
    with pytest.raises((sqlite3.OperationalError, psycopg.ProgrammingError), match="colour"):
        house.call()
    assert house.fal.sent == []
    assert house.standing() == (START, 0)
    assert house.at_once() == 0
