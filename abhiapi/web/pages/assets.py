"""Our own static files, read once: each under an address that changes with its content, so that it is kept for ever."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

from flask import Blueprint, Response, request

from abhiapi.web.pages import headers

_FOR_EVER = "public, max-age=31536000, immutable"
_TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class Asset:
    content: bytes
    content_type: str
    digest: str


class Assets:
    """The files of abhiapi/web/static."""

    def __init__(self) -> None:
        self._assets = {
            file.name: _read(file.name, file.read_bytes())
            for file in resources.files("abhiapi.web").joinpath("static").iterdir()
            if file.is_file()
        }

    def url(self, name: str) -> str:
        """The address of a file, as templates write it: ``{{ asset('app.css') }}``."""
        return f"/static/{name}?v={self._assets[name].digest}"

    def blueprint(self) -> Blueprint:
        """A route for each file: whatever else is asked for under /static is no route of ours."""
        routes = Blueprint("assets", __name__)
        for name, found in self._assets.items():
            routes.add_url_rule(f"/static/{name}", name.replace(".", "-"), _view(found))
        routes.after_request(headers.public)
        return routes


def _view(found: Asset) -> Callable[[], Response]:
    def serve() -> Response:
        response = Response(found.content, content_type=found.content_type)
        is_exact = request.args.get("v") == found.digest
        response.headers["Cache-Control"] = _FOR_EVER if is_exact else "no-cache"
        return response

    return serve


def _read(name: str, content: bytes) -> Asset:
    suffix = "." + name.rpartition(".")[2]
    kind = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Asset(content, kind, hashlib.sha256(content).hexdigest()[:16])
