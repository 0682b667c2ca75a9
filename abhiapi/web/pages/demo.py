"""The way into the demo account that a page may offer: by `serve --sandbox --demo`, to whoever sits at this machine.

The link signs in an operator of play money, so it is shown to nobody who may be a stranger: the server said that it has
one (`offer`), no proxy stands in front, the connection comes from this machine, and the browser asked for this machine
by one of its own names (else a page elsewhere whose name leads to 127.0.0.1 could read it).
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from flask import Flask, current_app, request

from abhiapi.web.caller import runtime

_EXTENSION = "abhiapi-demo-link"
_PASSED_ON = ("Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP")


def offer(app: Flask, link: str) -> None:
    """From now on pages show this link to those who may have it."""
    app.extensions[_EXTENSION] = link


def link() -> str | None:
    """Where the demo is entered, for whoever asks just now; None where there is none for them."""
    found: str | None = current_app.extensions.get(_EXTENSION)
    settings = runtime().settings
    if found is None or settings.trusted_proxies or settings.public_url is not None:
        return None
    if any(name in request.headers for name in _PASSED_ON):
        return None
    return found if _is_loopback(request.remote_addr) and _is_loopback(_host()) else None


def _host() -> str | None:
    try:
        return urlsplit(f"//{request.host}").hostname
    except ValueError:
        return None


def _is_loopback(name: str | None) -> bool:
    if name == "localhost":
        return True
    try:
        return name is not None and ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
