"""Webhooks on their way out, in one process: brought to customers once, whatever their hosts do."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import pytest
import requests
import trustme

from abhiapi import (
    outbound,
    signing,
    webhook_delivery,
    webhook_intake,
    webhooks,
    webhookwire,
)
from abhiapi.errors import (
    NotFound,
    Refused,
    WebhookUrlRefused,
)
from abhiapi.jobs import Job
from abhiapi.webhook_delivery import Deliveries
from tests.receiver import Receiver, is_signed
from tests.webhook_desk import Desk, desk, desk_with, known, receiver

__all__ = ["desk", "desk_with", "known", "receiver"]  # fixtures

# --- made and delivered -----------------------------------------------------------------------------------------


@pytest.mark.engines
def test_a_settled_job_is_told_once_with_its_charge(desk: Desk, receiver: Receiver) -> None:
    account, (job,) = desk.wanting(receiver.url("/hook?token=secret"))
    desk.deliveries.run_until_idle()
    assert receiver.deliveries == []  # it has not ended here yet
    desk.settle()
    desk.deliveries.run_until_idle()
    desk.deliveries.run_until_idle()
    (told,) = receiver.deliveries
    assert told.path == "/hook?token=secret"
    assert told.headers["content-type"] == "application/json"
    assert told.headers["x-fal-webhook-user-id"] == account
    assert is_signed(desk.rt.webhook_key.jwks(), told)
    assert not is_signed(signing.WebhookKey.new().jwks(), told)
    result = requests.get(
        f"{desk.fal.url}/queue/fal-ai/flux/requests/{job.request_id}", headers={"Authorization": "Key x:y"}, timeout=10
    ).content
    head = b'{"request_id": "%b", "gateway_request_id": "%b", "status": "OK", "payload": ' % (
        (job.request_id.encode(),) * 2
    )
    assert told.body.startswith(head + result + b', "_billing": {')
    assert told.json["_billing"]["credits_used"] == 26.25
    row = desk.row(job)
    assert (row.state, row.attempts, row.last_status, row.last_error) == ("delivered", 1, 200, None)


@pytest.mark.engines
def test_a_failed_attempt_is_repeated_with_the_same_bytes(desk: Desk, receiver: Receiver) -> None:
    receiver.statuses = [500, 404]
    _, (job,) = desk.wanting(receiver.url())
    desk.settle()
    for attempts, wait_ms in ((1, 10_000), (2, 20_000)):
        desk.deliveries.run_until_idle()
        row = desk.row(job)
        assert (row.state, row.attempts, len(receiver.deliveries)) == ("due", attempts, attempts)
        assert row.next_attempt_at == desk.clock.now_ms + wait_ms
        desk.clock.tick(wait_ms)
    desk.deliveries.run_until_idle()
    assert desk.row(job).state == "delivered"
    first, *_, last = receiver.deliveries
    assert first.body == last.body
    assert int(last.headers["x-fal-webhook-timestamp"]) == int(first.headers["x-fal-webhook-timestamp"]) + 30
    assert is_signed(desk.rt.webhook_key.jwks(), last)


@pytest.mark.engines
def test_after_a_day_of_failures_it_is_given_up_and_can_be_resent(
    desk: Desk, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.statuses = [503] * webhookwire.ATTEMPTS_MAX
    _, (job,) = desk.wanting(receiver.url("/secret-path?token=secret"))
    desk.settle()
    started = desk.clock.now_ms
    with caplog.at_level(logging.WARNING):
        while desk.row(job).state != "failed":
            desk.deliveries.run_until_idle()
            desk.clock.now_ms = desk.row(job).next_attempt_at or desk.clock.now_ms
    assert len(receiver.deliveries) == webhookwire.ATTEMPTS_MAX
    assert 20 * 3_600_000 < desk.clock.now_ms - started < 28 * 3_600_000
    assert "failed for good" in caplog.text
    assert receiver.url("") in caplog.text
    assert "secret" not in caplog.text
    desk.books.write(lambda tx: webhooks.resend(tx, job.call.call_id, now_ms=desk.clock.now_ms))
    desk.deliveries.run_until_idle()
    assert desk.row(job).state == "delivered"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_final(desk: Desk, receiver: Receiver, status: int) -> None:
    """Row 67 of B9."""
    with Receiver.started() as elsewhere:
        receiver.location, receiver.statuses = elsewhere.url(), [status]
        _, (job,) = desk.wanting(receiver.url())
        desk.settle()
        desk.deliveries.run_until_idle()
        assert elsewhere.deliveries == []
    assert (desk.row(job).state, desk.row(job).last_status) == ("failed", status)


def test_nobody_there_is_repeated(desk: Desk) -> None:
    with Receiver.started() as gone:
        url = gone.url()
    _, (job,) = desk.wanting(url)
    desk.settle()
    desk.deliveries.run_until_idle()
    row = desk.row(job)
    assert (row.state, row.attempts, row.last_status) == ("due", 1, None)
    assert "refused" in str(row.last_error).lower()


def test_a_host_that_does_not_answer_in_time_is_tried_again(
    desk: Desk, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhookwire, "FIRST_TIMEOUT_S", 1)
    receiver.hold = threading.Event()
    _, (job,) = desk.wanting(receiver.url())
    desk.settle()
    desk.deliveries.run_until_idle()
    assert (desk.row(job).state, desk.row(job).last_error) == ("due", "no answer within 1 s")


def test_an_answer_without_end_is_cut(desk: Desk, receiver: Receiver) -> None:
    """The status counts; of what follows no more than a little is read."""
    receiver.body = b"x" * 50_000_000
    _, (job,) = desk.wanting(receiver.url())
    desk.settle()
    desk.deliveries.run_until_idle()
    assert desk.row(job).state == "delivered"


# --- where it may go --------------------------------------------------------------------------------------------


def names(desk: Desk, answers: list[list[str]], **allowed: Any) -> list[str]:
    """Have the names resolved to these addresses, one answer after the other; the list of who was asked for."""
    asked: list[str] = []

    def lookup(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    desk.rt.outbound = outbound.Outbound(desk.rt.outbound._allowed, lookup)
    return asked


def test_a_name_that_moves_inside_after_the_submit_is_not_called(
    desk_with: Callable[..., Desk], receiver: Receiver
) -> None:
    """Row 67 of B9, DNS rebinding: public when checked at the submit, this machine when it is delivered."""
    desk = desk_with(ABHIAPI_WEBHOOK_ALLOW_LOOPBACK="0")
    asked = names(desk, [["93.184.216.34"], ["127.0.0.1"]])
    url = receiver.url(host="rebinding.example")
    assert webhook_intake.wished(desk.rt, 1, f"a=1&fal_webhook={url}") == ("a=1", url)
    _, (job,) = desk.wanting(url)
    desk.settle()
    desk.deliveries.run_until_idle()
    assert (desk.row(job).state, desk.row(job).attempts) == ("failed", 1)
    assert "not at a public address" in str(desk.row(job).last_error)
    assert receiver.deliveries == []
    assert asked == ["rebinding.example"] * 2


def test_the_connection_goes_to_the_address_that_was_checked(desk: Desk, receiver: Receiver) -> None:
    """The second answer of the name server would be refused; it is never asked for."""
    asked = names(desk, [["127.0.0.1"], ["10.0.0.1"]])
    _, (job,) = desk.wanting(receiver.url(host="hook.example.test"))
    desk.settle()
    desk.deliveries.run_until_idle()
    assert desk.row(job).state == "delivered"
    assert asked == ["hook.example.test"]
    assert receiver.deliveries[0].headers["host"] == f"hook.example.test:{receiver.port}"


@pytest.mark.parametrize("found", [["93.184.216.34", "10.0.0.1"], ["::ffff:127.0.0.1"], ["169.254.169.254"]])
def test_a_name_with_one_inner_address_is_refused_at_the_submit(
    desk_with: Callable[..., Desk], found: list[str]
) -> None:
    desk = desk_with(ABHIAPI_WEBHOOK_ALLOW_LOOPBACK="0")
    names(desk, [found])
    with pytest.raises(WebhookUrlRefused, match="public address"):
        webhook_intake.wished(desk.rt, 1, "fal_webhook=https://x.example/")


def test_a_name_server_that_does_not_answer_holds_up_nobody_else(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "RESOLVE_S", 1)
    stuck = threading.Event()

    def lookup(host: str, port: int) -> list[str]:
        stuck.wait(30)
        return []

    desk.rt.outbound = outbound.Outbound(desk.rt.outbound._allowed, lookup)
    ticks: list[float] = []

    def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            gevent.sleep(0.05)

    ticking = gevent.spawn(tick)
    with pytest.raises(WebhookUrlRefused, match="was not resolved"):
        webhook_intake.wished(desk.rt, 1, "fal_webhook=https://slow.example/")
    ticking.kill()
    stuck.set()
    assert len(ticks) > 5


@pytest.mark.parametrize(("certified", "state"), [("hook.example.test", "delivered"), ("other.example.test", "due")])
def test_tls_is_verified_against_the_name(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certified: str, state: str
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(certified).configure_cert(context)
    names(desk, [["127.0.0.1"]])
    with Receiver.started(context) as secure:
        _, (job,) = desk.wanting(secure.url(host="hook.example.test"))
        desk.settle()
        desk.deliveries.run_until_idle()
        row = desk.row(job)
        assert row.state == state, row.last_error
        assert len(secure.deliveries) == (state == "delivered")


def test_no_proxy_of_the_environment_is_asked(desk: Desk, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    target = webhookwire.target_of(receiver.url())
    assert desk.rt.outbound.post(target, [], b"{}", timeout_s=10) == 200


# --- many, and several at work ----------------------------------------------------------------------------------


@pytest.mark.engines
def test_a_host_that_does_not_answer_keeps_no_other_account_waiting(desk: Desk, receiver: Receiver) -> None:
    with Receiver.started() as dead:
        dead.hold = threading.Event()
        _, stuck = desk.wanting(dead.url(), 3 * webhook_delivery.PER_ACCOUNT)
        desk.settle()
        rounds = gevent.spawn(desk.deliveries.run_for_ever)
        until_here(lambda: len(dead.deliveries) >= webhook_delivery.PER_ACCOUNT)
        _, (job,) = desk.wanting(receiver.url())
        desk.settle()
        until_here(lambda: desk.row(job).state == "delivered")
        assert len(dead.deliveries) == webhook_delivery.PER_ACCOUNT
        dead.hold.set()
        until_here(lambda: all(desk.row(one).state == "delivered" for one in stuck))
        rounds.kill()
        assert len(dead.deliveries) == len(stuck)


@pytest.mark.engines
def test_while_every_place_is_taken_no_account_is_looked_at(
    desk: Desk, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 5,000 accounts that wait, looking at each took 90 ms of the event loop, several times a second."""
    monkeypatch.setattr(webhook_delivery, "DELIVERING_AT_ONCE", 1)
    receiver.hold = threading.Event()
    told = [desk.wanting(receiver.url())[1][0] for _ in range(3)]
    desk.settle()
    deliveries = Deliveries(desk.rt)
    deliveries.start_round()
    deliveries._making.join()
    assert deliveries.start_round() == 1
    looked: list[int] = []
    due = webhooks.due
    monkeypatch.setattr(webhooks, "due", lambda tx, account, **more: looked.append(account) or due(tx, account, **more))
    assert (deliveries.start_round(), looked) == (0, [])
    receiver.hold.set()
    deliveries.run_until_idle()
    deliveries._delivering.join()
    deliveries.run_until_idle()
    assert {desk.row(job).state for job in told} == {"delivered"}


