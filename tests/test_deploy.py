"""deploy/: what an operator copies works as it stands there, with real nginx, Caddy, systemd and docker-compose."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme

from tests.harness import ROOT, Fal, Server, environment, free_port, until

DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("abhiapi*"))
HOST = "fal.example.com"


# --- a reverse proxy in front -------------------------------------------------------------------------------------


class Front:
    """A web server in front of a server of ours, by an example of ours with other ports."""

    def __init__(self, url: str, verify: str | bool, stop_backend: Any) -> None:
        self.url, self.verify, self.stop_backend = url, verify, stop_backend

    def post(self, key: str, path: str = "/fal-ai/flux/dev", *, weather: str = "", **more: Any) -> requests.Response:
        headers = {"x-api-key": key, "Host": HOST} | ({"x-fal-sandbox": weather} if weather else {})
        headers |= more.pop("headers", {})
        body = {} if "data" in more else {"json": {"prompt": "a cat"}}
        return requests.post(self.url + path, headers=headers, verify=self.verify, timeout=60, **body, **more)


@contextmanager
def nginx(folder: Path, backend_port: int) -> Iterator[tuple[str, str | bool]]:
    """The real nginx with the example as it is, but for ports, the certificate's place and its user."""
    port, plain = free_port(), free_port()
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1", HOST).private_key_and_cert_chain_pem.write_to_path(folder / "chain.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    site = (DEPLOY / "nginx/abhiapi.conf").read_text()
    for there, here in (
        ("server 127.0.0.1:8000;", f"server 127.0.0.1:{backend_port};"),
        ("listen 80;", f"listen 127.0.0.1:{plain};"),
        ("listen 443 ssl http2;", f"listen 127.0.0.1:{port} ssl http2;"),
        ("/etc/letsencrypt/live/fal.example.com/fullchain.pem", str(folder / "chain.pem")),
        ("/etc/letsencrypt/live/fal.example.com/privkey.pem", str(folder / "chain.pem")),
    ):
        assert site.count(there) == 1
        site = site.replace(there, here)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"pid {folder}/nginx.pid; error_log {folder}/nginx.log; daemon off; worker_processes 1; user root;"
        f"events {{}} http {{ access_log off; {temporary}\n{site} }}"
    )
    with open(folder / "nginx.out", "wb") as out:
        process = subprocess.Popen(["nginx", "-c", str(folder / "nginx.conf")], stdout=out, stderr=out)
    try:
        until(lambda: _is_open(port, process), what="nginx listens")
        yield f"https://127.0.0.1:{port}", str(folder / "ca.pem")
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def caddy(folder: Path, backend_port: int, *, admin: str = "off") -> Iterator[tuple[str, str | bool]]:
    """The real Caddy with the example as it is; by a port alone it serves without a certificate."""
    port = free_port()
    env = environment(
        ABHIAPI_SITE=f"http://:{port}",
        ABHIAPI_UPSTREAMS=f"127.0.0.1:{backend_port}",
        XDG_DATA_HOME=str(folder),
        XDG_CONFIG_HOME=str(folder),
        HOME=str(folder),
    )
    file = folder / "Caddyfile"
    file.write_text(f"{{\n\tadmin {admin}\n\tauto_https off\n}}\n" + (DEPLOY / "caddy/Caddyfile").read_text())
    with open(folder / "caddy.out", "wb") as out:
        process = subprocess.Popen(
            ["caddy", "run", "--adapter", "caddyfile", "--config", str(file)], env=env, stdout=out, stderr=out
        )
    try:
        until(lambda: _is_open(port, process), what="caddy listens")
        yield f"http://127.0.0.1:{port}", True
    finally:
        process.terminate()
        process.wait(20)


