"""The simulated platform API's billing events: fal's books as fal tells them."""

from __future__ import annotations

from typing import Any

import pytest
import requests
import simplejson

from tests.harness import Fal

FLUX = "fal-ai/flux/dev"
ADMIN = {"Authorization": "Key id:secret"}


def events(fal: Fal, headers: dict[str, str] = ADMIN, **query: str) -> requests.Response:
    return requests.get(f"{fal.url}/v1/models/billing-events", params=query, headers=headers, timeout=30)


def run(fal: Fal, weather: str = "") -> str:
    answer = requests.post(
        f"{fal.url}/{FLUX}", json={"prompt": "x"}, headers=ADMIN | {"x-fal-sandbox": weather}, timeout=30
    )
    return answer.headers["x-fal-request-id"]


def of(fal: Fal, *ids: str, **query: str) -> dict[str, Any]:
    answer = events(fal, request_id=",".join(ids), **query)
    assert answer.status_code == 200
    document: dict[str, Any] = simplejson.loads(answer.text, use_decimal=True)
    return document


def test_each_billed_call_has_a_row_and_free_ones_have_none(fal: Fal) -> None:
    billed, free = run(fal), run(fal, "status=500")
    (row,) = of(fal, billed, free)["billing_events"]
    assert (row["request_id"], row["endpoint_id"]) == (billed, FLUX)
    assert str(row["unit_price"]) == "0.025"
    assert row["cost_estimate_nano_usd"] == row["cost_total"] * 10**9 == row["output_units"] * 25_000_000


def test_pages_follow_each_other(fal: Fal) -> None:
    wanted = [run(fal) for _ in range(5)]
    seen, cursor = [], "0"
    while cursor:
        page = of(fal, *wanted, limit="2", cursor=cursor)
        assert page["has_more"] == (page["next_cursor"] is not None)
        seen += [row["request_id"] for row in page["billing_events"]]
        cursor = page["next_cursor"]
    assert seen == wanted


def test_the_end_is_exclusive_and_the_start_is_not(fal: Fal) -> None:
    first, second = run(fal), run(fal)
    times = [row["timestamp"] for row in of(fal, first, second)["billing_events"]]
    if times[0] < times[1]:
        between = of(fal, first, second, start=times[0], end=times[1])["billing_events"]
        assert [row["request_id"] for row in between] == [first]


@pytest.mark.parametrize(
    ("headers", "query", "status"),
    [
        ({}, {}, 401),
        ({"Authorization": "Key api-only:x"}, {}, 403),
        (ADMIN, {"limit": "10001"}, 400),
        (ADMIN, {"cursor": "x"}, 400),
        (ADMIN, {"start": "yesterday"}, 400),
        (ADMIN, {"start": "2026-01-01", "end": "2026-11-01"}, 400),
        (ADMIN, {"request_id": ",".join(map(str, range(51)))}, 400),
    ],
)
def test_what_fal_would_refuse_is_refused(
    fal: Fal, headers: dict[str, str], query: dict[str, str], status: int
) -> None:
    answer = events(fal, headers, **query)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
