"""nginx as a child process: the fast stub and the plain reverse proxy are both one of these."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from process import DESCRIPTORS, Process


def nginx_config(folder: Path, http: str) -> str:
    """One worker, everything it writes inside `folder`, connections kept alive for good."""
    user = "user root;" if os.geteuid() == 0 else ""
    temp_paths = "".join(
        f"{kind}_temp_path {folder}/temp_{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""
{user}
daemon off;
worker_processes 1;
worker_rlimit_nofile {DESCRIPTORS};
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log error;
events {{ worker_connections {DESCRIPTORS // 2}; }}
http {{
{temp_paths}
access_log off;
sendfile on;
tcp_nopush on;
keepalive_requests 1000000000;
keepalive_timeout 600s;
client_max_body_size 200m;
{http}
}}
"""


@contextlib.contextmanager
def nginx(folder: Path, core: int, port: int, http: str) -> Iterator[Process]:
    """nginx with this content of its `http` block, listening on the port."""
    config = folder / "nginx.conf"
    config.write_text(nginx_config(folder, http))
    argv = ["nginx", "-p", str(folder), "-e", str(folder / "nginx-error.log"), "-c", str(config)]
    process = Process(argv, core=core, env=os.environ, cwd=folder, log=folder / "nginx.log")
    try:
        process.wait_until_listening(port)
        yield process
    finally:
        process.stop()