@pytest.mark.engines
def test_of_two_payloads_the_first_counts(desk: Desk, receiver: Receiver) -> None:
    """fal's delivery and our own making of it may meet."""
    _, (job,) = desk.wanting(receiver.url())
    call_id, now = job.call.call_id, desk.clock.now_ms
    assert desk.books.write(lambda tx: webhooks.store(tx, call_id, b'{"first": 1}', now_ms=now))
    assert not desk.books.write(lambda tx: webhooks.store(tx, call_id, b'{"second": 2}', now_ms=now))
    desk.deliveries.run_until_idle()
    assert not desk.books.write(lambda tx: webhooks.store(tx, call_id, b'{"third": 3}', now_ms=now))
    desk.deliveries.run_until_idle()
    assert [one.json for one in receiver.deliveries] == [{"first": 1}]


def until_here(condition: Callable[[], bool]) -> None:
    """Wait while this process's own greenlets work."""
    with gevent.Timeout(30):
        while not condition():
            gevent.sleep(0.01)


@pytest.mark.engines
def test_two_processes_deliver_each_once(desk: Desk, receiver: Receiver) -> None:
    _, found = desk.wanting(receiver.url(), 20)
    desk.settle()
    others = [Deliveries(desk.rt) for _ in range(3)]
    gevent.joinall([gevent.spawn(one.run_until_idle) for one in others], raise_error=True)
    assert sorted(one.json["request_id"] for one in receiver.deliveries) == sorted(job.request_id for job in found)
    assert {desk.row(job).state for job in found} == {"delivered"}


