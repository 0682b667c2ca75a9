"""The price file: a row for every published price, fal's recorded units, and what a bad file says."""

from __future__ import annotations

import re
from datetime import date
from decimal import Decimal
from importlib.metadata import metadata
from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abhiapi import pricing
from abhiapi.errors import PriceFileError
from abhiapi.money import credits_text, to_micros
from abhiapi.pricing import Catalogue, Price, PriceRule

PROPERTY = settings(deadline=None, derandomize=True, max_examples=300)
RULES = pricing.shipped_rules()
AT_COST = Catalogue(RULES, (), Decimal(0))
SHIPPED = Catalogue(RULES, (), Decimal("0.05"))

# What fal's lists say such a call costs in USD (fal-protocol 9, seen 2026-11-22), whatever its units are.
PUBLISHED: list[tuple[str, dict[str, Any], str]] = [
    ("fal-ai/flux/dev", {"image_size": "landscape_4_3"}, "0.025"),
    ("fal-ai/flux/dev", {"image_size": {"width": 2048, "height": 1024}, "num_images": 2}, "0.15"),
    ("fal-ai/flux-1/dev", {}, "0.025"),
    ("fal-ai/flux/schnell", {"num_images": 4}, "0.012"),
    ("fal-ai/flux-lora", {}, "0.035"),
    ("fal-ai/flux-realism", {}, "0.035"),
    ("fal-ai/flux-pro/v1.1", {}, "0.04"),
    ("fal-ai/flux-pro/new", {}, "0.05"),
    ("fal-ai/flux-pro/v1.1-ultra", {}, "0.06"),
    ("fal-ai/flux-pro/v1.1-ultra-finetuned", {}, "0.07"),
    ("fal-ai/flux-pro/kontext", {}, "0.04"),
    ("fal-ai/flux-pro/kontext/max", {"num_images": 2}, "0.16"),
    ("fal-ai/flux-2", {}, "0.012"),
    ("fal-ai/flux-2-flex", {}, "0.05"),
    ("fal-ai/stable-diffusion-v3-medium", {}, "0.035"),
    ("fal-ai/nano-banana", {}, "0.039"),
    ("fal-ai/nano-banana-2", {}, "0.08"),
    ("fal-ai/nano-banana-2", {"resolution": "0.5K"}, "0.06"),
    ("fal-ai/nano-banana-2", {"resolution": "2K"}, "0.12"),
    ("fal-ai/nano-banana-2/edit", {"resolution": "4K", "num_images": 2}, "0.32"),
    ("fal-ai/nano-banana-2", {"enable_web_search": True}, "0.095"),
    ("fal-ai/nano-banana-pro", {}, "0.15"),
    ("fal-ai/nano-banana-pro/edit", {"resolution": "4K"}, "0.3"),
    ("fal-ai/bytedance/seedream/v4/text-to-image", {"num_images": 2, "max_images": 3}, "0.18"),
    ("fal-ai/bytedance/seedream/v4.5/edit", {}, "0.04"),
    ("fal-ai/bytedance/seedream/v5/lite/text-to-image", {}, "0.035"),
    ("bytedance/seedream/v5/pro/text-to-image", {}, "0.135"),
    ("fal-ai/ideogram/v3", {"rendering_speed": "TURBO"}, "0.03"),
    ("fal-ai/ideogram/v3", {}, "0.06"),
    ("fal-ai/ideogram/v3", {"rendering_speed": "QUALITY"}, "0.09"),
    ("fal-ai/recraft/v3/text-to-image", {}, "0.04"),
    ("fal-ai/recraft/v3/text-to-image", {"style": "vector_illustration/engraving"}, "0.08"),
    ("fal-ai/recraft/v4/text-to-image", {}, "0.04"),
    ("fal-ai/recraft/v4/pro/text-to-image", {}, "0.25"),
    ("fal-ai/qwen-image", {}, "0.02"),
    ("fal-ai/qwen-image-edit", {"image_size": "square"}, "0.03"),
    ("fal-ai/qwen-image-2/edit", {}, "0.035"),
    ("fal-ai/hunyuan-image/v3/instruct/edit", {"image_size": "landscape_4_3"}, "0.09"),
    ("fal-ai/wan/v2.7/text-to-image", {"max_images": 5}, "0.15"),
    ("fal-ai/wan/v2.7/edit", {}, "0.03"),
    ("fal-ai/wan/v2.7/pro/text-to-image", {}, "0.075"),
    ("fal-ai/wan/v2.7/pro/edit", {"num_images": 4}, "0.3"),
    ("fal-ai/z-image/turbo", {}, "0.005"),
    ("xai/grok-imagine-image", {}, "0.02"),
    ("xai/grok-imagine-image/edit", {}, "0.08"),
    ("fal-ai/recraft/upscale/crisp", {}, "0.004"),
    ("fal-ai/ideogram/upscale", {}, "0.06"),
    ("fal-ai/bria/background/remove", {}, "0.018"),
    ("fal-ai/veo2", {}, "2.5"),
    ("fal-ai/veo2/image-to-video", {"duration": "8s"}, "4"),
    ("fal-ai/veo3", {}, "3.2"),
    ("fal-ai/veo3/image-to-video", {"duration": "4s", "generate_audio": False}, "0.8"),
    ("fal-ai/veo3/fast", {}, "1.2"),
    ("fal-ai/veo3/fast", {"generate_audio": False}, "0.8"),
    ("fal-ai/veo3.1", {"duration": "4s", "resolution": "1080p"}, "1.6"),
    ("fal-ai/veo3.1", {"duration": "4s", "generate_audio": False}, "0.8"),
    ("fal-ai/veo3.1/image-to-video", {"duration": "6s", "resolution": "4k"}, "3.6"),
    ("fal-ai/veo3.1", {"duration": "4s", "resolution": "4k", "generate_audio": False}, "1.6"),
    ("fal-ai/veo3.1/fast", {}, "1.2"),
    ("fal-ai/veo3.1/fast", {"duration": "4s", "generate_audio": False}, "0.4"),
    ("fal-ai/veo3.1/fast", {"duration": "4s", "resolution": "4k"}, "1.4"),
    ("fal-ai/veo3.1/fast", {"duration": "4s", "resolution": "4k", "generate_audio": False}, "1.2"),
    ("fal-ai/veo3.1/lite", {}, "0.4"),
    ("fal-ai/veo3.1/lite", {"generate_audio": False}, "0.24"),
    ("fal-ai/veo3.1/lite", {"resolution": "1080p"}, "0.64"),
    ("fal-ai/veo3.1/lite/image-to-video", {"resolution": "1080p", "generate_audio": False}, "0.4"),
    ("fal-ai/sora-2/text-to-video", {}, "0.4"),
    ("fal-ai/sora-2/image-to-video", {"duration": 20}, "2"),
    ("fal-ai/sora-2/text-to-video/pro", {"resolution": "720p"}, "1.2"),
    ("fal-ai/sora-2/text-to-video/pro", {}, "2"),
    ("fal-ai/sora-2/image-to-video/pro", {"duration": 12, "resolution": "720p"}, "3.6"),
    ("fal-ai/kling-video/v1/standard/text-to-video", {}, "0.225"),
    ("fal-ai/kling-video/v1.5/pro/image-to-video", {"duration": "10"}, "1"),
    ("fal-ai/kling-video/v1.6/standard/text-to-video", {}, "0.225"),
    ("fal-ai/kling-video/v1.6/pro/image-to-video", {}, "0.49"),
    ("fal-ai/kling-video/v2/master/text-to-video", {"duration": "5"}, "1.4"),
    ("fal-ai/kling-video/v2/master/image-to-video", {"duration": "10"}, "2.8"),
    ("fal-ai/kling-video/v2.1/standard/image-to-video", {}, "0.28"),
    ("fal-ai/kling-video/v2.1/pro/image-to-video", {}, "0.49"),
    ("fal-ai/kling-video/v2.1/master/text-to-video", {}, "1.4"),
    ("fal-ai/kling-video/v2.5-turbo/standard/image-to-video", {}, "0.21"),
    ("fal-ai/kling-video/v2.5-turbo/pro/text-to-video", {}, "0.35"),
    ("fal-ai/kling-video/v2.6/pro/text-to-video", {}, "0.7"),
    ("fal-ai/kling-video/v2.6/pro/text-to-video", {"generate_audio": False}, "0.35"),
    ("fal-ai/kling-video/v2.6/pro/image-to-video", {"voice_ids": ["v"]}, "0.84"),
    ("fal-ai/kling-video/v3/standard/text-to-video", {}, "0.63"),
    ("fal-ai/kling-video/v3/standard/image-to-video", {"generate_audio": False}, "0.42"),
    ("fal-ai/kling-video/v3/standard/image-to-video", {"elements": [{"voice_id": "v"}]}, "0.77"),
    ("fal-ai/kling-video/v3/pro/text-to-video", {"duration": "10"}, "1.68"),
    ("fal-ai/kling-video/v3/pro/image-to-video", {"generate_audio": False}, "0.56"),
    ("fal-ai/kling-video/v3/pro/image-to-video", {"elements": [{"voice_id": "v"}]}, "0.98"),
    ("fal-ai/kling-video/o3/4k/text-to-video", {}, "2.1"),
    ("fal-ai/wan/v2.7/text-to-video", {"resolution": "720p"}, "0.5"),
    ("fal-ai/wan/v2.7/image-to-video", {"duration": 2}, "0.3"),
    ("wan/v2.6/text-to-video", {"resolution": "720p"}, "0.5"),
    ("wan/v2.6/image-to-video", {"resolution": "480p"}, "0.25"),
    ("fal-ai/minimax/hailuo-02/standard/text-to-video", {}, "0.27"),
    ("fal-ai/minimax/hailuo-2.3/pro/text-to-video", {}, "0.49"),
    ("fal-ai/minimax/hailuo-2.3/standard/image-to-video", {}, "0.28"),
    ("xai/grok-imagine-video/text-to-video", {"duration": 6, "resolution": "480p"}, "0.3"),
    ("xai/grok-imagine-video/image-to-video", {"duration": 6}, "0.422"),
    ("fal-ai/ltx-2/text-to-video/fast", {}, "0.24"),
    ("fal-ai/elevenlabs/tts/multilingual-v2", {"text": "x" * 1000}, "0.1"),
    ("fal-ai/elevenlabs/tts/turbo-v2.5", {"text": "x" * 2000}, "0.1"),
    ("fal-ai/kokoro/american-english", {"prompt": "x" * 3000}, "0.06"),
    ("fal-ai/chatterbox/text-to-speech", {"text": "x" * 1000}, "0.025"),
    ("fal-ai/f5-tts", {"gen_text": "x" * 1000}, "0.05"),
    ("fal-ai/dia-tts", {"text": "x" * 1000}, "0.04"),
    ("fal-ai/minimax/speech-02-hd", {"text": "x" * 1000}, "0.1"),
    ("fal-ai/mmaudio-v2", {"duration": 10}, "0.01"),
    ("fal-ai/stable-audio-25/text-to-audio", {}, "0.2"),
    ("fal-ai/trellis", {}, "0.02"),
    ("fal-ai/hunyuan3d/v2", {}, "0.16"),
    ("fal-ai/meshy/v6/image-to-3d", {}, "0.8"),
]

