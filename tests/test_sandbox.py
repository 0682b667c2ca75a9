"""The fal simulator over real sockets: its answers, its files, its bill, and every weather it can make."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
import requests

from abhiapi import pricing
from abhiapi.estimates import units_ceiling
from abhiapi.sandbox import create_sandbox, pictures
from abhiapi.sandbox.server import running
from abhiapi.sandbox.weather import BODY_KINDS, KEYS

PRICES = """
[[model]]
id = "fal-ai/flux/dev"
unit = "megapixels"
unit_price_usd = "0.025"
source = "test"
seen = "2026-11-22"
estimate = { kind = "megapixels", maximum = "4", defaults = { image_size = "landscape_4_3" } }

[[model]]
ids = ["fal-ai/nano-banana", "fal-ai/nano-banana/edit"]
unit = "images"
unit_price_usd = "0.039"
source = "test"
seen = "2026-11-22"
estimate = { kind = "images" }

[[model]]
ids = ["fal-ai/kling-video/v2.6/pro/text-to-video", "fal-ai/kling-video/v2.6/pro/image-to-video"]
unit = "seconds"
unit_price_usd = "0.14"
source = "test"
seen = "2026-11-22"
[model.estimate]
kind = "seconds"
maximum = "10"
defaults = { duration = "5", generate_audio = true }
rates = [{ units = "0.5", when = { generate_audio = false } }, { units = "1", when = { generate_audio = true } }]

[[model]]
id = "fal-ai/sora-2/text-to-video"
unit = "seconds"
unit_price_usd = "0.10"
source = "test"
seen = "2026-11-22"
estimate = { kind = "seconds", maximum = "20", defaults = { duration = "4" } }

[[model]]
id = "bytedance/seedance-2.0/text-to-video"
unit = "1000 tokens"
unit_price_usd = "0.014"
source = "test"
seen = "2026-11-22"
[model.estimate]
kind = "tokens"
maximum = "15"
defaults = { resolution = "720p", duration = "auto" }
size_by_resolution = { 480p = "864x496", 720p = "1280x720" }

[[model]]
id = "fal-ai/clarity-upscaler"
unit = "megapixels"
unit_price_usd = "0.03"
source = "test"
seen = "2026-11-22"
estimate = { kind = "output_megapixels", maximum = "16" }

[[model]]
id = "fal-ai/creative-upscaler"
unit = "compute seconds"
unit_price_usd = "0.0011"
source = "test"
seen = "2026-11-22"
estimate = { kind = "none", maximum = "60" }

