"""Limits over several processes with one Redis: exact while it is there, bounded while it is not, exact again after."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import gevent
import pytest
import redis
import requests

from abhiapi.errors import RateLimited, TooManyConcurrent
from abhiapi.limits import CallLimits
from abhiapi.settings import Settings
from abhiapi.shared_counts import LEASE_S, places_of
from tests.harness import Fal, Server, in_time, until
from tests.limits_processes import Child, children
from tests.redis_server import RedisServer, Relay

LIMITS = {"ABHIAPI_RATE_PER_MINUTE": "30", "ABHIAPI_CONCURRENCY": "5"}
MANY_AT_ONCE = {"ABHIAPI_RATE_PER_MINUTE": "30", "ABHIAPI_CONCURRENCY": "1000"}


def total(children: list[Child], command: str, outcome: str) -> int:
    """How many calls had an outcome, of those that all processes made at the same time."""
    for child in children:
        child.say(command)
    return sum(child.hear().get(outcome, 0) for child in children)


def test_four_processes_admit_thirty_a_minute_and_five_at_once_and_not_one_more(own_redis: RedisServer) -> None:
    """Rows 54 and 55: a limit is not one per process; and row 53: who finds no place uses up no minute."""
    with children(own_redis.url(), 4, LIMITS) as four:
        assert total(four, "enter 1 20", "admitted") == 5
        assert total(four, "make 1 10", "too_many_concurrent") == 40
        assert total(four, "make 2 20", "admitted") == 30
        assert total(four, "make 2 1", "rate_limited") == 4
        assert total(four, "leave 1 5", "ended") == 5
        assert total(four, "make 1 20", "admitted") == 25  # of thirty; the refused ones before were none
        assert [child.ask("state")["alone"] for child in four] == [0] * 4


def test_a_killed_processes_places_are_free_when_its_leases_end_and_a_long_calls_are_not(
    own_redis: RedisServer,
) -> None:
    """Row 52. The leases here last 2 s; the long calls are held for longer."""
    with children(own_redis.url(), 2, LIMITS) as (killed, alive):
        assert alive.ask("enter 1 2") == {"admitted": 2}
        assert killed.ask("enter 1 5") == {"admitted": 3, "too_many_concurrent": 2}
        killed.popen.kill()
        freed = []

        def three_again() -> bool:
            freed.append(alive.ask("enter 1 1").get("admitted", 0))
            return sum(freed) == 3

        until(three_again, what="the killed process's three places are free")
        dozen = [alive.ask("enter 1 1") for _ in range(12)]
        assert dozen == [{"too_many_concurrent": 1}] * 12


def test_when_redis_dies_each_process_counts_and_when_it_is_back_all_count_together(own_redis: RedisServer) -> None:
    """Row 34: limits keep holding, and nothing is refused because Redis is away. It forgets everything meanwhile."""
    with children(own_redis.url(), 2, LIMITS) as (one, two):
        assert one.ask("enter 1 2") == {"admitted": 2}
        one.ask("make 2 3")
        own_redis.kill()
        assert one.ask("enter 1 5") == {"admitted": 3, "too_many_concurrent": 2}
        assert two.ask("enter 1 4") == {"admitted": 4}
        two.ask("leave 1 4")
        two.ask("enter 1 1")
        two.ask("make 2 5")
        assert not one.is_shared()
        assert one.ask("state")["alone"] >= 5
        own_redis.start()
        for child in (one, two):
            until(child.is_shared, what="Redis is back")
        assert two.ask("enter 1 5") == {"too_many_concurrent": 5}
        one.ask("leave 1 2")
        assert two.ask("enter 1 5") == {"admitted": 1, "too_many_concurrent": 4}
        assert one.ask("make 2 30") == {"admitted": 22, "rate_limited": 8}  # three before, and five without Redis


def test_redis_frozen_and_killed_under_load_moves_no_money_and_refuses_nobody(
    own_redis: RedisServer, fal: Fal, tmp_path: Path
) -> None:
    """Rows 32 and 34: sixty calls with credit for twelve, while Redis stands still and then dies. They take turns."""
    credit, cost = 315, 26_250
    turns = {"ABHIAPI_FAL_CONCURRENCY": "4", "ABHIAPI_FAL_QUEUE_S": "600"}
    with Server.started(tmp_path, fal.url, ABHIAPI_LIMITS_URL=own_redis.url(), **turns) as server:
        name, key = server.books.account(credit)
        _, other = server.books.account(credit)
        assert server.post(key).headers["X-RateLimit-Remaining"] == "99999"
        assert requests.get(f"{server.url}/v1/account", headers={"x-api-key": key}, timeout=30).ok
        names = own_redis.names()
        assert any(b"places" in found for found in names) or any(b"minute" in found for found in names)
        assert any(found.startswith(b"abhiapi:window:LIMITER") for found in names)  # Flask-Limiter's, of /v1
        assert b"abhiapi:{0}:turns" in names
        with ThreadPoolExecutor(8) as pool:
            first = [pool.submit(server.post, key) for _ in range(8)]
            own_redis.freeze()
            second = [pool.submit(server.post, key) for _ in range(8)]
            statuses = [call.result().status_code for call in first + second]
            own_redis.kill()
            statuses += [call.status_code for call in pool.map(lambda _: server.post(key), range(44))]
        assert sorted(statuses) == [200] * 11 + [402] * 49
        assert server.books.standing(name) == (credit * 1000 - 12 * cost, 0)
        assert server.post(other).status_code == 200
        assert requests.get(f"{server.url}/v1/account", headers={"x-api-key": key}, timeout=30).ok
        assert server.books.verify().problems == []
        assert 1 <= server.process.output().count("Redis is away") < 6  # one line for a crossing, not one for each call


def test_a_redis_that_was_emptied_is_told_again_by_each_process_at_its_next_call(own_redis: RedisServer) -> None:
    """Its connections stay (FLUSHALL by somebody else who uses it), so that nobody notices by those."""
    url = own_redis.url()
    with children(url, 2, LIMITS, lease_s="30") as two:
        assert total(two, "enter 1 20", "admitted") == 5
        assert total(two, "make 2 20", "admitted") == 30
        with redis.Redis.from_url(url) as client:
            client.flushall()
        assert total(two, "make 3 4", "admitted") == 8
        assert total(two, "enter 1 20", "admitted") == 0
        assert total(two, "make 2 20", "admitted") == 0
        assert total(two, "leave 1 5", "ended") == 5
        assert total(two, "make 1 20", "admitted") == 25
        assert [child.ask("state")["alone"] for child in two] == [0] * 2


def test_a_redis_whose_clock_was_ahead_refuses_nobody_for_longer_than_a_minute(redis_server: RedisServer) -> None:
    """What it has counted lies in the future then: it is taken for just now, not for what it will be in an hour."""
    hour = 3_600_000_000
    url = redis_server.url()
    with closing(CallLimits(Settings.from_env({"ABHIAPI_LIMITS_URL": url} | LIMITS), timeout_s=5)) as limits:
        for _ in range(30):
            limits.enter(1, "free").release()
        dead = [limits.enter(2, "free") for _ in range(5)]
        with redis.Redis.from_url(url) as client:
            for name in ("abhiapi:{1}:minute", places_of(2)):
                told = client.zrange(name, 0, -1, withscores=True)
                client.zadd(name, {member: score + hour for member, score in told})
            with pytest.raises(RateLimited) as refused:
                limits.enter(1, "free")
            assert refused.value.retry_after_s is not None
            assert 50 < refused.value.retry_after_s <= 61
            with pytest.raises(TooManyConcurrent):
                limits.enter(2, "free")
            ends = [score for _, score in client.zrange(places_of(2), 0, -1, withscores=True)]
            assert len(ends) == len(dead)
            assert max(ends) <= (client.time()[0] + 1 + LEASE_S) * 1_000_000


def test_who_is_far_beyond_a_limit_is_told_when_a_call_is_free_again(redis_server: RedisServer) -> None:
    """As after a time without Redis, or on a smaller plan: it is not when the oldest call leaves the minute."""
    url = redis_server.url()
    with closing(CallLimits(Settings.from_env({"ABHIAPI_LIMITS_URL": url} | LIMITS), timeout_s=5)) as limits:
        for _ in range(40):
            limits.enter(1, "pro").release()
        minute = "abhiapi:{1}:minute"
        with redis.Redis.from_url(url) as client:
            for member, score in client.zrange(minute, 0, 9, withscores=True):
                client.zadd(minute, {member: score - 50_000_000})
        with pytest.raises(RateLimited) as refused:
            limits.enter(1, "free")
        assert refused.value.retry_after_s is not None
        assert 30 < refused.value.retry_after_s <= 61


@pytest.fixture
def through(relay: Relay, redis_server: RedisServer) -> Iterator[CallLimits]:
    """Limits of this process whose Redis is at the other end of a wire that can be held up."""
    url = redis_server.url().replace(str(redis_server.port), str(relay.port))
    limits = CallLimits(Settings.from_env({"ABHIAPI_LIMITS_URL": url} | MANY_AT_ONCE))
    in_time(limits.is_shared, what="limits are counted in Redis")
    yield limits
    limits.close()


def admitted(limits: CallLimits, key_id: int, calls: int) -> int:
    """How many of so many calls at once are admitted, each ended at once."""

    def call() -> int:
        try:
            limits.enter(key_id, "free").release()
        except RateLimited:
            return 0
        return 1

    return sum(greenlet.get() for greenlet in gevent.joinall([gevent.spawn(call) for _ in range(calls)]))


def test_a_redis_that_never_answers_holds_nobody_up(through: CallLimits, relay: Relay) -> None:
    """Row 36: the wire is held until every call has been decided, so none can have waited for Redis."""
    assert admitted(through, 1, 10) == 10
    relay.hold()
    assert admitted(through, 1, 200) == 20
    assert not through.is_shared()
    assert through.in_flight() == 0
    assert relay.open_most <= 4  # no pile of connections either: the first, and those of the one that tries again
    relay.release()
    in_time(through.is_shared, what="limits are counted in Redis")
    assert admitted(through, 1, 5) == 0
    assert admitted(through, 2, 40) == 30


def test_a_redis_that_takes_no_writes_is_no_redis(own_redis: RedisServer) -> None:
    """It answers, with an error, as one without its replicas or without room does: calls are decided without it."""
    limits = CallLimits(Settings.from_env({"ABHIAPI_LIMITS_URL": own_redis.url()} | MANY_AT_ONCE))
    try:
        assert admitted(limits, 1, 5) == 5
        own_redis.set("min-replicas-to-write", "1")
        assert admitted(limits, 1, 40) == 25
        assert not limits.is_shared()
        own_redis.set("min-replicas-to-write", "0")
        in_time(limits.is_shared, what="limits are counted in Redis")
        assert admitted(limits, 1, 5) == 0
    finally:
        limits.close()


def test_a_redis_that_is_not_there_at_the_start_is_waited_for_without_a_call_refused(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    limits = CallLimits(Settings.from_env({"ABHIAPI_LIMITS_URL": server.url()} | LIMITS))
    try:
        held = [limits.enter(1, "free") for _ in range(5)]
        with pytest.raises(TooManyConcurrent):
            limits.enter(1, "free")
        server.start()
        in_time(limits.is_shared, what="limits are counted in Redis")
        with pytest.raises(TooManyConcurrent):
            limits.enter(1, "free")
        held.pop().release()
        limits.enter(1, "free").release()
        assert limits.headers(1, "free")[1] == ("X-RateLimit-Remaining", "24")
    finally:
        limits.close()
        server.kill()


def test_uploads_are_counted_by_all_processes_together(redis_server: RedisServer) -> None:
    url = redis_server.url()
    pair = [CallLimits(Settings.from_env({"ABHIAPI_LIMITS_URL": url}), timeout_s=5) for _ in range(2)]
    try:
        for number in range(300):
            pair[number % 2].allow_upload(1)
        for limits in pair:
            with pytest.raises(RateLimited):
                limits.allow_upload(1)
    finally:
        for limits in pair:
            limits.close()
