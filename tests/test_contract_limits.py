"""Limits (contract 2 and 3.4): 30 calls in any minute and 5 at once, exactly, for each key by itself."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import requests

from abhiapi import accounts, keys
from abhiapi.accounts import find
from abhiapi.db import Tx
from abhiapi.errors import RateLimited, TooManyConcurrent
from abhiapi.limits import CallLimits
from abhiapi.settings import Settings
from tests import raw_http
from tests.harness import OPERATOR_KEY, Fal, Server, until
from tests.redis_server import RedisServer

pytestmark = pytest.mark.engines

_names = count(1)
FREE, PRO = (30, 5), (300, 40)


@pytest.fixture(scope="module", params=["memory", "redis"])
def server(
    fal: Fal, tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, request: pytest.FixtureRequest
) -> Iterator[Server]:
    """A server with the limits that the reference page promises, counted in its memory and counted in Redis."""
    settings = {"ABHIAPI_RATE_PER_MINUTE": "", "ABHIAPI_CONCURRENCY": "", "ABHIAPI_UPSTREAM_TIMEOUT_S": "55"}
    settings["ABHIAPI_LIMITS_URL"] = redis_server.url() if request.param == "redis" else "memory://"
    with Server.started(tmp_path_factory.mktemp("limits"), fal.url, **settings) as running:
        yield running


@contextmanager
def running_calls(server: Server, fal: Fal, key: str, number: int) -> Iterator[list[Future[requests.Response]]]:
    """So many calls that fal is working on; they end with the block."""
    name = f"limits-{next(_names)}"
    with ThreadPoolExecutor(number) as pool:
        calls = [pool.submit(server.post, key, weather=f"hold_until={name}") for _ in range(number)]
        try:
            until(lambda: len(fal.calls(f"hold_until={name}", last=200)) == number, what=f"{number} calls are at fal")
            yield calls
        finally:
            fal.release(name)


def assert_refused(response: requests.Response, error_type: str, limit: int) -> None:
    body = response.json()
    assert (response.status_code, body["error"]["type"], body["error"]["code"]) == (429, error_type, 429)
    assert body["error"]["message"] == body["detail"] == body["message"]
    assert 1 <= int(response.headers["Retry-After"]) <= 61
    assert response.headers["X-RateLimit-Limit"] == str(limit)
    assert "nginx" not in response.text
    assert response.headers["x-abhiapi-call-id"].startswith("call_")


def remaining(response: requests.Response) -> int:
    return int(response.headers["X-RateLimit-Remaining"])


# --- in any minute ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plan", "limit"), [("free", FREE[0]), ("pro", PRO[0])])
def test_so_many_calls_in_a_minute_and_not_one_more(server: Server, fal: Fal, plan: str, limit: int) -> None:
    name, key = server.books.account(20_000, plan=plan)
    body = {"prompt": f"the minute of {name}"}
    left = []
    for _ in range(limit):
        response = server.post(key, body=body)
        assert response.status_code == 200
        left.append(remaining(response))
    assert left == list(range(limit - 1, -1, -1))
    for _ in range(3):
        refused = server.post(key, body=body)
        assert_refused(refused, "rate_limited", limit)
        assert remaining(refused) == 0
    assert len(fal.calls(f"the minute of {name}")) == limit
    assert len(server.books.calls(name)) == limit
    assert server.books.standing(name)[1] == 0


def test_thirty_of_sixty_in_parallel_and_not_one_more(server: Server, fal: Fal) -> None:
    """Sixty calls over as many connections, five at a time: none slips through."""
    name, key = server.books.account(20_000)
    body = {"prompt": f"the crowd of {name}"}
    with ThreadPoolExecutor(5) as pool:
        statuses = list(pool.map(lambda _: server.post(key, body=body).status_code, range(60)))
    assert sorted(statuses) == [200] * 30 + [429] * 30
    assert len(fal.calls(f"the crowd of {name}")) == 30


def test_refused_calls_count_as_well(server: Server) -> None:
    """Those with 400, 402 and 404 use up the minute, so that nobody probes for nothing."""
    _, key = server.books.account(1)
    refusals: list[tuple[dict[str, Any], int]] = [
        ({"body": {"prompt": "x"}}, 402),
        ({"path": "/fal-ai/nothing"}, 404),
        ({"path": "/fal-ai/flux%2fdev"}, 400),
        ({"headers": {"x-fal-target-url": "https://fal.run.evil/x"}}, 400),
        ({"data": b"{"}, 400),
    ]
    for number in range(30):
        options, code = refusals[number % len(refusals)]
        response = post_raw(server, key, options["data"]) if "data" in options else server.post(key, **options)
        assert (response.status_code, remaining(response)) == (code, 29 - number)
    assert_refused(server.post(key), "rate_limited", 30)


def post_raw(server: Server, key: str, data: bytes) -> requests.Response:
    headers = {"x-api-key": key, "Content-Type": "application/json"}
    return requests.post(f"{server.url}/fal-ai/flux/dev", data=data, headers=headers, timeout=30)


def test_own_routes_do_not_use_up_the_minute(server: Server) -> None:
    _, key = server.books.account()
    for path in ("/v1/account", "/v1/calls", "/v1/prices", "/healthz") * 10:
        assert requests.get(server.url + path, headers={"x-api-key": key}, timeout=30).status_code == 200
    assert remaining(server.post(key)) == 29


def test_a_wrong_key_uses_up_nobodys_minute(server: Server) -> None:
    _, key = server.books.account()
    for _ in range(40):
        response = server.post(key[:-1] + ("A" if key[-1] != "A" else "B"))
        assert response.status_code == 401
        assert "X-RateLimit-Limit" not in response.headers
    assert remaining(server.post(key)) == 29


# --- at once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plan", "limit"), [("free", FREE), ("pro", PRO)])
def test_so_many_calls_at_once_and_not_one_more(server: Server, fal: Fal, plan: str, limit: tuple[int, int]) -> None:
    """A refusal for concurrency never reaches fal and does not use up the minute."""
    name, key = server.books.account(20_000, plan=plan)
    per_minute, at_once = limit
    with running_calls(server, fal, key, at_once) as calls:
        for _ in range(per_minute + 5):
            refused = server.post(key, body={"prompt": f"one too many for {name}"})
            assert_refused(refused, "too_many_concurrent", per_minute)
            assert remaining(refused) == per_minute - at_once
        assert server.books.standing(name)[1] == at_once * 26_250
    assert [call.result().status_code for call in calls] == [200] * at_once
    assert fal.calls(f"one too many for {name}") == []
    assert remaining(server.post(key)) == per_minute - at_once - 1


def test_keys_do_not_disturb_one_another(server: Server, fal: Fal) -> None:
    """Not even two of one account."""
    name, key = server.books.account(20_000)

    def second(tx: Tx) -> str:
        account = find(tx, name)
        assert account is not None
        return keys.create(tx, account.account_id, name=None, expires_at=None, now_ms=server.books.clock())[0]

    other = server.books.write(second)
    with running_calls(server, fal, key, 5):
        assert_refused(server.post(key), "too_many_concurrent", 30)
        response = server.post(other)
        assert (response.status_code, remaining(response)) == (200, 29)
        with running_calls(server, fal, other, 5):
            assert_refused(server.post(other), "too_many_concurrent", 30)


def test_a_place_is_free_again_when_its_call_is_over(server: Server, fal: Fal) -> None:
    _, key = server.books.account(20_000)
    for _ in range(4):
        with running_calls(server, fal, key, 5):
            assert server.post(key).status_code == 429
    assert server.post(key).status_code == 200


FAILURES = (
    *(f"status={status}" for status in (301, 400, 401, 402, 403, 404, 405, 409, 422, 429, 499, 500, 502, 503, 504)),
    *(f"drop={drop}{reset}" for drop in ("before_headers", "in_headers", "in_body") for reset in ("", "; reset=1")),
    "length=long", "length=short", "garbage=1", "huge_head=1", "status=503; body=html", "units=none", "units=NaN",
    "drop=in_body; size_bytes=300000", "length=long; size_bytes=300000", "body=empty", "units=" + "9" * 40,
    "status=204", "unknown-weather=1",
)  # fmt: skip


def test_no_failure_keeps_a_place(server: Server, fal: Fal) -> None:
    """After every way a call can fail, as many at once are admitted as ever."""
    _, key = server.books.account(20_000, plan="pro")
    paths = ("/fal-ai/nothing", "/fal-ai/../x", "/fal-ai/creative-upscaler")
    for weather in FAILURES:
        try:
            server.post(key, weather=weather, allow_redirects=False)
        except requests.RequestException:
            pass  # the answer broke off, as it was told to
    for path in paths:
        server.post(key, path, weather="units=none")
    for body in (b"{", b"[]", b'{"prompt":NaN}'):
        assert post_raw(server, key, body).status_code == 400
    whole = raw_http.request_bytes(key, x_fal_sandbox="size_bytes=300000")
    for part in (whole[:40], whole[:-5], whole):
        with raw_http.connect(server.url) as sock:
            sock.sendall(part)
    until(lambda: "abhiapi_in_flight 0" in metrics(server), what="nothing is running")
    with running_calls(server, fal, key, PRO[1]):
        assert_refused(server.post(key), "too_many_concurrent", PRO[0])


def test_limits_are_counted_in_the_storage_of_the_settings(server: Server) -> None:
    """Else the tests above had tried another one."""
    is_redis = server.env["ABHIAPI_LIMITS_URL"].startswith("redis")
    until(lambda: f"\nabhiapi_limits_shared {int(is_redis)}" in metrics(server), what="it is in use")


def metrics(server: Server) -> str:
    return requests.get(f"{server.url}/metrics", timeout=30).text


# --- by the clock -----------------------------------------------------------------------------------------------


@pytest.fixture
def ticking() -> list[int]:
    """The time of the limits, in seconds; tests move it."""
    return [1_795_000_000]


def limits(now: list[int], tmp_path: Path) -> CallLimits:
    env = {"FAL_KEY": OPERATOR_KEY, "ABHIAPI_DATABASE_URL": f"sqlite:///{tmp_path / 'x.db'}"}
    return CallLimits(Settings.from_env(env), now=lambda: now[0])


def test_a_minute_is_any_sixty_seconds(ticking: list[int], tmp_path: Path) -> None:
    """A moving window, not a clock's minute: never more than 30 in any 60 seconds, and each comes back by itself."""
    window = limits(ticking, tmp_path)
    entered = []
    for second in range(300):
        ticking[0] += 1
        for _ in range(2):
            try:
                window.enter(1, "free").release()
            except RateLimited:
                pass
            else:
                entered.append(second)
    for start in range(300):
        assert sum(start <= second < start + 60 for second in entered) <= 30
    assert len(entered) == 30 * 5


