"""Starting and stopping the product as a newcomer and an operator do it."""

from __future__ import annotations

import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests

from abhiapi.serving import others_counting_apart, parse_bind
from abhiapi.settings import Settings
from abhiapi.web.pages import texts
from tests.harness import OPERATOR_KEY, ROOT, Process, Server, environment, free_port, until
from tests.receiver import Receiver


@contextmanager
def demo(folder: Path, port: int, **settings: str) -> Iterator[Process]:
    """`make run` without FAL_KEY, less the installing."""
    env = environment(ABHIAPI_DATABASE_URL=f"sqlite:///{folder / 'sandbox.db'}", **settings)
    process = Process.start(
        ["cli.py", "serve", "--sandbox", "--demo", "--bind", f"127.0.0.1:{port}"], folder / "demo.log", env
    )
    try:
        until(lambda: "Then look at the books" in process.output(), what="the greeting is printed", within_s=30)
        yield process
    finally:
        process.kill()


def pasted(output: str) -> dict[str, object]:
    """The answer to the printed curl line, run as a shell would."""
    line = re.search(r"curl -X POST(?:[^\n]*\\\n)*[^\n]*", output)
    assert line is not None
    words = shlex.split(line[0].replace("\\\n", " "))
    headers = dict(words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H")
    answer = requests.post(words[3], headers=headers, data=words[words.index("-d") + 1], timeout=30)
    assert answer.status_code == 200
    body: dict[str, object] = answer.json()
    return body


def test_the_printed_line_works_when_pasted(tmp_path: Path) -> None:
    """A newcomer's first call is answered and charged from the 5,000 credits of the demo account."""
    with demo(tmp_path, free_port()) as process:
        billing = pasted(process.output())["_billing"]
    assert billing == {
        "model": "fal-ai/flux/dev",
        "credits_used": 26.25,
        "cost_usd": 0.02625,
        "balance_remaining": 4973.75,
    }


@pytest.mark.parametrize("is_public", [False, True])
def test_a_newcomers_webhook_comes_to_their_own_machine(tmp_path: Path, is_public: bool) -> None:
    """Without any setting; and by the simulator's own delivery where it knows our address."""
    port = free_port()
    more = {"ABHIAPI_PUBLIC_URL": f"http://127.0.0.1:{port}", "ABHIAPI_RECONCILE_INTERVAL_S": "3600"}
    with Receiver.started() as receiver, demo(tmp_path, port, **(more if is_public else {})) as process:
        key = re.search(r"sk-fal-\w+", process.output())
        assert key is not None
        submitted = requests.post(
            f"http://127.0.0.1:{port}/queue/fal-ai/flux/dev",
            params={"fal_webhook": receiver.url()},
            json={"prompt": "a cat"},
            headers={"x-api-key": key[0]},
            timeout=30,
        )
        (told,) = receiver.delivered(submitted.json()["request_id"])
        assert told.json["_billing"]["credits_used"] == 26.25


def test_a_second_start_prints_a_line_that_works_and_gives_no_more_credit(tmp_path: Path) -> None:
    for start in (1, 2):
        with demo(tmp_path, free_port()) as process:
            billing = pasted(process.output())["_billing"]
            assert isinstance(billing, dict)
            assert billing["balance_remaining"] == 5000 - start * 26.25
            (tmp_path / "demo.log").unlink()


def test_a_checkout_serves_from_any_working_folder(tmp_path: Path) -> None:
    env = environment(ABHIAPI_DATABASE_URL=f"sqlite:///{tmp_path / 'sandbox.db'}")
    del env["PYTHONPATH"]
    bind = f"127.0.0.1:{free_port()}"
    log = tmp_path / "demo.log"
    process = Process.start([str(ROOT / "cli.py"), "serve", "--sandbox", "--bind", bind], log, env, cwd=tmp_path)
    try:
        until(lambda: "AbhiAPI serves" in process.output(), what="it serves", within_s=30)
        assert requests.get(f"http://{bind}/healthz", timeout=10).ok
    finally:
        process.kill()


def test_each_start_prints_a_link_that_signs_in_and_ends_the_one_before(tmp_path: Path) -> None:
    links = []
    for _ in range(2):
        port = free_port()
        with demo(tmp_path, port) as process:
            links += re.findall(r"/dashboard/demo/\S+", process.output())[-1:]
            opened = [requests.get(f"http://127.0.0.1:{port}{link}", timeout=30) for link in links]
            (tmp_path / "demo.log").unlink()
    assert [page.status_code for page in opened] == [404, 200]
    assert "Signed in as demo@example.com" in opened[1].text


def test_the_demo_key_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    with demo(tmp_path, free_port()):
        assert (tmp_path / "sandbox.db.demo-key").stat().st_mode & 0o077 == 0


def test_the_simulator_ends_with_the_server(tmp_path: Path) -> None:
    with demo(tmp_path, free_port()) as process:
        children = psutil.Process(process.popen.pid).children(recursive=True)
        simulators = [child for child in children if "abhiapi.sandbox" in child.cmdline()]
        assert len(simulators) == 1
        assert process.stop(signal.SIGTERM) == 0
        until(lambda: not simulators[0].is_running(), what="the simulator has ended")


@pytest.mark.parametrize("command", [["cli.py", "serve"], ["-m", "gunicorn", "app:app"]], ids=["serve", "gunicorn"])
def test_several_workers_on_sqlite_are_refused(tmp_path: Path, command: list[str]) -> None:
    env = environment(FAL_KEY=OPERATOR_KEY, ABHIAPI_DATABASE_URL=f"sqlite:///{tmp_path / 'a.db'}")
    bind = ["--bind", f"127.0.0.1:{free_port()}", "--workers", "2"]
    ended = subprocess.run(
        [sys.executable, *command, *bind], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert "PostgreSQL" in ended.stderr


def test_serving_without_a_credential_is_refused(tmp_path: Path) -> None:
    env = environment(ABHIAPI_DATABASE_URL=f"sqlite:///{tmp_path / 'a.db'}")
    ended = subprocess.run(
        [sys.executable, "cli.py", "serve"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert "FAL_KEY" in ended.stderr
    assert "--sandbox" in ended.stderr


def test_a_second_server_of_one_ledger_is_warned_of(shared_server: Server) -> None:
    """Each counts limits for itself, unless they share a Redis."""
    settings = Settings.from_env({"ABHIAPI_LIMITS_URL": "memory://"})
    database = shared_server.books.database
    until(lambda: others_counting_apart(database, settings) >= 1, what="it has taken its place")
    shared = Settings.from_env({"ABHIAPI_LIMITS_URL": "redis://127.0.0.1:9/0"})
    assert others_counting_apart(database, shared) == 0


def test_a_taken_port_is_said_in_one_line(tmp_path: Path) -> None:
    env = environment(FAL_KEY=OPERATOR_KEY, ABHIAPI_DATABASE_URL=f"sqlite:///{tmp_path / 'a.db'}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = subprocess.run(
            [sys.executable, "cli.py", "serve", "--bind", bind],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 1
    assert bind in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("127.0.0.1:8000", ("127.0.0.1", 8000)), ("[::1]:80", ("::1", 80)), ("0.0.0.0:0", ("0.0.0.0", 0))],
)
def test_bind_addresses_are_read(text: str, parsed: tuple[str, int]) -> None:
    assert parse_bind(text) == parsed


def test_the_installed_package_holds_its_data_files(tmp_path: Path) -> None:
    """schema.sql lies at the top of the checkout and must still come along in the package."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(next(tmp_path.glob("*.whl")))],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert "abhiapi/schema.sql" in listed
    assert "abhiapi/prices.toml" in listed
    for folder in ("web/templates/reference", "web/static"):
        for path in (ROOT / "abhiapi" / folder).iterdir():
            assert f"abhiapi/{folder}/{path.name}" in listed
    for guide in texts.names():  # links to docs/, which lies at the top, too
        assert f"abhiapi/web/pages/texts/{guide}.md" in listed
