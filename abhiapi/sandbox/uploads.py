"""Simulated uploads: the beginning of one under ``/rest/storage/upload``, the signed PUT, and the file's own URL.

Shapes: fal-protocol 6.2, seen 2026-11-22; what ``complete-multipart`` answers at fal is not published. Files lie in
temporary files of the process, the oldest making room. The routes of fal's that mint credentials are imitated so that
tests can show that nobody is led there.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from secrets import token_hex
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qs

from abhiapi.sandbox import replies
from abhiapi.sandbox.replies import Reply

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

REST = "/rest/"
ASKED = (f"{REST}storage/", f"{REST}tokens")  # with the operator's credential
FILES = "/uploads/"  # with a signature, or open to all
FILE_MAX_BYTES = 256 * 1024**2
KEPT_MAX_BYTES = 1024**3
PARTS_MAX = 1_000
COMPLETE_MAX_BYTES = 1024**2
READ_BYTES = 256 * 1024

_BEGINNINGS = ("storage/upload/initiate", "storage/upload/initiate-multipart")
_FILE = re.compile(r"/uploads/(?P<id>[0-9a-f]{32})/(?P<name>[A-Za-z0-9._-]{1,100})(?:/(?P<part>[0-9]{1,4}|complete))?")
_OPEN = (("access-control-allow-origin", "*"), ("access-control-expose-headers", "etag"))


@dataclass(slots=True)
class _Part:
    file: IO[bytes]
    size: int
    etag: str


@dataclass(slots=True)
class _Upload:
    content_type: str
    signature: str
    is_multipart: bool
    parts: dict[int, _Part] = field(default_factory=dict)
    order: list[int] | None = None  # of the parts, once all of it is there

    def size(self) -> int:
        return sum(part.size for part in self.parts.values())

    def pieces(self) -> Iterator[bytes]:
        for number in self.order or ():
            file, at = self.parts[number].file, 0
            while True:  # several may read at once, so each keeps its own place
                file.seek(at)
                piece = file.read(READ_BYTES)
                if not piece:
                    break
                at += len(piece)
                yield piece


class Uploads:
    """The uploads of one simulator."""

    def __init__(self) -> None:
        self._uploads: dict[str, _Upload] = {}

    def asked(self, path: str, query: str, host: str, body: bytes) -> Reply:
        """What fal's helper service answers to a caller with a credential."""
        route = path.removeprefix(REST).strip("/")
        if route in _BEGINNINGS:
            if parse_qs(query).get("storage_type") != ["fal-cdn-v3"]:
                return replies.of_json(400, {"detail": "Unsupported storage type"})
            return self._begun(host, body, is_multipart=route.endswith("multipart"))
        if route == "storage/upload/complete-multipart":
            return replies.of_json(200, {})
        if route in ("tokens", "tokens/realtime"):
            return replies.of_json(200, "simulated.token.that-nobody-should-see")
        if route == "storage/auth/token":
            minted = {"token": "simulated-token-that-nobody-should-see", "token_type": "Bearer"}
            return replies.of_json(200, minted | {"base_url": f"http://{host}"})
        return replies.not_found(path)

    def served(self, environ: WSGIEnvironment) -> Reply:
        """What fal's file servers answer: the file to anybody, a change to whoever has its signed address."""
        method, match = environ["REQUEST_METHOD"], _FILE.fullmatch(environ["PATH_INFO"])
        if method == "OPTIONS":
            leave = (
                ("access-control-allow-methods", "GET, PUT, POST"),
                ("access-control-allow-headers", "content-type"),
            )
            return replies.of_bytes(204, b"", headers=(*_OPEN, *leave))
        upload = self._uploads.get(match["id"]) if match else None
        if match is None or upload is None:
            reply = replies.of_json(404, {"detail": "File not found"})
        elif method in ("GET", "HEAD") and match["part"] is None:
            reply = _whole(upload)
            reply = replace(reply, body=()) if method == "HEAD" else reply
        elif not hmac.compare_digest(_signature_in(environ), upload.signature):
            reply = replies.of_json(403, {"detail": "Invalid signature"})
        elif method == "PUT" and (match["part"] is not None) == upload.is_multipart and match["part"] != "complete":
            reply = self._put(upload, int(match["part"] or 1), environ)
        elif method == "POST" and match["part"] == "complete":
            reply = _completed(upload, environ["wsgi.input"].read(COMPLETE_MAX_BYTES))
        else:
            reply = replies.of_json(405, {"detail": "Method Not Allowed"})
        return reply.with_headers(*_OPEN)

    def _begun(self, host: str, body: bytes, *, is_multipart: bool) -> Reply:
        try:
            wanted = json.loads(body)
            name, content_type = wanted["file_name"], wanted["content_type"]
        except (ValueError, KeyError, TypeError):
            name = content_type = None
        if not isinstance(name, str) or not isinstance(content_type, str) or not content_type.isprintable():
            missing = {"loc": ["body", "file_name"], "msg": "Field required", "type": "missing"}
            return replies.of_json(422, {"detail": [missing]})
        upload_id, signature = token_hex(16), token_hex(32)
        self._uploads[upload_id] = _Upload(content_type, signature, is_multipart)
        url = f"http://{host}{FILES}{upload_id}/{re.sub(r'[^A-Za-z0-9._-]', '_', name)[-100:] or 'file'}"
        return replies.of_json(200, {"file_url": url, "upload_url": f"{url}?signature={signature}"})

    def _put(self, upload: _Upload, number: int, environ: WSGIEnvironment) -> Reply:
        if not 1 <= number <= PARTS_MAX:
            return replies.of_json(400, {"detail": "No such part"})
        part = _received(environ["wsgi.input"], FILE_MAX_BYTES - upload.size())
        if part is None:
            return replies.of_json(413, {"detail": "File too large"})
        before = upload.parts.pop(number, None)
        if before is not None:
            before.file.close()
        upload.parts[number] = part
        self._make_room(upload)
        if upload.is_multipart:
            told = {"partNumber": number, "etag": part.etag}
            return replies.of_json(200, told, (("etag", part.etag),))
        upload.order = [1]
        return replies.of_bytes(200, b"", "text/plain", (("etag", part.etag),))

    def _make_room(self, newest: _Upload) -> None:
        kept = sum(upload.size() for upload in self._uploads.values())
        for upload_id, upload in list(self._uploads.items()):
            if kept <= KEPT_MAX_BYTES:
                return
            if upload is not newest:
                kept -= upload.size()
                del self._uploads[upload_id]
                for part in upload.parts.values():
                    part.file.close()