def test_retry_after_is_long_enough(ticking: list[int], tmp_path: Path) -> None:
    window = limits(ticking, tmp_path)
    for _ in range(30):
        window.enter(1, "free").release()
        ticking[0] += 1
    with pytest.raises(RateLimited) as refused:
        window.enter(1, "free")
    ticking[0] += refused.value.retry_after_s or 0
    window.enter(1, "free").release()


def test_a_place_that_was_lost_comes_back_by_its_deadline(ticking: list[int], tmp_path: Path) -> None:
    window = limits(ticking, tmp_path)
    lost = [window.enter(1, "free") for _ in range(5)]
    with pytest.raises(TooManyConcurrent):
        window.enter(1, "free")
    ticking[0] = int(lost[0].deadline) + 1
    again = window.enter(1, "free")
    assert window.in_flight() == 1
    for lease in lost:
        lease.release()
    assert window.in_flight() == 1
    again.release()
    again.release()
    assert window.in_flight() == 0


def test_a_key_that_changes_its_plan_has_the_new_limits_at_once(server: Server) -> None:
    name, key = server.books.account(20_000)
    for _ in range(30):
        server.post(key)
    assert server.post(key).status_code == 429

    def upgrade(tx: Tx) -> None:
        account = find(tx, name)
        assert account is not None
        accounts.set_plan(tx, account.account_id, "pro")

    server.books.write(upgrade)
    response = server.post(key)
    assert (response.status_code, response.headers["X-RateLimit-Limit"]) == (200, "300")