# Holds that are not a published price: upper bounds, placeholders, tokens of the largest frame. At a margin of 5 %.
HELD: list[tuple[str, dict[str, Any], str]] = [
    # the three quick-start calls of the API reference
    ("fal-ai/flux/dev", {"prompt": "a futuristic city at night", "image_size": "landscape_4_3"}, "26.25"),
    ("fal-ai/kling-video/v2/master/text-to-video", {"prompt": "drone shot", "duration": "5"}, "1470"),
    ("fal-ai/creative-upscaler", {"image_url": "https://example.com/photo.jpg", "scale": 4}, "100"),
    # the others
    ("fal-ai/clarity-upscaler", {"upscale_factor": 4}, "535.5"),
    ("fal-ai/fast-sdxl", {"num_images": 4}, "20"),
    ("fal-ai/fast-lightning-sdxl", {}, "20"),
    ("fal-ai/esrgan", {}, "20"),
    ("fal-ai/aura-sr", {}, "20"),
    ("fal-ai/birefnet/v2", {}, "20"),
    ("fal-ai/topaz/upscale/image", {}, "168"),
    ("fal-ai/seedvr/upscale/image", {}, "105"),
    ("fal-ai/flux-pro/v1/fill", {}, "210"),
    ("fal-ai/qwen-image-edit", {}, "126"),
    ("fal-ai/gpt-image-1.5", {}, "262.5"),
    ("fal-ai/gpt-image-1.5", {"quality": "low", "num_images": 2}, "132.3"),
    ("openai/gpt-image-2", {}, "483"),
    ("fal-ai/bytedance/seedance/v1/lite/text-to-video", {}, "214.969"),
    ("fal-ai/bytedance/seedance/v1/lite/image-to-video", {"num_frames": 289}, "513.438"),
    ("fal-ai/bytedance/seedance/v1/pro/text-to-video", {"resolution": "1080p"}, "647.955"),
    ("fal-ai/bytedance/seedance/v1/pro/fast/image-to-video", {}, "259.182"),
    ("fal-ai/bytedance/seedance/v1.5/pro/text-to-video", {}, "276.158"),
    ("fal-ai/bytedance/seedance/v1.5/pro/text-to-video", {"generate_audio": False}, "138.079"),
    ("bytedance/seedance-2.0/text-to-video", {"duration": "5"}, "1610.919"),
    ("bytedance/seedance-2.0/image-to-video", {}, "4806.129"),
    ("bytedance/seedance-2.0/reference-to-video", {"duration": "5", "video_urls": ["x"]}, "5764.693"),
    ("bytedance/seedance-2.0/fast/text-to-video", {"duration": "5"}, "1288.735"),
    ("bytedance/seedance-2.0/fast/reference-to-video", {"duration": "5"}, "1288.735"),
    ("bytedance/seedance-2.5/text-to-video", {"duration": "5", "resolution": "720p"}, "2462.405"),
    ("fal-ai/kling-video/v3/pro/text-to-video", {"multi_prompt": [{"duration": "15"}]}, "2646"),
    ("fal-ai/sora-2/image-to-video/pro", {}, "2940"),
    ("fal-ai/hunyuan-video", {}, "866.25"),
    ("fal-ai/pixverse/v5/text-to-video", {}, "420"),
    ("fal-ai/whisper", {"audio_url": "https://example.com/talk.mp3"}, "500"),
]

