"""fal's deliveries, in one process: taken only as fal signed them for this very job, and passed on with the charge."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing

import gevent
import pytest
import requests
from sqlalchemy import text

from abhiapi import (
    calls,
    fal_keys,
    jobs,
    reconcile,
    signing,
    webhook_delivery,
    webhook_intake,
    webhookwire,
)
from abhiapi.errors import (
    AbhiError,
    NotFound,
    WebhookNotTaken,
    WebhookSignatureInvalid,
)
from abhiapi.fal import Fal as FalHost
from abhiapi.ids import call_text
from abhiapi.money import Micros
from tests.harness import OPERATOR_KEY, Clock, Fal
from tests.receiver import Receiver
from tests.test_queue import FLUX_MICROS
from tests.webhook_desk import PUBLIC_URL, Desk, desk, desk_with, fals_body, known, receiver

__all__ = ["desk", "desk_with", "known", "receiver"]  # fixtures


def test_fal_is_given_a_url_of_ours(known: Desk, receiver: Receiver) -> None:
    url = receiver.url("/hook?a=1")
    query, wish = webhook_intake.wished(known.rt, 7, f"x=1&fal_webhook={requests.utils.quote(url, safe='')}")
    assert wish == url
    text = call_text(7)
    ours = f"{PUBLIC_URL}/v1/webhooks/fal/{text}/{known.rt.webhook_key.token(text)}"
    assert query == f"x=1&fal_webhook={requests.utils.quote(ours, safe='')}"


@pytest.mark.engines
def test_fals_delivery_settles_and_is_passed_on_byte_for_byte(known: Desk, receiver: Receiver) -> None:
    account, (job,) = known.wanting(receiver.url())
    body = fals_body(job)
    known.receive(job, body)
    assert known.books.standing(account) == (5_000_000 - FLUX_MICROS, 0)
    known.deliveries.run_until_idle()
    (told,) = receiver.deliveries
    assert told.body.startswith(body[:-1] + b', "_billing": {"model": "fal-ai/flux/dev", "credits_used": 26.25, ')
    known.receive(job, body)  # a replay
    known.receive(job, fals_body(job).replace(b"1.0", b"2.0"))
    known.clock.tick(webhook_delivery.GRACE_MS)
    known.deliveries.run_until_idle()
    assert len(receiver.deliveries) == 1
    assert len([entry for entry in known.books.entries(account) if entry.kind == "charge"]) == 1


@pytest.mark.engines
def test_where_fal_does_not_deliver_we_do_after_a_while(known: Desk, receiver: Receiver) -> None:
    _, (job,) = known.wanting(receiver.url())
    known.settle()
    known.clock.tick(webhook_delivery.GRACE_MS - 1)
    known.deliveries.run_until_idle()
    assert receiver.deliveries == []
    known.clock.tick(1)
    known.deliveries.run_until_idle()
    assert len(receiver.deliveries) == 1
    known.receive(job, fals_body(job))  # at last
    known.deliveries.run_until_idle()
    assert len(receiver.deliveries) == 1


def refusal(
    desk: Desk, job: jobs.Job, body: bytes, headers: dict[str, str] | None = None, **more: str
) -> type[AbhiError]:
    with pytest.raises(AbhiError) as refused:
        desk.receive(job, body, headers, **more)
    assert desk.row(job).state == "waiting"
    assert desk.rt.reader.read(lambda tx: jobs.by_call(tx, job.call.call_id)).state == "sent"  # type: ignore[union-attr]
    return type(refused.value)


def test_only_what_fal_signed_just_now_is_taken(known: Desk, receiver: Receiver) -> None:
    _, (job,) = known.wanting(receiver.url())
    body = fals_body(job)
    good = known.signed(job, body)
    for headers in (
        {"content-type": "application/json"},
        good | {"x-fal-webhook-signature": "00" * 64},
        good | {"x-fal-webhook-signature": "zz"},
        good | {"x-fal-webhook-timestamp": str(known.clock.now_ms // 1000 - 5)},
        good | {"x-fal-webhook-user-id": "somebody"},
        known.signed(job, body + b" "),
        known.signed(job, body, age_s=301),
        known.signed(job, body, age_s=-301),
        known.signed(job, body, key=known.rt.webhook_key),
    ):
        assert refusal(known, job, body, headers) is WebhookSignatureInvalid
    known.receive(job, body, known.signed(job, body, age_s=299))
    assert known.row(job).state == "due"


def test_what_fal_signed_for_somebody_else_is_useless(known: Desk, receiver: Receiver) -> None:
    """fal's keys sign for all of its customers; the token in the URL is what they cannot have."""
    _, (job, other) = known.wanting(receiver.url(), 2)
    body = fals_body(job)
    assert refusal(known, job, body, token="0" * 64) is NotFound
    assert refusal(known, job, body, token=known.rt.webhook_key.token(call_text(other.call.call_id))) is NotFound
    assert refusal(known, job, fals_body(other), known.signed(other, fals_body(other))) is NotFound
    assert refusal(known, job, b"[1]", known.signed(other, b"[1]")) is NotFound
    assert refusal(known, job, fals_body(other), known.signed(job, fals_body(other))) is NotFound


def test_another_user_of_fal_is_refused_where_ours_is_set(desk_with: Callable[..., Desk], receiver: Receiver) -> None:
    desk = desk_with(ABHIAPI_PUBLIC_URL=PUBLIC_URL, ABHIAPI_FAL_USER_ID="operator-at-fal")
    _, (job,) = desk.wanting(receiver.url())
    assert refusal(desk, job, fals_body(job)) is WebhookSignatureInvalid


