"""What fal's models are like from outside: which input they want, and which family of answer they give.

Pure knowledge, read off the endpoint id and, where that leaves it open, off what the price rule counts. Sources:
fal-protocol 2.3 and 9.1, fal's generated client types; seen 2026-11-22.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from abhiapi.pricing import PriceRule

Shape = Literal["image", "partner", "picture", "video", "audio", "text", "mesh"]


@dataclass(frozen=True, slots=True)
class Model:
    """One endpoint.

    shape: ``image`` is the list of pictures with sizes, timings and seed; ``partner`` the list whose sizes are null;
    ``picture`` a single picture (upscalers and the like). required: the members that fal asks for by name.
    durations: what ``duration`` may be, in the type fal wants; empty where anything goes. default_seconds: of a clip
    whose length neither the input nor the price rule says. scale: how much larger an upscaler makes a picture.
    """

    shape: Shape
    required: tuple[str, ...]
    images_max: int = 4
    durations: tuple[str | int, ...] = ()
    default_seconds: int = 5
    sized_video: bool = False
    scale: int = 1

    @property
    def streams(self) -> bool:
        """Whether it has a ``/stream``. fal publishes no list: here pictures with sizes and texts have one."""
        return self.shape in ("image", "text")


# Members that stand in for another: models differ in the name, and a simulator should not be pickier than they are.
STAND_INS = {
    "image_url": ("image_urls", "start_image_url", "first_frame_url", "input_image_url", "reference_image_urls"),
    "image_urls": ("image_url", "image_urls", "reference_image_urls"),
    "prompt": ("multi_prompt", "messages", "text"),
    "text": ("prompt", "input"),
}

_VIDEO_TOOLS = ("upscale/video", "video-to-video", "video-upscaler")
_PICTURE_TOOLS = ("upscal", "esrgan", "aura-sr", "ccsr", "birefnet", "background/remove", "remove-background")
_TEXT = ("any-llm", "openrouter", "moondream", "florence", "llava", "speech-to-text", "whisper", "wizper", "scribe")
_AUDIO = ("tts", "speech", "text-to-audio", "stable-audio", "music", "elevenlabs", "kokoro", "chatterbox")
_MESH = ("trellis", "hunyuan3d", "meshy", "triposr", "/3d")
_PICTURES = ("text-to-image", "image-to-image", "grok-imagine-image", "qwen-image", "hunyuan-image")
_VIDEO = (
    "video", "veo", "sora", "seedance", "hailuo", "minimax/h3", "pixverse", "ltx", "wan/", "luma", "runway", "vidu",
)  # fmt: skip
_PARTNERS = (
    "nano-banana", "gpt-image", "seedream", "gemini", "imagen", "grok-imagine-image", "ideogram", "recraft", "wan/",
)  # fmt: skip
_NO_PROMPT = ("redux", "reframe", "remove")
_SEVERAL_IMAGES = ("nano-banana", "gpt-image", "seedream", "flux-2", "hunyuan-image", "gemini", "reference-to-video")
_EDITS = ("/edit", "-edit", "/fill", "/redux", "inpaint", "image-to-image", "image-to-video", "frame-to-video")


def model_of(rule: PriceRule) -> Model:
    return _model_of(rule.model, rule.estimate.kind, rule.estimate.text_param)


@lru_cache(maxsize=4096)
def _model_of(endpoint_id: str, kind: str, text_param: str) -> Model:
    if kind == "characters":
        return Model("audio", (text_param,))
    if _any(endpoint_id, _VIDEO_TOOLS):
        return Model("video", ("video_url",), sized_video=True)
    if _any(endpoint_id, _PICTURE_TOOLS):
        enlarges = not _any(endpoint_id, ("birefnet", "background"))
        return Model("picture", ("image_url",), scale=(4 if "aura-sr" in endpoint_id else 2) if enlarges else 1)
    if _any(endpoint_id, _TEXT):
        listens = _any(endpoint_id, ("speech-to-text", "whisper", "wizper", "scribe"))
        return Model("text", ("audio_url",) if listens else ("prompt",))
    if _any(endpoint_id, _AUDIO):
        return Model("audio", ("text" if _any(endpoint_id, ("tts", "speech")) else "prompt",))
    if "mmaudio" in endpoint_id:  # adds sound to a clip
        return Model("video", ("video_url", "prompt"))
    if _any(endpoint_id, _MESH):
        return Model("mesh", ("prompt",) if "text-to-3d" in endpoint_id else ("image_url",))
    makes_pictures = kind in ("images", "megapixels") or _any(endpoint_id, _PICTURES)
    if _any(endpoint_id, _VIDEO) and not makes_pictures:
        durations, seconds = _durations(endpoint_id)
        sized = _any(endpoint_id, ("sora", "grok", "wan/v2.7"))
        return Model("video", _required(endpoint_id), 4, durations, seconds, sized)
    partner = _any(endpoint_id, _PARTNERS)
    return Model("partner" if partner else "image", _required(endpoint_id), 6 if "seedream" in endpoint_id else 4)


def _required(endpoint_id: str) -> tuple[str, ...]:
    required = () if _any(endpoint_id, _NO_PROMPT) else ("prompt",)
    kontext = "kontext" in endpoint_id and "text-to-image" not in endpoint_id
    if not (kontext or _any(endpoint_id, _EDITS)):
        return required
    several = _any(endpoint_id, _SEVERAL_IMAGES) and "image-to-video" not in endpoint_id
    return (*required, "image_urls" if several else "image_url")


def _durations(endpoint_id: str) -> tuple[tuple[str | int, ...], int]:
    """What ``duration`` may be, and the default."""
    if _any(endpoint_id, ("kling-video/v3", "kling-video/o3")):
        return _texts(3, 15), 5
    if "kling-video" in endpoint_id:
        return ("5", "10"), 5
    if "veo2" in endpoint_id:
        return _texts(5, 8, "s"), 5
    if "veo" in endpoint_id:
        return ("4s", "6s", "8s"), 8
    if "sora" in endpoint_id:
        return (4, 8, 12, 16, 20), 4
    if _any(endpoint_id, ("seedance-2", "seedance/v2")):
        return ("auto", *_texts(4, 15)), 5
    if "seedance/v1.5" in endpoint_id:
        return _texts(4, 12), 5
    if "seedance" in endpoint_id:
        return _texts(2, 12), 5
    return (), 6 if _any(endpoint_id, ("hailuo", "grok")) else 5


def _texts(first: int, last: int, suffix: str = "") -> tuple[str, ...]:
    return tuple(f"{seconds}{suffix}" for seconds in range(first, last + 1))


def _any(endpoint_id: str, parts: tuple[str, ...]) -> bool:
    return any(part in endpoint_id for part in parts)