def _is_open(port: int, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "it has ended"
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


FRONTS = {"nginx": nginx, "caddy": caddy}


@pytest.fixture(scope="module")
def server(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("deployed")
    with Server.started(folder, fal.url, ABHIAPI_TRUSTED_PROXIES="1") as running:
        yield running


@pytest.fixture(scope="module", params=FRONTS)
def front(request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    port = int(server.url.rpartition(":")[2])
    with FRONTS[request.param](tmp_path_factory.mktemp(request.param), port) as (url, verify):
        made = Front(url, verify, None)
        until(lambda: made.post("").status_code == 401, what="it has found our server")
        yield made


def test_a_stream_passes_event_by_event(front: Front, server: Server, fal: Fal) -> None:
    """Each event is there before fal sends the next."""
    _, key = server.books.account(1000)
    gate = f"front-{front.url.rpartition(':')[2]}"
    weather = f"events=3; event_gate={gate}"
    with front.post(key, "/fal-ai/flux/dev/stream", weather=weather, stream=True) as stream:
        lines = stream.iter_lines(chunk_size=1)
        for number in (1, 2, 3):
            assert next(line for line in lines if line.startswith(b"data:"))
            fal.release(f"{gate}-{number}")
        rest = b"\n".join(lines)
    assert b": _billing" in rest


def test_large_requests_and_answers_pass(front: Front, server: Server) -> None:
    _, key = server.books.account(1000)
    body = json.dumps({"prompt": "x", "image_url": "data:," + "a" * 20_000_000}).encode()
    headers = {"Content-Type": "application/json"}
    answer = front.post(key, data=body, headers=headers, weather="size_bytes=20000000")
    assert answer.status_code == 200
    assert len(answer.content) > 20_000_000
    assert answer.json()["_billing"]["credits_used"] == 26.25


def test_a_body_above_the_limit_is_refused_in_json(front: Front, server: Server) -> None:
    _, key = server.books.account(1000)

    headers = {"Content-Type": "application/json"}
    answer = front.post(key, data=bytes(100 * 1024**2 + 1), headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "body_too_large")
    assert "nginx" not in answer.text


def test_what_the_proxy_says_of_the_caller_is_believed_and_what_the_caller_says_is_not(
    front: Front, server: Server
) -> None:
    _, key = server.books.account(1000)
    forged = {"X-Forwarded-Host": "evil.example.com", "X-Forwarded-Proto": "gopher", "X-Forwarded-For": "127.0.0.1"}
    submitted = front.post(key, "/queue/fal-ai/flux/dev", headers=forged)
    scheme = front.url.partition(":")[0]
    assert submitted.json()["status_url"].startswith(f"{scheme}://{HOST}/queue/")
    metrics = requests.get(front.url + "/metrics", headers={"Host": HOST} | forged, verify=front.verify, timeout=30)
    assert metrics.status_code == 404


def test_our_own_errors_pass_as_they_are(front: Front, server: Server) -> None:
    _, key = server.books.account(1000)
    answer = front.post(key, weather="drop=before_headers")
    assert answer.status_code == 502
    assert answer.json()["error"]["type"] == "upstream_broken"
    assert "_billing" in answer.json()


@pytest.mark.parametrize("name", FRONTS)
def test_an_error_page_says_neither_nginx_nor_what_a_client_repeats(name: str, fal: Fal, tmp_path: Path) -> None:
    """fal-protocol 10.2, no. 8: with our server gone, while a call runs and afterwards."""
    server = Server.start(tmp_path, fal.url, ABHIAPI_TRUSTED_PROXIES="1")
    try:
        _, key = server.books.account(1000)
        with FRONTS[name](tmp_path, int(server.url.rpartition(":")[2])) as (url, verify):
            front, answers, marker = Front(url, verify, None), [], f"cut {tmp_path.name}"
            until(lambda: front.post("").status_code == 401, what="it has found our server")
            body = json.dumps({"prompt": marker}).encode()
            headers = {"Content-Type": "application/json"}
            weather = f"hold_until={tmp_path.name}"
            running = threading.Thread(
                target=lambda: answers.append(front.post(key, data=body, headers=headers, weather=weather))
            )
            running.start()
            until(lambda: fal.calls(marker), what="fal has the call")
            server.process.kill()
            running.join(30)
            answers.append(front.post(key))
            fal.release(tmp_path.name)
            assert len(fal.calls(marker)) == 1
    finally:
        server.process.kill()
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "upstream_outcome_unknown")
        assert {"detail", "message"} < answer.json().keys()
        assert "nginx" not in answer.text.lower()
