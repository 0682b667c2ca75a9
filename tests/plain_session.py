"""Requests as tests make them, with nothing of the environment between them and 127.0.0.1: no proxy, no netrc.

It would be looked through for each request, some ten thousand times, and while in-process commands change it beside.
"""

from __future__ import annotations

from types import SimpleNamespace

import requests


class PlainSession(requests.Session):
    def __init__(self) -> None:
        super().__init__()
        self.trust_env = False


def make_usual() -> None:
    """For `requests.get` and its like, which tests use and the product does not."""
    requests.api.sessions = SimpleNamespace(Session=PlainSession)
