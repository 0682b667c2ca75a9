"""fal's own clients, unmodified, through the proxy: Python over TLS, JavaScript in Node; and the lines of the docs."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.harness import ROOT, Fal, Server, environment

CLIENTS = ROOT / "tests" / "clients"
DOCS = (ROOT / "docs/clients.md").read_text()
CHARGE = 26.25
CLIENT_S = 60


class TlsFront:
    """What a web server in front of the proxy does: ends TLS and passes bytes on."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.authority_file = folder / "authority.pem"
        authority.cert_pem.write_to_path(str(self.authority_file))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(self._context)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._target = ("127.0.0.1", 0)

    def lead_to(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with (
            suppress(OSError),
            socket.create_connection(self._target) as server,
            self._context.wrap_socket(client, server_side=True) as secure,
        ):
            back = threading.Thread(target=_pump, args=(server, secure), daemon=True)
            back.start()
            _pump(secure, server)
            back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@dataclass
class Site:
    """A proxy as its customers see it, and one customer."""

    server: Server
    account: str
    key: str
    tls: TlsFront

    def env(self, **more: str) -> dict[str, str]:
        return environment(
            FAL_KEY=self.key,
            FAL_RUN_HOST=self.tls.address,
            FAL_QUEUE_RUN_HOST=f"{self.tls.address}/queue",
            SSL_CERT_FILE=str(self.tls.authority_file),
            BASE_URL=self.server.url,
            KEY=self.key,
            NO_PROXY="127.0.0.1",
            no_proxy="127.0.0.1",
            **more,
        )

    def charges(self) -> int:
        return len([entry for entry in self.server.books.entries(self.account) if entry.kind == "charge"])


@pytest.fixture(scope="module")
def tls_site(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, TlsFront]]:
    folder = tmp_path_factory.mktemp("tls")
    tls = TlsFront(folder)
    with Server.started(folder, fal.url, ABHIAPI_PUBLIC_URL=f"https://{tls.address}") as server:
        tls.lead_to(server.url)
        yield server, tls
    tls.close()


@pytest.fixture
def site(tls_site: tuple[Server, TlsFront]) -> Iterator[Site]:
    """A customer of their own; afterwards every job has been charged once, and the books are right."""
    server, tls = tls_site
    account, key = server.books.account(5000)
    made = Site(server, account, key, tls)
    yield made
    calls = server.books.calls(account)
    assert not [call for call in calls if call.state not in ("settled", "released")]
    assert made.charges() == len([call for call in calls if call.charged_micros])
    assert server.books.verify().problems == []


