"""The reference pages in Chromium: phone and desk, light and dark, with and without a script, by mouse and keyboard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import Window, opened, program
from tests.harness import Books, Server
from tests.test_quickstart import pasted

ROWS = "table.prices tbody tr"

Open = Callable[..., Page]


@pytest.fixture
def window(browser: Browser, shared_server: Server, axe: str) -> Iterator[Window]:
    with opened(browser, shared_server, axe) as made:
        yield made


@pytest.fixture
def page_at(browser: Browser, shared_server: Server, axe: str) -> Iterator[Open]:
    """Opens pages of the shared server, in windows that hear what goes wrong."""
    with ExitStack() as stack:

        def make(path: str = "/", *, size: str = "wide", scripts: bool = True) -> Page:
            made = stack.enter_context(opened(browser, shared_server, axe, size=size, scripts=scripts))
            made.page.goto(shared_server.url + path)
            made.page.wait_for_load_state("networkidle")
            return made.page

        yield make


def test_every_page_is_fit_for_everybody(window: Window) -> None:
    """The reference, a search without a result, a wrong turn, and each guide (how they are looked at: `browser`)."""
    window.expected = ("status of 404",)
    for path in ("/", "/?q=no-such-model", "/docs/no-such-page"):
        window.go(path)
    guides = [link.get_attribute("href") for link in window.page.locator(".menu a").all()]
    for path in sorted({guide.partition("#")[0] for guide in guides if guide}):
        window.go(path)


def test_light_and_dark_are_the_readers_choice(window: Window) -> None:
    grounds = []
    window.page.goto(window.url)
    for scheme in ("light", "dark"):
        window.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        grounds.append(window.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] == "rgb(255, 255, 255)" != grounds[1]


def test_the_price_list_follows_what_is_typed(page_at: Open) -> None:
    """Without the page being loaded again; the address can be passed on."""
    page = page_at()
    page.evaluate("window.isTheSame = true")
    everything = page.locator(ROWS).count()
    page.get_by_label("Search models").press_sequentially("kling-video master")
    expect(page.locator(".found")).to_contain_text("matching “kling-video master”")
    names = page.locator(f"{ROWS} th").all_inner_texts()
    assert names
    assert all("kling-video" in name and "master" in name for name in names)
    expect(page.get_by_role("status")).to_contain_text(f"of {len(names)} models")
    assert page.evaluate("window.isTheSame") is True
    assert "q=kling-video+master" in page.url
    again = page_at(urlsplit(page.url).path + "?" + urlsplit(page.url).query)
    assert again.locator(f"{ROWS} th").all_inner_texts() == names
    page.get_by_label("Search models").fill("")
    expect(page.locator(ROWS)).to_have_count(everything)


def test_pages_of_the_price_list_turn_in_place(page_at: Open) -> None:
    page = page_at()
    page.evaluate("window.isTheSame = true")
    first = page.locator(f"{ROWS} th").all_inner_texts()
    page.get_by_role("link", name="Next").click()
    expect(page.locator("nav.pages")).to_contain_text("Page 2 of")
    assert not set(first) & set(page.locator(f"{ROWS} th").all_inner_texts())
    page.get_by_role("link", name="Previous").click()
    expect(page.locator(f"{ROWS} th").first).to_have_text(first[0])
    assert page.evaluate("window.isTheSame") is True


def test_everything_is_there_without_a_script(page_at: Open) -> None:
    page = page_at(scripts=False)
    assert page.get_by_role("button", name="Copy").count() == 0
    page.get_by_label("Search models").fill("flux/schnell")
    page.get_by_label("Search models").press("Enter")
    expect(page.locator(f"{ROWS} th").first).to_contain_text("flux/schnell")
    assert page.url.endswith("?q=flux%2Fschnell#prices")
    page.goto(page.url.split("?")[0])
    page.get_by_role("link", name="Next").click()
    expect(page.locator("nav.pages")).to_contain_text("Page 2 of")


def test_what_is_copied_runs(page_at: Open, shared_server: Server, books: Books) -> None:
    """The button copies the command as it stands, and says so; it makes a picture."""
    _, key = books.account()
    page = page_at()
    figure = page.locator("figure.code").filter(has_text="curl -X POST").first
    figure.get_by_role("button", name="Copy").click()
    expect(figure.get_by_role("button")).to_have_text("Copied")
    expect(page.get_by_role("status")).to_have_text("Copied to the clipboard")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == figure.locator("code").inner_text()
    assert json.loads(pasted(copied, shared_server, key))["images"]


def test_copying_works_where_the_page_came_by_plain_http(browser: Browser, shared_server: Server) -> None:
    """Browsers give such a page no clipboard, but for this machine's own address."""
    port = urlsplit(shared_server.url).port
    resolver = "--host-resolver-rules=MAP plain.example.org 127.0.0.1"
    with browser.browser_type.launch(executable_path=program(), args=["--no-sandbox", resolver]) as other:
        page = other.new_page()
        page.goto(f"http://plain.example.org:{port}/")
        assert page.evaluate("navigator.clipboard") is None
        figure = page.locator("figure.code").first
        figure.get_by_role("button", name="Copy").click()
        expect(figure.get_by_role("button")).to_have_text("Copied")
        page.get_by_label("Search models").focus()
        page.keyboard.press("Control+V")
        expect(page.get_by_label("Search models")).to_have_value(figure.locator("code").inner_text())


def test_every_block_of_code_can_be_copied(page_at: Open) -> None:
    page = page_at("/docs/clients")
    assert page.get_by_role("button", name="Copy").count() == page.locator("pre").count() > 5


def test_the_keyboard_suffices(page_at: Open) -> None:
    """The first stop leads past the menu; on a phone the menu opens and closes again."""
    page = page_at(size="phone")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the text")).to_be_focused()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    summary = page.locator("summary")
    expect(page.get_by_role("link", name="Rate Limits")).to_be_hidden()
    summary.focus()
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Rate Limits").click()
    expect(page.locator("#rate-limits")).to_be_in_viewport()
    expect(page.get_by_role("link", name="Rate Limits")).to_be_hidden()


def test_no_text_of_a_page_is_ever_run(browser: Browser, shared_server: Server) -> None:
    """Not even what should get past the escaping: the policy stops it."""
    page = browser.new_page()
    page.goto(shared_server.url)
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.wasRun = true";
            document.body.append(script);
            const other = document.createElement("img");
            other.setAttribute("onerror", "window.wasRun = true");
            other.src = "data:x";
            document.body.append(other);
        }"""
    )
    page.wait_for_load_state("networkidle")
    assert page.evaluate("window.wasRun") is None
    page.close()