@pytest.mark.engines
def test_what_a_killed_process_was_at_is_taken_up_again(desk: Desk, receiver: Receiver) -> None:
    """The kill left a lease behind, first while the payload was made, then while it was delivered."""
    _, (job,) = desk.wanting(receiver.url())
    desk.settle()
    call_id, now = job.call.call_id, desk.clock.now_ms
    (ready,) = desk.rt.reader.read(lambda tx: webhooks.ended(tx, before=now, most=10))
    assert desk.books.write(lambda tx: webhooks.lease(tx, ready, "waiting", until=now + 1000))
    assert not desk.books.write(lambda tx: webhooks.lease(tx, ready, "waiting", until=now + 2000))
    desk.deliveries.run_until_idle()
    assert desk.row(job).state == "waiting"
    desk.clock.tick(1000)
    desk.books.write(lambda tx: webhooks.store(tx, call_id, b'{"made": 1}', now_ms=desk.clock.now_ms))
    (ready,) = desk.rt.reader.read(lambda tx: webhooks.due(tx, job.call.account_id, now_ms=desk.clock.now_ms, most=10))
    assert desk.books.write(lambda tx: webhooks.lease(tx, ready, "due", until=desk.clock.now_ms + 1000))
    desk.deliveries.run_until_idle()
    assert receiver.deliveries == []
    desk.clock.tick(1000)
    desk.deliveries.run_until_idle()
    assert [one.json for one in receiver.deliveries] == [{"made": 1}]