# fal's recorded calls and units (fal-protocol 8.2), and what they cost the customer in credits at a margin of 5 %.
RECORDED: list[tuple[str, dict[str, Any], str, str]] = [
    ("fal-ai/veo3.1", {"duration": "4s", "resolution": "720p", "generate_audio": False}, "2.0", "840"),
    ("fal-ai/kling-video/v3/pro/text-to-video", {"duration": "5", "generate_audio": False}, "4.0", "588"),
    ("fal-ai/kling-video/v3/standard/text-to-video", {"duration": "5", "generate_audio": False}, "3.0", "441"),
    ("fal-ai/kling-video/o3/4k/text-to-video", {"duration": "5"}, "5.0", "2205"),
    ("xai/grok-imagine-video/image-to-video", {"duration": 6, "resolution": "720p"}, "8.44", "443.1"),
    ("xai/grok-imagine-video/image-to-video", {"duration": 6}, "8.439999999999998", "443.1"),
    ("xai/grok-imagine-image/edit", {}, "1.1", "23.1"),
    ("bytedance/seedance-2.0/text-to-video", {"duration": "4", "resolution": "480p"}, "38.8", "570.36"),
    ("fal-ai/gpt-image-1.5", {"quality": "low", "image_size": "1024x1024"}, "0.02", "21"),
    ("fal-ai/wan/v2.7/text-to-video", {"duration": 2, "resolution": "720p"}, "2", "210"),
    ("fal-ai/sora-2/text-to-video", {"duration": 4}, "4.0", "420"),
    ("fal-ai/nano-banana", {}, "1", "40.95"),
    ("fal-ai/nano-banana-2", {}, "1", "84"),
    ("fal-ai/nano-banana-pro", {}, "1", "157.5"),
    ("fal-ai/bytedance/seedream/v5/lite/text-to-image", {}, "1", "36.75"),
    ("fal-ai/qwen-image", {"image_size": "square_hd"}, "1", "21"),
    ("fal-ai/qwen-image-edit", {}, "1.0", "31.5"),
    ("fal-ai/hunyuan-image/v3/instruct/edit", {}, "1.0", "94.5"),
    ("fal-ai/flux/dev", {"image_size": "landscape_4_3"}, "1", "26.25"),
]


