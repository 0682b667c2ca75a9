"""How gunicorn serves AbhiAPI: one gevent process, many connections, time to finish what runs.

Read by gunicorn in its master process (`abhiapi serve`, and gunicorn.conf.py of a checkout). Checks the settings
before anything is bound, so that a wrong one ends the process with status 2 and every problem said.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from typing import Any

from abhiapi import logs, serving
from abhiapi.errors import SettingsError

log = logging.getLogger("abhiapi")

GC_THRESHOLDS = (20_000, 20, 50)
SWITCH_INTERVAL_S = 0.0005  # the thread that commits gets its turn beside a busy event loop


def _end(error: SettingsError) -> None:
    for problem in error.problems:
        print(f"abhiapi: {problem}", file=sys.stderr)
    sys.exit(2)


try:
    _settings = serving.checked_settings()
except SettingsError as error:
    _end(error)
_warning = serving.raise_file_limit()
if _warning:
    print(f"abhiapi: {_warning}", file=sys.stderr)

_lines: logs.Lines | None = None  # of a worker

worker_class = "abhiapi.worker.LeanWorker"
workers = 1
worker_connections = serving.CONNECTIONS
backlog = 4096
timeout = 60  # a worker whose event loop stands still this long is restarted
graceful_timeout = _settings.drain_s
keepalive = 5
forwarded_allow_ips = ""  # proxies in front are trusted by ABHIAPI_TRUSTED_PROXIES alone
control_socket_disable = True
http_parser = "auto"  # gunicorn_h1c where it is installed, else the parser in Python
accesslog = None  # the calls table is the record of calls
errorlog = "-"
loglevel = "warning"


def on_starting(server: Any) -> None:
    try:
        serving.check_workers(_settings, server.cfg.workers)
    except SettingsError as error:
        _end(error)
    logs.set_up(_settings)
    reload = server.handle_hup

    def reload_if_settings_are_good() -> None:
        """A worker that cannot start ends the whole server, so what it will read is read here first."""
        try:
            serving.checked_settings()
        except SettingsError as error:
            log.error("not reloaded, the old settings stay in force: %s", "; ".join(error.problems))
        else:
            reload()

    server.handle_hup = reload_if_settings_are_good


def on_reload(server: Any) -> None:
    logs.set_up(serving.checked_settings())  # gunicorn has just made its own log anew


def post_fork(server: Any, worker: Any) -> None:
    global _lines
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _lines = logs.set_up(serving.checked_settings())  # as they are now: secrets may have changed since the start


def post_worker_init(worker: Any) -> None:
    """Now calls are answered: say where, and to a newcomer how."""
    if _lines is not None:
        _lines.write_aside()
        logs.take_stray_tracebacks()
    gc.collect()
    gc.freeze()  # what was loaded stays; looking through it again and again would cost a tenth of each call
    gc.set_threshold(*GC_THRESHOLDS)
    addresses = ", ".join(str(sock.getsockname()) for sock in worker.sockets)
    serves = f"AbhiAPI serves {_settings.fal_run_url} on {addresses}"
    if _settings.log_format == "json":
        log.warning("%s", serves)  # whatever the level: this is how a start is seen
    else:
        print(serves, file=sys.stderr, flush=True)
    if link := os.environ.get("ABHIAPI_DEMO_LINK"):
        from abhiapi.web.pages import demo

        demo.offer(sys.modules["abhiapi.wsgi"].app, link)
    banner = os.environ.get("ABHIAPI_BANNER")
    if banner:
        print(banner, flush=True)


def worker_exit(server: Any, worker: Any) -> None:
    """End the process's row and lock, so that nothing of it is left for a sweep."""
    wsgi = sys.modules.get("abhiapi.wsgi")
    if wsgi is not None and hasattr(wsgi, "rt"):
        wsgi.rt.close()
    if _lines is not None:
        _lines.flush()