[[model]]
id = "fal-ai/kokoro/american-english"
unit = "1000 characters"
unit_price_usd = "0.02"
source = "test"
seen = "2026-11-22"
estimate = { kind = "characters", maximum = "5", text_param = "prompt" }
"""
RULES = {rule.model: rule for rule in pricing.load_rules(PRICES)}

FLUX = "/fal-ai/flux/dev"
KLING = "/fal-ai/kling-video/v2.6/pro/text-to-video"
CAT = {"prompt": "a cat"}
TIMEOUT_S = 10


class Fal:
    """The simulator's address, with the few calls that tests make of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host = url.removeprefix("http://")
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.headers["Authorization"] = "Key id:secret"

    def post(self, path: str, call_input: Any = None, weather: str = "", **options: Any) -> requests.Response:
        headers = {"x-fal-sandbox": weather} if weather else {}
        if call_input is not None:
            options["json"] = call_input
        options.setdefault("headers", headers)
        return self.session.post(self.url + path, timeout=TIMEOUT_S, allow_redirects=False, **options)

    def get(self, path: str) -> requests.Response:
        return self.session.get(path if path.startswith("http") else self.url + path, timeout=TIMEOUT_S)

    def order(self, *weather: dict[str, Any]) -> requests.Response:
        return self.session.post(self.url + "/_sandbox/weather", json=list(weather), timeout=TIMEOUT_S)

    def bill(self) -> dict[str, Any]:
        return dict(self.get("/_sandbox/bill").json())

    def calls(self, query: str = "") -> list[dict[str, Any]]:
        return list(self.get(f"/_sandbox/calls{query}").json()["calls"])

    def raw(self, weather: str, body: bytes = b'{"prompt":"a cat"}') -> tuple[bytes, bool]:
        """Everything the server sends for one call, and whether it ended the connection with a reset."""
        head = (
            f"POST {FLUX} HTTP/1.1\r\nHost: {self.host}\r\nAuthorization: Key k\r\nConnection: close\r\n"
            f"x-fal-sandbox: {weather}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        received = b""
        with self.connect() as client:
            client.sendall(head.encode() + body)
            try:
                while piece := client.recv(65536):
                    received += piece
            except ConnectionResetError:
                return received, True
        return received, False

    def connect(self) -> socket.socket:
        name, _, port = self.host.partition(":")
        return socket.create_connection((name, int(port)), timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running(create_sandbox(RULES.values())) as url:
        yield url


@pytest.fixture
def fal(server: str) -> Iterator[Fal]:
    fresh = Fal(server)
    for page in ("calls", "bill", "weather"):
        fresh.session.delete(f"{server}/_sandbox/{page}", timeout=TIMEOUT_S).raise_for_status()
    yield fresh
    fresh.session.close()


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
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", _id(reply))
    assert reply.headers["x-fal-served-from"]
    assert reply.headers["content-type"] == "application/json"


def test_same_request_gives_same_answer_under_a_new_request_id(fal: Fal) -> None:
    first, second, other = fal.post(FLUX, CAT), fal.post(FLUX, CAT), fal.post(FLUX, {"prompt": "a dog"})
    assert first.content == second.content != other.content
    assert _id(first) < _id(second)


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
    assert _png(base64.b64decode(encoded, validate=True))[:2] == (1024, 768)


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
    assert (billed["request_id"], billed["endpoint_id"], billed["units"]) == (_id(reply), rule.model, units)
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
    assert _png(fal.get(image["url"]).content)[:2] == (1024, 1024)


# --- files ------------------------------------------------------------------------------------------------------


def test_pictures_open_and_have_the_size_announced(fal: Fal) -> None:
    image = fal.post(FLUX, {"prompt": "Ein Käse & más!", "image_size": "portrait_16_9"}).json()["images"][0]
    reply = requests.get(image["url"], timeout=TIMEOUT_S)  # files need no key
    assert reply.headers["content-type"] == image["content_type"] == "image/png"
    width, height, rows = _png(reply.content)
    assert (width, height) == (image["width"], image["height"]) == (576, 1024)
    assert len(set(rows)) > 100  # a gradient, not one colour
    assert bytes([255]) in b"".join(rows)  # and words on it


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (14142, 2)])
def test_pictures_of_extreme_shapes_are_valid(size: tuple[int, int]) -> None:
    assert _png(b"".join(pictures.png(*size, "seed", "words")))[:2] == size


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
    boxes = dict(_boxes(reply.content))
    assert list(boxes) == [b"ftyp", b"moov", b"mdat"]
    table = _inside(boxes[b"moov"], b"trak", b"mdia", b"minf", b"stbl")
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
    reply = requests.post(fal.url + FLUX, json=CAT, headers={"Authorization": header} if header else {}, timeout=TIMEOUT_S)
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


# --- weather that HTTP allows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "detail", "header"),
    [
        (500, "Internal server error", ("x-fal-error-type", "internal_error")),
        (502, "Runner returned an incomplete response", ("x-fal-error-type", "runner_incomplete_response")),
        (503, "No runner could be scheduled", ("x-fal-error-type", "runner_scheduling_failure")),
        (504, "Request timed out", ("x-fal-error-type", "request_timeout")),
        (429, "Concurrent requests limit reached", ("x-fal-needs-retry", "1")),
        (401, "invalid key credentials", None),
        (404, f"Path {FLUX} not found", ("x-fal-billable-units", "0")),
        (405, "Method Not Allowed", None),
        (307, "Redirected", ("location", f"/redirected{FLUX}")),
        (418, "I'm a Teapot", None),
        (598, "Internal server error", None),
    ],
)
def test_statuses_come_with_fals_bodies(fal: Fal, status: int, detail: str, header: tuple[str, str] | None) -> None:
    reply = fal.post(FLUX, CAT, f"status={status}")
    assert reply.status_code == status
    assert reply.json()["detail"].lower() == detail.lower()
    if header is not None:
        assert reply.headers[header[0]].endswith(header[1])
    assert fal.bill()["billed"] == []


