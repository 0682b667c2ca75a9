"""The playground and the operator's pages in Debian's Chromium (how each page is looked at: `browser`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from abhiapi import accounts
from tests.browser import Window, opened
from tests.harness import Fal, Server
from tests.people import new_user


@pytest.fixture
def server(dashboard: Server) -> Server:
    return dashboard


@pytest.fixture
def window(browser: Browser, server: Server, fal: Fal, axe: str) -> Iterator[Window]:
    with opened(browser, server, axe, fal.url) as made:
        yield made


def has_loaded(page: Page, selector: str, what: str) -> None:
    """The browser itself says that a picture or film is there, and not only its element."""
    page.wait_for_function(f"document.querySelector({selector!r})?.{what} > 0")


def test_a_picture_a_film_and_a_refusal(window: Window, server: Server) -> None:
    """The estimate follows what is typed; the picture is there; the charge is in the books."""
    page = window.page
    name, _ = server.books.account(1000)
    window.expected = ("status of 404",)
    window.sign_in(new_user(server, name).email)
    window.click("Playground", exact=True)
    expect(page.locator("[data-credits]")).to_have_text("26.25")
    page.get_by_label("Other parameters, as JSON").fill('{"num_images": 2}')
    expect(page.locator("[data-credits]")).to_have_text("52.5")
    expect(page.locator("[data-sample=curl]")).to_contain_text('"num_images": 2')
    page.get_by_label("Other parameters, as JSON").fill("{")
    expect(page.locator("[data-basis]")).to_contain_text("cannot be read")
    page.get_by_label("Other parameters, as JSON").fill('{"image_size": "landscape_4_3"}')
    expect(page.locator("[data-credits]")).to_have_text("26.25")
    page.get_by_label("Prompt").fill("a red bridge in fog")
    window.click("Run", exact=True)
    has_loaded(page, "img.media", "naturalWidth")
    expect(page.get_by_text("26.25 credits (0.02625 USD)")).to_be_visible()
    assert server.books.standing(name) == (973_750, 0)
    for language in ("Python", "JavaScript"):
        page.get_by_text(language, exact=True).click()
    page.get_by_text("The whole answer").click()
    window.look("playground-picture")

    page.get_by_label("Which one, or a part of its name").fill("kling v1 standard text")
    window.click("Choose", exact=True)
    window.click("fal-ai/kling-video/v1/standard/text-to-video", exact=True)
    page.get_by_label("Prompt").fill("a short film")
    window.click("Run", exact=True)
    has_loaded(page, "video.media", "duration")
    window.look("playground-film")
    window.go("/dashboard/playground?model=fal-ai/dia-tts")
    page.get_by_label("Prompt").fill("what is said")
    window.click("Run", exact=True)
    has_loaded(page, "audio.media", "duration")
    assert len(server.books.calls(name)) == 3
    assert server.books.verify().problems == []

    window.click("Keys", exact=True)
    expect(page.get_by_role("rowheader", name="playground")).to_be_visible()
    account = server.books.read(lambda tx: accounts.find(tx, name))
    assert account is not None
    server.books.write(lambda tx: accounts.set_status(tx, account.account_id, "suspended"))
    window.go("/dashboard/playground")
    expect(page.get_by_role("button", name="Run")).to_have_count(0)


def test_the_playground_works_without_a_script(browser: Browser, server: Server, fal: Fal, axe: str) -> None:
    """Choose, estimate, run, and the picture is there."""
    name, _ = server.books.account(1000)
    with opened(browser, server, axe, fal.url, scripts=False) as window:
        page = window.page
        window.sign_in(new_user(server, name).email)
        window.click("Playground", exact=True)
        window.fill("Other parameters, as JSON", '{"num_images": 3}')
        window.click("Estimate")
        expect(page.locator("[data-credits]")).to_have_text("78.75")
        with page.expect_response(lambda answer: answer.url.endswith(".png")) as picture:
            page.get_by_role("button", name="Run").click()
        assert picture.value.ok
        expect(page.locator("img.media")).to_have_count(3)
        assert server.books.standing(name) == (1_000_000 - 78_750, 0)


def test_an_operators_round(window: Window, server: Server) -> None:
    """Search, top up, suspend and resume, settle a hold, revenue, attention: each change asked about, then done."""
    page = window.page
    name, key = server.books.account(1000)
    for model in ("fal-ai/flux/dev", "fal-ai/flux/schnell"):
        assert server.post(key, f"/{model}").ok
    lost = server.post(key, "/fal-ai/fast-sdxl", weather="units=none").headers["x-abhiapi-call-id"]
    new_user(server, name)
    window.sign_in(new_user(server, None, is_operator=True).email)
    page.get_by_label("Part of a name").fill(name)
    window.click("Search", exact=True)
    window.click(name, exact=True)
    page.get_by_label("Amount").fill("49.90")
    page.get_by_label("US dollars").check()
    page.get_by_label("The payment's own number").fill("invoice-118")
    window.click("Top up", exact=True)
    expect(page.get_by_text("49,900 credits")).to_be_visible()
    window.click("Add the credit", exact=True)
    expect(page.get_by_text("49,900 credits were added.")).to_be_visible()
    window.click("Suspend", exact=True)
    window.click("Suspend", exact=True)
    assert server.post(key).json()["error"]["type"] == "account_suspended"
    window.click("Resume", exact=True)
    window.click("Resume", exact=True)
    assert server.post(key).ok
    window.click("Attention", exact=True)
    window.click("Open holds", exact=True)
    window.click(f"Settle {lost}", exact=True)
    page.get_by_label("Credits to charge").fill("10")
    window.click("Charge it", exact=True)
    expect(page.get_by_text(f"{lost} of {name} was charged 10 credits.")).to_be_visible()
    window.click("Revenue", exact=True)
    expect(page.locator(".chart rect.series-0").first).to_be_visible()
    page.get_by_text("The same as a table").click()
    window.look()
    assert server.books.standing(name)[1] == 0
    assert server.books.verify().problems == []
