"""The stub upstream: what it answers, and how each kind of it is started.

nginx answers small JSON and the 50 MB file (it must cost far less than any proxy in front of it); `stub_server.py`
answers slowly and reads large uploads whole. Each listens on a port of 127.0.0.1.
"""

import base64
import contextlib
import json
import os
import random
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nginx import nginx
from process import Process, free_port

ROOT = Path(__file__).resolve().parents[1]
MODEL_PATH = "/fal-ai/flux/dev"
BIG_BYTES = 50_000_000
SLOW_ANSWER_S = 5.0

ANSWER_HEADERS = {
    "x-fal-billable-units": "1",
    "x-fal-request-id": "7c1f5f0e-3f0b-4c53-9d0a-5b6a4b5b7a10",
}
ANSWER_BODY = json.dumps(
    {
        "images": [
            {
                "url": "https://v3.fal.media/files/rabbit/bench-4c53a9d05b6a_c0ffee.jpg",
                "width": 1024,
                "height": 768,
                "content_type": "image/jpeg",
            }
        ],
        "timings": {"inference": 1.1437978390604258},
        "seed": 3_871_442_950,
        "has_nsfw_concepts": [False],
        "prompt": "a cat",
    }
).encode()


@dataclass(frozen=True, slots=True)
class Stub:
    """A running upstream."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set_delay(self, seconds: float) -> None:
        """Wait this long before each answer from now on, and count calls in flight anew (the Python stub only)."""
        self._control(f"/delay/{seconds}")

    def peak_in_flight(self) -> int:
        """How many calls it held at once since the delay was set (the Python stub only)."""
        return self._control("/stats")["peak_in_flight"]

    def _control(self, path: str) -> dict[str, int]:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            state: dict[str, int] = json.load(answer)
        return state


StubStarter = Callable[[Path, int], contextlib.AbstractContextManager[Stub]]


def big_text() -> str:
    """Incompressible base64, so that the JSON around it is about BIG_BYTES long."""
    return base64.b64encode(random.Random(2).randbytes(BIG_BYTES * 3 // 4)).decode()


@contextlib.contextmanager
def small_json(folder: Path, core: int) -> Iterator[Stub]:
    """nginx answering every call with ANSWER_BODY."""
    location = f"location / {{ {_nginx_headers()} return 200 '{ANSWER_BODY.decode()}'; }}"
    with _nginx_stub(folder, core, location) as stub:
        yield stub


@contextlib.contextmanager
def big_json(folder: Path, core: int) -> Iterator[Stub]:
    """nginx answering every call with a JSON object of BIG_BYTES, an image inline as a data URI."""
    answer = {"images": [{"url": f"data:image/png;base64,{big_text()}"}], "seed": 1, "prompt": "a cat"}
    (folder / "answer.json").write_text(json.dumps(answer))
    # A static file refuses POST with 405; the error page turns that into the file itself with status 200.
    locations = f"""
        location / {{ rewrite ^ /answer.json last; }}
        location = /answer.json {{ root {folder}; {_nginx_headers()} error_page 405 =200 /answer.json; }}
    """
    with _nginx_stub(folder, core, locations) as stub:
        yield stub


@contextlib.contextmanager
def python_stub(folder: Path, core: int) -> Iterator[Stub]:
    """`stub_server.py`: reads the whole request, answers at once until told to wait."""
    port = free_port()
    script = Path(__file__).with_name("stub_server.py")
    argv = [sys.executable, str(script), "--port", str(port)]
    process = Process(argv, core=core, env=os.environ, cwd=folder, log=folder / "stub.log")
    try:
        process.wait_until_listening(port)
        yield Stub(port)
    finally:
        process.stop(kill=True)


@contextlib.contextmanager
def simulator(folder: Path, core: int) -> Iterator[Stub]:
    """This repository's fal simulator, with its queue and its streams."""
    port = free_port()
    argv = [sys.executable, str(ROOT / "cli.py"), "sandbox", "--bind", f"127.0.0.1:{port}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = Process(argv, core=core, env=env, cwd=folder, log=folder / "simulator.log")
    try:
        process.wait_until_listening(port)
        yield Stub(port)
    finally:
        process.stop(kill=True)


def _nginx_headers() -> str:
    headers = " ".join(f"add_header {name} {value};" for name, value in ANSWER_HEADERS.items())
    return f"default_type application/json; {headers}"


@contextlib.contextmanager
def _nginx_stub(folder: Path, core: int, locations: str) -> Iterator[Stub]:
    port = free_port()
    with nginx(folder, core, port, f"server {{ listen 127.0.0.1:{port} backlog=4096; {locations} }}"):
        yield Stub(port)
