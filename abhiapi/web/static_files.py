"""The stylesheets, scripts and pictures of our pages, from `static/`: named by their content, so that they may be kept.

A file's address carries a digest of it (`?v=`). Nothing else is served from there, and no folder is listed.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from flask import Blueprint, Response, request

from abhiapi.errors import UnknownRoute
from abhiapi.web.pages import headers

FOLDER = Path(__file__).with_name("static")
KEPT_S = 365 * 86_400
_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}


def blueprint() -> Blueprint:
    routes = Blueprint("static_files", __name__)
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in _TYPES:
            routes.add_url_rule(f"/static/{path.name}", path.name.replace(".", "-"), lambda name=path.name: _file(name))
    routes.after_request(headers.finish)
    routes.app_template_global("asset")(url)
    return routes


def url(name: str) -> str:
    """The address of a file, another one whenever its content is another."""
    return f"/static/{name}?v={_content(name)[1]}"


def _file(name: str) -> Response:
    content, digest = _content(name)
    response = Response(content, content_type=_TYPES[Path(name).suffix])
    is_named = request.args.get("v") == digest
    response.headers["Cache-Control"] = f"public, max-age={KEPT_S}, immutable" if is_named else "no-cache"
    return response


@lru_cache(maxsize=64)
def _content(name: str) -> tuple[bytes, str]:
    try:
        content = (FOLDER / name).read_bytes()
    except FileNotFoundError as error:
        raise UnknownRoute("no such file here") from error
    return content, hashlib.sha256(content).hexdigest()[:12]