def test_locked_account_speaks_of_the_balance(fal: Fal) -> None:
    assert "Top up your balance" in fal.post(FLUX, CAT, "status=403").json()["detail"]


@pytest.mark.parametrize(
    ("weather", "sent", "billed"),
    [
        ("units=7.5", ["7.5"], ["7.5"]),
        ("units=0", ["0"], ["0"]),
        ("units_factor=3", ["3"], ["3"]),
        ("units=-5", ["-5"], ["1"]),
        ("units=NaN", ["NaN"], ["1"]),
        ("units=1e309", ["1e309"], ["1"]),
        ("units=1,5", ["1,5"], ["1"]),
        ("units=", [""], ["1"]),
        ("units=none", [], ["1"]),
        ("units=twice", ["1", "1"], ["1"]),
        ("status=422", [], []),
        ("status=422; units=2", ["2"], ["2"]),
        ("status=422; units=0", ["0"], []),
        ("status=401; units=2", ["2"], []),
        ("status=500; units=2", ["2"], []),
        ("status=202; units=2", ["2"], ["2"]),
        ("status=204", ["1"], ["1"]),
    ],
)
def test_units_weather_sends_what_it_says_and_bills_what_is_true(
    fal: Fal, weather: str, sent: list[str], billed: list[str]
) -> None:
    reply = fal.post(FLUX, CAT, weather)
    assert reply.raw.headers.getlist("x-fal-billable-units") == sent
    bill = fal.bill()
    assert [one["units"] for one in bill["billed"]] == billed
    assert bill["cost_nano_usd"] == sum(Decimal(units) * 25_000_000 for units in billed)
    assert bill["calls"] == len(billed)


@pytest.mark.parametrize("kind", BODY_KINDS)
def test_odd_bodies_arrive_as_they_are(fal: Fal, kind: str) -> None:
    reply = fal.post(FLUX, CAT, f"body={kind}")
    assert reply.status_code == 200
    assert int(reply.headers["content-length"]) == len(reply.content)
    is_object = kind in ("object", "nested", "whitespace", "escaped", "billing", "latin1")
    assert (_object(reply.content) is not None) is is_object
    assert ("x-fal-request-id" in reply.headers) is (kind != "html")
    zipped = fal.post(FLUX, CAT, f"body={kind}; encoding=gzip")
    assert zipped.headers["content-encoding"] == "gzip"
    assert zipped.content == reply.content


def test_sized_bodies_are_objects_of_exactly_that_size(fal: Fal) -> None:
    for size in (64, 300_000, 5_000_001):
        reply = fal.post(FLUX, CAT, f"size_bytes={size}")
        assert len(reply.content) == size == int(reply.headers["content-length"])
        assert list(reply.json()) == ["image"]
    zipped = fal.post(FLUX, CAT, "size_bytes=5000001; encoding=gzip")
    assert (zipped.headers["transfer-encoding"], zipped.content) == ("chunked", reply.content)


def test_echo_tells_what_arrived(fal: Fal) -> None:
    body = bytes(range(256)) * 8_000
    reply = fal.post(FLUX, data=body, headers={"x-fal-sandbox": "echo=1"})
    assert reply.json() == {"sha256": hashlib.sha256(body).hexdigest(), "length": len(body)}


def test_delay_is_waited(fal: Fal) -> None:
    assert fal.post(FLUX, CAT, "delay_s=0.2").elapsed.total_seconds() >= 0.2


