"""deploy/: the command lines and health checks of every kind of service run as they stand there, without Docker."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from abhiapi import audit, redis_line
from abhiapi.db import database_at
from abhiapi.migrations import migrate
from abhiapi.settings import Settings, variables
from tests.harness import ROOT, Fal, Process, environment, free_port, until
from tests.postgres import Postgres, programs
from tests.test_deploy import DEPLOY, HOST, caddy

UNITS = sorted((DEPLOY / "systemd").glob("abhiapi*"))


@cache
def compose() -> dict[str, Any]:
    checked = subprocess.run(
        ["docker-compose", "-f", str(DEPLOY / "docker-compose.yml"), "config"],
        env=environment(ABHIAPI_SITE=HOST), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    made: dict[str, Any] = yaml.safe_load(checked.stdout)
    return made


def health_check(of: str, port: int) -> list[str]:
    """How Docker finds out whether a service is well, where it listens here: as an image or a compose file says it."""
    if of == "image":
        line = dockerfile("HEALTHCHECK")[0]
        command: list[str] = json.loads(line[line.index("[") :])
        there = "8000"
    else:
        test = compose()["services"][of]["healthcheck"]["test"]
        assert test[0] == "CMD"
        command, there = test[1:], {"caddy": "2019"}.get(of, "")
    given = {"redis": ["-p", str(port)], "postgres": [f"--port={port}"]}.get(of, [])
    where = [word.replace(f":{there}/", f":{port}/") for word in command[1:]]
    assert bool(given) != (where != command[1:])
    return [command[0], *given, *where]


def is_well(command: list[str]) -> bool:
    """Run a health check as Docker does, which looks at nothing but its exit status."""
    env = environment(PATH=f"{Path(sys.executable).parent}:{programs()}:/usr/bin:/bin")
    status = subprocess.run(command, env=env, capture_output=True, timeout=60, check=False).returncode
    assert status in (0, 1, 2, 4, 8), "it could not be run"
    return status == 0


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


def serves(command: list[str], folder: Path, fal_url: str) -> tuple[Process, int]:
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
    process = Process.start([str(ROOT / "cli.py"), *arguments], folder / "log", environment(**env), folder)
    until(lambda: "AbhiAPI serves" in process.output(), what=f"{command} serves", within_s=30)
    assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=10).json() == {"status": "ok"}
    return process, port


@pytest.mark.parametrize("source", ["unit", "compose"])
def test_the_command_line_of_each_kind_of_service_serves(source: str, fal: Fal, tmp_path: Path) -> None:
    """And ends with status 0 at the signal that it is stopped by."""
    command = {
        "unit": lambda: shlex.split(unit("abhiapi.service")["ExecStart"][0]),
        "compose": lambda: compose()["services"]["proxy-1"]["command"],
    }[source]()
    process, _ = serves(command, tmp_path, fal.url)
    try:
        assert process.stop(signal.SIGTERM) == 0
    finally:
        process.kill()


def test_the_image_serves_and_is_unwell_while_the_ledger_takes_no_write_or_it_has_ended(
    fal: Fal, tmp_path: Path
) -> None:
    assert dockerfile("ENTRYPOINT") == []
    process, port = serves(json.loads(dockerfile("CMD")[-1]), tmp_path, fal.url)
    try:
        check = health_check("image", port)
        assert is_well(check)
        writer = sqlite3.connect(tmp_path / "abhiapi.db", isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        until(lambda: not is_well(check), what="it has noticed")
        writer.execute("ROLLBACK")
        writer.close()
        until(lambda: is_well(check), what="it is well again")
        assert process.stop(getattr(signal, dockerfile("STOPSIGNAL")[0])) == 0
        assert not is_well(check)
    finally:
        process.kill()


def test_the_database_of_the_compose_file_serves_and_its_health_is_seen(tmp_path: Path) -> None:
    service = compose()["services"]["postgres"]
    assert service["command"][0] == "postgres"
    server = Postgres.make()
    check = health_check("postgres", server.port)
    try:
        assert not is_well(check)
        server.go(*service["command"][1:])
        assert is_well(check)
        with server.connect() as connection:
            connection.execute("CREATE DATABASE abhiapi TEMPLATE template0")
            given = dict(word.split("=") for word in service["command"] if "=" in word)
            for name, value in given.items():
                assert connection.execute("SELECT current_setting(%s)", [name]).fetchone() == (value,)
        made = database_at(server.url(service["environment"]["POSTGRES_DB"]))
        migrate(made)
        assert made.read(audit.verify).ok
        server.stop("fast")
        assert not is_well(check)
    finally:
        server.remove()


def test_the_redis_of_the_compose_file_counts_and_its_health_is_seen(tmp_path: Path) -> None:
    command, port = compose()["services"]["redis"]["command"], free_port()
    check = health_check("redis", port)
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([*command, "--port", str(port)], cwd=tmp_path, stdout=log, stderr=log)
    try:
        until(lambda: is_well(check), what="Redis is well")
        seen = redis_line.look(f"redis://127.0.0.1:{port}/0")
        assert seen.eviction_policy == "noeviction"
        process.terminate()
        assert process.wait(20) == 0
        assert not is_well(check)
        assert {path.name for path in tmp_path.iterdir()} == {"log"}, "its root is read-only"
    finally:
        process.kill()


def test_the_caddy_of_the_compose_file_is_seen_to_be_well(tmp_path: Path) -> None:
    port = free_port()
    check = health_check("caddy", port)
    assert not is_well(check)
    with caddy(tmp_path, free_port(), admin=f"127.0.0.1:{port}"):
        until(lambda: is_well(check), what="Caddy is well")


def test_secrets_made_as_the_compose_file_says_are_what_its_services_read(tmp_path: Path) -> None:
    """The lines at its top as they are, but for the owner where we may not give files away; then its settings."""
    text = (DEPLOY / "docker-compose.yml").read_text()
    lines = [line[4:] for line in text.splitlines() if line.startswith("#   ")]
    script = "\n".join(line for line in lines if os.geteuid() == 0 or not line.startswith("chown"))
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    files = {path.name: path for path in (tmp_path / "secrets").iterdir()}
    made = compose()
    assert set(files) == set(made["secrets"]) == {Path(one["file"]).name for one in made["secrets"].values()}
    assert all(path.stat().st_mode & 0o077 == 0 for path in files.values())
    for name, service in made["services"].items():
        for secret in service.get("secrets", []):
            is_ours = name.startswith("proxy")
            assert os.geteuid() != 0 or (files[secret["source"]].stat().st_uid == 10001) == is_ours
    environ = {
        name: value.replace("/run/secrets/", f"{tmp_path}/secrets/")
        for name, value in made["services"]["proxy-1"]["environment"].items()
    }
    settings = Settings.from_env(environ)
    assert settings.public_url == f"https://{HOST}"
    password = files["postgres_password"].read_text()
    assert settings.database_url == f"postgresql+psycopg://abhiapi:{password}@postgres/abhiapi"
    assert None not in (settings.fal_key, settings.webhook_key, settings.metrics_token)


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
