"""deploy/: what an operator copies works as it stands there, with real nginx, Caddy, systemd and docker-compose."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme
import yaml

from abhiapi.settings import Settings, variables
from tests.harness import ROOT, Fal, Process, Server, environment, free_port, until

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
def caddy(folder: Path, backend_port: int) -> Iterator[tuple[str, str | bool]]:
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
    file.write_text("{\n\tadmin off\n\tauto_https off\n}\n" + (DEPLOY / "caddy/Caddyfile").read_text())
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


# --- the command lines, without Docker and systemd ----------------------------------------------------------------


def compose() -> dict[str, Any]:
    checked = subprocess.run(
        ["docker-compose", "-f", str(DEPLOY / "docker-compose.yml"), "config"],
        env=environment(ABHIAPI_SITE=HOST), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    made: dict[str, Any] = yaml.safe_load(checked.stdout)
    return made


def unit(name: str) -> dict[str, list[str]]:
    """A unit's [Service] by key, each with all its values."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in (DEPLOY / "systemd" / name).read_text().splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def dockerfile(instruction: str) -> list[str]:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    return [line[len(instruction) :].strip() for line in text.splitlines() if line.startswith(instruction + " ")]


def serves(command: list[str], folder: Path, fal_url: str, **settings: str) -> Process:
    """Start a command that ends in `abhiapi serve --bind ADDRESS`, elsewhere and with the simulator; wait for it."""
    at = command.index("serve")
    assert Path(command[at - 1]).name == "abhiapi"
    port = free_port()
    arguments = [re.sub(r"^([\d.]+):8000$", rf"127.0.0.1:{port}", word) for word in command[at:]]
    assert arguments != command[at:]
    (folder / "fal-key").write_text("id:from-a-file\n")
    env = {
        "ABHIAPI_DATABASE_URL": f"sqlite:///{folder / 'abhiapi.db'}",
        "FAL_KEY_FILE": str(folder / "fal-key"),
        "ABHIAPI_PRICES_SYNC_S": "0",
        **{f"ABHIAPI_FAL_{name}_URL": fal_url for name in ("RUN", "QUEUE", "REST", "API")},
    }
    process = Process.start([str(ROOT / "cli.py"), *arguments], folder / "log", environment(**env | settings), folder)
    until(lambda: "AbhiAPI serves" in process.output(), what=f"{command} serves", within_s=30)
    assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=10).json() == {"status": "ok"}
    return process


@pytest.mark.parametrize("source", ["unit", "Dockerfile", "compose"])
def test_the_command_line_of_each_kind_of_service_serves(source: str, fal: Fal, tmp_path: Path) -> None:
    """And ends with status 0 at the signal that it is stopped by."""
    command = {
        "unit": lambda: shlex.split(unit("abhiapi.service")["ExecStart"][0]),
        "Dockerfile": lambda: json.loads(dockerfile("CMD")[-1]),
        "compose": lambda: compose()["services"]["proxy-1"]["command"],
    }[source]()
    process = serves(command, tmp_path, fal.url)
    try:
        assert process.stop(signal.SIGTERM) == 0
    finally:
        process.kill()


def test_the_backup_service_makes_a_copy_that_verifies(tmp_path: Path) -> None:
    (line,) = unit("abhiapi-backup.service")["ExecStart"]
    words = shlex.split(line.replace("%%", "%"))
    assert words[:2] == ["/bin/sh", "-c"]
    script = words[2].replace("/opt/abhiapi/.venv/bin/abhiapi", f"{sys.executable} {ROOT / 'cli.py'}")
    script = script.replace("/var/lib/abhiapi-backups", str(tmp_path))
    env = environment(ABHIAPI_DATABASE_URL=f"sqlite:///{tmp_path / 'abhiapi.db'}")
    command = [sys.executable, str(ROOT / "cli.py"), "accounts", "create", "ann"]
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=60)
    subprocess.run([*words[:2], script], env=env, check=True, capture_output=True, timeout=60)
    (copy,) = tmp_path.glob("abhiapi-2*.db")
    verified = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "ledger", "verify", "--json"],
        env=env | {"ABHIAPI_DATABASE_URL": f"sqlite:///{copy}"}, check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert json.loads(verified.stdout)["accounts"] == 1


