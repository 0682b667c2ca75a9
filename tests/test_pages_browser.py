"""The dashboard in Debian's Chromium: from the invitation to a charge, on a phone and a wide screen, light and dark."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import requests
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from abhiapi import accounts, users
from abhiapi.db import Tx
from tests.harness import ROOT, Fal, Process, Server, environment, free_port, until
from tests.people import PASSWORD, new_address, new_email, new_user
from tests.test_queue_clients import node_folder

__all__ = ["node_folder"]  # a fixture

Scheme = Literal["light", "dark"]
SIZES = {"phone": (390, 844), "wide": (1440, 900)}
SCREENS = [(size, scheme) for size in SIZES for scheme in ("light", "dark")]
AXE_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@pytest.fixture(scope="module")
def server(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.started(tmp_path_factory.mktemp("pages"), fal.url, ABHIAPI_TRUSTED_PROXIES="1") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, without a window. A machine without it fails here."""
    found = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
    assert found, "no chromium on this machine: install it (Debian: apt-get install chromium), as .ci/run does"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@dataclass
class Screen:
    """A browser's window, and what must not be heard of it: errors, other hosts, a sideways scroll, axe's findings."""

    page: Page
    context: BrowserContext
    server: Server
    axe: str
    errors: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)  # parts of console messages that this test is about

    def go(self, path: str) -> None:
        self.page.goto(self.server.url + path)
        self.check()

    def click(self, name: str | re.Pattern[str]) -> None:
        """Press the button, or follow the link, of this name; then look at the page it leads to."""
        named = self.page.get_by_role("button", name=name).or_(self.page.get_by_role("link", name=name))
        with self.page.expect_navigation():
            named.first.click()
        self.check()

    def fill(self, label: str, text: str) -> None:
        self.page.get_by_label(label, exact=True).fill(text)

    def check(self) -> None:
        page = self.page
        width = page.evaluate("document.documentElement.clientWidth")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{page.url} scrolls sideways"
        assert page.title().endswith(" · AbhiAPI")
        page.evaluate(self.axe)
        found: dict[str, Any] = page.evaluate("tags => axe.run({runOnly: tags})", AXE_TAGS)
        wrong = [(item["id"], [node["html"] for node in item["nodes"]]) for item in found["violations"]]
        assert wrong == [], page.url
        folder = os.environ.get("SCREENSHOTS")  # to look at: SCREENSHOTS=folder pytest tests/test_pages_browser.py
        if folder:
            assert page.viewport_size is not None
            scheme = "dark" if page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") else "light"
            name = re.sub(r"\W+", "-", page.title().partition(" · ")[0].lower())
            page.screenshot(path=f"{folder}/{name}-{page.viewport_size['width']}-{scheme}.png", full_page=True)

    def done(self) -> None:
        heard = [error for error in self.errors if not any(part in error for part in self.expected)]
        assert heard == []


def opened(browser: Browser, server: Server, axe: str, size: str, scheme: Scheme, **more: Any) -> Screen:
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        extra_http_headers={"X-Forwarded-For": new_address()},
        **more,
    )
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(20_000)
    screen = Screen(page, context, server, axe)
    page.on("console", lambda said: screen.errors.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: screen.errors.append(str(error)))
    page.on(
        "request",
        lambda asked: None if asked.url.startswith(server.url) else screen.errors.append(f"asked for {asked.url}"),
    )
    return screen


@pytest.fixture(scope="module")
def axe(node_folder: Path) -> str:
    return (node_folder / "node_modules/axe-core/axe.min.js").read_text()


@pytest.fixture(params=SCREENS, ids=["-".join(screen) for screen in SCREENS])
def screen(browser: Browser, server: Server, axe: str, request: pytest.FixtureRequest) -> Iterator[Screen]:
    made = opened(browser, server, axe, *request.param)
    yield made
    made.done()
    made.context.close()


def invitation(server: Server, account: str, email: str) -> str:
    def op(tx: Tx) -> str:
        owner = accounts.find(tx, account)
        assert owner is not None
        return users.invite(tx, email, account_id=owner.account_id, now_ms=server.books.clock())[0]

    return f"/dashboard/invite/{server.books.write(op)}"


def sign_in(screen: Screen, email: str, password: str = PASSWORD) -> None:
    screen.fill("E-mail", email)
    screen.fill("Password", password)
    screen.click("Sign in")


def shown_key(screen: Screen) -> str:
    text = screen.page.locator("#key").text_content()
    assert text is not None
    return text


def test_from_an_invitation_to_a_charge_and_a_new_key(screen: Screen) -> None:
    """Invited, a password, signed out and in again, a key, a call with it, the charge, the key replaced and revoked."""
    server, page = screen.server, screen.page
    name, _ = server.books.account(100)
    email = new_email()
    screen.go(invitation(server, name, email))
    screen.fill("Password", PASSWORD)
    screen.fill("The same again", PASSWORD)
    screen.click("Set the password and sign in")
    expect(page.get_by_text("Your password is set.")).to_be_visible()
    screen.click("Sign out")
    sign_in(screen, email)
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    expect(page.get_by_text("Nothing was spent in the last 30 days.")).to_be_visible()

    screen.click("Keys")
    screen.fill("Name (optional)", "production")
    screen.click("Create key")
    key = shown_key(screen)
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == key
    assert server.post(key).json()["_billing"]["balance_remaining"] == 73.75

    screen.go("/dashboard/")
    tiles = page.locator(".tiles")
    expect(tiles.get_by_text("73.75").first).to_be_visible()
    expect(tiles.get_by_text("26.25").first).to_be_visible()  # spent today
    expect(page.locator(".chart rect.series-0").first).to_be_visible()
    page.get_by_text("The same as a table").click()
    screen.check()
    expect(page.get_by_role("row", name=re.compile(r"flux.dev .* settled .*26\.25"))).to_be_visible()

    screen.click("Keys")
    screen.click("Rotate production")
    page.get_by_label("in an hour").check()
    screen.click("Rotate")
    new = shown_key(screen)
    assert new != key
    assert [server.post(each).status_code for each in (key, new)] == [200, 200]  # the grace period

    screen.click("To your keys")
    screen.click("Disable production")
    screen.click("Disable")
    expect(page.get_by_text("The key 'production' is disabled.")).to_be_visible()
    assert server.post(new).json()["error"]["type"] == "key_disabled"
    screen.click("Enable production")
    screen.click("Enable")
    screen.click("Revoke production")
    screen.click("Revoke")
    assert server.post(new).json()["error"]["type"] == "key_revoked"
    assert server.books.standing(name) == (21_250, 0)
    assert server.books.verify().problems == []


