"""What a model answers: the shapes of fal-protocol 2.3, filled deterministically from the request, and the work done.

Pure. An answer names the content type of what is really served at its URLs (PNG, MP4), which for some models is
another than fal's own (many of fal's pictures are JPEGs).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from abhiapi.pricing import PriceRule
from abhiapi.sandbox import clips, files, pictures, sizes
from abhiapi.sandbox.models import Model
from abhiapi.sandbox.usage import Work

Answer = dict[str, Any]

_SCALE_PARAMETERS = ("scale", "upscale_factor", "upscaling_factor")
_DEFAULT_PICTURES = 1
_SOUND_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Request:
    """The facts that an answer is made from. fingerprint: 32 hex digits of the endpoint and the input."""

    rule: PriceRule
    model: Model
    call_input: Mapping[str, Any]
    host: str
    fingerprint: str

    @property
    def prompt(self) -> str:
        texts = (self.call_input.get(name) for name in ("prompt", "text", self.rule.estimate.text_param))
        return next((text for text in texts if isinstance(text, str)), "")

    @property
    def seed(self) -> int:
        given = self.call_input.get("seed")
        if isinstance(given, int) and not isinstance(given, bool):
            return given
        return int(self.fingerprint[:8], 16) % 2**31

    @property
    def compute_ms(self) -> int:
        """How long the model would have worked on one piece: half a second to three and a half."""
        return 500 + int(self.fingerprint[8:16], 16) % 3_000


def answer(request: Request) -> tuple[Answer, Work]:
    return _SHAPES[request.model.shape](request)


def _image(request: Request) -> tuple[Answer, Work]:
    size = sizes.image_size(request.rule.model, request.rule.estimate, request.call_input)
    count = _count(request)
    made = [
        {"url": url, "width": size[0], "height": size[1], "content_type": pictures.CONTENT_TYPE}
        for url in _picture_urls(request, size, count)
    ]
    shown: Answer = {
        "images": made,
        "timings": {"inference": request.compute_ms / 1000},
        "seed": request.seed,
        "has_nsfw_concepts": [False] * count,
        "prompt": request.prompt,
    }
    return shown, Work(pictures=(size,) * count, compute_ms=request.compute_ms * count)


def _partner(request: Request) -> tuple[Answer, Work]:
    """Models of other companies: sizes are left null, so nobody can count megapixels in the answer."""
    size = sizes.image_size(request.rule.model, request.rule.estimate, request.call_input)
    count = _count(request)
    made = [
        {
            "url": url, "content_type": pictures.CONTENT_TYPE, "file_name": f"output_{number}.png",
            "file_size": None, "width": None, "height": None,
        }
        for number, url in enumerate(_picture_urls(request, size, count))
    ]  # fmt: skip
    shown: Answer = {"images": made}
    if "seedream" in request.rule.model:
        shown["seed"] = request.seed
    elif "nano-banana" in request.rule.model or "gemini" in request.rule.model:
        shown["description"] = ""
    return shown, Work(pictures=(size,) * count, compute_ms=request.compute_ms * count)


def _picture(request: Request) -> tuple[Answer, Work]:
    """Upscalers and the like. A picture of this simulator is known by its URL; any other counts as 1024 x 1024."""
    source = request.call_input.get("image_url")
    known = files.picture_size(source) if isinstance(source, str) else None
    factor = next((request.call_input[name] for name in _SCALE_PARAMETERS if name in request.call_input), None)
    size = sizes.scaled(known or (1024, 1024), factor, request.model.scale) if request.model.scale > 1 else known
    size = size or (1024, 1024)
    (url,) = _picture_urls(request, size, 1)
    shown: Answer = {
        "image": {
            "url": url, "content_type": pictures.CONTENT_TYPE, "width": size[0], "height": size[1],
            "file_name": "output.png", "file_size": None,
        },
    }  # fmt: skip
    if "esrgan" not in request.rule.model:
        shown["seed"] = request.seed
    if "clarity" in request.rule.model or "aura-sr" in request.rule.model:
        shown["timings"] = {"inference": request.compute_ms / 1000}
    megapixels = max(1, size[0] * size[1] // 1_000_000)
    return shown, Work(pictures=(size,), compute_ms=request.compute_ms + 250 * megapixels)


def _video(request: Request) -> tuple[Answer, Work]:
    estimate = request.rule.estimate
    size = sizes.video_size(estimate, request.call_input)
    seconds = sizes.clip_seconds(request.call_input, estimate, request.model.default_seconds)
    served = min(size[0], clips.SIDE_MAX), min(size[1], clips.SIDE_MAX)
    words = files.slug(request.prompt)
    video: Answer = {
        "url": files.clip_url(request.host, request.fingerprint[:16], served, seconds, words),
        "content_type": clips.CONTENT_TYPE,
        "file_name": "output.mp4",
        "file_size": clips.size_bytes(*served, seconds),
    }
    shown: Answer = {"video": video}
    if request.model.sized_video:
        video |= {"width": served[0], "height": served[1], "fps": clips.FPS, "duration": seconds}
        video["num_frames"] = clips.frame_count(seconds)
    if "seedance" in request.rule.model or "wan" in request.rule.model:
        shown["seed"] = request.seed
    if "sora" in request.rule.model:
        still = {"content_type": pictures.CONTENT_TYPE, "file_name": "thumbnail.png", "file_size": None}
        url = files.picture_url(request.host, request.fingerprint[:16], served, words)
        shown |= {"video_id": f"video_{request.fingerprint}", "thumbnail": {"url": url, **still}, "spritesheet": None}
    return shown, Work(seconds=seconds, frame=size, compute_ms=request.compute_ms * seconds)


def _audio(request: Request) -> tuple[Answer, Work]:
    seconds = sizes.clip_seconds(request.call_input, request.rule.estimate, _SOUND_SECONDS)
    url = files.sound_url(request.host, request.fingerprint[:16], seconds, files.slug(request.prompt))
    shown: Answer = {"audio": {"url": url, "content_type": files.SOUND_TYPE, "file_name": "output.wav"}}
    text = request.call_input.get(request.rule.estimate.text_param)
    letters = len(text) if isinstance(text, str) else len(request.prompt)
    return shown, Work(seconds=seconds, characters=letters, compute_ms=request.compute_ms)


def _text(request: Request) -> tuple[Answer, Work]:
    told = f"A placeholder of the simulator, about: {request.prompt[:200]}" if request.prompt else "A placeholder."
    return {"output": told, "text": told, "partial": False, "error": None}, Work(compute_ms=request.compute_ms)


def _mesh(request: Request) -> tuple[Answer, Work]:
    url = files.mesh_url(request.host, request.fingerprint[:16], files.slug(request.prompt))
    shown: Answer = {"model_mesh": {"url": url, "content_type": files.MESH_TYPE, "file_name": "model.obj"}}
    return shown, Work(compute_ms=request.compute_ms)


_SHAPES = {
    "image": _image,
    "partner": _partner,
    "picture": _picture,
    "video": _video,
    "audio": _audio,
    "text": _text,
    "mesh": _mesh,
}


def _count(request: Request) -> int:
    """How many pictures come back: a batch comes out whole."""
    estimate = request.rule.estimate
    each = _whole(request.call_input.get(estimate.count_param, estimate.defaults.get(estimate.count_param)), 6)
    if estimate.batch_param is None:
        return each
    return each * _whole(request.call_input.get(estimate.batch_param, estimate.defaults.get(estimate.batch_param)), 15)


def _whole(given: Any, most: int) -> int:
    text = str(given).strip() if isinstance(given, str | int | Decimal) and not isinstance(given, bool) else ""
    return max(1, min(int(text), most)) if text.isdecimal() and len(text) < 10 else _DEFAULT_PICTURES


def _picture_urls(request: Request, size: sizes.Size, count: int) -> list[str]:
    """A URL for each picture, or with ``sync_mode`` the picture itself as a data URI."""
    words = files.slug(request.prompt)
    seeds = [f"{request.fingerprint[:14]}{number:02x}" for number in range(count)]
    if request.call_input.get("sync_mode") not in (True, "true", "True", "1"):
        return [files.picture_url(request.host, seed, size, words) for seed in seeds]
    uris = []
    for seed in seeds:
        drawn = b"".join(pictures.png(*size, seed, words.replace("-", " ")))
        uris.append(f"data:{pictures.CONTENT_TYPE};base64,{base64.b64encode(drawn).decode()}")
    return uris
