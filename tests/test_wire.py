"""What may cross between a customer and fal, as tables: paths, queries, headers, statuses, and our own words."""

from __future__ import annotations

import json
from decimal import Decimal
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abhiapi import errors, wire

SECRET = "operator-id:secret"

GOOD_PATHS = (
    "/fal-ai/flux/dev",
    "/fal-ai/flux/dev/",
    "/bytedance/seedance-2.0/fast/text-to-video",
    "/workflows/owner/name_1~x",
    "/fal-ai/caf%C3%A9",
    "/fal-ai/...",
    "/fal-ai/.hidden",
    "/fal-ai/a;b=c,d",
    "/fal-ai/a:b!$&'()*+",
)
BAD_PATHS = (
    "",
    "fal-ai/flux/dev",
    "http://evil.example/fal-ai/flux/dev",
    "//evil.example/fal-ai/flux/dev",
    "/fal-ai//flux/dev",
    "/fal-ai/flux/dev//",
    "/fal-ai/../tokens",
    "/..",
    "/fal-ai/./flux",
    "/fal-ai/flux/..",
    "/fal-ai/%2e%2e/tokens",
    "/fal-ai/%2E./tokens",
    "/fal-ai/.%2e/tokens",
    "/fal-ai/%2e/flux",
    "/fal-ai/%252e%252e/tokens",
    "/fal-ai/%25252e%25252e/tokens",
    "/fal-ai%2fflux/dev",
    "/fal-ai%2Fflux/dev",
    "/fal-ai%252fflux/dev",
    "/fal-ai%5cflux/dev",
    "/fal-ai%255Cflux/dev",
    "/fal-ai\\flux/dev",
    "/@evil.example/fal-ai",
    "/fal-ai@evil.example/flux",
    "/%40evil.example/fal-ai",
    "/fal-ai/flux%00",
    "/fal-ai/flux%0d%0aX-Evil:1",
    "/fal-ai/flux%09",
    "/fal-ai/flux%7f",
    "/fal-ai/flux\n",
    "/fal-ai/flux\x00",
    "/fal-ai/flux dev",
    "/fal-ai/flux%20dev",
    "/fal-ai/flux?x=1",
    "/fal-ai/flux%3fx=1",
    "/fal-ai/flux#top",
    "/fal-ai/flux%23top",
    "/fal-ai/caf\xe9",
    "/fal-ai/%" + "25" * 5 + "41",
)


@pytest.mark.parametrize("path", GOOD_PATHS)
def test_ordinary_paths_are_let_through(path: str) -> None:
    wire.check_path(path)


@pytest.mark.parametrize("path", BAD_PATHS)
def test_paths_that_could_mean_another_place_are_forbidden(path: str) -> None:
    with pytest.raises(errors.ForbiddenPath):
        wire.check_path(path)


@given(st.lists(st.sampled_from(["a", "/", ".", "%2e", "%2F", "%25", "25", "2f", "2e", "%5c", "@", "%40", "%00"])))
def test_however_often_an_allowed_path_is_decoded_it_stays_in_its_place(parts: list[str]) -> None:
    """fal may decode a path once or several times: none of the readings may leave the folder or the host."""
    path = "/" + "".join(parts)
    try:
        wire.check_path(path)
    except errors.ForbiddenPath:
        return
    reading = path
    for _ in range(8):
        assert not {".", ".."} & set(reading.split("/"))
        assert not any(sign in reading for sign in ("//", "\\", "@", "\x00"))
        assert reading.count("/") == path.count("/")
        reading = unquote_to_bytes(reading).decode("latin-1")


@pytest.mark.parametrize(
    ("path", "model", "streamed"),
    [
        ("/fal-ai/flux/dev", "fal-ai/flux/dev", False),
        ("/fal-ai/flux/dev/", "fal-ai/flux/dev", False),
        ("/fal-ai/flux/dev/stream", "fal-ai/flux/dev", True),
        ("/fal-ai/flux/dev/stream/", "fal-ai/flux/dev", True),
        ("/fal-ai/stream/dev", "fal-ai/stream/dev", False),
        ("/fal-ai/upstream", "fal-ai/upstream", False),
        (f"/fal-ai/{'x' * 5000}/stream", f"fal-ai/{'x' * 5000}", True),
    ],
)
def test_a_models_price_covers_its_stream(path: str, model: str, streamed: bool) -> None:
    assert wire.endpoint_of(path) == (model, streamed)


def test_only_short_paths_are_remembered() -> None:
    """What anybody may send must not pile up here."""
    wire._known_endpoint.cache_clear()
    for path in ("/fal-ai/flux/dev", "/" + "x" * 5000):
        wire.endpoint_of(path)
    assert wire._known_endpoint.cache_info().currsize == 1


@pytest.mark.parametrize("path", ["/", "", "/fal-ai/../tokens", "/fal-ai/flux/dev%2f"])
def test_a_forbidden_path_names_no_model(path: str) -> None:
    with pytest.raises(errors.ForbiddenPath):
        wire.endpoint_of(path)


