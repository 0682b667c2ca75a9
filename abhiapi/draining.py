"""Whether this server was told to end and still takes calls: gunicorn's master tells it to all of its workers.

For as long as ABHIAPI_DRAIN_S says, `/healthz` answers 503 meanwhile, so that a balancer that asks there sends its
calls elsewhere before the socket closes. A byte of memory that is shared by fork, so the master imports this first.
"""

from __future__ import annotations

import mmap

_told = mmap.mmap(-1, 1)


def begin() -> None:
    _told[0] = 1


def is_under_way() -> bool:
    return _told[0] == 1
