"""The reference pages in Chromium: phone and desk, light and dark, with and without a script, by mouse and keyboard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.harness import Books, Server
from tests.test_queue_clients import node_folder
from tests.test_quickstart import pasted
from tests.test_target_clients import browser

__all__ = ["browser", "node_folder"]  # fixtures

PHONE, DESK = 390, 1440
HEIGHT = 900
ROWS = "table.prices tbody tr"

Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, shared_server: Server) -> Iterator[Open]:
    """Opens a page of the shared server; afterwards nothing has been complained of or asked of anybody else."""
    trouble: list[str] = []
    host = urlsplit(shared_server.url).netloc
    contexts = []

    def make(path: str = "/", *, width: int = DESK, scheme: str = "light", scripts: bool = True) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": HEIGHT},
            color_scheme=scheme,  # type: ignore[arg-type]
            java_script_enabled=scripts,
            permissions=["clipboard-read", "clipboard-write"],
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: trouble.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        page.on("request", lambda asked: trouble.extend([asked.url] if urlsplit(asked.url).netloc != host else []))
        page.on("response", lambda answer: trouble.extend([f"{answer.status} {answer.url}"] if not answer.ok else []))
        page.goto(shared_server.url + path)
        page.wait_for_load_state("networkidle")
        return page

    yield make
    for context in contexts:
        context.close()
    assert trouble == []


@pytest.fixture(scope="session")
def axe(node_folder: Path) -> str:
    return (node_folder / "node_modules/axe-core/axe.min.js").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("path", ["/", "/?q=no-such-model", "/docs/clients", "/docs/api"])
def test_a_page_is_fit_for_everybody(opened: Open, axe: str, path: str, width: int, scheme: str) -> None:
    """No line of axe-core's, nothing wider than the window, nothing in the console."""
    page = opened(path, width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.evaluate(axe)
    found = page.evaluate("axe.run().then((results) => results.violations)")
    told = [f"{each['id']}: {[node['html'] for node in each['nodes']][:3]}" for each in found]
    assert told == [], json.dumps(told, indent=1)
    assert page.evaluate("axe.run().then((results) => results.passes.length)") > 20


@pytest.mark.parametrize("path", ["/docs/browser", "/docs/any-client", "/docs/webhooks", "/docs/uploads"])
def test_no_guide_is_wider_than_a_phone(opened: Open, path: str) -> None:
    page = opened(path, width=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE


def test_light_and_dark_are_the_readers_choice(opened: Open) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    assert opened(scheme="light").evaluate(ground) == "rgb(255, 255, 255)"
    assert opened(scheme="dark").evaluate(ground) != "rgb(255, 255, 255)"


def test_the_price_list_follows_what_is_typed(opened: Open) -> None:
    """Without the page being loaded again; the address can be passed on."""
    page = opened()
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
    again = opened(urlsplit(page.url).path + "?" + urlsplit(page.url).query)
    assert again.locator(f"{ROWS} th").all_inner_texts() == names
    page.get_by_label("Search models").fill("")
    expect(page.locator(ROWS)).to_have_count(everything)


def test_pages_of_the_price_list_turn_in_place(opened: Open) -> None:
    page = opened()
    page.evaluate("window.isTheSame = true")
    first = page.locator(f"{ROWS} th").all_inner_texts()
    page.get_by_role("link", name="Next").click()
    expect(page.locator("nav.pages")).to_contain_text("Page 2 of")
    assert not set(first) & set(page.locator(f"{ROWS} th").all_inner_texts())
    page.get_by_role("link", name="Previous").click()
    expect(page.locator(f"{ROWS} th").first).to_have_text(first[0])
    assert page.evaluate("window.isTheSame") is True


def test_everything_is_there_without_a_script(opened: Open) -> None:
    page = opened(scripts=False)
    assert page.get_by_role("button", name="Copy").count() == 0
    page.get_by_label("Search models").fill("flux/schnell")
    page.get_by_label("Search models").press("Enter")
    expect(page.locator(f"{ROWS} th").first).to_contain_text("flux/schnell")
    assert page.url.endswith("?q=flux%2Fschnell#prices")
    page.goto(page.url.split("?")[0])
    page.get_by_role("link", name="Next").click()
    expect(page.locator("nav.pages")).to_contain_text("Page 2 of")


def test_what_is_copied_runs(opened: Open, shared_server: Server, books: Books) -> None:
    """The button copies the command as it stands, and says so; it makes a picture."""
    _, key = books.account()
    page = opened()
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
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    resolver = "--host-resolver-rules=MAP plain.example.org 127.0.0.1"
    with browser.browser_type.launch(executable_path=chromium, args=["--no-sandbox", resolver]) as other:
        page = other.new_page()
        page.goto(f"http://plain.example.org:{port}/")
        assert page.evaluate("navigator.clipboard") is None
        figure = page.locator("figure.code").first
        figure.get_by_role("button", name="Copy").click()
        expect(figure.get_by_role("button")).to_have_text("Copied")
        page.get_by_label("Search models").focus()
        page.keyboard.press("Control+V")
        expect(page.get_by_label("Search models")).to_have_value(figure.locator("code").inner_text())


def test_every_block_of_code_can_be_copied(opened: Open) -> None:
    page = opened("/docs/clients")
    assert page.get_by_role("button", name="Copy").count() == page.locator("pre").count() > 5


def test_the_keyboard_suffices(opened: Open) -> None:
    """The first stop leads past the menu; on a phone the menu opens and closes again."""
    page = opened(width=PHONE)
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