def test_held_call_waits_for_its_name_and_no_other(fal: Fal) -> None:
    done = threading.Event()
    replies: list[requests.Response] = []

    def call() -> None:
        replies.append(Fal(fal.url).post(FLUX, CAT, "hold_until=go"))
        done.set()

    thread = threading.Thread(target=call)
    thread.start()
    assert len(fal.calls("?at_least=1&timeout_s=10")) == 1
    fal.session.post(fal.url + "/_sandbox/release", json={"name": "other"}, timeout=TIMEOUT_S)
    assert fal.post(FLUX, CAT).status_code == 200  # others go on meanwhile
    assert not done.is_set()
    assert fal.get("/_sandbox/calls").json()["waiting"] == 1
    fal.session.post(fal.url + "/_sandbox/release", json={"name": "go"}, timeout=TIMEOUT_S)
    assert done.wait(TIMEOUT_S)
    thread.join()
    assert replies[0].status_code == 200
    assert fal.post(FLUX, CAT, "hold_until=go").status_code == 200  # once released, always open


def test_ordered_weather_is_taken_in_order_by_the_calls_it_fits(fal: Fal) -> None:
    fal.order({"status": 503, "match": FLUX}, {"units": "9"}, {"status": 422, "units": 2})
    assert fal.post(KLING, {"prompt": "p"}).headers["x-fal-billable-units"] == "9"
    assert fal.post(FLUX, CAT, "status=500").status_code == 500  # its own weather: takes none of these
    assert requests.post(fal.url + FLUX, json=CAT, timeout=TIMEOUT_S).status_code == 401  # nor does a refused call
    assert [fal.post(FLUX, CAT).status_code for _ in range(3)] == [503, 422, 200]
    assert fal.get("/_sandbox/weather").json() == []


def test_unknown_weather_is_400_and_named(fal: Fal) -> None:
    reply = fal.post(FLUX, CAT, "statsu=500; delay_s=1; hail=1; body=soup; units_factor=-1; reset=1")
    assert reply.status_code == 400
    for word in ("statsu", "hail", "soup", "units_factor", "reset", *KEYS):
        assert word in reply.json()["detail"]
    for wrong in ({"hail": 1}, {"status": 99}, {"status": True}, {"units": "a\r\nb"}, [1], {"match": 5}):
        assert fal.order(wrong).status_code == 400  # type: ignore[arg-type]
    assert fal.get("/_sandbox/weather").json() == []


# --- weather that HTTP does not allow -----------------------------------------------------------------------------


def test_drop_before_headers_sends_nothing(fal: Fal) -> None:
    assert fal.raw("drop=before_headers") == (b"", False)


def test_drop_in_headers_ends_within_the_head(fal: Fal) -> None:
    received, _ = fal.raw("drop=in_headers")
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\n\r\n" not in received


@pytest.mark.parametrize("more", ["", "; chunked=1", "; encoding=gzip", "; size_bytes=1000000; encoding=gzip"])
def test_drop_in_body_sends_a_part(fal: Fal, more: str) -> None:
    received, _ = fal.raw("drop=in_body" + more)
    head, _, body = received.partition(b"\r\n\r\n")
    announced = re.search(rb"content-length: (\d+)", head)
    assert 0 < len(body)
    assert len(body) < int(announced[1]) if announced else not body.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("place", ["before_headers", "in_headers", "in_body"])
def test_drop_by_reset_resets(fal: Fal, place: str) -> None:
    assert fal.raw(f"drop={place}; reset=1")[1] is True


def test_dropped_calls_are_billed_as_undelivered(fal: Fal) -> None:
    with pytest.raises(requests.ConnectionError):
        fal.post(FLUX, CAT, "drop=before_headers")
    assert [(one["units"], one["delivered"]) for one in fal.bill()["billed"]] == [("1", False)]


def test_short_length_leaves_bytes_on_an_open_connection(fal: Fal) -> None:
    received, _ = fal.raw("length=short")
    head, _, body = received.partition(b"\r\n\r\n")
    assert int(re.search(rb"content-length: (\d+)", head)[1]) == len(body) - 7  # type: ignore[index]
    json.loads(body)


