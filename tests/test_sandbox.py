"""The fal simulator over real sockets: its answers, the files behind them, what it refuses, and what it bills."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from abhiapi import pricing
from abhiapi.estimates import units_ceiling
from abhiapi.sandbox import create_sandbox, pictures
from tests.sandbox_client import (
    CAT,
    FLUX,
    KLING,
    RULES,
    TIMEOUT_S,
    Fal,
    fresh,
    read_boxes,
    read_inside,
    read_png,
    request_id,
    simulator,
    wsgi_call,
)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with simulator() as url:
        yield url


@pytest.fixture
def fal(server: str) -> Iterator[Fal]:
    with fresh(server) as client:
        yield client


# --- answers ----------------------------------------------------------------------------------------------------


def test_image_answer_has_the_shape_and_headers_of_fal(fal: Fal) -> None:
    reply = fal.post(FLUX, {"prompt": "a cat", "num_images": 2, "seed": 7})
    assert reply.status_code == 200
    answer = reply.json()
    assert list(answer) == ["images", "timings", "seed", "has_nsfw_concepts", "prompt"]
    assert [(one["width"], one["height"]) for one in answer["images"]] == [(1024, 768)] * 2
    assert len({one["url"] for one in answer["images"]}) == 2
    assert (answer["seed"], answer["prompt"], answer["has_nsfw_concepts"]) == (7, "a cat", [False, False])
    assert reply.headers["x-fal-billable-units"] == "2"
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", request_id(reply))
    assert reply.headers["x-fal-served-from"]
    assert reply.headers["content-type"] == "application/json"


def test_same_request_gives_same_answer_under_a_new_request_id(fal: Fal) -> None:
    first, second, other = fal.post(FLUX, CAT), fal.post(FLUX, CAT), fal.post(FLUX, {"prompt": "a dog"})
    assert first.content == second.content != other.content
    assert request_id(first) < request_id(second)


def test_get_takes_the_query_as_input(fal: Fal) -> None:
    reply = fal.get(f"{FLUX}?prompt=a+cat&image_size=square&num_images=3")
    assert [(one["width"], one["height"]) for one in reply.json()["images"]] == [(512, 512)] * 3
    assert reply.headers["x-fal-billable-units"] == "3"


def test_partner_answer_hides_sizes(fal: Fal) -> None:
    reply = fal.post("/fal-ai/nano-banana", {"prompt": "a cat", "num_images": 3, "aspect_ratio": "16:9"})
    (first, *_) = reply.json()["images"]
    assert (first["width"], first["height"], first["file_size"]) == (None, None, None)
    assert reply.json()["description"] == ""
    assert reply.headers["x-fal-billable-units"] == "3"


def test_sync_mode_answers_with_the_picture_itself(fal: Fal) -> None:
    url = fal.post(FLUX, {"prompt": "a cat", "sync_mode": True}).json()["images"][0]["url"]
    kind, _, encoded = url.partition(",")
    assert kind == "data:image/png;base64"
    assert read_png(base64.b64decode(encoded, validate=True))[:2] == (1024, 768)


@pytest.mark.parametrize(
    ("path", "call_input", "units"),
    [
        (FLUX, {"prompt": "p"}, "1"),  # 0.79 MP: never less than one
        (FLUX, {"prompt": "p", "image_size": "square_hd"}, "1"),  # 1.05 MP: to the nearest
        (FLUX, {"prompt": "p", "image_size": {"width": 1376, "height": 768}}, "1"),  # recorded: 1.0
        (FLUX, {"prompt": "p", "image_size": {"width": 2048, "height": 2048}, "num_images": 2}, "8"),
        (FLUX, {"prompt": "p", "image_size": {"width": 14142, "height": 14142}}, "200"),
        ("/fal-ai/nano-banana", {"prompt": "p", "num_images": "4"}, "4"),
        (KLING, {"prompt": "p"}, "5"),
        (KLING, {"prompt": "p", "duration": "10", "generate_audio": False}, "5"),
        ("/fal-ai/sora-2/text-to-video", {"prompt": "p", "duration": 12}, "12"),
        # recorded for 4 s of 480p 1:1: 38.8, which is 97 frames x 640 x 640 / 1024 / 1000
        (
            "/bytedance/seedance-2.0/text-to-video",
            {"prompt": "p", "duration": "4", "resolution": "480p", "aspect_ratio": "1:1"},
            "38.8",
        ),
        ("/fal-ai/clarity-upscaler", {"image_url": "https://example.com/a.png"}, "4"),
        ("/fal-ai/kokoro/american-english", {"text": "t", "prompt": "x" * 1500}, "1.5"),
    ],
)
def test_units_are_those_fal_would_bill(fal: Fal, path: str, call_input: dict[str, Any], units: str) -> None:
    reply = fal.post(path, call_input)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-fal-billable-units"] == units
    rule = RULES[path.strip("/")]
    assert Decimal(units) <= units_ceiling(rule.estimate, call_input)[0]  # what is billed never exceeds a hold
    (billed,) = fal.bill()["billed"]
    assert (billed["request_id"], billed["endpoint_id"], billed["units"]) == (request_id(reply), rule.model, units)
    assert billed["cost_nano_usd"] == Decimal(units) * rule.fal_unit_price_usd * 10**9


def test_compute_seconds_are_plausible_and_repeatable(fal: Fal) -> None:
    call_input = {"image_url": "https://example.com/photo.jpg", "scale": 4}
    first, second = (fal.post("/fal-ai/creative-upscaler", call_input) for _ in range(2))
    assert first.headers["x-fal-billable-units"] == second.headers["x-fal-billable-units"]
    assert Decimal("0.5") < Decimal(first.headers["x-fal-billable-units"]) < 60
    assert (first.json()["image"]["width"], first.json()["image"]["height"]) == (4096, 4096)


def test_upscaler_knows_the_size_of_our_own_pictures(fal: Fal) -> None:
    source = fal.post(FLUX, {"prompt": "a cat", "image_size": "square"}).json()["images"][0]["url"]
    image = fal.post("/fal-ai/clarity-upscaler", {"image_url": source}).json()["image"]
    assert (image["width"], image["height"]) == (1024, 1024)
    assert read_png(fal.get(image["url"]).content)[:2] == (1024, 1024)


# --- files ------------------------------------------------------------------------------------------------------


def test_pictures_open_and_have_the_size_announced(fal: Fal) -> None:
    image = fal.post(FLUX, {"prompt": "Ein Käse & más!", "image_size": "portrait_16_9"}).json()["images"][0]
    reply = requests.get(image["url"], timeout=TIMEOUT_S)  # files need no key
    assert reply.headers["content-type"] == image["content_type"] == "image/png"
    width, height, rows = read_png(reply.content)
    assert (width, height) == (image["width"], image["height"]) == (576, 1024)
    assert len(set(rows)) > 100  # a gradient, not one colour
    assert bytes([255]) in b"".join(rows)  # and words on it


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (14142, 2)])
def test_pictures_of_extreme_shapes_are_valid(size: tuple[int, int]) -> None:
    assert read_png(b"".join(pictures.png(*size, "seed", "words")))[:2] == size


def test_largest_picture_is_never_whole_in_memory() -> None:
    """Each piece is bounded, whatever the picture's size: checked on the raw rows of the first thousand."""
    pieces = pictures.png(14_142, 14_142, "seed", "words")
    largest = max(len(next(pieces)) for _ in range(1_000))
    assert largest < pictures.STRIP_BYTES