@pytest.mark.parametrize(("model", "call_input", "usd"), PUBLISHED)
def test_a_hold_is_the_published_price_and_the_margin(model: str, call_input: dict[str, Any], usd: str) -> None:
    assert pricing.ceiling(AT_COST.price_of(model), call_input).amount_micros == to_micros(Decimal(usd))
    with_margin = to_micros(Decimal(usd) * Decimal("1.05"))
    assert pricing.ceiling(SHIPPED.price_of(model), call_input).amount_micros == with_margin


@pytest.mark.parametrize(("model", "call_input", "credits"), HELD)
def test_a_hold_without_a_published_price_is_an_upper_bound(
    model: str, call_input: dict[str, Any], credits: str
) -> None:
    assert credits_text(pricing.ceiling(SHIPPED.price_of(model), call_input).amount_micros) == credits


@pytest.mark.parametrize(("model", "call_input", "units", "credits"), RECORDED)
def test_recorded_units_charge_what_the_call_cost_and_fit_their_hold(
    model: str, call_input: dict[str, Any], units: str, credits: str
) -> None:
    price = SHIPPED.price_of(model)
    charged = pricing.charge(price, Decimal(units))
    assert credits_text(charged) == credits
    assert charged <= pricing.ceiling(price, call_input).amount_micros


