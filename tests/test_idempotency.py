"""The Idempotency-Key over a real database and a scripted fal: what is replayed, what runs anew, what is refused."""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import gevent
import pytest

from abhiapi import admission, calls, idempotency, ledger, replay, settlement
from abhiapi.errors import DatabaseUnavailable, UpstreamBroken, UpstreamTimeout, UpstreamUnreachable
from abhiapi.http_adapter import FileBody
from abhiapi.ids import call_text
from abhiapi.metering import released
from abhiapi.money import Micros
from tests.harness import Clock
from tests.keyed import (
    JOB,
    MEGAPIXEL,
    QUEUE,
    START,
    ask,
    charges,
    drained,
    error_of,
    header,
    house_of,
    is_replay,
    kept_keys,
)
from tests.scripted import FLUX, JSON, PICTURE, UNITS, Body, House, answer

pytestmark = pytest.mark.engines

LARGE = b'{"image":{"content":"' + b"x" * 100_000 + b'"}}'


@pytest.fixture
def house(tmp_path: Path, clock: Clock) -> Iterator[House]:
    with house_of(tmp_path, clock) as made:
        yield made


# --- the same request again -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "told"), [(FLUX, PICTURE), (QUEUE, JOB)])
def test_the_same_request_again_is_the_first_answer_again(house: House, path: str, told: bytes) -> None:
    """Row 28 of B3: byte for byte, with the first call's id and charge; fal hears nothing and nothing is held."""
    house.fal.answer = answer([told])
    first, again = ask(house, path), ask(house, path)
    assert first.status == again.status == 200
    assert first.body == again.body
    assert not is_replay(first)
    assert is_replay(again)
    shown = {name for name, _ in first.headers} - {"X-RateLimit-Remaining", "X-RateLimit-Reset"}
    assert {name: header(again, name) for name in shown} == {name: header(first, name) for name in shown}
    assert {"x-abhiapi-call-id", "x-fal-request-id", "x-abhiapi-credits-used"} <= shown
    assert len(house.fal.sent) == 1
    (call,) = house.books.calls(house.account)
    assert header(again, "x-abhiapi-call-id") == call_text(call.call_id)