def test_every_other_page(screen: Screen) -> None:
    """Those that the story above does not come to: wrong passwords, errors, suspension, an operator, a full chart."""
    server, page = screen.server, screen.page
    name, key = server.books.account(5000)
    user = new_user(server, name, is_operator=True)
    screen.expected = ["status of 401", "status of 404", "status of 422"]  # which Chromium tells of every such page
    for model in ("fal-ai/flux/dev", "fal-ai/flux/schnell", "fal-ai/creative-upscaler"):
        assert server.post(key, f"/{model}", {"prompt": "x", "image_url": "https://example.com/a.jpg"}).ok
    screen.go("/dashboard/keys")
    sign_in(screen, user.email, "not the password")
    expect(page.get_by_role("alert")).to_contain_text("do not go together")
    sign_in(screen, user.email)
    assert page.url.endswith("/dashboard/keys")
    screen.go("/dashboard/")
    assert page.locator(".legend li").count() == 3
    screen.click("Account")
    screen.fill("Current password", "wrong")
    screen.fill("New password", "a good new one")
    screen.fill("The same again", "a good new one")
    screen.click("Change the password")
    expect(page.get_by_role("alert")).to_contain_text("not your current password")
    screen.click("All accounts")
    screen.go("/dashboard/nothing-here")
    server.books.write(lambda tx: accounts.set_status(tx, user.account_id or 0, "suspended"))
    screen.go("/dashboard/keys")
    expect(page.get_by_text("This account is suspended.")).to_be_visible()
    expect(page.get_by_role("button", name="Create key")).to_have_count(0)
    screen.go("/dashboard/account")
    screen.click("Sign out everywhere")
    expect(page.get_by_text("You have signed out everywhere.")).to_be_visible()


def test_everything_works_without_a_script(browser: Browser, server: Server, axe: str) -> None:
    """The same forms and links; only copying by a button is not there."""
    screen = opened(browser, server, axe, "phone", "light", java_script_enabled=False)
    page = screen.page
    name, _ = server.books.account(100)
    page.goto(server.url + invitation(server, name, new_email()))
    screen.fill("Password", PASSWORD)
    screen.fill("The same again", PASSWORD)
    page.get_by_role("button", name="Set the password").click()
    page.get_by_role("link", name="Keys").click()
    page.get_by_role("button", name="Create key").click()
    key = shown_key(screen)
    expect(page.get_by_role("button", name="Copy")).to_have_count(0)
    assert server.post(key).status_code == 200
    page.get_by_role("link", name="To your keys").click()
    page.get_by_role("link", name="Revoke").first.click()
    page.get_by_role("button", name="Revoke").click()
    assert server.post(key).status_code == 403
    screen.done()
    screen.context.close()


def test_the_keyboard_alone_is_enough(browser: Browser, server: Server, axe: str) -> None:
    """The first stop leads past the navigation; the form is sent by Enter."""
    user = new_user(server, server.books.account(1)[0])
    screen = opened(browser, server, axe, "wide", "light")
    page = screen.page
    screen.go("/dashboard/sign-in")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_label("E-mail")).to_be_focused()
    page.keyboard.type(user.email)
    page.keyboard.press("Tab")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    screen.done()
    screen.context.close()


def test_a_newcomer_is_in_with_one_click(browser: Browser, tmp_path: Path) -> None:
    """`serve --sandbox --demo` prints a link; the key that the page makes pays with play money."""
    url = f"http://127.0.0.1:{free_port()}"
    env = environment(ABHIAPI_DATABASE_URL=f"sqlite:///{tmp_path / 'sandbox.db'}")
    arguments = ["cli.py", "serve", "--sandbox", "--demo", "--bind", url.removeprefix("http://")]
    process = Process.start(arguments, tmp_path / "log", env, cwd=ROOT)
    try:
        until(lambda: "Then look at the books" in process.output(), what="it serves", within_s=30)
        (link,) = re.findall(rf"{re.escape(url)}/dashboard/demo/\S+", process.output())
        page = browser.new_page()
        page.goto(link)
        expect(page.get_by_role("heading", name="Overview")).to_be_visible()
        page.get_by_role("link", name="Keys").click()
        page.get_by_role("button", name="Create key").click()
        key = page.locator("#key").text_content()
        answer = requests.post(
            f"{url}/fal-ai/flux/dev", json={"prompt": "x"}, headers={"x-api-key": key or ""}, timeout=30
        )
        assert answer.json()["_billing"]["balance_remaining"] == 4973.75
        page.get_by_role("link", name="All accounts").click()
        expect(page.get_by_role("row", name=re.compile("demo"))).to_be_visible()
        page.close()
    finally:
        process.kill()
