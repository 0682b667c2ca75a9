"""Usage, calls, ledger and jobs in Debian's Chromium, with scripts and without (how pages are looked at: `browser`)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from abhiapi import calls, ledger
from abhiapi.money import Micros
from tests.browser import Window, opened
from tests.harness import Server, until
from tests.people import new_user
from tests.receiver import Receiver

MODELS = ("fal-ai/flux/dev", "fal-ai/flux/schnell", "fal-ai/creative-upscaler")


@pytest.fixture
def server(dashboard: Server) -> Server:
    return dashboard


@pytest.fixture
def window(browser: Browser, server: Server, axe: str) -> Iterator[Window]:
    with opened(browser, server, axe, size="phone") as made:
        yield made


def busy_account(server: Server, hook: str) -> str:
    """An account in which everything has happened that these pages show."""
    name, key = server.books.account(5000)
    for model in MODELS:
        assert server.post(key, f"/{model}", {"prompt": "x", "image_url": "https://example.com/a.jpg"}).ok
    server.post(key, weather="status=500")
    (settled, *_) = [row for row in server.books.calls(name) if row.model == MODELS[0] and row.state == "settled"]
    now = server.books.clock()
    server.books.write(lambda tx: calls.refund(tx, settled.call_id, Micros(1_250), now_ms=now))
    note = "a correction, with a note that is as long as notes of operators can become"
    owner = new_user(server, name).account_id or 0
    server.books.write(lambda tx: ledger.adjust(tx, owner, Micros(-5), note=note, now_ms=now))
    assert server.post(key, f"/queue/{MODELS[0]}?fal_webhook={hook}").ok
    assert server.post(key, f"/queue/{MODELS[1]}", weather="queue_s=600").ok
    return name


def test_from_the_usage_to_a_call_to_its_line_in_the_statement(window: Window, server: Server) -> None:
    """Filters, the drill-down, the statement, the printed statement, jobs, a webhook sent again."""
    page = window.page
    with Receiver.started() as receiver:
        name = busy_account(server, receiver.url("/hook"))
        until(lambda: len(receiver.deliveries) == 1, what="the delivery")
        window.go("/dashboard/usage")
        window.sign_in(new_user(server, name).email)
        expect(page.locator(".legend li")).to_have_count(3)
        expect(page.locator(".chart rect").first).to_be_visible()
        for by in ("key", "day", "model"):
            window.click(f"By {by}")
        page.get_by_label("Model", exact=True).select_option(MODELS[1])
        window.click("Show")
        assert "model=fal-ai" in page.url
        expect(page.get_by_role("rowheader", name=MODELS[1])).to_be_visible()
        expect(page.get_by_role("rowheader", name=MODELS[0])).to_have_count(0)

        window.click("Show all models and keys")
        window.click(f"Calls of {MODELS[0]}")
        page.get_by_label("State", exact=True).select_option("settled")
        window.click("Show")
        page.locator("tbody a").last.click()
        expect(page.get_by_role("heading", name="How this charge came about")).to_be_visible()
        window.look()
        expect(page.get_by_text("1.25 credits were refunded.")).to_be_visible()
        expect(page.get_by_role("rowheader", name=re.compile("^refund"))).to_be_visible()

        window.click("Ledger")
        expect(page.get_by_role("heading", name="Statement")).to_be_visible()
        expect(page.get_by_text("a correction, with a note")).to_be_visible()
        with page.expect_download() as download:
            page.get_by_role("link", name="Download CSV").click()
        assert download.value.suggested_filename.startswith("statement-20")
        page.get_by_role("link", name="To print, whole").click()
        expect(page.get_by_role("heading", name="Statement")).to_be_visible()
        assert page.evaluate("getComputedStyle(document.querySelector('main')).maxWidth") == "832px"  # its style counts

        window.go("/dashboard/jobs")
        expect(page.get_by_text("1 call holds")).to_be_visible()
        until(lambda: page.reload() and page.get_by_text("status 200").count(), what="the delivery is written down")
        window.click(re.compile("^Send again"))
        expect(page.get_by_text("is on its way once more")).to_be_visible()
        until(lambda: len(receiver.deliveries) == 2, what="the second delivery")


def test_an_account_without_anything_reads_well(window: Window, server: Server) -> None:
    user = new_user(server, server.books.account(0)[0])
    window.go("/dashboard/usage")
    window.sign_in(user.email)
    for path, said in (
        ("usage", "No call ended in these days"), ("calls", "No call fits"), ("ledger", "Nothing moved in this month"),
        ("jobs", "No call is open"),
    ):  # fmt: skip
        window.go(f"/dashboard/{path}")
        expect(window.page.get_by_text(said)).to_be_visible()


def test_filters_and_months_need_no_script(browser: Browser, server: Server, axe: str) -> None:
    name, key = server.books.account(100)
    assert server.post(key).ok
    user = new_user(server, name)
    with opened(browser, server, axe, size="phone", scripts=False) as window:
        page = window.page
        window.go("/dashboard/usage")
        window.sign_in(user.email)
        page.get_by_label("Model", exact=True).select_option("fal-ai/flux/dev")
        window.click("Show")
        window.click("Calls of fal-ai/flux/dev")
        page.locator("tbody a").click()
        expect(page.get_by_text("26.25 credits were held")).to_be_visible()
        window.click("Ledger")
        window.click("Show")
        expect(page.get_by_text("Closing balance")).to_be_visible()
        assert user.email in page.content()
