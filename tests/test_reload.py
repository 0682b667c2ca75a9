"""A running server gets a new credential, or new settings, without dropping a call: SIGHUP."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import psutil
import requests

from tests.harness import Fal, Server, until

OLD, NEW = "old-id:0123456789-old-secret", "new-id:9876543210-new-secret"


def credentials(fal: Fal, marker: str) -> list[str]:
    """What fal was shown by the calls that bear a mark."""
    return [value for call in fal.calls(marker) for name, value in call["headers"] if name.lower() == "authorization"]


def serving(server: Server) -> int:
    """How many workers have begun to serve so far."""
    return server.process.output().count("AbhiAPI serves")


def worker(server: Server) -> psutil.Process:
    """The one that serves, where no reload is under way."""
    (only,) = psutil.Process(server.process.popen.pid).children()
    return only


def takes_calls(one: psutil.Process) -> bool:
    """Whether it has the socket on which calls come in."""
    try:
        return any(connection.status == psutil.CONN_LISTEN for connection in one.net_connections("tcp"))
    except psutil.NoSuchProcess:
        return False


def called_with(server: Server, key: str, fal: Fal, marker: str) -> str:
    """The credential that a call made now came to fal with."""
    assert server.post(key, body={"prompt": marker}).status_code == 200
    return credentials(fal, marker)[-1]


def test_a_new_credential_is_taken_without_a_restart(fal: Fal, tmp_path: Path) -> None:
    """The call that runs ends under the old one and is charged; the next goes under the new; no line shows either."""
    file = tmp_path / "fal-key"
    file.write_text(OLD + "\n")
    with Server.started(tmp_path, fal.url, FAL_KEY="", FAL_KEY_FILE=str(file)) as server:
        name, key = server.books.account(1000)
        answers: list[requests.Response] = []
        before, after = (f"{word} {tmp_path.name}" for word in ("before", "after"))
        weather = f"hold_until={tmp_path.name}"
        running = threading.Thread(
            target=lambda: answers.append(server.post(key, body={"prompt": before}, weather=weather))
        )
        running.start()
        until(lambda: fal.calls(before), what="fal has the call")
        file.write_text(NEW + "\n")
        old = worker(server)
        server.process.popen.send_signal(signal.SIGHUP)
        until(lambda: not takes_calls(old), what="the old worker takes no more calls")
        assert server.post(key, body={"prompt": after}).status_code == 200
        fal.release(tmp_path.name)
        running.join(60)
        assert answers[0].status_code == 200
        assert credentials(fal, before) == [f"Key {OLD}"]
        assert credentials(fal, after) == [f"Key {NEW}"]
        assert server.books.standing(name) == (1_000_000 - 2 * 26_250, 0)
        assert server.books.verify().ok
        output = server.process.output()
        assert not any(part in output for whole in (OLD, NEW) for part in whole.split(":"))


def test_a_reload_with_bad_settings_is_refused_and_the_server_goes_on(fal: Fal, tmp_path: Path) -> None:
    """A worker that cannot start would end the whole server. Here the credential is in .env, which is read anew too."""
    dotenv = tmp_path / ".env"
    dotenv.write_text(f"FAL_KEY={OLD}\n")
    marker = f"reloaded {tmp_path.name}"
    with Server.started(tmp_path, fal.url, CWD=str(tmp_path), FAL_KEY="") as server:
        _, key = server.books.account(1000)
        for number, wrong in enumerate(("", "FAL_KEY=two words"), start=1):
            dotenv.write_text(wrong)
            server.process.popen.send_signal(signal.SIGHUP)
            until(
                lambda number=number: server.process.output().count("not reloaded") == number,  # type: ignore[misc]
                what="it says why",
            )
            assert server.post(key).status_code == 200
        assert serving(server) == 1
        dotenv.write_text(f"FAL_KEY={NEW}\n")
        old = worker(server)
        server.process.popen.send_signal(signal.SIGHUP)
        until(lambda: serving(server) == 2, what="the next reload works")
        until(lambda: not takes_calls(old), what="the old worker takes no more calls")
        assert called_with(server, key, fal, marker) == f"Key {NEW}"
        assert server.process.stop() == 0