@pytest.mark.engines
@pytest.mark.parametrize("site", ["desk", "known"])
def test_a_payload_that_was_being_made_at_a_kill_is_made_half_a_minute_later(
    request: pytest.FixtureRequest, site: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making is no delivery: doing it twice harms nobody, so the lease need not outlive the slowest answer of fal's."""
    at: Desk = request.getfixturevalue(site)
    at.wanting(receiver.url())
    at.settle()
    at.clock.tick(webhook_delivery.GRACE_MS)
    killed, asking = Deliveries(at.rt), gevent.event.Event()

    def ask_for_ever(job: Job) -> bytes:
        asking.set()
        gevent.sleep(60)
        raise AssertionError("it was to be killed")

    monkeypatch.setattr(killed, "_payload", ask_for_ever)
    assert killed.start_round() == 1
    assert asking.wait(30)
    killed._making.kill()
    at.deliveries.run_until_idle()
    assert receiver.deliveries == []
    at.clock.tick(30_000)
    at.deliveries.run_until_idle()
    assert len(receiver.deliveries) == 1


@pytest.mark.engines
def test_old_payloads_are_forgotten_with_the_secrets_of_their_urls(desk: Desk, receiver: Receiver) -> None:
    _, (job,) = desk.wanting(receiver.url("/hook?token=secret"))
    desk.settle()
    desk.deliveries.run_until_idle()
    desk.clock.tick(webhooks.KEPT_MS)
    desk.deliveries._drop_old()
    assert desk.row(job).has_payload
    desk.clock.tick(webhook_delivery.DROP_EVERY_MS)
    desk.deliveries._drop_old()
    row = desk.row(job)
    assert (row.has_payload, row.url) == (0, receiver.url("/hook"))
    with pytest.raises(Refused, match="payload"):
        desk.books.write(lambda tx: webhooks.resend(tx, job.call.call_id, now_ms=desk.clock.now_ms))


@pytest.mark.engines
def test_a_large_payload_is_forgotten_once_it_was_delivered(desk: Desk, receiver: Receiver) -> None:
    """Pictures as data URIs would fill the disk; one that could not be delivered is kept for the operator."""
    large = f"size_bytes={webhooks.DELIVERED_KEPT_BYTES + 1}"
    for path, status, has_payload in (("/ok", 200, 0), ("/moved", 302, 1)):
        receiver.statuses = [status]
        _, (job,) = desk.wanting(receiver.url(path), weather=large)
        desk.settle()
        desk.deliveries.run_until_idle()
        assert (desk.row(job).state, desk.row(job).has_payload) == (
            "delivered" if status == 200 else "failed",
            has_payload,
        )


@pytest.mark.engines
def test_a_running_job_or_an_unknown_call_is_not_resent(desk: Desk, receiver: Receiver) -> None:
    _, (job,) = desk.wanting(receiver.url())
    with pytest.raises(Refused, match="not ended"):
        desk.books.write(lambda tx: webhooks.resend(tx, job.call.call_id, now_ms=1))
    with pytest.raises(NotFound):
        desk.books.write(lambda tx: webhooks.resend(tx, 7, now_ms=1))


@pytest.mark.engines
def test_trouble_at_fal_delays_the_payload(desk: Desk, receiver: Receiver) -> None:
    _, (job,) = desk.wanting(receiver.url())
    desk.settle()
    match = f"queue/result/{job.request_id}"
    requests.post(desk.fal.url + "/_sandbox/weather", json=[{"match": match, "status": 403}], timeout=10)
    desk.deliveries.run_until_idle()
    assert (desk.row(job).state, desk.row(job).attempts) == ("waiting", 1)
    desk.clock.tick(10_000)
    desk.deliveries.run_until_idle()
    assert desk.row(job).state == "delivered"


def test_a_result_that_is_too_large_is_announced(desk: Desk, receiver: Receiver) -> None:
    _, _ = desk.wanting(receiver.url(), weather=f"size_bytes={webhookwire.PAYLOAD_BYTES_MAX + 1}")
    desk.settle()
    desk.deliveries.run_until_idle()
    told = receiver.deliveries[0].json
    assert (told["status"], told["payload"], told["payload_error"]) == ("OK", None, webhookwire.TOO_LARGE)
    assert told["_billing"]["credits_used"] == 26.25
