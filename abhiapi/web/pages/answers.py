"""What a person sees of a model's answer: its pictures, films, sounds and texts, found wherever they stand. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

Kind = Literal["image", "video", "audio", "file"]
MEDIA_MAX, TEXTS_MAX, DEPTH_MAX = 24, 8, 8
# fal's own delivery network: v2.fal.media, v3.fal.media, storage.fal.media and the like.
FALS_HOSTS = "https://*.fal.media"

_FALS_HOST = re.compile(r"(?:[a-z0-9-]+\.)+fal\.media")
_ENDINGS: Mapping[str, Kind] = {
    **dict.fromkeys(("png", "jpg", "jpeg", "webp", "gif", "avif"), "image"),
    **dict.fromkeys(("mp4", "webm", "mov"), "video"),
    **dict.fromkeys(("wav", "mp3", "ogg", "flac", "m4a"), "audio"),
}
_SHOWN: tuple[Kind, ...] = ("image", "video", "audio")
_TEXT_NAMES = ("output", "text", "response", "answer", "caption", "results", "transcription")


@dataclass(frozen=True, slots=True)
class Media:
    kind: Kind
    url: str
    is_shown: bool  # from a host that the page may show pictures of; else it is a link
    width: int | None
    height: int | None


def simulator_origin(fal_run_url: str) -> str | None:
    """Where the simulator's pictures come from, where fal is one on this machine; None where it is fal."""
    parts = urlsplit(fal_run_url)
    if parts.scheme != "http" or parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        return None
    return f"http://{parts.netloc.rpartition('@')[2]}"


def picture_sources(fal_run_url: str) -> str:
    """As the Content-Security-Policy names them."""
    origin = simulator_origin(fal_run_url)
    return FALS_HOSTS if origin is None else f"{FALS_HOSTS} {origin}"


def media(answer: Any, fal_run_url: str) -> list[Media]:
    found: dict[str, Media] = {}
    for name, thing in _things(answer, "", 0):
        url = thing.get("url")
        if not isinstance(url, str) or not _is_web(url) or url in found or len(found) >= MEDIA_MAX:
            continue
        kind = _kind(name, thing.get("content_type"), url)
        width, height = (_side(thing.get(side)) for side in ("width", "height"))
        found[url] = Media(kind, url, _is_shown(url, fal_run_url), width, height)
    return list(found.values())


def texts(answer: Any) -> list[str]:
    """Answers in words; one by one, without what is around them."""
    if not isinstance(answer, Mapping):
        return []
    found = [answer[name] for name in _TEXT_NAMES if isinstance(answer.get(name), str) and answer[name].strip()]
    return found[:TEXTS_MAX]


def _things(value: Any, name: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every object of an answer, with the name it stands under."""
    if depth > DEPTH_MAX:
        return
    if isinstance(value, Mapping):
        if name:
            yield name, value
        for key, inner in value.items():
            if key != "_billing":
                yield from _things(inner, key, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _things(inner, name, depth + 1)


def _kind(name: str, content_type: Any, url: str) -> Kind:
    said = content_type.partition("/")[0] if isinstance(content_type, str) else ""
    for kind in _SHOWN:
        if said == kind:
            return kind
    ending = urlsplit(url).path.rpartition(".")[2].lower()
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    return next((kind for kind in _SHOWN if name.startswith(kind)), "file")


def _is_web(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return len(url) < 4000 and parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable()
    except ValueError:
        return False


def _is_shown(url: str, fal_run_url: str) -> bool:
    parts = urlsplit(url)
    if parts.scheme == "https" and _FALS_HOST.fullmatch(parts.netloc):
        return True
    return f"{parts.scheme}://{parts.netloc}" == simulator_origin(fal_run_url)


def _side(given: Any) -> int | None:
    return given if isinstance(given, int) and not isinstance(given, bool) and 0 < given <= 100_000 else None
