"""fal's own clients, unmodified, through the proxy: Python over TLS, JavaScript in Node; and the lines of the docs."""

from __future__ import annotations

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
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.harness import ROOT, Fal, Server, environment, until

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


class LossyFront(TlsFront):
    """Loses the first answers: they come from the proxy, and the connection ends before a byte of them is passed on."""

    to_lose = 0

    def _serve(self, client: socket.socket) -> None:
        if self.to_lose <= 0:
            super()._serve(client)
            return
        self.to_lose -= 1
        with (
            suppress(OSError),
            socket.create_connection(self._target) as server,
            self._context.wrap_socket(client, server_side=True) as secure,
        ):
            threading.Thread(target=_pump, args=(secure, server), daemon=True).start()
            server.recv(65536)
            secure.shutdown(socket.SHUT_RDWR)


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

    def settled(self) -> list[Any]:
        return [call for call in self.server.books.calls(self.account) if call.state == "settled"]

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


def ran(command: list[str], env: dict[str, str], cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=CLIENT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(site: Site, script: str) -> Any:
    poor_key = site.server.books.account(1)[1]
    return json.loads(ran([sys.executable, str(CLIENTS / script)], site.env(POOR_KEY=poor_key)))


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
    assert errors["invalid"][0] == errors["invalid_run"][0] == 422
    assert errors["unpriced"][0] == 404
    assert "no-such-model" in errors["unpriced"][1]
    for name in ("poor_run", "poor_submit"):
        assert errors[name][0] == 402
        assert "needs 26.25 credits" in errors[name][1]
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
    errors = told["errors"]
    assert {name: status for name, (status, _) in errors.items()} == {
        "invalid": 422, "unpriced": 404, "unknown_job": 404, "poor_run": 402, "poor_submit": 402,
    }  # fmt: skip
    assert errors["unknown_job"][1] == "no such job of this account"
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


def test_a_client_that_repeats_itself_pays_for_each_job_that_fal_has(site: Site, fal: Fal, tmp_path: Path) -> None:
    """Row 28 of B3: fal's Python client submits again when an answer is lost; each job at fal is a charge."""
    front = LossyFront(tmp_path)
    front.to_lose = 2
    front.lead_to(site.server.url)
    prompt = f"lost {tmp_path.name}"
    env = site.env() | {"FAL_QUEUE_RUN_HOST": f"{front.address}/queue", "SSL_CERT_FILE": str(front.authority_file)}
    script = (
        f"import fal_client; print(fal_client.submit('fal-ai/flux/dev', arguments={{'prompt': {prompt!r}}}).request_id)"
    )
    request_id = ran([sys.executable, "-c", script], env).strip()
    front.close()
    assert front.to_lose == 0
    assert len(fal.calls(prompt)) == 3
    calls = until(lambda: settled if len(settled := site.settled()) == 3 else None, what="all three are settled")
    assert request_id in {call.fal_request_id for call in calls}
    assert site.charges() == 3


def streams_of(command: list[str], env: dict[str, str], cwd: Path, *hosts: str) -> Any:
    """What a client's script tells, with the hosts of picture URLs left out."""
    told = ran(command, env, cwd)
    for host in hosts:
        told = told.replace(host, "fal")
    return json.loads(told)


@pytest.fixture
def poor_key(site: Site) -> str:
    return site.server.books.account(1)[1]


def test_streams_of_the_python_client(site: Site, fal: Fal, poor_key: str, tmp_path: Path) -> None:
    """fal's events and none of ours, the last one last; errors surface as they do at fal's own address."""
    command = [sys.executable, str(CLIENTS / "python_stream.py")]
    at_fal = TlsFront(tmp_path)
    at_fal.lead_to(fal.url)
    env = site.env(POOR_KEY=poor_key)
    direct_env = env | {"FAL_RUN_HOST": at_fal.address, "SSL_CERT_FILE": str(at_fal.authority_file)}
    hosts = fal.url.removeprefix("http://"), at_fal.address
    told = streams_of(command, env, ROOT, *hosts)
    direct = streams_of(command, direct_env, ROOT, *hosts)
    at_fal.close()
    assert told["sync"] == told["async"] == direct["sync"] == direct["async"]
    assert {name: len(events) for name, events in told["sync"].items()} == {
        "plain": 4, "pinged": 4, "split": 4, "unended": 3, "long": 200,
    }  # fmt: skip
    last = told["sync"]["plain"][-1]
    assert last["prompt"] == "a café \N{CAT FACE}"
    assert last["images"][0]["width"] == 1024
    assert "_billing" not in str(told["sync"])
    errors = told["errors"]
    assert errors.pop("poor")[:2] == ["0", "SSEError"]  # that client shows no error's body (fal-protocol 4)
    assert direct["errors"].pop("poor")[0] == "4"
    assert errors == direct["errors"]
    assert [errors[name][1] for name in ("invalid", "unknown", "cut")] == [
        "SSEError",
        "SSEError",
        "RemoteProtocolError",
    ]
    assert errors["cut"][0] == "2"
    assert site.charges() == 10


def test_streams_of_the_javascript_client(site: Site, fal: Fal, poor_key: str, node_folder: Path) -> None:
    """fal's events and none of ours; `done()` gives the last of them. A character cut by fal arrives whole."""
    shutil.copy(CLIENTS / "javascript_stream.mjs", node_folder)
    command, env, host = ["node", "javascript_stream.mjs"], site.env(POOR_KEY=poor_key), fal.url.removeprefix("http://")
    told = streams_of(command, env, node_folder, host)
    direct = streams_of(command, env | {"BASE_URL": fal.url}, node_folder, host)
    for name, count in {"plain": 4, "pinged": 4, "split": 4, "unended": 3, "long": 200}.items():
        events = told[name]["events"]
        assert len(events) == count
        assert events[-1] == told[name]["done"]
        assert events == direct[name]["events"] or name == "split"
        assert {event["prompt"] for event in events} == {"a café \N{CAT FACE}"}
        assert re.fullmatch(r"[0-9a-f-]{36}", told[name]["requestId"])
    assert "_billing" not in str({name: told[name] for name in ("plain", "pinged", "split", "unended", "long")})
    errors = told["errors"]
    assert (errors["invalid"]["kind"], errors["invalid"]["status"]) == ("ValidationError", 422)
    assert (errors["unknown"]["kind"], errors["unknown"]["status"]) == ("ApiError", 404)
    assert "no-such-model" in errors["unknown"]["message"]
    assert (errors["poor"]["kind"], errors["poor"]["status"]) == ("ApiError", 402)
    assert "credits" in errors["poor"]["message"]
    assert errors["cut"] == direct["errors"]["cut"]
    assert errors["cut"]["events"] == 2
    assert site.charges() == 5


def snippet(language: str, section: str) -> list[str]:
    """The blocks of one language in one section of the page."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", DOCS, re.DOTALL | re.MULTILINE)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def for_site(script: str, site: Site) -> str:
    return script.replace("https://fal.example.com", site.server.url).replace("sk-fal-your-key", site.key)


def test_the_docs_curl_lines_work(site: Site) -> None:
    (script,) = snippet("sh", "curl")
    output = ran(["bash", "-euo", "pipefail", "-c", for_site(script, site)], site.env())
    assert '"images"' in output
    assert site.charges() == 1


def test_the_docs_python_lines_work(site: Site, tmp_path: Path) -> None:
    (exports, script) = snippet("python", "Python")
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


def test_the_docs_python_lines_for_a_first_try_work_over_plain_http(site: Site) -> None:
    """`make run` has no TLS, and the client knows nothing else."""
    (script,) = snippet("python", "Python, over plain http")
    env = site.env() | {"FAL_RUN_HOST": "fal.run", "FAL_QUEUE_RUN_HOST": "queue.fal.run"}
    assert "26.25" in ran([sys.executable, "-c", script.replace("http://127.0.0.1:8000", site.server.url)], env)
    assert site.charges() == 1


def test_what_the_readme_of_fals_python_client_shows_works(site: Site, tmp_path: Path) -> None:
    """All of its blocks, but the one whose upload goes to fal itself (docs/uploads.md)."""
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/audio.wav").write_bytes(b"RIFF")
    blocks = re.findall(r"```python\n(.*?)```", str(metadata("fal-client").get_payload()), re.DOTALL)
    shown = [block for block in blocks if "upload_file" not in block]
    assert (len(blocks), len(shown)) == (5, 4)
    for block in shown:
        assert ran([sys.executable, "-c", block], site.env(), tmp_path).strip()
    assert site.charges() == 4


def test_the_docs_javascript_lines_work(site: Site, node_folder: Path) -> None:
    (script,) = snippet("js", "JavaScript")
    (node_folder / "docs.mjs").write_text(for_site(script, site))
    assert "26.25" in ran(["node", "docs.mjs"], site.env(), node_folder)
    assert site.charges() == 1


def test_the_docs_lines_about_streams_work(site: Site, node_folder: Path) -> None:
    (curl,), (shown,) = snippet("sh", "Streaming"), snippet("text", "Streaming")
    assert ran(["bash", "-euo", "pipefail", "-c", for_site(curl, site)], site.env()) == shown
    (python_lines,) = snippet("python", "Streaming")
    urls = ran([sys.executable, "-c", python_lines], site.env()).split()
    assert len(urls) == 4
    (setting_up,), (script,) = snippet("js", "JavaScript"), snippet("js", "Streaming")
    (node_folder / "docs_stream.mjs").write_text(for_site(setting_up.split("const result")[0] + script, site))
    *js_urls, inference_s = ran(["node", "docs_stream.mjs"], site.env(), node_folder).split()
    assert len(js_urls) == 4
    assert 0 < float(inference_s) < 4
    assert site.charges() == 3