def test_long_length_ends_before_its_end(fal: Fal) -> None:
    received, _ = fal.raw("length=long")
    head, _, body = received.partition(b"\r\n\r\n")
    assert int(re.search(rb"content-length: (\d+)", head)[1]) == len(body) + 7  # type: ignore[index]
    json.loads(body)


def test_chunked_answer_comes_in_chunks_and_is_whole(fal: Fal) -> None:
    plain = fal.post(FLUX, CAT)
    chunked = fal.post(FLUX, CAT, "chunked=1; chunk_delay_s=0.001")
    assert chunked.headers["transfer-encoding"] == "chunked"
    assert "content-length" not in chunked.headers
    assert chunked.content == plain.content
    received, _ = fal.raw("chunked=1")
    assert received.count(b"\r\n") > 20


def test_slow_head_is_a_good_answer_in_single_bytes(fal: Fal) -> None:
    reply = fal.post(FLUX, CAT, "slow_head=0")
    assert reply.status_code == 200
    assert reply.json()["prompt"] == "a cat"


def test_garbage_is_no_http(fal: Fal) -> None:
    received, _ = fal.raw("garbage=1")
    assert received
    assert not received.startswith(b"HTTP/")


def test_huge_head_is_a_megabyte(fal: Fal) -> None:
    received, _ = fal.raw("huge_head=1")
    assert len(received.partition(b"\r\n\r\n")[0]) > 1_000_000
    with pytest.raises(requests.ConnectionError):
        fal.post(FLUX, CAT, "huge_head=1")


@pytest.mark.parametrize("weather", ["chunked=1", "length=short", "slow_head=0", ""])
def test_connection_serves_the_next_call_after(fal: Fal, weather: str) -> None:
    """Weather that does not end the connection leaves it usable, so that pools meet what such servers do to them."""
    body = b'{"prompt":"a cat"}'
    head = f"POST {FLUX} HTTP/1.1\r\nHost: h\r\nAuthorization: Key k\r\nContent-Length: {len(body)}\r\n"
    with fal.connect() as client:
        client.sendall(f"{head}x-fal-sandbox: {weather}\r\n\r\n".encode() + body)
        client.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)
        received = b""
        while piece := client.recv(65536):
            received += piece
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 2


# --- records ------------------------------------------------------------------------------------------------------