@pytest.mark.parametrize(
    ("query", "forwarded"),
    [
        ("", ""),
        ("a=1&b=%20+&&c", "a=1&b=%20+&&c"),
        ("logs=true&logs=1&x=%e4%BD", "logs=true&logs=1&x=%e4%BD"),
        ("fal_jwt_token=abc", ""),
        ("a=1&fal_jwt_token=abc&b=2", "a=1&b=2"),
        ("a=1&FAL_JWT_TOKEN=abc", "a=1"),
        ("fal%5Fjwt_token=abc&b=2", "b=2"),
        ("%66al_jwt%5ftoken=abc&b=2", "b=2"),
        ("fal_jwt_token", ""),
        ("note=fal_jwt_token", "note=fal_jwt_token"),
    ],
)
def test_a_query_goes_on_as_it_is_less_the_token_of_another_account(query: str, forwarded: str) -> None:
    assert wire.forwarded_query(query) == forwarded


@pytest.mark.parametrize("query", ["a=\r\nx-evil:1", "a=\n", "a b", "a=\x00", "a=\t", "a=\x7f", "a=\xe9"])
def test_a_query_cannot_carry_another_request(query: str) -> None:
    with pytest.raises(errors.ForbiddenPath):
        wire.forwarded_query(query)


FORWARDED = ("content-type", "accept", "user-agent", "x-fal-request-timeout", "x-fal-queue-priority",
             "x-app-fal-disable-fallback", "x-fal-anything-new")  # fmt: skip
NOT_FORWARDED = ("x-api-key", "authorization", "cookie", "host", "content-length", "transfer-encoding", "connection",
                 "forwarded", "x-forwarded-for", "x-real-ip", "accept-encoding", "referer", "origin", "idempotency-key",
                 "x-fal-target-url", "x-fal-store-io", "x-fal-object-lifecycle-preference", "x-fal-object-lifecycle",
                 "x-fal-tags", "x-fal-no-retry", "x-fal-retry-config", "x-fal-runner-hint", "x-fal-cdn-token",
                 "x-fal-user-id", "x-abhiapi-anything", "proxy-authorization", "te", "upgrade")  # fmt: skip


def test_only_the_listed_headers_go_to_fal() -> None:
    sent = [(name, f"value of {name}") for name in FORWARDED + NOT_FORWARDED]
    assert wire.request_headers(sent) == [
        *((name, f"value of {name}") for name in FORWARDED),
        ("accept-encoding", "identity"),
    ]


def test_fals_headers_come_back_in_order_and_spelling_less_those_of_the_connection() -> None:
    kept = [
        ("Content-Type", "application/json"),
        ("Set-Cookie", "a=1"),
        ("Set-Cookie", "b=2"),
        ("x-fal-request-id", "019da0f9"),
        ("X-Fal-Billable-Units", "1"),
        ("Location", "https://fal.run/elsewhere"),
        ("etag", '"abc"'),
    ]
    dropped = [
        ("Connection", "close, X-Named"),
        ("X-Named", "by the connection header"),
        ("Keep-Alive", "timeout=5"),
        ("Transfer-Encoding", "chunked"),
        ("Content-Length", "10"),
        ("TE", "trailers"),
        ("Trailer", "x"),
        ("Upgrade", "h2c"),
        ("Proxy-Authenticate", "Basic"),
        ("Date", "now"),
        ("Server", "uvicorn"),
        ("x-abhiapi-balance-remaining", "forged"),
        ("X-RateLimit-Remaining", "forged"),
        ("x-echo", f"Key {SECRET} was used"),
    ]
    assert wire.response_headers(dropped + kept, secret=SECRET) == kept
    shown = wire.response_headers(kept, secret=SECRET, without=wire.DIGESTS)
    assert [name for name, _ in shown] == [name for name, _ in kept[:-1]]


def test_a_word_is_not_taken_for_a_credential() -> None:
    """`FAL_KEY=any` is what people try a simulator with, and many an answer has it."""
    headers = [("x-note", "many"), ("x-key", SECRET)]
    assert wire.response_headers(headers, secret=wire.worth_hiding("any")) == headers
    assert wire.response_headers(headers, secret=wire.worth_hiding(None)) == headers
    assert wire.response_headers(headers, secret=wire.worth_hiding(SECRET)) == headers[:1]


@pytest.mark.parametrize(
    ("status", "in_table"),
    [(200, 200), (204, 204), (301, 301), (307, 307), (400, 400), (404, 404), (405, 405), (408, 408), (409, 409),
     (422, 400), (429, 429), (499, 499), (500, 502), (502, 502), (503, 502), (504, 504), (599, 502)],
)  # fmt: skip
def test_statuses_of_both_dialects(status: int, in_table: int) -> None:
    assert wire.status_for("table", status) == in_table
    assert wire.status_for("fal", status) == status


