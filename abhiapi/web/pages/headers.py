"""What every page of ours says to a browser: what it may load, and that nobody may frame it. Compresses, too."""

from __future__ import annotations

import gzip

from flask import Response, request

# Only our own files, and no text of a page is ever run as a script or taken as a style.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
SMALL_BYTES = 1024  # not worth compressing
GZIP_LEVEL = 6


def finish(response: Response) -> Response:
    """Put the headers on a page, and compress it for those who take gzip."""
    response.headers.extend(HEADERS)
    if request.is_secure:
        response.headers["Strict-Transport-Security"] = "max-age=31536000"
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