def _received(source: Any, most: int) -> _Part | None:
    """A body, in a file; None where it is larger than that."""
    file, digest, size = tempfile.TemporaryFile(), hashlib.sha256(), 0
    while piece := source.read(READ_BYTES):
        size += len(piece)
        if size > most:
            file.close()
            return None
        digest.update(piece)
        file.write(piece)
    return _Part(file, size, digest.hexdigest()[:32])


def _completed(upload: _Upload, body: bytes) -> Reply:
    try:
        named = [(part["partNumber"], part["etag"]) for part in json.loads(body)["parts"]]
    except (ValueError, KeyError, TypeError):
        return replies.of_json(400, {"detail": "Malformed list of parts"})
    if not named or sorted(named) != [(number, part.etag) for number, part in sorted(upload.parts.items())]:
        return replies.of_json(400, {"detail": "Parts do not match"})
    upload.order = sorted(upload.parts)
    return replies.of_json(200, {})


def _whole(upload: _Upload) -> Reply:
    if upload.order is None:
        return replies.of_json(404, {"detail": "File not found"})
    return Reply(200, upload.content_type, upload.pieces(), upload.size())


def _signature_in(environ: WSGIEnvironment) -> str:
    query: str = environ.get("QUERY_STRING", "")
    return parse_qs(query).get("signature", [""])[-1]