def test_every_entry_of_the_file_has_a_row_in_these_tables() -> None:
    tested = {model for model, *_ in (*PUBLISHED, *HELD)}
    entries: dict[int, list[PriceRule]] = {}
    for rule in RULES:
        entries.setdefault(id(rule.estimate), []).append(rule)
    assert [rules[0].model for rules in entries.values() if not tested & {rule.model for rule in rules}] == []


def test_every_model_in_the_readme_of_fals_python_client_has_a_price() -> None:
    """What a newcomer pastes first is not answered with `unpriced_model`."""
    readme = metadata("fal-client").get_payload()
    named = set(re.findall(r'"(fal-ai/[^"]+)"', str(readme)))
    assert named == {"fal-ai/fast-sdxl", "fal-ai/whisper"}
    assert {SHIPPED.price_of(model).model for model in named} == named


def test_every_shipped_price_is_above_zero_and_says_where_and_when_it_was_seen() -> None:
    for rule in RULES:
        assert rule.fal_unit_price_usd > 0, rule.model
        assert rule.unit, rule.model
        assert rule.source[0] in "PLACM", rule.model
        assert date(2026, 1, 1) <= date.fromisoformat(rule.seen) <= date(2026, 11, 22), rule.model
        assert pricing.ceiling(SHIPPED.price_of(rule.model), {}).amount_micros > 0, rule.model


# --- never below what fal would bill ----------------------------------------------------------------------------