def test_calls_are_recorded_as_they_came(fal: Fal) -> None:
    body = b'{ "prompt" : "a \\u00fc cat" }'
    fal.post(f"{FLUX}?a=1&b=%20", data=body, headers={"X-Fal-Tags": "a=b", "Content-Type": "application/json"})
    fal.post(FLUX, data=b"\xff" * 10)
    fal.post(FLUX, data=b" " * 70_000)
    first, binary, long = fal.calls()
    assert (first["method"], first["path"], first["query"]) == ("POST", FLUX, "a=1&b=%20")
    assert ["X-Fal-Tags", "a=b"] in first["headers"]
    assert ["Authorization", "Key id:secret"] in first["headers"]
    assert (first["body"], first["body_length"]) == (body.decode(), len(body))
    assert first["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert (binary["body"], binary["body_length"]) == (None, 10)
    assert (long["body"], long["body_length"]) == (None, 70_000)
    assert [one["body_length"] for one in fal.calls("?last=1")] == [70_000]


def test_call_cut_off_in_its_body_is_recorded_and_not_billed(fal: Fal) -> None:
    with fal.connect() as client:
        client.sendall(f"POST {FLUX} HTTP/1.1\r\nHost: h\r\nAuthorization: Key k\r\nContent-Length: 99\r\n\r\n{{".encode())
    (call,) = fal.calls("?at_least=1&timeout_s=10")
    assert (call["complete"], call["body_length"]) == (False, 0)
    assert fal.bill()["billed"] == []


def test_records_can_be_cleared(fal: Fal) -> None:
    fal.post(FLUX, CAT)
    assert len(fal.calls()) == 1
    for page in ("calls", "bill"):
        fal.session.delete(f"{fal.url}/_sandbox/{page}", timeout=TIMEOUT_S)
    assert fal.calls() == []
    assert fal.bill() == {"calls": 0, "billed": [], "cost_nano_usd": 0}


def test_parallel_calls_are_all_billed_once(fal: Fal) -> None:
    def call() -> None:
        mine = Fal(fal.url)
        for _ in range(10):
            mine.post(FLUX, CAT)

    threads = [threading.Thread(target=call) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bill = fal.bill()
    assert bill["calls"] == len({one["request_id"] for one in bill["billed"]}) == 100
    assert bill["cost_nano_usd"] == 100 * 25_000_000


def test_page_names_every_weather_and_what_is_not_imitated(fal: Fal) -> None:
    page = fal.get("/_sandbox/")
    assert page.headers["content-type"].startswith("text/plain")
    assert "does not imitate" in page.text
    for key in (*KEYS, "fal-ai/flux/dev"):
        assert key in page.text


def test_control_refuses_what_it_does_not_know(fal: Fal) -> None:
    assert fal.get("/_sandbox/nothing").status_code == 404
    assert fal.session.put(fal.url + "/_sandbox/bill", timeout=TIMEOUT_S).status_code == 405
    assert fal.get("/_sandbox/calls?last=-1").status_code == 400
    assert fal.session.post(fal.url + "/_sandbox/release", data=b"{", timeout=TIMEOUT_S).status_code == 400


def test_answers_are_the_same_without_a_server() -> None:
    """The simulator is a plain WSGI application; only broken connections need its own server."""
    sandbox = create_sandbox(RULES.values(), new_id=lambda: "request-1")
    body = json.dumps(CAT).encode()

    def call(weather: str) -> tuple[str, dict[str, str], bytes]:
        told: list[Any] = []
        environ = _environ(body) | {"HTTP_X_FAL_SANDBOX": weather}
        answer = b"".join(sandbox(environ, _start(told)))
        return told[0], dict(told[1]), answer

    status, headers, answer = call("")
    assert (status, headers["x-fal-request-id"]) == ("200 OK", "request-1")
    assert json.loads(answer)["images"][0]["url"].startswith("http://fal.test:80/files/")
    assert call("garbage=1")[0].startswith("500")


def _environ(body: bytes) -> dict[str, Any]:
    import io

    return {
        "REQUEST_METHOD": "POST", "PATH_INFO": FLUX, "HTTP_AUTHORIZATION": "Key k", "SERVER_NAME": "fal.test",
        "SERVER_PORT": "80", "CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body),
    }  # fmt: skip


def _start(told: list[Any]) -> Callable[..., Any]:
    return lambda status, headers, *rest: told.extend((status, headers))


def _id(reply: requests.Response) -> str:
    return reply.headers["x-fal-request-id"]


def _object(body: bytes) -> dict[str, Any] | None:
    """The JSON object that a body is, or None."""
    try:
        value = json.loads(body.decode("latin-1"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _png(content: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height and rows of a PNG, every chunk of it checked."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: list[tuple[bytes, bytes]] = []
    at = 8
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        kind, payload = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", content, at + 8 + length)[0] == zlib.crc32(kind + payload)
        chunks.append((kind, payload))
        at += 12 + length
    assert at == len(content)
    assert [chunks[0][0], chunks[1][0], chunks[-1][0]] == [b"IHDR", b"PLTE", b"IEND"]
    width, height, depth, colour_type, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, colour_type, rest) == (8, 3, [0, 0, 0])
    assert len(chunks[1][1]) == 3 * 256
    data = zlib.decompress(b"".join(payload for kind, payload in chunks if kind == b"IDAT"))
    assert len(data) == height * (width + 1)
    rows = [data[start : start + width + 1] for start in range(0, len(data), width + 1)]
    assert all(row[0] == 0 for row in rows)
    return width, height, [row[1:] for row in rows]


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        assert 8 <= length <= len(content) - at
        yield content[at + 4 : at + 8], content[at + 8 : at + length]
        at += length


def _inside(content: bytes, *path: bytes) -> dict[bytes, bytes]:
    for kind in path:
        content = dict(_boxes(content))[kind]
    return dict(_boxes(content))