def test_colours_and_words_come_from_the_prompt(fal: Fal) -> None:
    urls = [fal.post(FLUX, {"prompt": prompt}).json()["images"][0]["url"] for prompt in ("a cat", "a dog")]
    assert fal.get(urls[0]).content != fal.get(urls[1]).content
    assert urls[0].endswith("/a-cat.png")


@pytest.mark.parametrize(("path", "sized"), [(KLING, False), ("/fal-ai/sora-2/text-to-video", True)])
def test_clips_are_mp4_files_of_the_length_announced(fal: Fal, path: str, sized: bool) -> None:
    video = fal.post(path, {"prompt": "drone shot", "aspect_ratio": "9:16"}).json()["video"]
    reply = fal.get(video["url"])
    assert reply.headers["content-type"] == video["content_type"] == "video/mp4"
    assert len(reply.content) == video["file_size"]
    boxes = dict(read_boxes(reply.content))
    assert list(boxes) == [b"ftyp", b"moov", b"mdat"]
    table = read_inside(boxes[b"moov"], b"trak", b"mdia", b"minf", b"stbl")
    count = int.from_bytes(table[b"stsz"][8:12], "big")
    sizes = struct.unpack(f">{count}I", table[b"stsz"][12:])
    assert sum(sizes) == len(boxes[b"mdat"])
    at = 0
    for size in sizes:  # every sample is one NAL unit that fills it
        assert int.from_bytes(boxes[b"mdat"][at : at + 4], "big") == size - 4
        at += size
    seconds = video["duration"] if sized else 5
    assert count == seconds * 24
    assert struct.unpack(">HH", table[b"stsd"][40:44]) == (720, 1280)
    assert b"avcC" in table[b"stsd"]
    if sized:
        assert (video["width"], video["height"], video["fps"], video["num_frames"]) == (720, 1280, 24, count)


