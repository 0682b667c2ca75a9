"""The log: lines of text or JSON on stderr, with the call that they belong to, and never a secret.

A line is made and cleared of secrets where it is logged, and written a moment later from a native thread, many at once,
so that no call waits for whoever reads the log; a warning, and all before it, is written at once. What a killed
process had not written yet is lost: the calls table is the record of calls, not the log.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any

import gevent
from gevent.event import Event

from abhiapi.committer import in_thread
from abhiapi.ids import call_text, key_text
from abhiapi.redaction import Redactor
from abhiapi.settings import Settings

GATHER_S = 0.1  # how long a line may wait for others
WAITING_MAX = 20_000  # lines; more are dropped, and counted: nobody reads as fast as they come
_log = logging.getLogger("abhiapi")
_CALL_ID = re.compile(r"\bcall_[0-9a-z]{13}\b")
_CONTROL = {code: repr(chr(code))[1:-1] for code in (*range(32), 127)}
_JSON = json.JSONEncoder(default=str)  # made once: making it costs more than using it
_NAMES = {logging.CRITICAL: "critical", logging.ERROR: "error", logging.WARNING: "warning", logging.INFO: "info"}


@dataclass(slots=True)
class InCall:
    """The call that this greenlet is at: whose lines these are."""

    call_id: int
    account: str = ""
    key_id: int = 0
    is_told: bool = False  # its line at the end has been written


in_call: ContextVar[InCall | None] = ContextVar("abhiapi_in_call", default=None)


def tell(log: logging.Logger, message: str, fields: dict[str, Any]) -> None:
    """A line at level `info` with figures of its own. Where it was logged is not looked up, which would cost as much as
    all the rest."""
    record = log.makeRecord(log.name, logging.INFO, "", 0, message, (), None, extra={"fields": fields})
    log.handle(record)


class JsonLines(logging.Formatter):
    """One object a line: when, how bad, what, and of which call."""

    def format(self, record: logging.LogRecord) -> str:
        shape: dict[str, Any] = {
            "at": _iso(record.created),
            "level": _NAMES.get(record.levelno, record.levelname.lower()),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        of = in_call.get()
        if fields is not None:
            shape.update(fields)
        elif of is not None:
            shape["call_id"] = call_text(of.call_id)
            if of.account:
                shape["account"], shape["key_id"] = of.account, key_text(of.key_id)
        elif found := _CALL_ID.search(shape["message"]):
            shape["call_id"] = found[0]
        if record.exc_info:
            shape["traceback"] = self.formatException(record.exc_info)
        return _JSON.encode(shape)


class TextLines(logging.Formatter):
    """For people. What came from outside cannot begin a line of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return _iso(record.created)

    def formatMessage(self, record: logging.LogRecord) -> str:
        of = in_call.get()
        fields = getattr(record, "fields", None)
        if fields is not None:
            record.message = " ".join((record.message, *(f"{name}={value}" for name, value in fields.items())))
        elif of is not None:
            whose = f" ({call_text(of.call_id)}, {of.account}, {key_text(of.key_id)})" if of.account else ""
            record.message += whose or f" ({call_text(of.call_id)})"
        if not record.message.isprintable():
            record.message = record.message.translate(_CONTROL)
        return super().formatMessage(record)


class Lines(logging.Handler):
    """Where all lines of a process go: formatted and cleared of secrets at once, written by and by."""

    def __init__(self, secrets: Iterable[str], *, fd: int | None = None) -> None:
        super().__init__()
        self._redact = Redactor(secrets)
        self._fd = sys.stderr.fileno() if fd is None else fd
        self._waiting: deque[str] = deque()
        self._wake: Event | None = None  # set once a greenlet writes
        self._is_writing = False
        self.dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._redact(self.format(record))
        except Exception as error:  # a bug in a message; its arguments may be anything, so they are not shown
            line = f"a line of the log could not be made at {record.pathname}:{record.lineno}: {type(error).__name__}"
        if len(self._waiting) >= WAITING_MAX:
            self.dropped += 1
            return
        self._waiting.append(line)
        if self._wake is None or record.levelno >= logging.WARNING:
            self.flush()
        else:
            self._wake.set()

    def flush(self) -> None:
        """Write what waits, now; unless the thread is at it, which then takes these lines too."""
        if not self._is_writing and self._waiting:
            _write(self._fd, self._taken())

    def write_aside(self) -> None:
        """From now on lines are written from a native thread. For a process whose event loop runs."""
        if self._wake is None:
            self._wake = Event()
            gevent.spawn(self._write_for_ever, self._wake)

    def _write_for_ever(self, wake: Event) -> None:
        pool = gevent.get_hub().threadpool
        while True:
            wake.wait()
            gevent.sleep(GATHER_S)
            wake.clear()
            while self._waiting:
                block = self._taken()
                self._is_writing = True
                try:
                    in_thread(pool, lambda block=block: _write(self._fd, block))  # type: ignore[misc]
                finally:
                    self._is_writing = False

    def _taken(self) -> bytes:
        lines = [self._waiting.popleft() for _ in range(len(self._waiting))]
        return ("\n".join(lines) + "\n").encode(errors="backslashreplace")


def set_up(settings: Settings) -> Lines:
    """Send every line of this process here, those of libraries and of gunicorn included."""
    lines = Lines(settings.secrets)
    lines.setFormatter(JsonLines() if settings.log_format == "json" else TextLines())
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    root.addHandler(lines)
    root.setLevel(settings.log_level.upper())
    gunicorn = logging.getLogger("gunicorn.error")
    gunicorn.handlers.clear()
    gunicorn.propagate = True
    return lines


def take_stray_tracebacks() -> None:
    """What gevent would print of a greenlet that failed becomes a line of the log, cleared of secrets."""

    def log_it(context: object, kind: Any, value: Any, trace: TracebackType | None) -> None:
        _log.error("%s failed", context, exc_info=(kind, value, trace))

    gevent.get_hub().print_exception = log_it  # type: ignore[method-assign,assignment]


def _iso(at_s: float) -> str:
    second, milliseconds = divmod(int(at_s * 1000), 1000)
    return f"{_second_text(second)}.{milliseconds:03d}Z"


@lru_cache(maxsize=2)
def _second_text(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _write(fd: int, block: bytes) -> None:
    try:
        while block:
            block = block[os.write(fd, block) :]
    except OSError:
        pass  # nobody reads the log any more, or its disk is full: no reason to fail a call