def test_a_command_of_roots_has_the_services_user_folder_and_settings(tmp_path: Path) -> None:
    """Else it makes a second ledger, and tells of that; what it is asked passes as it is."""
    stub = tmp_path / "systemd-run"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    ran = subprocess.run(
        [str(DEPLOY / "abhiapi"), "topup", "acme", "5", "--note", "two words"],
        env=environment(PATH=f"{tmp_path}:/usr/bin:/bin"), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    options, program = ran.stdout.split("\n--\n")
    service = unit("abhiapi.service")
    said = options.splitlines()
    assert [word[9:] for word in said if word.startswith("--setenv=")] == service["Environment"]
    for option, key in (("--uid=", "User"), ("--working-directory=", "WorkingDirectory")):
        assert option + service[key][0] in said
    for key in ("EnvironmentFile", "UMask"):
        assert f"--property={key}={service[key][0]}" in said
    assert program.splitlines() == [service["ExecStart"][0].split()[0], "topup", "acme", "5", "--note", "two words"]
    known = subprocess.run(["systemd-run", "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert {word.partition("=")[0] for word in said} <= set(re.findall(r"--[a-z-]+", known))


def test_units_are_accepted_and_hardened(tmp_path: Path) -> None:
    """As they are, but for the program, which is not installed where the tests run."""
    for path in UNITS:
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/abhiapi/.venv/bin/abhiapi", "/bin/true"))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / path.name) for path in UNITS)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    said = [line for line in verified.stderr.splitlines() if "abhiapi" in line]
    assert said == []
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(tmp_path / "abhiapi.service")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert rated.returncode == 0, rated.stdout[-500:]


def test_who_stops_a_service_waits_longer_than_the_longest_call() -> None:
    longest_s = Settings.from_env({}).upstream_timeout_s + 60  # gunicorn's graceful_timeout
    assert int(unit("abhiapi.service")["TimeoutStopSec"][0]) > longest_s
    service = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]["proxy-1"]
    assert int(service["stop_grace_period"].removesuffix("s")) > longest_s
    for text in ((DEPLOY / "nginx/abhiapi.conf").read_text(), (DEPLOY / "caddy/Caddyfile").read_text()):
        waits = [int(found) for found in re.findall(r"(?:proxy_read_timeout|response_header_timeout) (\d+)s", text)]
        assert waits
        assert min(waits) > Settings.from_env({}).upstream_timeout_s
        assert str(Settings.from_env({}).max_body_bytes) in text


def test_every_setting_in_the_kit_is_one() -> None:
    known = {variable.name for variable in variables()}
    known |= {f"{variable.name}_FILE" for variable in variables() if variable.may_be_file}
    known |= {"ABHIAPI_SITE", "ABHIAPI_UPSTREAMS"}  # of the Caddyfile
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.suffix != ".json":
            used = set(re.findall(r"\b(?:ABHIAPI|FAL)_[A-Z_]*[A-Z]\b", path.read_text()))
            assert used <= known, path.name


def test_the_image_holds_no_secret_runs_as_nobody_and_looks_after_itself() -> None:
    assert dockerfile("USER") == ["10001"]
    assert len(dockerfile("HEALTHCHECK")) == 1
    assert all(re.search(r":\d+\.\d+\.\d+-", base) for base in dockerfile("FROM"))
    assert not re.search(r"FAL_KEY|_TOKEN|PASSWORD|SECRET", "".join(dockerfile("ENV") + dockerfile("ARG")))
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"  # .env, databases and keys stay outside whatever their names
    copied = {word for line in dockerfile("COPY") if "--from" not in line for word in line.split()[:-1]}
    assert copied == {word.removeprefix("!") for word in ignored if word.startswith("!")}


def test_two_proxies_share_everything_that_must_be_shared() -> None:
    services = compose()["services"]
    proxies = [services[name] for name in ("proxy-1", "proxy-2")]
    assert proxies[0]["environment"] == proxies[1]["environment"]
    asked = proxies[0]["environment"]
    assert asked["ABHIAPI_LIMITS_URL"].startswith("redis://redis:")
    assert {"FAL_KEY_FILE", "ABHIAPI_DATABASE_URL_FILE", "ABHIAPI_WEBHOOK_KEY_FILE"} <= asked.keys()
    assert all("ports" not in service for name, service in services.items() if name != "caddy")
    upstreams = services["caddy"]["environment"]["ABHIAPI_UPSTREAMS"].split()
    assert upstreams == ["proxy-1:8000", "proxy-2:8000"]