def test_sounds_are_wav_files(fal: Fal) -> None:
    audio = fal.post("/fal-ai/kokoro/american-english", {"prompt": "hello"}).json()["audio"]
    reply = fal.get(audio["url"])
    assert reply.headers["content-type"] == audio["content_type"] == "audio/wav"
    assert reply.content[:4] == b"RIFF"
    assert int.from_bytes(reply.content[4:8], "little") == len(reply.content) - 8


@pytest.mark.parametrize(
    "path", ["/files/", "/files/ab/0x5/a.png", "/files/ab/99999x5/a.png", "/files/zz/1x1/a.png", "/files/ab/1x1/a.mp4"]
)
def test_unknown_files_are_404(fal: Fal, path: str) -> None:
    assert fal.get(path).status_code == 404


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "", "Key", "Key ", "Bearer id:secret", "id:secret"])
def test_calls_without_a_key_are_refused_and_free(fal: Fal, header: str | None) -> None:
    reply = requests.post(
        fal.url + FLUX, json=CAT, headers={"Authorization": header} if header else {}, timeout=TIMEOUT_S
    )
    assert (reply.status_code, list(reply.json())) == (401, ["detail"])
    assert "x-fal-billable-units" not in reply.headers
    assert fal.bill()["billed"] == []


def test_unknown_endpoint_is_404_with_no_units(fal: Fal) -> None:
    reply = fal.post("/fal-ai/nothing", CAT)
    assert (reply.status_code, reply.json()) == (404, {"detail": "Path /fal-ai/nothing not found"})
    assert reply.headers["x-fal-billable-units"] == "0"
    assert fal.post(FLUX + "/", CAT).status_code == 200


def test_other_methods_are_405(fal: Fal) -> None:
    reply = fal.session.put(fal.url + FLUX, json=CAT, timeout=TIMEOUT_S)
    assert (reply.status_code, reply.json()) == (405, {"detail": "Method Not Allowed"})


@pytest.mark.parametrize(
    ("path", "call_input", "where", "kind"),
    [
        (FLUX, {}, ["body", "prompt"], "missing"),
        (FLUX, {"prompt": 5}, ["body", "prompt"], "string_type"),
        (FLUX, {"prompt": "p", "num_images": 0}, ["body", "num_images"], "greater_than_equal"),
        (FLUX, {"prompt": "p", "num_images": 5}, ["body", "num_images"], "less_than_equal"),
        (FLUX, {"prompt": "p", "num_images": 10**30}, ["body", "num_images"], "less_than_equal"),
        (FLUX, {"prompt": "p", "num_images": 1.5}, ["body", "num_images"], "int_from_float"),
        (FLUX, {"prompt": "p", "num_images": float("nan")}, ["body", "num_images"], "int_from_float"),
        (FLUX, {"prompt": "p", "num_images": "many"}, ["body", "num_images"], "int_parsing"),
        (FLUX, {"prompt": "p", "num_images": [1]}, ["body", "num_images"], "int_type"),
        (FLUX, {"prompt": "p", "image_size": "huge"}, ["body", "image_size"], "enum"),
        (
            FLUX,
            {"prompt": "p", "image_size": {"width": 14143, "height": 9}},
            ["body", "image_size", "width"],
            "less_than_equal",
        ),
        (KLING, {"prompt": "p", "duration": "7"}, ["body", "duration"], "literal_error"),
        (KLING, {"prompt": "p", "duration": 5}, ["body", "duration"], "literal_error"),
        ("/fal-ai/kling-video/v2.6/pro/image-to-video", {"prompt": "p"}, ["body", "image_url"], "missing"),
        ("/fal-ai/nano-banana/edit", {"prompt": "p"}, ["body", "image_urls"], "missing"),
        ("/fal-ai/creative-upscaler", {"scale": 2}, ["body", "image_url"], "missing"),
        (FLUX, [1], ["body"], "model_attributes_type"),
        (FLUX, "text", ["body"], "model_attributes_type"),
    ],
)
def test_wrong_input_is_422_in_fals_shape_and_free(
    fal: Fal, path: str, call_input: Any, where: list[str], kind: str
) -> None:
    reply = fal.post(path, data=json.dumps(call_input))
    assert reply.status_code == 422, reply.text
    (problem,) = reply.json()["detail"]
    assert (problem["loc"], problem["type"]) == (where, kind)
    assert problem["msg"]
    assert reply.headers["x-fal-billable-units"] == "0"
    assert fal.bill()["billed"] == []