@pytest.fixture(scope="session")
def node_folder(request: pytest.FixtureRequest) -> Path:
    """A folder with the JavaScript client installed, kept between runs in pytest's own cache."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js is not installed: the JavaScript client is not tried")
    wanted = (CLIENTS / "package.json").read_bytes()
    assert request.config.cache is not None
    folder = request.config.cache.mkdir(f"fal-ai-client-{re.sub(rb'[^0-9.]', b'', wanted).decode()}")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers may come at once
        if not (folder / "installed").exists():
            shutil.copy(CLIENTS / "package.json", folder)
            command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            (folder / "installed").touch()
    return folder


def ran(command: list[str], env: dict[str, str], cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=CLIENT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(site: Site, script: str) -> Any:
    return json.loads(ran([sys.executable, str(CLIENTS / script)], site.env()))


def is_paid(answer: dict[str, Any]) -> bool:
    return bool(answer["images"]) and answer["_billing"]["credits_used"] == CHARGE


def test_python_client(site: Site) -> None:
    told = python(site, "python_sync.py")
    assert is_paid(told["run"])
    submit = told["submit"]
    assert submit["status_url"].startswith(f"https://{site.tls.address}/queue/fal-ai/flux/requests/")
    assert submit["first"] in ("Queued", "InProgress")
    assert submit["events"][-1] == submit["final"] == "Completed"
    assert submit["logs"] == ["started", "done"]
    assert is_paid(submit["get"])
    assert submit["get"] == submit["result"]
    assert is_paid(told["subscribe"])
    assert is_paid(told["subscribe_plain"])
    assert "Completed" in told["updates"]
    assert told["cancel"] == [499, "client_cancelled"]
    errors = told["errors"]
    assert errors["invalid"][0] == 422
    assert errors["unpriced"][0] == 404
    assert "no-such-model" in errors["unpriced"][1]
    assert errors["unknown_job"] == [404, "no such job of this account"]
    assert errors["webhook"][0] == 400
    assert site.charges() == 4


def test_python_client_async(site: Site) -> None:
    told = python(site, "python_async.py")
    assert is_paid(told["run"])
    assert told["submit"]["events"][-1] == told["submit"]["final"] == "Completed"
    assert told["submit"]["logs"] == ["started", "done"]
    assert told["submit"]["get"] == told["submit"]["result"]
    assert is_paid(told["submit"]["get"])
    assert is_paid(told["subscribe"])
    assert told["cancel"] == [499, "client_cancelled"]
    assert told["together"] == [CHARGE] * 5
    assert site.charges() == 8


def test_javascript_client(site: Site, node_folder: Path) -> None:
    shutil.copy(CLIENTS / "javascript.mjs", node_folder)
    told = json.loads(ran(["node", "javascript.mjs"], site.env(), node_folder))
    for name in ("run", "polling", "streaming"):
        assert is_paid(told[name]["data"])
        assert re.fullmatch(r"[0-9a-f-]{36}", told[name]["requestId"])
    assert told["pollingUpdates"][-1] == told["streamingUpdates"][-1] == "COMPLETED"
    assert all(url.startswith(f"https://{site.tls.address}/queue/") for url in told["streamingUrls"])
    queue = told["queue"]
    assert queue["submitted"]["_billing"]["credits_used"] == 0
    assert queue["status"]["_billing"] == queue["result"]["data"]["_billing"]
    assert queue["result"]["requestId"] == queue["submitted"]["request_id"]
    assert is_paid(queue["result"]["data"])
    assert told["cancelled"] == "client_cancelled"
    errors = told["errors"]
    assert (errors["invalid"]["kind"], errors["invalid"]["status"]) == ("ValidationError", 422)
    assert errors["invalid"]["body"]["_billing"]["credits_used"] == 0
    assert (errors["unpriced"]["kind"], errors["unpriced"]["status"]) == ("ApiError", 404)
    assert "no-such-model" in errors["unpriced"]["message"]
    assert errors["unknownJob"]["body"]["status"] == "NOT_FOUND"
    assert site.charges() == 4


def snippet(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def test_the_docs_curl_lines_work(site: Site) -> None:
    (script,) = snippet("sh")
    script = script.replace("https://fal.example.com", site.server.url).replace("sk-fal-your-key", site.key)
    site_url = site.server.url
    output = ran(["bash", "-euo", "pipefail", "-c", script], site.env()).replace(site_url, "")
    assert '"images"' in output
    assert site.charges() == 1


def test_the_docs_python_lines_work(site: Site, tmp_path: Path) -> None:
    (exports, script) = snippet("python")
    settings = dict(re.findall(r"^# export (\w+)=(\S+)$", exports, re.MULTILINE))
    assert settings == {
        "FAL_KEY": "sk-fal-your-key", "FAL_RUN_HOST": "fal.example.com", "FAL_QUEUE_RUN_HOST": "fal.example.com/queue",
    }  # fmt: skip
    env = site.env() | {
        name: value.replace("sk-fal-your-key", site.key).replace("fal.example.com", site.tls.address)
        for name, value in settings.items()
    }
    assert "26.25" in ran([sys.executable, "-c", script], env)
    assert site.charges() == 1


def test_the_docs_javascript_lines_work(site: Site, node_folder: Path) -> None:
    (script,) = snippet("js")
    script = script.replace("https://fal.example.com", site.server.url).replace("sk-fal-your-key", site.key)
    (node_folder / "docs.mjs").write_text(script)
    assert "26.25" in ran(["node", "docs.mjs"], site.env(), node_folder)
    assert site.charges() == 1