COMPUTED = [price for price in SHIPPED if price.estimate.kind not in ("none", "output_megapixels")]
SIDES = st.integers(64, 4096)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Price, dict[str, Any], Decimal]:
    """A valid call of any computed model and the units fal would bill for it, reckoned here a second time."""
    price = draw(st.sampled_from(COMPUTED))
    estimate = price.estimate
    rate = draw(st.sampled_from(estimate.rates))
    given = {name: {"*": ["x"], "": None}.get(str(wanted), wanted) for name, wanted in rate.when.items()}
    number = draw(st.integers(1, 4))
    seconds = draw(st.integers(1, int(estimate.maximum)))
    match estimate.kind:
        case "images":
            batch = draw(st.integers(1, 6)) if estimate.batch_param else 1
            given |= {estimate.count_param: number} | ({estimate.batch_param: batch} if estimate.batch_param else {})
            quantity = Decimal(number * draw(st.integers(1, batch)))  # a batch may come out smaller
        case "megapixels":
            width, height = draw(SIDES), draw(SIDES)
            size = {"width": width, "height": height}
            if draw(st.booleans()):
                size, (width, height) = draw(st.sampled_from(sorted(pricing.IMAGE_SIZES.items())))
            given |= {"image_size": size, "num_images": number}
            quantity = Decimal(number * ceil(Decimal(width * height) / 1_000_000))
        case "seconds":
            given |= {"duration": draw(st.sampled_from([seconds, str(seconds), f"{seconds}s"]))}
            quantity = Decimal(seconds)
        case "tokens":
            resolution = draw(st.sampled_from(sorted(estimate.size_by_resolution)))
            pixels = draw(st.integers(1, estimate.size_by_resolution[resolution]))
            given |= {"duration": draw(st.sampled_from([str(seconds), "auto"])), "resolution": resolution}
            quantity = pixels * (24 * Decimal(seconds) + 1) / 1024 / 1000
        case "characters":
            text = draw(st.text("ab \u00e9\U0001f600", max_size=40)) * draw(st.integers(1, 200))
            given |= {estimate.text_param: text}
            quantity = Decimal(len(text)) / 1000
        case _:
            quantity = Decimal(1)
    return price, given, rate.units * quantity + estimate.surcharge


@PROPERTY
@given(calls())
def test_a_hold_covers_what_fal_bills_for_a_valid_call(call: tuple[Price, dict[str, Any], Decimal]) -> None:
    price, call_input, units = call
    assert pricing.charge(price, units) <= pricing.ceiling(price, call_input).amount_micros


# --- bad files --------------------------------------------------------------------------------------------------

