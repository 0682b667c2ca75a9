"""A person's window in Debian's Chromium, and what nobody should meet on any page that it comes to.

Every page is looked at twice, on a phone in light and on a wide screen in dark: it must not scroll sideways, axe must
find nothing, the console must stay silent, and no host but ours is asked. A journey is therefore walked once.
SCREENSHOTS=folder keeps a picture of each page in both sizes and both themes, to be looked at.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.harness import Server
from tests.people import PASSWORD, new_address

Scheme = Literal["light", "dark"]
SIZES = {"phone": (390, 844), "wide": (1440, 900)}
LOOKS: tuple[tuple[str, Scheme], ...] = (("phone", "light"), ("wide", "dark"))
AXE_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
# Which kinds of elements stand in which, however many of each.
_SHAPE = """[location.pathname.replace(/[\\w-]*\\d[\\w-]*/g, '#'), ...new Set(Array.from(
    document.querySelectorAll('body *'), (one) => [one.parentElement.tagName, one.tagName, one.className, one.role,
    one.tabIndex, one.id.replace(/\\d+/g, '#')].join()))].join()"""
_shapes: set[tuple[str, Scheme, int]] = set()  # that axe has seen in this process: it need not see them again


@contextmanager
def chromium(*arguments: str) -> Iterator[Browser]:
    """Debian's Chromium, without a window. A machine without it fails here."""
    with sync_playwright() as playwright:
        # Without a sandbox of its own, which needs rights that containers do not have; it only sees our own pages.
        launched = playwright.chromium.launch(executable_path=program(), args=["--no-sandbox", *arguments])
        yield launched
        launched.close()


def program() -> str:
    found = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
    assert found, "no chromium on this machine: install it (Debian: apt-get install chromium), as .ci/run does"
    return found


@dataclass
class Window:
    """What one person has open."""

    page: Page
    context: BrowserContext
    url: str
    axe: str
    size: str
    hosts: tuple[str, ...]
    scripts: bool
    errors: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()  # parts of console messages that a test is about

    def go(self, path: str) -> None:
        self.page.goto(self.url + path)
        self.look()

    def click(self, name: str | re.Pattern[str], *, exact: bool = False) -> None:
        """Press the button, or follow the link, of this name; then look at the page it leads to."""
        named = self.page.get_by_role("button", name=name, exact=exact)
        named = named.or_(self.page.get_by_role("link", name=name, exact=exact))
        with self.page.expect_navigation():
            named.first.click()
        self.look()

    def fill(self, label: str, text: str) -> None:
        self.page.get_by_label(label, exact=True).fill(text)

    def sign_in(self, email: str, password: str = PASSWORD) -> None:
        """By the form that is there, or else by the page that has it."""
        if "/sign-in" not in self.page.url:
            self.go("/dashboard/sign-in")
        self.fill("E-mail", email)
        self.fill("Password", password)
        with self.page.expect_navigation():
            self.page.get_by_role("button", name="Sign in", exact=True).click()
        self.look()

    def look(self, name: str = "") -> None:
        """The page as it stands now, as the module says."""
        page = self.page
        if not self.scripts:
            return
        assert page.title().endswith(" · AbhiAPI"), page.url
        for size, scheme in LOOKS:
            self._resize(size, scheme)
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= SIZES[size][0], f"{page.url} scrolls sideways at {SIZES[size][0]}: {width}"
            shape = (page.evaluate(_SHAPE), scheme, SIZES[size][0])
            if shape not in _shapes:
                self._ask_axe()
                _shapes.add(shape)
        if folder := os.environ.get("SCREENSHOTS"):
            self._picture(Path(folder), name or re.sub(r"\W+", "-", page.title().partition(" · ")[0].lower()))
        self._resize(self.size, "light")

    def done(self) -> None:
        heard = [error for error in self.errors if not any(part in error for part in self.expected)]
        assert heard == []

    def _resize(self, size: str, scheme: Scheme) -> None:
        width, height = SIZES[size]
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme=scheme)

    def _ask_axe(self) -> None:
        page = self.page
        if not page.evaluate("'axe' in window"):
            page.evaluate(self.axe)
        found: dict[str, Any] = page.evaluate(
            "tags => axe.run({runOnly: tags}).then(({violations, passes}) => ({violations, passed: passes.length}))",
            AXE_TAGS,
        )
        wrong = [(item["id"], [node["html"] for node in item["nodes"]][:3]) for item in found["violations"]]
        assert wrong == [], page.url
        assert found["passed"] > 10, f"{page.url}: axe saw no page"

    def _picture(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for size in SIZES:
            for scheme in ("light", "dark"):
                self._resize(size, scheme)  # type: ignore[arg-type]
                self.page.screenshot(path=folder / f"{name}-{SIZES[size][0]}-{scheme}.png", full_page=True)


@contextmanager
def opened(
    browser: Browser, server: Server | str, axe: str, *others: str, size: str = "wide", scripts: bool = True
) -> Iterator[Window]:
    """A window on a server, which may also ask these other hosts; at the end nothing was complained of."""
    url = server if isinstance(server, str) else server.url
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        extra_http_headers={} if isinstance(server, str) else {"X-Forwarded-For": new_address()},
        java_script_enabled=scripts,
        permissions=["clipboard-read", "clipboard-write"],
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    window = Window(page, context, url, axe, size, (url, *others), scripts)
    page.on("console", lambda said: window.errors.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: window.errors.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(window.hosts) else window.errors.append(asked.url))
    yield window
    window.done()
    context.close()


def shown_key(window: Window) -> str:
    text = window.page.locator("#key").text_content()
    assert text is not None
    return text
