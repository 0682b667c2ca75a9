"""fal's own JavaScript client by its `proxyUrl`, unmodified: in Node, and in a page of another origin in a browser."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests import raw_http
from tests.harness import ROOT, Books, Fal, Process, Server, environment, free_port, until
from tests.raw_http import Received
from tests.test_queue_clients import CHARGE, CLIENTS, Site, is_paid, ran, site, tls_site

__all__ = ["site", "tls_site"]  # fixtures

REQUEST_ID = re.compile(r"[0-9a-f-]{36}")


@pytest.fixture
def customer(shared_server: Server, books: Books) -> Iterator[tuple[str, str]]:
    """An account and its key; afterwards every call has ended, each was charged once, and the books are right."""
    name, key = books.account(5000)
    yield name, key
    calls = books.calls(name)
    assert not [call for call in calls if call.state not in ("settled", "released")]
    charges = [entry for entry in books.entries(name) if entry.kind == "charge"]
    assert len(charges) == len([call for call in calls if call.charged_micros])
    assert books.verify().problems == []


@pytest.fixture
def workplace(node_folder: Path) -> Iterator[Path]:
    """A folder of this test's own, where Node.js finds the packages that lie above it."""
    with TemporaryDirectory(dir=node_folder) as made:
        yield Path(made)


