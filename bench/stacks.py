"""The stacks measured side by side, each in front of the same stub: how to start one and how to call it.

`direct` is the stub itself, against which the others' added latency is counted.
"""

import base64
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from books import CLI, Books, command_line
from install import EXPRESS, express_modules, litellm_command
from nginx import nginx
from process import Process, free_port, on_core
from stub import MODEL_PATH, Stub

sys.path.insert(0, str(CLI.parent))
from tests.postgres import Postgres
from tests.redis_server import RedisServer

FAL_KEY = "bench:key"
JSON_HEADERS = {"content-type": "application/json"}


@dataclass(slots=True)
class Running:
    """A stack that accepts calls: POST `path` on 127.0.0.1:`port` with `headers` reaches the model through it."""

    port: int
    path: str = MODEL_PATH
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON_HEADERS))
    process: Process | None = None
    books: Books | None = None


StackStarter = Callable[[Stub, Path, int], contextlib.AbstractContextManager[Running]]


@contextlib.contextmanager
def direct(stub: Stub, folder: Path, core: int) -> Iterator[Running]:
    """No proxy at all."""
    yield Running(stub.port, headers=JSON_HEADERS | {"authorization": f"Key {FAL_KEY}"})


@contextlib.contextmanager
def nginx_proxy(stub: Stub, folder: Path, core: int) -> Iterator[Running]:
    """nginx as a plain reverse proxy, set up to pass bodies on as they come rather than through temporary files."""
    port = free_port()
    http = f"""
        upstream stub {{ server 127.0.0.1:{stub.port}; keepalive 4096; keepalive_requests 1000000000; }}
        server {{
            listen 127.0.0.1:{port} backlog=4096;
            location / {{
                proxy_pass http://stub;
                proxy_http_version 1.1;
                proxy_set_header Connection "";
                proxy_set_header Authorization "Key {FAL_KEY}";
                proxy_request_buffering off;
                proxy_max_temp_file_size 0;
            }}
        }}
    """
    with nginx(folder, core, port, http) as process:
        yield Running(port, process=process)


@contextlib.contextmanager
def official(stub: Stub, folder: Path, core: int) -> Iterator[Running]:
    """fal's own `@fal-ai/server-proxy` on Express; it has no keys, limits or billing."""
    port = free_port()
    env = os.environ | {
        "FAL_KEY": FAL_KEY,
        "PORT": str(port),
        "BENCH_STUB_URL": stub.url,
        "NODE_ENV": "production",
        "NODE_PATH": str(express_modules()),
    }
    argv = ["node", "--require", str(EXPRESS / "remap.js"), str(EXPRESS / "server.js")]
    process = Process(argv, core=core, env=env, cwd=folder, log=folder / "official.log")
    try:
        process.wait_until_listening(port)
        target = {"x-fal-target-url": f"https://fal.run{MODEL_PATH}"}
        yield Running(port, "/api/fal/proxy", JSON_HEADERS | target, process)
    finally:
        process.stop()


@contextlib.contextmanager
def litellm(stub: Stub, folder: Path, core: int) -> Iterator[Running]:
    """LiteLLM's proxy with a pass-through route: it checks its master key and forwards; its database is off."""
    port = free_port()
    config = folder / "litellm.yaml"
    config.write_text(f"""
model_list: []
general_settings:
  master_key: sk-bench
  pass_through_endpoints:
    - path: "/fal-ai"
      target: "{stub.url}/fal-ai"
      include_subpath: true
      headers: {{ Authorization: "Key {FAL_KEY}", content-type: application/json }}
""")
    env = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    argv = [str(litellm_command()), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    process = Process(argv, core=core, env=env, cwd=folder, log=folder / "litellm.log")
    try:
        process.wait_until_listening(port)
        yield Running(port, headers=JSON_HEADERS | {"authorization": "Bearer sk-bench"}, process=process)
    finally:
        process.stop()


@contextlib.contextmanager
def abhiapi(stub: Stub, folder: Path, core: int) -> Iterator[Running]:
    """This repository's proxy: one process, a new SQLite file, every charge recorded before its answer is whole."""
    with _serving(stub, folder, core, {"ABHIAPI_DATABASE_URL": f"sqlite:///{folder / 'abhi.db'}"}, 1) as running:
        yield running


def on_postgresql(workers: int) -> StackStarter:
    """The same on a new PostgreSQL that syncs each commit to disk, with a Redis; all of them on the proxy's core."""

    @contextlib.contextmanager
    def start(stub: Stub, folder: Path, core: int) -> Iterator[Running]:
        with contextlib.ExitStack() as stack:
            with on_core(core):
                postgres = Postgres.start(fsync="on", full_page_writes="on")
                stack.callback(postgres.remove)
                redis = stack.enter_context(RedisServer.started(folder))
            settings = {
                "ABHIAPI_DATABASE_URL": stack.enter_context(postgres.fresh(empty=True)),
                "ABHIAPI_LIMITS_URL": redis.url(),
                "ABHIAPI_WEBHOOK_KEY": base64.b64encode(b"bench" * 6 + b"..").decode(),
            }
            yield stack.enter_context(_serving(stub, folder, core, settings, workers))

    return start


@contextlib.contextmanager
def _serving(stub: Stub, folder: Path, core: int, settings: dict[str, str], workers: int) -> Iterator[Running]:
    port = free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("ABHIAPI_")} | {
        "FAL_KEY": FAL_KEY,
        "ABHIAPI_FAL_RUN_URL": stub.url,
        "ABHIAPI_FAL_QUEUE_URL": f"{stub.url}/queue",
        "ABHIAPI_PRICES_SYNC_S": "0",
        "ABHIAPI_LOG_CALLS": "0",
        "ABHIAPI_RATE_PER_MINUTE": "1000000000",
        "ABHIAPI_CONCURRENCY": "100000",
        # It runs in the temporary folder, so that no .env of this checkout joins in; the workers import from here.
        "PYTHONPATH": str(CLI.parent),
    }
    env |= settings
    books = Books(env, folder)
    key = books.open()
    argv = command_line("serve", "--bind", f"127.0.0.1:{port}", "--workers", str(workers))
    process = Process(argv, core=core, env=env, cwd=folder, log=folder / "abhiapi.log")
    try:
        process.wait_until_listening(port)
        yield Running(port, headers=JSON_HEADERS | {"x-api-key": key}, process=process, books=books)
    finally:
        process.stop()


STACKS: dict[str, StackStarter] = {
    "direct": direct,
    "nginx": nginx_proxy,
    "official": official,
    "litellm": litellm,
    "abhiapi": abhiapi,
}
ENGINES: dict[str, StackStarter] = {f"postgresql-{workers}": on_postgresql(workers) for workers in (1, 2, 4)}


def check_answer(name: str, body: bytes, expected: bytes) -> str | None:
    """What is wrong with a stack's answer to a call that the stub answered with `expected`, if anything."""
    if name != "abhiapi" and name not in ENGINES:
        return None if body == expected else f"{name} changed the answer"
    if not body.startswith(expected[:-1]):
        return "abhiapi changed the answer beyond its last brace"
    billing = json.loads(body, parse_float=str).get("_billing", {})
    if billing.get("credits_used") != "26.25":
        return f"abhiapi billed {billing.get('credits_used')!r} credits for a call that costs 26.25"
    return None
