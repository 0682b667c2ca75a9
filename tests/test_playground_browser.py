"""The playground and the operator's pages in Debian's Chromium: on a phone and a wide screen, in light and dark."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from abhiapi import accounts
from tests.harness import Fal, Server
from tests.people import PASSWORD, new_address, new_user
from tests.test_queue_clients import node_folder

__all__ = ["node_folder"]  # a fixture

Scheme = Literal["light", "dark"]
SIZES = {"phone": (390, 844), "wide": (1440, 900)}
SCREENS = [("phone", "light"), ("wide", "dark")]
AXE_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@pytest.fixture(scope="module")
def server(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.started(tmp_path_factory.mktemp("play"), fal.url, ABHIAPI_TRUSTED_PROXIES="1") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
    assert found, "no chromium on this machine: install it (Debian: apt-get install chromium), as .ci/run does"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def axe(node_folder: Path) -> str:
    return (node_folder / "node_modules/axe-core/axe.min.js").read_text()


@dataclass
class Window:
    """A browser's window, and what must not be heard of it: errors, other hosts, a sideways scroll, axe's findings."""

    page: Page
    server: Server
    axe: str
    errors: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()

    def go(self, path: str) -> None:
        self.page.goto(self.server.url + path)
        self.check()

    def press(self, name: str | re.Pattern[str]) -> None:
        named = self.page.get_by_role("button", name=name, exact=True)
        named = named.or_(self.page.get_by_role("link", name=name, exact=True))
        with self.page.expect_navigation():
            named.first.click()
        self.check()

    def sign_in(self, email: str) -> None:
        self.page.goto(self.server.url + "/dashboard/sign-in")
        self.page.get_by_label("E-mail").fill(email)
        self.page.get_by_label("Password").fill(PASSWORD)
        self.press("Sign in")

    def check(self, name: str = "") -> None:
        page = self.page
        width = page.evaluate("document.documentElement.clientWidth")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{page.url} scrolls sideways"
        page.evaluate(self.axe)
        found: dict[str, Any] = page.evaluate("tags => axe.run({runOnly: tags})", AXE_TAGS)
        wrong = [(item["id"], [node["html"] for node in item["nodes"]]) for item in found["violations"]]
        assert wrong == [], page.url
        folder = os.environ.get("SCREENSHOTS")  # to look at
        if folder:
            assert page.viewport_size is not None
            scheme = "dark" if page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") else "light"
            title = name or re.sub(r"\W+", "-", page.title().partition(" · ")[0].lower())
            page.screenshot(path=f"{folder}/{title}-{page.viewport_size['width']}-{scheme}.png", full_page=True)


def opened(
    browser: Browser, server: Server, fal: Fal, axe: str, size: str = "wide", scheme: Scheme = "light", **more: Any
) -> Iterator[Window]:
    context = browser.new_context(
        viewport={"width": SIZES[size][0], "height": SIZES[size][1]},
        color_scheme=scheme,
        extra_http_headers={"X-Forwarded-For": new_address()},
        **more,
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    window = Window(page, server, axe)
    page.on("console", lambda said: window.errors.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: window.errors.append(str(error)))
    hosts = (server.url, fal.url)
    page.on("request", lambda asked: None if asked.url.startswith(hosts) else window.errors.append(asked.url))
    yield window
    assert [error for error in window.errors if not any(part in error for part in window.expected)] == []
    context.close()


@pytest.fixture(params=SCREENS, ids=["-".join(screen) for screen in SCREENS])
def window(browser: Browser, server: Server, fal: Fal, axe: str, request: pytest.FixtureRequest) -> Iterator[Window]:
    yield from opened(browser, server, fal, axe, *request.param)


def has_loaded(page: Page, selector: str, what: str) -> None:
    """The browser itself says that a picture or film is there, and not only its element."""
    page.wait_for_function(f"document.querySelector({selector!r})?.{what} > 0")


def test_a_picture_a_film_and_a_refusal(window: Window) -> None:
    """The estimate follows what is typed; the picture is there; the charge is in the books."""
    server, page = window.server, window.page
    name, _ = server.books.account(1000)
    window.expected = ("status of 404",)
    window.sign_in(new_user(server, name).email)
    window.press("Playground")
    expect(page.locator("[data-credits]")).to_have_text("26.25")
    page.get_by_label("Other parameters, as JSON").fill('{"num_images": 2}')
    expect(page.locator("[data-credits]")).to_have_text("52.5")
    expect(page.locator("[data-sample=curl]")).to_contain_text('"num_images": 2')
    page.get_by_label("Other parameters, as JSON").fill("{")
    expect(page.locator("[data-basis]")).to_contain_text("cannot be read")
    page.get_by_label("Other parameters, as JSON").fill('{"image_size": "landscape_4_3"}')
    expect(page.locator("[data-credits]")).to_have_text("26.25")
    page.get_by_label("Prompt").fill("a red bridge in fog")
    window.press("Run")
    has_loaded(page, "img.media", "naturalWidth")
    expect(page.get_by_text("26.25 credits (0.02625 USD)")).to_be_visible()
    assert server.books.standing(name) == (973_750, 0)
    for language in ("Python", "JavaScript"):
        page.get_by_text(language, exact=True).click()
    page.get_by_text("The whole answer").click()
    window.check("playground-picture")

    page.get_by_label("Which one, or a part of its name").fill("kling v1 standard text")
    window.press("Choose")
    window.press("fal-ai/kling-video/v1/standard/text-to-video")
    page.get_by_label("Prompt").fill("a short film")
    window.press("Run")
    has_loaded(page, "video.media", "duration")
    window.check("playground-film")
    window.go("/dashboard/playground?model=fal-ai/dia-tts")
    page.get_by_label("Prompt").fill("what is said")
    window.press("Run")
    has_loaded(page, "audio.media", "duration")
    assert len(server.books.calls(name)) == 3
    assert server.books.verify().problems == []

    window.press("Keys")
    expect(page.get_by_role("rowheader", name="playground")).to_be_visible()
    account = server.books.read(lambda tx: accounts.find(tx, name))
    assert account is not None
    server.books.write(lambda tx: accounts.set_status(tx, account.account_id, "suspended"))
    window.go("/dashboard/playground")
    expect(page.get_by_role("button", name="Run")).to_have_count(0)


def test_the_playground_works_without_a_script(browser: Browser, server: Server, fal: Fal) -> None:
    """Choose, estimate, run, and the picture is there."""
    name, _ = server.books.account(1000)
    for window in opened(browser, server, fal, "", java_script_enabled=False):
        page = window.page
        page.goto(server.url + "/dashboard/sign-in")
        page.get_by_label("E-mail").fill(new_user(server, name).email)
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("link", name="Playground").click()
        page.get_by_label("Other parameters, as JSON").fill('{"num_images": 3}')
        page.get_by_role("button", name="Estimate").click()
        expect(page.locator("[data-credits]")).to_have_text("78.75")
        with page.expect_response(lambda answer: answer.url.endswith(".png")) as picture:
            page.get_by_role("button", name="Run").click()
        assert picture.value.ok
        expect(page.locator("img.media")).to_have_count(3)
        assert server.books.standing(name) == (1_000_000 - 78_750, 0)


def test_an_operators_round(window: Window) -> None:
    """Search, top up, suspend and resume, settle a hold, revenue, attention: each change asked about, then done."""
    server, page = window.server, window.page
    name, key = server.books.account(1000)
    for model in ("fal-ai/flux/dev", "fal-ai/flux/schnell"):
        assert server.post(key, f"/{model}").ok
    lost = server.post(key, "/fal-ai/fast-sdxl", weather="units=none").headers["x-abhiapi-call-id"]
    new_user(server, name)
    window.sign_in(new_user(server, None, is_operator=True).email)
    page.get_by_label("Part of a name").fill(name)
    window.press("Search")
    window.press(name)
    page.get_by_label("Amount").fill("49.90")
    page.get_by_label("US dollars").check()
    page.get_by_label("The payment's own number").fill("invoice-118")
    window.press("Top up")
    expect(page.get_by_text("49,900 credits")).to_be_visible()
    window.press("Add the credit")
    expect(page.get_by_text("49,900 credits were added.")).to_be_visible()
    window.press("Suspend")
    window.press("Suspend")
    assert server.post(key).json()["error"]["type"] == "account_suspended"
    window.press("Resume")
    window.press("Resume")
    assert server.post(key).ok
    window.press("Attention")
    window.press("Open holds")
    window.press(f"Settle {lost}")
    page.get_by_label("Credits to charge").fill("10")
    window.press("Charge it")
    expect(page.get_by_text(f"{lost} of {name} was charged 10 credits.")).to_be_visible()
    window.press("Revenue")
    expect(page.locator(".chart rect.series-0").first).to_be_visible()
    page.get_by_text("The same as a table").click()
    window.check()
    assert server.books.standing(name)[1] == 0
    assert server.books.verify().problems == []
