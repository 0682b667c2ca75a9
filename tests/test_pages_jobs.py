"""Jobs at the dashboard: those that run, and webhooks that their customer may send once more."""

from __future__ import annotations

import re

import pytest

from abhiapi import accounts, ids
from tests.harness import Server, until
from tests.people import Customer, Person, address_of, text_of
from tests.receiver import Receiver


@pytest.fixture
def server(dashboard: Server) -> Server:
    return dashboard


@pytest.fixture
def customer(server: Server) -> Customer:
    return Customer.new(server)


def test_open_jobs_stand_with_their_age_until_they_end(customer: Customer) -> None:
    assert "No call is open" in customer.page("/dashboard/jobs")
    row = customer.call("/queue/fal-ai/flux/dev", weather="queue_s=600")
    shown = text_of(customer.page("/dashboard/jobs"))
    assert "1 call holds" in shown
    assert row.fal_request_id in shown
    assert re.search(r"\d s queue sent", shown)
    assert ids.call_text(row.call_id) in customer.page("/dashboard/calls?state=sent")


def test_a_webhook_is_sent_again_by_its_own_customer_only(server: Server, customer: Customer) -> None:
    """By a form with its token; the host is shown, the rest of the address is not."""
    with Receiver.started() as receiver:
        secret = "path-and-query-secret"
        row = customer.call(f"/queue/fal-ai/flux/dev?fal_webhook={receiver.url(f'/{secret}')}")
        until(lambda: len(receiver.deliveries) == 1, what="the delivery")
        call_id = ids.call_text(row.call_id)
        until(lambda: "delivered" in customer.page("/dashboard/jobs"), what="it is written down")
        for path in ("/dashboard/jobs", address_of(row)):
            page = customer.page(path)
            assert "127.0.0.1" in page
            assert secret not in page
            assert "status 200" in page
            assert f"/dashboard/jobs/{call_id}/resend" in page
        resend = f"/dashboard/jobs/{call_id}/resend"
        assert customer.person.post_bare(resend, {}).status_code == 400
        assert customer.person.get(resend).status_code in (404, 405)
        assert Person(server).post(resend).status_code == 302
        assert Customer.new(server).person.post(resend).status_code == 404
        server.books.write(lambda tx: accounts.set_status(tx, customer.account_id, "suspended"))
        assert customer.person.post(resend).status_code == 403
        assert "Send again" not in customer.page("/dashboard/jobs")
        server.books.write(lambda tx: accounts.set_status(tx, customer.account_id, "active"))
        assert len(receiver.deliveries) == 1
        assert customer.person.post(resend).status_code == 303
        until(lambda: len(receiver.deliveries) == 2, what="the second delivery")


def test_resending_has_a_limit(customer: Customer) -> None:
    """A customer's webhook is no hammer."""
    row = customer.call("/queue/fal-ai/flux/dev?fal_webhook=http://127.0.0.1:9/hook")
    form = {"csrf_token": customer.person.csrf_token()}
    path = f"/dashboard/jobs/{ids.call_text(row.call_id)}/resend"
    statuses = [customer.person.post_bare(path, form).status_code for _ in range(31)]
    assert set(statuses[:30]) <= {303, 409}
    assert statuses[30] == 429