GOOD = """
[[model]]
id = "fal-ai/x"
unit = "images"
unit_price_usd = "0.5"
source = "P"
seen = "2026-09-05"
estimate = { kind = "images" }
"""
BAD_FILES = [
    # what is wrong with the file, what the message must say
    ("", ["it lists no model"]),
    ("model = []", ["it lists no model"]),
    ("[[model]", ["the price file is not TOML"]),
    ("model = 5", ["the file: model is no list"]),
    ("model = [5]", ["the file: model is no list of tables"]),
    (GOOD + "[[models]]", ["the file: unknown field models"]),
    (GOOD + GOOD, ["fal-ai/x: listed twice"]),
    (GOOD.replace('id = "fal-ai/x"', 'ids = ["fal-ai/x", "fal-ai/x"]'), ["fal-ai/x: listed twice"]),
    (GOOD.replace('id = "fal-ai/x"\n', ""), ["the file, model 1: id is missing", "'' is no model id"]),
    (GOOD.replace('"fal-ai/x"', "7"), ["model 1: id is no text"]),
    (GOOD.replace('"fal-ai/x"', '"/fal-ai//x"'), ["'/fal-ai//x' is no model id"]),
    (GOOD.replace('"fal-ai/x"', '"flux"'), ["'flux' is no model id"]),
    (GOOD.replace('id = "fal-ai/x"', "ids = [7]"), ["7: '7' is no model id"]),
    (GOOD.replace('id = "fal-ai/x"', "ids = []"), ["it lists no model"]),
    (GOOD.replace('id = "fal-ai/x"', 'ids = "fal-ai/x"'), ["model 1: ids is no list"]),
    (GOOD + 'ids = ["fal-ai/y"]', ["fal-ai/x: unknown field ids"]),
    (GOOD + 'colour = "red"', ["fal-ai/x: unknown field colour"]),
    (GOOD.replace('unit = "images"\n', ""), ["fal-ai/x: unit is missing"]),
    (GOOD.replace('"P"', "1"), ["fal-ai/x: source is no text"]),
    (GOOD.replace('unit_price_usd = "0.5"\n', ""), ["fal-ai/x: unit_price_usd: '' is not a plain"]),
    (GOOD.replace('"0.5"', '"-0.5"'), ["fal-ai/x: unit_price_usd: '-0.5' is not a plain non-negative decimal"]),
    (GOOD.replace('"fal-ai/x"', f'"fal-ai/{"x" * 194}"'), ["xxx...' is no model id"]),
    (re.sub(r'unit = "[a-z]+"', f'unit = "{"u" * 61}"', GOOD), ["fal-ai/x: unit has more than 60 characters"]),
    (GOOD.replace('"0.5"', '"NaN"'), ["fal-ai/x: unit_price_usd: 'NaN'"]),
    (GOOD.replace('"0.5"', '"100001"'), ["fal-ai/x: unit_price_usd: 100001 is larger than"]),
    (GOOD.replace('"0.5"', "1"), ["fal-ai/x: unit_price_usd is no text"]),
    (GOOD.replace('"2026-09-05"', '"last week"'), ["fal-ai/x: seen 'last week' is no date"]),
    (GOOD + 'hold_credits = "0"', ["fal-ai/x: hold_credits: the amount is zero"]),
    (GOOD + 'hold_credits = "0.0001"', ["fal-ai/x: hold_credits: '0.0001' is finer than the ledger"]),
    (GOOD + "hold_credits = 5", ["fal-ai/x: hold_credits is no text"]),
    (GOOD.replace('{ kind = "images" }', "5"), ["fal-ai/x: estimate is no table", "estimate: kind is missing"]),
    (GOOD.replace('"images" }', '"bananas", maximum = "1" }'), ["estimate: kind 'bananas' is none of images, "]),
    (GOOD.replace('"images" }', '"seconds" }'), ["estimate: kind seconds needs a maximum"]),
    (GOOD.replace('"images" }', '"none" }'), ["estimate: kind none needs a maximum"]),
    (GOOD.replace('"images" }', '"tokens", maximum = "9" }'), ["estimate: kind tokens needs size_by_resolution"]),
    (GOOD.replace('"images" }', '"images", size_by_resolution = { a = "big" } }'), ["size_by_resolution.a is no size"]),
    (GOOD.replace('"images" }', '"images", colour = "red" }'), ["estimate: unknown field colour"]),
    (GOOD.replace('"images" }', '"images", defaults = { n = 5 } }'), ["defaults.n is neither a text nor a boolean"]),
    (GOOD.replace('"images" }', '"images", rates = [{ when = {} }] }'), ["estimate, rates 1: units: '' is not"]),
    (GOOD.replace('"images" }', '"images", rates = [{ units = "1", x = "" }] }'), ["rates 1: unknown field x"]),
    (
        GOOD.replace('"0.5"', '"-1"').replace('"images" }', '"apples" }') + GOOD.replace("fal-ai/x", "y"),
        ["fal-ai/x: unit_price_usd: '-1'", "fal-ai/x, estimate: kind 'apples'", "y: 'y' is no model id"],
    ),
]


@pytest.mark.parametrize(("text", "problems"), BAD_FILES)
def test_a_bad_price_file_is_refused_naming_every_problem(text: str, problems: list[str]) -> None:
    with pytest.raises(PriceFileError) as refusal:
        pricing.load_rules(text)
    assert [problem for problem in problems if problem not in refusal.value.message] == []


def test_an_entry_is_read_as_it_is_written() -> None:
    text = GOOD.replace('id = "fal-ai/x"', 'ids = ["fal-ai/x", "fal-ai/y"]').replace('"images" }', '"none" }')
    first, second = pricing.load_rules(text + 'hold_credits = "26.25"')
    assert (first.model, second.model) == ("fal-ai/x", "fal-ai/y")
    assert (first.unit, first.fal_unit_price_usd, first.source, first.seen) == (
        "images",
        Decimal("0.5"),
        "P",
        "2026-09-05",
    )
    assert first.hold_micros == 26_250
    assert first.estimate.kind == "none"