def test_what_may_have_cost_money_is_never_repeated_by_fals_clients() -> None:
    """They repeat 502, 503 and 504 by themselves (fal-protocol 1.4, 1.5)."""
    for error in (errors.UpstreamBroken("cut"), errors.UpstreamTimeout("late")):
        shown = wire.error_for("fal", error)
        assert (shown.status, shown.type) == (500, "upstream_outcome_unknown")
        assert error.message in shown.message
        assert wire.error_for("table", error) is error
    for error in (errors.UpstreamUnreachable("no"), errors.UpstreamRefused("no"), errors.InvalidKey("no")):
        assert wire.error_for("fal", error) is error


def test_an_error_says_the_same_to_every_kind_of_client() -> None:
    error = errors.InsufficientCredits('needs 12 and "10" are available')
    body = json.loads(wire.error_body(error))
    assert body == {
        "error": {
            "code": 402,
            "name": "Payment Required",
            "type": "insufficient_credits",
            "message": error.message,
        },
        "detail": error.message,
        "message": error.message,
    }
    member = wire.billing_member("fal-ai/x", 0, 5_000_000)
    billed = json.loads(wire.error_body(error, status=599, billing=member))
    assert billed["error"]["code"] == 599
    assert billed["_billing"] == {"model": "fal-ai/x", "credits_used": 0, "cost_usd": 0, "balance_remaining": 5000}


def test_the_billing_member_reads_as_the_reference_shows_it() -> None:
    assert wire.billing_member("fal-ai/flux/dev", 12_000, 4_988_000) == (
        b'"_billing": {"model": "fal-ai/flux/dev", "credits_used": 12, "cost_usd": 0.012, "balance_remaining": 4988}'
    )


@given(st.text(), st.integers(0, 10**15), st.integers(-(10**15), 10**15))
def test_the_billing_member_is_exact_json(model: str, charge_micros: int, balance_micros: int) -> None:
    member = wire.billing_member(model, charge_micros, balance_micros)
    shown = json.loads(b"{" + member + b"}", parse_float=Decimal)["_billing"]
    assert shown["model"] == model
    assert shown["credits_used"] * 1000 == charge_micros
    assert shown["cost_usd"] * 1_000_000 == charge_micros
    assert shown["balance_remaining"] * 1000 == balance_micros


@given(st.text(), st.integers(0, 10**15), st.integers(-(10**15), 10**15))
def test_the_closing_comment_is_one_line_that_no_client_takes_for_an_event(model: str, charge: int, left: int) -> None:
    comment = wire.billing_comment(wire.billing_member(model, charge, left))
    assert comment.startswith(b": _billing {")
    assert comment.endswith(b"}\n")
    assert comment.count(b"\n") == 1
    assert b"\r" not in comment


@pytest.mark.parametrize(
    ("headers", "key", "dialect"),
    [
        ({}, None, "table"),
        ({"x-api-key": "a"}, "a", "table"),
        ({"x-api-key": " a "}, "a", "table"),
        ({"authorization": "Key a"}, "a", "fal"),
        ({"authorization": "key  a"}, "a", "fal"),
        ({"authorization": "Bearer a"}, "a", "table"),
        ({"authorization": "BEARER a"}, "a", "table"),
        ({"authorization": "Basic YTpi"}, None, "table"),
        ({"authorization": "Key"}, None, "table"),
        ({"authorization": "a"}, None, "table"),
        ({"x-api-key": "a", "authorization": "Key b"}, "a", "table"),
        ({"x-api-key": "", "authorization": "Key b"}, "b", "fal"),
    ],
)
def test_where_a_key_is_looked_for(headers: dict[str, str], key: str | None, dialect: str) -> None:
    assert wire.caller_key(headers) == (key, dialect)


@pytest.mark.parametrize(
    ("content_type", "is_json", "is_stream"),
    [
        (None, False, False),
        ("", False, False),
        ("application/json", True, False),
        ("Application/JSON; charset=utf-8", True, False),
        ("application/problem+json", True, False),
        ("application/jsonl", False, False),
        ("text/event-stream", False, True),
        ("text/event-stream; charset=utf-8", False, True),
        ("text/plain", False, False),
        ("audio/mpeg", False, False),
    ],
)
def test_content_types(content_type: str | None, is_json: bool, is_stream: bool) -> None:
    assert wire.is_json_type(content_type) is is_json
    assert wire.is_event_stream(content_type) is is_stream


@pytest.mark.parametrize(
    "query", ["fal_webhook=https://x.example", "a=1&Fal_Webhook=x", "a=1&fal%5fwebhook=x", "+fal_webhook=x"]
)
def test_a_sync_call_asks_fal_for_no_webhook(query: str) -> None:
    """It would lead fal's answer past this service (row 46)."""
    kept = wire.forwarded_query(query, without_webhook=True)
    assert "webhook" not in kept.lower()
    assert wire.forwarded_query(query) == query
