"""What every page of ours says to a browser: what it may load, that nobody may frame it, and whether it may be kept.

`private` is for the dashboard's pages, which are kept nowhere; `public` for the reference and the static files, which
are alike for everybody: compressed, and not sent again while they are the same.
"""

from __future__ import annotations

import gzip

from flask import Response, request

# Only our own files, and no text of a page is ever run as a script or taken as a style.
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "media-src": "'self'",
    "connect-src": "'self'",
    "form-action": "'self'",
    "base-uri": "'none'",
    "frame-ancestors": "'none'",
}
_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
SMALL_BYTES = 1024  # not worth compressing
GZIP_LEVEL = 6


def policy(**others: str) -> str:
    """The Content-Security-Policy, with other sources for some of it: ``policy(style_src="'sha256-...'")``."""
    given = {name.replace("_", "-"): sources for name, sources in others.items()}
    return "; ".join(f"{name} {sources}" for name, sources in (_POLICY | given).items())


def allow_pictures_from(response: Response, sources: str) -> Response:
    """Let one page show pictures and films of these sources, such as ``https:``."""
    both = f"'self' {sources}"
    response.headers["Content-Security-Policy"] = policy(img_src=both, media_src=both)
    return response


def private(response: Response) -> Response:
    """A page of the dashboard, with figures or a key. Never compressed: a token stands beside what was typed."""
    _secure(response)
    # Its forms are told by it from forms of others, where the connection is TLS (Flask-WTF).
    response.headers.setdefault("Referrer-Policy", "same-origin")
    response.headers.setdefault("Cache-Control", "no-store")
    return response


def public(response: Response) -> Response:
    """A page that is alike for all who ask, compressed for those who take gzip."""
    _secure(response)
    response.headers.setdefault("Referrer-Policy", "no-referrer")
    response.headers.setdefault("Cache-Control", "no-cache")  # a page names the host it was asked by
    response.vary.add("Accept-Encoding")
    if response.status_code == 200 and request.accept_encodings["gzip"] > 0:
        body = response.get_data()
        if len(body) >= SMALL_BYTES:
            response.set_data(gzip.compress(body, GZIP_LEVEL, mtime=0))
            response.headers["Content-Encoding"] = "gzip"
    response.add_etag()  # the same page again is a 304
    response.make_conditional(request)
    return response


def _secure(response: Response) -> None:
    response.headers.setdefault("Content-Security-Policy", policy())
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    if request.is_secure:
        response.headers.setdefault("Strict-Transport-Security", "max-age=31536000")
