"""What ``x-fal-target-url`` may name: the proxy protocol of fal's JavaScript client (fal-protocol 1.3 and 10.1, no. 4).

Pure. The address itself is never fetched: it is taken apart strictly, and what remains is one of three services here
and a path and query for it, in words that our own routes understand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from abhiapi import queuewire, wire
from abhiapi.errors import ForbiddenPath, ForbiddenTarget, UnknownRoute

HEADER = "x-fal-target-url"
DOCUMENTED_AT = "/api/fal/proxy"

Service = Literal["run", "queue", "upload"]

_UPLOADS = frozenset(f"/storage/upload/{step}" for step in ("initiate", "initiate-multipart", "complete-multipart"))
_UPLOAD_QUERY = "storage_type=fal-cdn-v3"

# Of the hosts that have something to refuse, api.fal.ai is named so that its answer is 404, as that of our own routes
# of the same names. A comma may come from two headers that a server in front joined into one; clients encode it.
_ADDRESS = re.compile(
    r"https://(?P<host>fal\.run|queue\.fal\.run|rest\.fal\.ai|api\.fal\.ai)"
    r"(?P<path>/[\x21-\x3e\x40-\x7e]*)"
    r"(?:\?(?P<query>[\x21-\x7e]*))?"
)
_NEVER = re.compile(r'[#,\\"<>]')


@dataclass(frozen=True, slots=True)
class Target:
    """What to do, as if it had come to a route of this proxy. ``path`` and ``query`` are raw."""

    service: Service
    path: str
    query: str

    @property
    def uri(self) -> str:
        return f"{self.path}?{self.query}" if self.query else self.path


def parse(address: str | None) -> Target:
    """Where a call with this header goes; None where there is no header.

    Raises `ForbiddenTarget` for what is no address of fal's, `UnknownRoute` for what is not served of fal's.
    """
    if address is None:
        raise ForbiddenTarget(f"say in the header {HEADER} what to call, as fal's JavaScript client does")
    match = _ADDRESS.fullmatch(address)
    if match is None or _NEVER.search(address):
        raise ForbiddenTarget(
            f"{HEADER} must be one address https://fal.run/..., https://queue.fal.run/... "
            "or https://rest.fal.ai/storage/upload/initiate, without a port, a fragment, a comma or a backslash"
        )
    host, path, query = match["host"], match["path"], match["query"] or ""
    try:
        wire.check_path(path)
    except ForbiddenPath as error:
        raise ForbiddenTarget(f"{HEADER}: {error.message}") from error
    match host:
        case "queue.fal.run":
            return Target("queue", queuewire.QUEUE + path, query)
        case "fal.run" if path.startswith(queuewire.SHORT):
            return Target("queue", path, query)
        case "fal.run":
            return Target("run", path, query)
        case "rest.fal.ai" if path in _UPLOADS:
            if query != _UPLOAD_QUERY:
                raise ForbiddenTarget(f"{HEADER}: an upload is begun with ?{_UPLOAD_QUERY}")
            return Target("upload", path, query)
    raise UnknownRoute(
        f"{HEADER}: of rest.fal.ai only the beginning of an upload is served here, of api.fal.ai nothing"
    )
