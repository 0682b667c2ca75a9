"""The dashboard in Debian's Chromium: from the invitation to a charge, on a phone and a wide screen, light and dark."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from abhiapi import accounts
from tests.browser import Window, opened, shown_key
from tests.harness import ROOT, Process, Server, environment, free_port, until
from tests.people import PASSWORD, invitation, new_email, new_user


@pytest.fixture
def server(dashboard: Server) -> Server:
    return dashboard


@pytest.fixture
def window(browser: Browser, server: Server, axe: str) -> Iterator[Window]:
    with opened(browser, server, axe) as made:
        yield made


def test_from_an_invitation_to_a_charge_and_a_new_key(window: Window, server: Server) -> None:
    """Invited, a password, signed out and in again, a key, a call with it, the charge, the key replaced and revoked."""
    page = window.page
    name, _ = server.books.account(100)
    email = new_email()
    window.go(invitation(server, name, email))
    window.fill("Password", PASSWORD)
    window.fill("The same again", PASSWORD)
    window.click("Set the password and sign in")
    expect(page.get_by_text("Your password is set.")).to_be_visible()
    window.click("Sign out")
    window.sign_in(email)
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    expect(page.get_by_text("Nothing was spent in the last 30 days.")).to_be_visible()

    window.click("Keys")
    window.fill("Name (optional)", "production")
    window.click("Create key")
    key = shown_key(window)
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == key
    assert server.post(key).json()["_billing"]["balance_remaining"] == 73.75

    window.go("/dashboard/")
    tiles = page.locator(".tiles")
    expect(tiles.get_by_text("73.75").first).to_be_visible()
    expect(tiles.get_by_text("26.25").first).to_be_visible()  # spent today
    expect(page.locator(".chart rect.series-0").first).to_be_visible()
    page.get_by_text("The same as a table").click()
    window.look()
    expect(page.get_by_role("row", name=re.compile(r"flux.dev .* settled .*26\.25"))).to_be_visible()

    window.click("Keys")
    window.click("Rotate production")
    page.get_by_label("in an hour").check()
    window.click("Rotate")
    new = shown_key(window)
    assert new != key
    assert [server.post(each).status_code for each in (key, new)] == [200, 200]  # the grace period

    window.click("To your keys")
    window.click("Disable production")
    window.click("Disable")
    expect(page.get_by_text("The key 'production' is disabled.")).to_be_visible()
    assert server.post(new).json()["error"]["type"] == "key_disabled"
    window.click("Enable production")
    window.click("Enable")
    window.click("Revoke production")
    window.click("Revoke")
    assert server.post(new).json()["error"]["type"] == "key_revoked"
    assert server.books.standing(name) == (21_250, 0)
    assert server.books.verify().problems == []


def test_every_other_page(window: Window, server: Server) -> None:
    """Those that the story above does not come to: wrong passwords, errors, suspension, an operator, a full chart."""
    page = window.page
    name, key = server.books.account(5000)
    user = new_user(server, name, is_operator=True)
    window.expected = ("status of 401", "status of 404", "status of 422")  # which Chromium tells of every such page
    for model in ("fal-ai/flux/dev", "fal-ai/flux/schnell", "fal-ai/creative-upscaler"):
        assert server.post(key, f"/{model}", {"prompt": "x", "image_url": "https://example.com/a.jpg"}).ok
    window.go("/dashboard/keys")
    window.sign_in(user.email, "not the password")
    expect(page.get_by_role("alert")).to_contain_text("do not go together")
    window.sign_in(user.email)
    assert page.url.endswith("/dashboard/keys")
    window.go("/dashboard/")
    assert page.locator(".legend li").count() == 3
    window.click("Account")
    window.fill("Current password", "wrong")
    window.fill("New password", "a good new one")
    window.fill("The same again", "a good new one")
    window.click("Change the password")
    expect(page.get_by_role("alert")).to_contain_text("not your current password")
    window.click("All accounts")
    window.go("/dashboard/nothing-here")
    server.books.write(lambda tx: accounts.set_status(tx, user.account_id or 0, "suspended"))
    window.go("/dashboard/keys")
    expect(page.get_by_text("This account is suspended.")).to_be_visible()
    expect(page.get_by_role("button", name="Create key")).to_have_count(0)
    window.go("/dashboard/account")
    window.click("Sign out everywhere")
    expect(page.get_by_text("You have signed out everywhere.")).to_be_visible()


def test_everything_works_without_a_script(browser: Browser, server: Server, axe: str) -> None:
    """The same forms and links; only copying by a button is not there."""
    name, _ = server.books.account(100)
    with opened(browser, server, axe, size="phone", scripts=False) as window:
        page = window.page
        window.go(invitation(server, name, new_email()))
        window.fill("Password", PASSWORD)
        window.fill("The same again", PASSWORD)
        window.click("Set the password and sign in")
        window.click("Keys", exact=True)
        window.click("Create key")
        key = shown_key(window)
        expect(page.get_by_role("button", name="Copy")).to_have_count(0)
        assert server.post(key).status_code == 200
        window.click("To your keys")
        window.click(re.compile("^Revoke"))
        window.click("Revoke", exact=True)
        assert server.post(key).status_code == 403


def test_the_keyboard_alone_is_enough(window: Window, server: Server) -> None:
    """The first stop leads past the navigation; the form is sent by Enter."""
    user = new_user(server, server.books.account(1)[0])
    page = window.page
    window.go("/dashboard/sign-in")
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


def test_a_newcomer_gets_from_the_printed_address_to_a_line_in_the_statement(
    browser: Browser, axe: str, tmp_path: Path
) -> None:
    """`make run`, its plain address, and from there clicks alone: a key, a picture by each way, the call, the line."""
    url = f"http://127.0.0.1:{free_port()}"
    env = environment(ABHIAPI_DATABASE_URL=f"sqlite:///{tmp_path / 'sandbox.db'}")
    arguments = ["cli.py", "serve", "--sandbox", "--demo", "--bind", url.removeprefix("http://")]
    process = Process.start(arguments, tmp_path / "log", env, cwd=ROOT)
    try:
        until(lambda: "Then look at the books" in process.output(), what="it serves", within_s=30)
        assert f"\n  {url}\n" in process.output()
        with opened(browser, url, axe, "http://127.0.0.1:") as window:
            page = window.page
            window.go("")
            window.click("Open the demo dashboard")
            expect(page.get_by_role("heading", name="Overview")).to_be_visible()
            window.click("Create a key")
            window.click("Create key")
            page.get_by_role("button", name="Copy the call").click()
            expect(page.get_by_role("button", name="Copied")).to_be_visible()
            pasted = page.evaluate("navigator.clipboard.readText()")
            assert shown_key(window) in pasted
            told = subprocess.run(["sh", "-c", pasted], check=True, capture_output=True, timeout=60).stdout
            assert json.loads(told)["_billing"]["balance_remaining"] == 4973.75

            window.click("Make a picture in the playground")
            window.click("Run", exact=True)
            page.wait_for_function("document.querySelector('img.media')?.naturalWidth > 0")
            window.look("playground-picture")
            window.click(re.compile("^How this charge came about"))
            expect(page.get_by_text("In all: 26.25 credits")).to_be_visible()
            window.click("charge", exact=True)
            line = page.locator(":target")
            expect(line).to_contain_text("fal-ai/flux/dev")
            expect(line).to_contain_text("-26.25")
            expect(line).to_contain_text("4,947.5")
            window.click("All accounts")
            expect(page.get_by_role("row", name=re.compile("demo"))).to_be_visible()
    finally:
        process.kill()
