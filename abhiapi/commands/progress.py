"""How far a long command is, on stderr, where it takes over a second: a line that is written over on a terminal, and
elsewhere a line of its own now and then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic_ns

import click

FIRST_AFTER_MS = 1000
TERMINAL_EVERY_MS = 200
LOG_EVERY_MS = 5000

Progress = Callable[[str, int, int], None]  # what was done with how many rows, of how many


@contextmanager
def shown() -> Iterator[Progress]:
    """What a command tells its progress, as often as it likes."""
    is_terminal = _is_terminal()
    next_ms = _now_ms() + FIRST_AFTER_MS

    def show(done: str, rows: int, total: int) -> None:
        nonlocal next_ms
        now_ms = _now_ms()
        if now_ms >= next_ms:
            next_ms = now_ms + (TERMINAL_EVERY_MS if is_terminal else LOG_EVERY_MS)
            line = f"{done} {rows} of {total} rows"
            click.echo(f"\r\033[K{line}" if is_terminal else line, nl=not is_terminal, err=True)

    try:
        yield show
    finally:
        if is_terminal:
            click.echo("\r\033[K", nl=False, err=True)


def _is_terminal() -> bool:
    return sys.stderr.isatty()


def _now_ms() -> int:
    return monotonic_ns() // 1_000_000