def node(folder: Path, script: str, base_url: str, key: str, **more: str) -> Any:
    shutil.copy(CLIENTS / script, folder)
    env = environment(BASE_URL=base_url, KEY=key, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1", **more)
    return json.loads(ran(["node", script], env, folder))


def test_everything_of_the_clients_own_readme(
    shared_server: Server, fal: Fal, books: Books, workplace: Path, customer: tuple[str, str]
) -> None:
    """failures.md rows 61, 62 and 64: nothing of the caller's key reaches fal, and no minting route does."""
    name, key = customer
    told = node(workplace, "proxy.mjs", shared_server.url, key)
    for call in ("run", "get", "polling", "streaming"):
        assert is_paid(told[call]["data"]), call
        assert REQUEST_ID.fullmatch(told[call]["requestId"])
    assert told["pollingUpdates"][-1] == told["streamingUpdates"][-1] == told["streamStatus"][-1] == "COMPLETED"
    queue = told["queue"]
    assert queue["submitted"]["_billing"]["credits_used"] == 0
    assert queue["submitted"]["status_url"].startswith(f"{shared_server.url}/queue/fal-ai/flux/requests/")
    assert queue["status"]["_billing"] == queue["result"]["data"]["_billing"]
    assert queue["result"]["requestId"] == queue["submitted"]["request_id"]
    assert told["cancelled"] == "client_cancelled"
    assert told["uploaded"] == "a small file"
    assert told["large"]["length"] == told["large"]["wanted"] == 91 * 1024 * 1024
    assert told["blob"]["data"]["image"]["url"]
    enlarged = [call for call in fal.calls("/fal-ai/clarity-upscaler") if "/uploads/" in str(call["body"])]
    assert enlarged
    assert len([entry for entry in books.entries(name) if entry.kind == "charge"]) == 6
    seen = fal.calls()
    assert not [call for call in seen if "tokens" in call["path"] or "auth" in call["path"]]
    assert key not in str(seen)


def test_errors_are_those_that_the_client_knows(
    shared_server: Server, books: Books, workplace: Path, customer: tuple[str, str]
) -> None:
    _, poor = books.account(0)
    told = node(workplace, "proxy_errors.mjs", shared_server.url, customer[1], POOR_KEY=poor)
    errors = told["errors"]
    kinds = {name: (error["kind"], error["status"]) for name, error in errors.items()}
    assert kinds == {
        "invalid": ("ValidationError", 422), "invalidJob": ("ValidationError", 422), "unpriced": ("ApiError", 404),
        "unpricedJob": ("ApiError", 404), "unknownJob": ("ApiError", 404), "poor": ("ApiError", 402),
        "poorJob": ("ApiError", 402), "poorUpload": ("ApiError", 402), "wrongKey": ("ApiError", 401),
    }  # fmt: skip
    assert {error["loc"][-1] for error in errors["invalid"]["fields"]} == {"prompt", "num_images"}
    assert "26.25 credits and 0 are available" in errors["poor"]["message"]
    assert "credits are available" in errors["poorUpload"]["message"]
    assert "no-such-model" in errors["unpriced"]["message"]
    assert errors["unknownJob"]["body"]["status"] == "NOT_FOUND"
    assert told["realtime"] == {"target": "https://rest.fal.ai/tokens/", "status": 404}


def test_a_stream_is_fals_events_and_nothing_else(workplace: Path, tmp_path: Path) -> None:
    """The closing comment is invisible: the last event that the client resolves with is fal's last."""
    events = [{"step": 1, "text": "caf\u00e9"}, {"images": [{"url": "x"}]}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)

    def stream(sock: socket.socket, received: Received) -> None:
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\nx-fal-billable-units: 1\r\n"
        sock.sendall((head + "x-fal-request-id: r-1\r\n\r\n" + body).encode())

    with raw_http.upstream() as fal, Server.started(tmp_path, fal.url) as server:
        fal.script = stream
        name, key = server.books.account()
        told = node(workplace, "proxy_stream.mjs", server.url, key)
        assert told == {"events": events, "last": events[-1], "requestId": "r-1"}
        (received,) = fal.received
        assert received.line == "POST /fal-ai/flux/dev/stream HTTP/1.1"
        assert ("accept", "application/json, text/event-stream") in received.headers
        (call,) = server.books.calls(name)
        assert (call.mode, call.charged_micros) == ("stream", int(CHARGE * 1000))


# --- in a browser -----------------------------------------------------------------------------------------------


@dataclass
class Pages:
    """A web server with pages of its own origin: its folder, its port, and an AbhiAPI that this origin may call."""

    folder: Path
    port: int
    server: Server

    def bundle(self, script: Path, workplace: Path, **given: str) -> None:
        """A page that runs this script."""
        shutil.copy(script, workplace / "bundled.js")
        command = ["../node_modules/.bin/esbuild", "bundled.js", "--bundle", "--format=esm", "--log-level=error"]
        ran([*command, f"--outfile={self.folder / 'bundle.js'}"], environment(), workplace)
        (self.folder / "index.html").write_text(
            f"<!doctype html><img alt=''><p></p><script>window.given = {json.dumps(given)}</script>"
            "<script type=module src=bundle.js></script>"
        )


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing: what a page asks for is no news."""


@pytest.fixture(scope="module")
def pages(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    folder = tmp_path_factory.mktemp("pages")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        origin = f"http://127.0.0.1:{web.server_port}"
        with Server.started(tmp_path_factory.mktemp("open"), fal.url, ABHIAPI_CORS_ORIGINS=origin) as server:
            yield Pages(folder, web.server_port, server)
        web.shutdown()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    opened = browser.new_page()
    yield opened
    opened.close()


def test_a_page_of_another_origin(pages: Pages, page: Page, workplace: Path) -> None:
    """Preflights, request ids, uploads to the signed address and readable errors: as browsers have them."""
    books = pages.server.books
    name, key = books.account(5000)
    _, poor = books.account(0)
    pages.bundle(CLIENTS / "page.js", workplace, base=pages.server.url, key=key, poor=poor)
    page.goto(f"http://127.0.0.1:{pages.port}/")
    page.wait_for_function("window.told")
    told = page.evaluate("window.told")
    assert "failed" not in told
    for call in ("run", "polling", "streaming"):
        assert is_paid(told[call]["data"])
        assert REQUEST_ID.fullmatch(told[call]["requestId"])
    assert told["updates"][-1] == "COMPLETED"
    assert len(told["events"]) > 1
    assert told["streamed"]["images"][0]["url"] == told["events"][-1]  # and ours is no event
    assert told["uploaded"] == "a small file"
    assert told["blob"]["data"]["image"]["url"]
    assert told["cancel"] in ("accepted", 400)
    assert told["account"]["account"] == name
    assert told["poor"]["status"] == 402
    assert "26.25 credits and 0 are available" in told["poor"]["message"]
    until(lambda: books.standing(name)[1] == 0, what="the last job is settled")
    assert books.verify().problems == []


def test_a_page_of_no_allowed_origin_reads_nothing(pages: Pages, page: Page, fal: Fal) -> None:
    """The same files under another name of the same machine are another origin."""
    name, key = pages.server.books.account()
    (pages.folder / "empty.html").write_text("<!doctype html><title>empty</title>")
    page.goto(f"http://localhost:{pages.port}/empty.html")
    call = """async ([base, key]) => fetch(`${base}/fal-ai/flux/dev`, {
        method: "POST", headers: {"x-api-key": key, "content-type": "application/json"}, body: '{"prompt": "x"}',
    }).then((response) => response.status, (error) => error.name)"""
    assert page.evaluate(call, [pages.server.url, key]) == "TypeError"
    assert pages.server.books.calls(name) == []
    page.goto(f"http://127.0.0.1:{pages.port}/empty.html")
    assert page.evaluate(call, [pages.server.url, key]) == 200


# --- the lines of the docs --------------------------------------------------------------------------------------


def snippets(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def filled_in(script: str, server: Server, key: str) -> str:
    return script.replace("https://fal.example.com", server.url).replace("sk-fal-your-key", key)


def in_node(script: str, folder: Path, server: Server, key: str) -> str:
    (folder / "docs-target.mjs").write_text(filled_in(script, server, key))
    return ran(["node", "docs-target.mjs"], environment(), folder)


def test_the_docs_lines_for_node_work(shared_server: Server, workplace: Path, customer: tuple[str, str]) -> None:
    script, _, _ = snippets("browser.md", "js")
    assert "26.25" in in_node(script, workplace, shared_server, customer[1])


def test_the_docs_lines_for_a_page_work(pages: Pages, page: Page, workplace: Path, tmp_path: Path) -> None:
    _, _, script = snippets("browser.md", "js")
    _, key = pages.server.books.account()
    (tmp_path / "docs.js").write_text(filled_in(script, pages.server, key))
    pages.bundle(tmp_path / "docs.js", workplace)
    warnings: list[str] = []
    page.on("console", lambda message: warnings.append(message.text))
    page.goto(f"http://127.0.0.1:{pages.port}/")
    page.wait_for_function("document.querySelector('p').textContent")
    assert page.text_content("p").endswith(": 26.25 credits")  # type: ignore[union-attr]
    page.wait_for_function("document.querySelector('img').naturalWidth > 0")
    assert any("credentials are exposed" in text for text in warnings)


def test_the_docs_lines_for_a_server_of_ones_own_work(
    shared_server: Server, workplace: Path, customer: tuple[str, str], tmp_path: Path
) -> None:
    """The client has no key; the server in between adds it."""
    _, script, _ = snippets("browser.md", "js")
    port = free_port()
    (workplace / "docs-server.mjs").write_text(
        filled_in(script, shared_server, customer[1]).replace("listen(3000,", f"listen({port},")
    )
    run_node = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    process = Process.start(["-c", run_node, "node", "docs-server.mjs"], tmp_path / "log", environment(), cwd=workplace)
    try:
        until(lambda: _listens(port), what="the server of one's own listens")
        told = node(workplace, "proxy.mjs", f"http://127.0.0.1:{port}", "")
    finally:
        process.kill()
    assert is_paid(told["run"]["data"])
    assert told["streamingUpdates"][-1] == "COMPLETED"
    assert told["uploaded"] == "a small file"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_docs_lines_for_uploads_work(
    shared_server: Server, workplace: Path, customer: tuple[str, str], site: Site, tmp_path: Path
) -> None:
    (script,) = snippets("uploads.md", "js")
    assert "files/" in in_node(script, workplace, shared_server, customer[1])
    (script,) = snippets("uploads.md", "python")
    (tmp_path / "cat.png").write_bytes(b"not really a picture")
    assert "files/" in ran([sys.executable, "-c", script], site.env(), tmp_path)
    assert site.charges() == 1


def test_the_docs_lines_for_any_client_work(shared_server: Server, workplace: Path, customer: tuple[str, str]) -> None:
    (script,) = snippets("any-client.md", "js")
    assert "26.25" in in_node(script, workplace, shared_server, customer[1])