def test_without_the_header_nothing_is_looked_up_and_every_call_runs(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("find", "check_free", "take", "keep"):
        monkeypatch.setattr(idempotency, name, None)
    for _ in range(2):
        house.fal.answer = answer([PICTURE])
        assert ask(house, idempotency_key=None).status == 200
    assert len(house.fal.sent) == charges(house) == 2


def test_the_key_is_never_sent_to_fal(house: House) -> None:
    for path, told in ((FLUX, PICTURE), (QUEUE, JOB)):
        house.fal.answer = answer([told])
        ask(house, path, idempotency_key=f"secret-{path}")
    assert len(house.fal.sent) == 2
    assert "idempotency" not in str(house.fal.sent).lower()
    assert "secret-" not in str(house.fal.sent)


OTHERS: list[dict[str, Any]] = [
    {"path": "/fal-ai/flux/schnell"}, {"path": QUEUE}, {"query": "a=1"}, {"body": b'{"prompt":"a  cat"}'},
    {"body": b""}, {"method": "PUT"}, {"content_type": "text/plain"},
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_another_request_under_the_key_is_refused(house: House, other: dict[str, Any]) -> None:
    ask(house)
    assert error_of(ask(house, **other)) == (422, "idempotency_key_reused")
    assert len(house.fal.sent) == len(house.books.calls(house.account)) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\xe9", "a\tb", "a\x7f"])
def test_a_key_that_is_no_key_is_refused(house: House, key: str) -> None:
    assert error_of(ask(house, idempotency_key=key)) == (400, "invalid_idempotency_key")
    assert house.fal.sent == []


@pytest.mark.parametrize("key", ["x" * 255, " ", '"8e03978e-40d5-43dd-bc93-6894a57f9324"'])
def test_any_printable_ascii_is_a_key(house: House, key: str) -> None:
    assert not is_replay(ask(house, idempotency_key=key))
    assert is_replay(ask(house, idempotency_key=key))


def test_keys_of_two_accounts_are_apart_and_those_of_two_keys_are_not(house: House) -> None:
    other, key = house.books.account(1000)
    ask(house)
    house.fal.answer = answer([PICTURE])
    assert not is_replay(ask(house, key=key))
    assert len(house.fal.sent) == 2
    assert [len(house.books.calls(name)) for name in (house.account, other)] == [1, 1]


def test_a_large_body_counts_like_a_small_one(house: House) -> None:
    """Bytes in memory and the same bytes in a file are one request."""
    text = b'{"prompt":"' + b"y" * 600_000 + b'"}'

    def digest(content: Any) -> bytes:
        read = Body(content, {})
        return replay._digest(admission.Request("POST", FLUX, "", {}, lambda: read), read)

    assert digest(text) == digest(FileBody(io.BytesIO(text), len(text)))
    assert digest(text) != digest(FileBody(io.BytesIO(text + b" "), len(text) + 1))


# --- what ends a claim ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "is_kept"),
    [
        (answer([PICTURE]), True),
        (answer([b"{}"], JSON, ("x-fal-billable-units", "0")), True),
        (answer([], JSON, status=302), True),
        *[(answer([b'{"detail":"no"}'], JSON, status=status), True) for status in (400, 404, 405, 413, 422, 499)],
        *[(answer([b'{"detail":"no"}'], JSON, UNITS, status=status), True) for status in (408, 409, 422, 425, 429)],
        *[(answer([b'{"detail":"no"}'], JSON, status=status), False) for status in (408, 409, 425, 429)],
        *[(answer([b'{"detail":"no"}'], JSON, UNITS, status=status), False) for status in (401, 402, 403)],
        *[(answer([b'{"detail":"no"}'], JSON, UNITS, status=status), False) for status in (500, 502, 503, 504)],
        (UpstreamUnreachable("gone"), False),
        (UpstreamTimeout("late"), False),
        (UpstreamBroken("cut"), False),
        (answer([PICTURE[:9], UpstreamBroken("cut")]), False),
        (answer([LARGE[:90_000], UpstreamBroken("cut")]), False),
    ],
    ids=lambda told: type(told).__name__ if isinstance(told, Exception) else str(getattr(told, "status", told)),
)
@pytest.mark.parametrize("dialect", ["table", "fal"])
def test_fals_last_word_is_kept_and_a_call_given_back_runs_anew(
    house: House, told: Any, is_kept: bool, dialect: str
) -> None:
    """Row 28 of B3: however often it is asked for, it is paid for once; and what was not paid for may be had."""
    house.fal.answer = deepcopy(told)  # its pieces are used up, and another dialect is told the same
    key = {"x_api_key": house.key} if dialect == "table" else {"authorization": f"Key {house.key}"}
    named = {"idempotency_key": "k1"} | key
    first = house.call(**named)
    with suppress(UpstreamBroken):
        drained(first)
    before = charges(house)
    house.fal.answer = answer([PICTURE])
    again = house.call(**named)
    assert is_replay(again) is is_kept
    assert len(house.fal.sent) == (1 if is_kept else 2)
    if is_kept:
        assert (again.status, again.body, charges(house)) == (first.status, first.body, before)
    else:
        assert (again.status, before, charges(house)) == (200, 0, 1)
        assert is_replay(house.call(**named))
    assert house.standing()[1] == 0


def test_what_is_refused_before_the_hold_leaves_the_key_free(house: House) -> None:
    _, key = house.books.account(0)
    assert error_of(ask(house, key=key))[0] == 402
    assert error_of(ask(house, "/fal-ai/nobody-knows", key=key))[0] == 404
    assert kept_keys(house) == 0

    def top_up(tx: Any) -> None:
        account_id = house.rt.authenticate(key).account_id
        ledger.topup(tx, account_id, Micros(START), ref=None, note=None, now_ms=1)

    house.books.write(top_up)
    assert ask(house, key=key).status == 200
    assert is_replay(ask(house, key=key))


@pytest.mark.parametrize(
    "told",
    [
        answer([LARGE]),
        answer([b"ID3" * 9], ("content-type", "audio/mpeg"), UNITS),
        answer([b"data: {}\n\n"], ("content-type", "text/event-stream"), UNITS),
    ],
    ids=["large", "no JSON", "stream"],
)
def test_an_answer_that_is_not_kept_is_not_paid_for_twice(house: House, told: Any) -> None:
    house.fal.answer = told
    first = ask(house)
    drained(first)
    again = ask(house)
    assert error_of(again) == (410, "idempotency_answer_gone")
    assert isinstance(again.body, bytes)
    message = json.loads(again.body)["message"]
    call_id = header(first, "x-abhiapi-call-id")
    assert f"{call_id}, has ended and cost 26.25 credits" in message
    assert header(again, "x-abhiapi-call-id") == call_id
    assert len(house.fal.sent) == charges(house) == 1


def test_what_is_kept_of_an_account_in_a_day_has_a_bound(
    house: House, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond it small answers are kept all the same, others on another day; no call is paid for twice."""
    house.rt.kept_today.most = 20_000
    middling = b'{"image":{"content":"' + b"x" * 8000 + b'"}}'

    def is_kept(name: str, told: bytes) -> bool:
        house.fal.answer = answer([told])
        first = ask(house, idempotency_key=name)
        again = ask(house, idempotency_key=name)
        assert again.body == first.body or error_of(again) == (410, "idempotency_answer_gone")
        return is_replay(again)

    assert [is_kept(f"k{number}", middling) for number in range(4)] == [True, True, False, False]
    assert is_kept("small", PICTURE)
    assert len([line for line in caplog.messages if f"kept for {house.account} today" in line]) == 1
    clock.tick(86_400_000)
    assert is_kept("next day", middling)
    assert len(house.fal.sent) == charges(house) == 6


@pytest.mark.parametrize(("path", "told"), [(FLUX, PICTURE), (QUEUE, JOB)])
def test_an_answer_that_could_not_be_written_down_leaves_and_is_refused_later(
    house: House, monkeypatch: pytest.MonkeyPatch, path: str, told: bytes
) -> None:
    """As after a crash between the charge and the answer: a repeat hears where it is, and pays nothing."""

    def full(*_: object, **__: object) -> bool:
        raise DatabaseUnavailable("the disk is full")

    monkeypatch.setattr(idempotency, "keep", full)
    house.fal.answer = answer([told])
    assert ask(house, path).status == 200
    again = ask(house, path)
    assert error_of(again) == (410, "idempotency_answer_gone")
    assert isinstance(again.body, bytes)
    if path == QUEUE:
        assert (
            "https://here/queue/fal-ai/flux/requests/job-1. It cost 0 credits so far"
            in json.loads(again.body)["message"]
        )
    assert len(house.fal.sent) == 1


def test_a_submit_whose_answer_was_lost_is_never_sent_again(house: House) -> None:
    """Row 30 of B3: fal may have taken the job. Once the operator has released the hold, the key is free."""
    house.fal.answer = UpstreamBroken("cut")
    assert error_of(ask(house, QUEUE)) == (502, "upstream_broken")
    for _ in range(3):
        assert error_of(ask(house, QUEUE)) == (500, "idempotency_outcome_unknown")
    assert len(house.fal.sent) == 1
    assert house.standing() == (START, MEGAPIXEL)
    call = house.books.read(lambda tx: calls.open_call(tx, house.last().call_id))
    house.books.write(lambda tx: calls.finish(tx, call, released("operator"), now_ms=house.rt.now_ms()))
    house.fal.answer = answer([JOB])
    assert ask(house, QUEUE).status == 200
    assert is_replay(ask(house, QUEUE))
    assert len(house.fal.sent) == 2


def test_a_submit_that_fal_was_never_sent_runs_anew(house: House) -> None:
    house.fal.answer = UpstreamUnreachable("no way")
    assert error_of(ask(house, QUEUE)) == (502, "upstream_unreachable")
    house.fal.answer = answer([JOB])
    assert not is_replay(ask(house, QUEUE))
    assert len(house.fal.sent) == 2


@pytest.mark.engines("sqlite")
def test_a_charge_that_waits_for_the_disk_is_waited_for(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer was withheld; a repeat hears so, and neither pays nor runs again."""
    monkeypatch.setattr(admission, "SETTLE_PATIENCE_S", 0)
    with closing(sqlite3.connect(house.rt.database.path, isolation_level=None)) as other:
        house.fal.when_sent = lambda: other.execute("BEGIN IMMEDIATE")
        assert error_of(ask(house)) == (500, "charge_not_recorded")
        repeat = gevent.spawn(ask, house)
        gevent.idle()
        assert not repeat.ready()
        other.execute("ROLLBACK")
        reply = repeat.get(timeout=20)
    assert error_of(reply) == (410, "idempotency_answer_gone")
    assert len(house.fal.sent) == charges(house) == 1


@pytest.mark.engines("sqlite")
def test_a_job_that_waits_for_the_disk_is_named_in_the_log(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 30 of B3: where the process dies before the disk takes it, fal's id stands nowhere else."""
    monkeypatch.setattr(settlement, "SETTLE_PATIENCE_S", 0)
    house.fal.answer = answer([JOB])
    with closing(sqlite3.connect(house.rt.database.path, isolation_level=None)) as other:
        house.fal.when_sent = lambda: other.execute("BEGIN IMMEDIATE")
        assert error_of(ask(house, QUEUE)) == (500, "charge_not_recorded")
        (said,) = [record.getMessage() for record in caplog.records if "job-1" in record.getMessage()]
        other.execute("ROLLBACK")
    assert error_of(ask(house, QUEUE)) == (410, "idempotency_answer_gone")
    assert call_text(house.last().call_id) in said
    assert house.last().fal_request_id == "job-1"


def test_a_broken_submit_answer_that_is_large_is_not_kept(house: House) -> None:
    """fal's answer to a submit may be larger than what is kept: the repeat is told where the job is."""
    told = JOB[:-1] + b',"logs":"' + b"z" * admission.WHOLE_BYTES_MAX * 2 + b'"}'
    house.fal.answer = answer([told])
    assert ask(house, QUEUE).status == 200
    assert error_of(ask(house, QUEUE)) == (410, "idempotency_answer_gone")
