"""Usage, calls, ledger and jobs in Debian's Chromium: on a phone and a wide screen, light and dark, with and without
scripts."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from abhiapi import calls, ledger
from abhiapi.money import Micros
from tests.harness import Fal, Server, until
from tests.people import new_user
from tests.receiver import Receiver
from tests.test_pages_browser import SCREENS, Screen, axe, browser, node_folder, opened, sign_in

__all__ = ["axe", "browser", "node_folder"]  # fixtures

MODELS = ("fal-ai/flux/dev", "fal-ai/flux/schnell", "fal-ai/creative-upscaler")


@pytest.fixture(scope="module")
def server(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"ABHIAPI_TRUSTED_PROXIES": "1", "ABHIAPI_WEBHOOK_ALLOW_LOOPBACK": "1"}
    with Server.started(tmp_path_factory.mktemp("figures"), fal.url, **settings) as running:
        yield running


@pytest.fixture(params=SCREENS, ids=["-".join(screen) for screen in SCREENS])
def screen(browser: Browser, server: Server, axe: str, request: pytest.FixtureRequest) -> Iterator[Screen]:
    made = opened(browser, server, axe, *request.param)
    yield made
    made.done()
    made.context.close()


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


def test_from_the_usage_to_a_call_to_its_line_in_the_statement(screen: Screen) -> None:
    """Filters, the drill-down, the statement, the printed statement, jobs, a webhook sent again."""
    server, page = screen.server, screen.page
    with Receiver.started() as receiver:
        name = busy_account(server, receiver.url("/hook"))
        until(lambda: len(receiver.deliveries) == 1, what="the delivery")
        screen.go("/dashboard/usage")
        sign_in(screen, new_user(server, name).email)
        expect(page.locator(".legend li")).to_have_count(3)
        expect(page.locator(".chart rect").first).to_be_visible()
        for by in ("key", "day", "model"):
            screen.click(f"By {by}")
        page.get_by_label("Model", exact=True).select_option(MODELS[1])
        screen.click("Show")
        assert "model=fal-ai" in page.url
        expect(page.get_by_role("rowheader", name=MODELS[1])).to_be_visible()
        expect(page.get_by_role("rowheader", name=MODELS[0])).to_have_count(0)

        screen.click("Show all models and keys")
        screen.click(f"Calls of {MODELS[0]}")
        page.get_by_label("State", exact=True).select_option("settled")
        screen.click("Show")
        page.locator("tbody a").last.click()
        expect(page.get_by_role("heading", name="How this charge came about")).to_be_visible()
        screen.check()
        expect(page.get_by_text("1.25 credits were refunded.")).to_be_visible()
        expect(page.get_by_role("rowheader", name=re.compile("^refund"))).to_be_visible()

        screen.click("Ledger")
        expect(page.get_by_role("heading", name="Statement")).to_be_visible()
        expect(page.get_by_text("a correction, with a note")).to_be_visible()
        with page.expect_download() as download:
            page.get_by_role("link", name="Download CSV").click()
        assert download.value.suggested_filename.startswith("statement-20")
        page.get_by_role("link", name="To print, whole").click()
        expect(page.get_by_role("heading", name="Statement")).to_be_visible()
        assert page.evaluate("getComputedStyle(document.querySelector('main')).maxWidth") == "832px"  # its style counts

        screen.go("/dashboard/jobs")
        expect(page.get_by_text("1 call holds")).to_be_visible()
        until(lambda: page.reload() and page.get_by_text("status 200").count(), what="the delivery is written down")
        screen.click(re.compile("^Send again"))
        expect(page.get_by_text("is on its way once more")).to_be_visible()
        until(lambda: len(receiver.deliveries) == 2, what="the second delivery")


def test_an_account_without_anything_reads_well(screen: Screen) -> None:
    user = new_user(screen.server, screen.server.books.account(0)[0])
    screen.go("/dashboard/usage")
    sign_in(screen, user.email)
    for path, said in (
        ("usage", "No call ended in these days"), ("calls", "No call fits"), ("ledger", "Nothing moved in this month"),
        ("jobs", "No call is open"),
    ):  # fmt: skip
        screen.go(f"/dashboard/{path}")
        expect(screen.page.get_by_text(said)).to_be_visible()


def test_filters_and_months_need_no_script(browser: Browser, server: Server, axe: str) -> None:
    made = opened(browser, server, axe, "phone", "light", java_script_enabled=False)
    page = made.page
    name, key = server.books.account(100)
    assert server.post(key).ok
    page.goto(server.url + "/dashboard/usage")
    made.fill("E-mail", (user := new_user(server, name)).email)
    made.fill("Password", "correct horse battery")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_label("Model", exact=True).select_option("fal-ai/flux/dev")
    page.get_by_role("button", name="Show").click()
    page.get_by_role("link", name="Calls of fal-ai/flux/dev").click()
    page.locator("tbody a").click()
    expect(page.get_by_text("26.25 credits were held")).to_be_visible()
    page.get_by_role("link", name="Ledger").click()
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_text("Closing balance")).to_be_visible()
    assert user.email in page.content()
    made.done()
    made.context.close()