@pytest.mark.parametrize("body", [b'{"prompt": ', b"\xff\xfe", b'{"a":1} trailing', b"[" * 100_000, b"1" * 5_000])
def test_bodies_that_are_no_json_are_422(fal: Fal, body: bytes) -> None:
    reply = fal.post(FLUX, data=body)
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["type"] == "json_invalid"


def test_empty_body_is_a_missing_body(fal: Fal) -> None:
    reply = fal.post(FLUX)
    assert reply.json()["detail"][0]["loc"] == ["body"]


# --- without a server -----------------------------------------------------------------------------------------------


def test_answers_are_the_same_without_a_server() -> None:
    """The simulator is a plain WSGI application; only broken connections need its own server."""
    sandbox = create_sandbox(RULES.values(), new_id=lambda: "request-1")
    body = json.dumps(CAT).encode()

    status, headers, answer = wsgi_call(sandbox, FLUX, body)
    assert (status, headers["x-fal-request-id"]) == ("200 OK", "request-1")
    assert json.loads(answer)["images"][0]["url"].startswith("http://fal.test:80/files/")
    assert wsgi_call(sandbox, FLUX, body, HTTP_X_FAL_SANDBOX="garbage=1")[0].startswith("500")


@pytest.mark.parametrize("rule", pricing.shipped_rules(), ids=lambda rule: rule.model)
def test_every_model_of_the_catalogue_answers_within_its_hold(rule: pricing.PriceRule) -> None:
    """The input that each model asks for, and no more, is served, and costs no more than is held for it."""
    call_input: dict[str, Any] = {}
    for _ in range(5):
        sandbox = create_sandbox([rule])
        status, headers, answer = wsgi_call(sandbox, f"/{rule.model}", json.dumps(call_input).encode())
        if not status.startswith("422"):
            break
        for problem in json.loads(answer)["detail"]:
            name = problem["loc"][-1]
            call_input[name] = "https://example.com/a.png" if name.endswith(("_url", "_urls")) else "some words"
    assert status == "200 OK"
    price = pricing.Catalogue([rule], [], Decimal(0)).price_of(rule.model)
    cost = pricing.charge(price, Decimal(headers["x-fal-billable-units"]))
    assert 0 < cost <= pricing.ceiling(price, call_input).amount_micros


_NAMES = ("prompt", "num_images", "image_size", "duration", "image_url", "seed", "resolution", "aspect_ratio", "scale",
          "sync_mode", "width", "height", "generate_audio", "text")  # fmt: skip
_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=2),
    st.sampled_from(["5", "1:1", "0:0", "720p", "4K", "square", "9999x1", "auto", "\ud800", 10**400, 1e-300]),
    st.dictionaries(st.sampled_from(["width", "height", "x"]), st.integers() | st.floats() | st.text(max_size=3)),
)  # fmt: skip


@given(st.sampled_from(sorted(RULES)), st.dictionaries(st.sampled_from(_NAMES), _VALUES), st.booleans())
@settings(max_examples=30, deadline=None)
def test_no_input_is_an_accident(model: str, call_input: dict[str, Any], forced: bool) -> None:
    """Any JSON object is answered or refused in fal's shape, also where the weather skips the validation."""
    sandbox = create_sandbox(RULES.values())
    weather = {"HTTP_X_FAL_SANDBOX": "status=200"} if forced else {}
    status, headers, answer = wsgi_call(sandbox, f"/{model}", json.dumps(call_input).encode(), **weather)
    assert status.startswith("200" if forced else ("200", "422"))
    assert isinstance(json.loads(answer), dict)
    assert Decimal(headers["x-fal-billable-units"]) >= 0