@pytest.mark.engines
def test_fal_may_be_faster_than_our_row(known: Desk) -> None:
    """A submit on its way is asked for again; a call that has ended, or that never was, is not."""
    _, (job,) = known.wanting("https://x.example/")
    body = fals_body(job)

    def lose(state: str, finished_at: int | None) -> type[AbhiError]:
        change = text("UPDATE calls SET state = :state, finished_at = :finished_at, fal_request_id = NULL")
        known.books.write(lambda tx: tx.run(change, state=state, finished_at=finished_at))
        with pytest.raises(AbhiError) as refused:
            known.receive(job, body)
        return type(refused.value)

    assert lose("held", None) is WebhookNotTaken
    assert lose("unknown", None) is WebhookNotTaken
    assert lose("released", 1) is NotFound
    never = jobs.Job(calls.OpenCall(7, 1, 1, "m", Micros(0)), job.request_id, "sent", 1, 1, None)
    with pytest.raises(NotFound):
        known.receive(never, body)


def test_new_keys_of_fal_are_found_and_strangers_make_us_ask_seldom(known: Desk, receiver: Receiver) -> None:
    _, (job, later) = known.wanting(receiver.url(), 2)
    known.receive(job, fals_body(job))
    assert known.keys_page.asked == 1
    fresh = signing.WebhookKey.new()
    known.keys_page.body = json.dumps(fresh.jwks()).encode()
    body = fals_body(later)
    for _ in range(5):
        assert refusal(known, later, body, known.signed(later, body, key=fresh)) is WebhookSignatureInvalid
    assert known.keys_page.asked == 1
    known.clock.tick(fal_keys.AGAIN_MS + 1)
    known.receive(later, body, known.signed(later, body, key=fresh))
    assert known.keys_page.asked == 2


def test_without_fals_keys_it_is_asked_to_come_again(known: Desk, receiver: Receiver) -> None:
    _, (job,) = known.wanting(receiver.url())
    page, known.keys_page.body = known.keys_page.body, b"<html>"
    assert refusal(known, job, fals_body(job)) is WebhookNotTaken
    known.keys_page.body = page
    known.receive(job, fals_body(job))
    known.clock.tick(fal_keys.KEPT_MS + 1)  # old keys are not believed for ever
    known.keys_page.body = b"<html>"
    with pytest.raises(WebhookNotTaken):
        known.receive(job, fals_body(job))


@pytest.mark.engines
def test_a_job_whose_result_cannot_be_had_is_asked_to_come_again(known: Desk, receiver: Receiver) -> None:
    _, (job,) = known.wanting(receiver.url())
    match = f"queue/result/{job.request_id}"
    weather = [{"match": match, "status": 503, "body": "html"}] * 4
    requests.post(known.fal.url + "/_sandbox/weather", json=weather, timeout=10).raise_for_status()
    assert refusal(known, job, fals_body(job)) is WebhookNotTaken
    known.receive(job, fals_body(job))
    assert known.row(job).state == "due"


@pytest.mark.engines
@pytest.mark.parametrize("body", [b"x" * (webhookwire.PAYLOAD_BYTES_MAX + 1), b"[1]", b"\xff"])
def test_a_signed_body_that_cannot_be_kept_still_ends_the_job(known: Desk, receiver: Receiver, body: bytes) -> None:
    account, (job,) = known.wanting(receiver.url())
    known.receive(job, body)
    assert known.books.standing(account) == (5_000_000 - FLUX_MICROS, 0)
    known.deliveries.run_until_idle()  # made from the result, without waiting any longer
    assert receiver.deliveries[0].json["payload"]["images"]


def test_a_large_body_beyond_what_is_kept_in_a_day_is_left_and_ends_the_job(known: Desk, receiver: Receiver) -> None:
    known.rt.kept_today.most = 20_000
    account, found = known.wanting(receiver.url(), 3)
    for job in found:
        known.receive(job, fals_body(job).replace(b'"n":1.0', b'"n":"' + b"x" * 9000 + b'"'))
    assert [known.row(job).state for job in found] == ["due", "due", "waiting"]
    assert known.books.standing(account)[1] == 0
    known.deliveries.run_until_idle()
    assert sum("images" in delivery.json["payload"] for delivery in receiver.deliveries) == 1  # made from the result
    assert len(receiver.deliveries) == 3


@pytest.mark.engines
def test_settlers_racing_with_fals_delivery_end_it_once(known: Desk, receiver: Receiver) -> None:
    """Row 37 of B5, with the webhook as one of them."""
    account, found = known.wanting(receiver.url(), 5)
    racing = [gevent.spawn(known.receive, job, fals_body(job)) for job in found for _ in range(4)]
    racing += [gevent.spawn(reconcile.run_once, known.rt) for _ in range(3)]
    gevent.joinall(racing, raise_error=True)
    known.clock.tick(webhook_delivery.GRACE_MS)
    known.deliveries.run_until_idle()
    assert len([entry for entry in known.books.entries(account) if entry.kind == "charge"]) == 5
    assert len(receiver.deliveries) == 5
    assert known.books.verify().problems == []


def test_the_operators_credential_is_not_told_to_customers(known: Desk, receiver: Receiver) -> None:
    _, (job,) = known.wanting(receiver.url())
    known.receive(job, fals_body(job).replace(b'"n"', OPERATOR_KEY.join(['"', '"']).encode()))
    known.deliveries.run_until_idle()
    assert OPERATOR_KEY.encode() not in receiver.deliveries[0].body


def test_this_is_fals_page(fal: Fal) -> None:
    """The simulator's keys are read as fal's are."""
    with closing(FalHost(f"{fal.url}/rest", None, timeout_s=10)) as host:
        page = fal_keys.FalKeys(host, Clock())
        assert not page.have_signed(bytes(64), b"message")
        assert len(page._keys) == 1
