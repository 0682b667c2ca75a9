"""Turns at fal over several processes with one Redis: whose it is does not depend on where a call came in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import redis

from abhiapi.fairness import NOBODY
from abhiapi.shared_counts import SharedCounts, places_of
from abhiapi.shared_turns import EVERYBODY, LAST_TURNS, WAITING, SharedTurns
from tests.harness import in_time, until
from tests.limits_processes import Child, children
from tests.redis_server import RedisServer, Relay

BURSTING, OTHER, THIRD = 1, 2, 3
FOUR = {"ABHIAPI_FAL_CONCURRENCY": "4", "ABHIAPI_FAL_QUEUE_S": "600"}


# --- the decision in Redis --------------------------------------------------------------------------------------


class Process:
    """What one process asks of Redis, and the places that it has been given."""

    def __init__(self, url: str, waits_s: float, timeout_s: float) -> None:
        self.counts = SharedCounts(url, tuple, timeout_s=timeout_s)
        self.turns = SharedTurns(self.counts, waits_s=waits_s)
        self.held: list[str] = []

    def next(self, waiting: dict[int, float], *, most: int = 1, calls: int = 9) -> int | None:
        """The account whose turn it is, of calls that have waited for so many seconds."""
        place = self.turns.new_place()
        account_id = self.turns.next(place, most, list(waiting.items()), calls=calls)
        if account_id:
            self.held.append(self.turns.member(place, account_id))
        return account_id

    def end(self) -> None:
        """The oldest of its calls, before anything else is asked of Redis."""
        at_fal = self.turns.at_fal()
        self.turns.give_back(self.held.pop(0))
        assert at_fal is not None
        assert self.turns.at_fal() == at_fal - 1


Start = Callable[..., Process]


@pytest.fixture
def url(redis_server: RedisServer) -> str:
    return redis_server.url()


@pytest.fixture
def through(url: str, redis_server: RedisServer, relay: Relay) -> str:
    """The same Redis, at the other end of a wire that can be held up."""
    return url.replace(str(redis_server.port), str(relay.port))


@pytest.fixture
def start(url: str) -> Iterator[Start]:
    """Starts processes that share a Redis, and remember each other's waiters for long."""
    with ExitStack() as stack:

        def started(at: str = url, *, waits_s: float = 60, timeout_s: float = 5) -> Process:
            process = Process(at, waits_s, timeout_s)
            stack.callback(process.counts.close)
            return process

        yield started


def test_the_account_with_the_fewest_places_is_next_wherever_it_waits(start: Start) -> None:
    one, two = start(), start()
    assert [one.next({BURSTING: 90}, most=3) for _ in range(4)] == [BURSTING, BURSTING, BURSTING, NOBODY]
    assert two.next({OTHER: 1}, most=3) == NOBODY
    one.end()
    assert one.next({BURSTING: 90}, most=3) == NOBODY
    assert two.next({OTHER: 1}, most=3, calls=1) == OTHER
    two.end()
    assert one.next({BURSTING: 90}, most=3) == BURSTING  # nobody else waits any more


def test_accounts_take_turns_over_all_processes(start: Start) -> None:
    """Among equals the one whose last turn is longest ago, however long its calls have waited."""
    pair = {BURSTING: start(), OTHER: start()}
    plug = start()
    plug.next({THIRD: 0}, calls=1)
    waiting = {BURSTING: {BURSTING: 500.0}, OTHER: {OTHER: 50.0, THIRD: 5.0}}
    assert [process.next(waiting[name]) for name, process in pair.items()] == [NOBODY, NOBODY]
    plug.end()
    served = []
    for _ in range(6):
        given = [account for name, process in pair.items() if (account := process.next(waiting[name]))]
        served += given
        pair[BURSTING if given == [BURSTING] else OTHER].end()
    assert served == [BURSTING, OTHER, THIRD] * 2


def test_of_one_accounts_calls_the_oldest_is_first_and_a_tie_moves_no_place(start: Start, url: str) -> None:
    one, two = start(), start()
    assert one.next({BURSTING: 10}) == BURSTING
    assert two.next({BURSTING: 20}) == NOBODY
    one.end()
    assert one.next({BURSTING: 10}) == NOBODY
    assert two.next({BURSTING: 20}) == BURSTING
    with redis.Redis.from_url(url) as client:
        arrived_mid_second = 10 + client.time()[1] / 1e6 + 0.5
    assert one.next({BURSTING: arrived_mid_second}) == NOBODY
    two.end()
    assert two.next({BURSTING: arrived_mid_second}) == BURSTING
    two.end()
    assert one.next({BURSTING: arrived_mid_second}) == BURSTING


def test_places_of_an_older_version_count_and_are_no_accounts(start: Start, url: str) -> None:
    """Its members do not say whose they are."""
    process = start()
    with redis.Redis.from_url(url) as client:
        client.zadd(places_of(EVERYBODY), {"0123456789abcdef-fal-7": 9e15, "0123456789abcdef-fal-8": 1})
        assert process.next({BURSTING: 1, OTHER: 0}, most=2) == BURSTING
        assert process.next({BURSTING: 1, OTHER: 0}, most=2) == NOBODY
        client.zrem(places_of(EVERYBODY), "0123456789abcdef-fal-7")
        assert process.next({BURSTING: 1, OTHER: 0}, most=2) == OTHER


def test_what_fal_has_taught_one_process_counts_for_all_while_calls_wait_at_it(start: Start) -> None:
    """Else those who wait there would be passed over for as long as the others, not taught yet, keep more at work."""
    lowered, other = start(), start()
    assert [other.next({OTHER: 1}, most=4) for _ in range(4)] == [OTHER] * 4
    for _ in range(3):
        assert lowered.next({BURSTING: 9}, most=2) == NOBODY
        other.end()
        assert other.next({OTHER: 1}, most=4) == NOBODY
    assert lowered.next({BURSTING: 9}, most=2, calls=1) == BURSTING
    assert [other.next({OTHER: 1}, most=4) for _ in range(3)] == [OTHER, OTHER, NOBODY]


def test_a_turn_before_the_clock_of_redis_was_set_right_keeps_no_account_waiting(start: Start, url: str) -> None:
    """Else it would be last among equals until that time comes again."""
    one, two = start(), start()
    with redis.Redis.from_url(url) as client:
        client.zadd(LAST_TURNS, {str(OTHER): (client.time()[0] + 3600) * 1_000_000})
    assert one.next({BURSTING: 9}) == BURSTING
    assert two.next({OTHER: 9}) == NOBODY
    one.end()
    served = []
    for _ in range(4):
        served.append(one.next({BURSTING: 9}) or two.next({OTHER: 9}) or one.next({BURSTING: 9}))
        (one if one.held else two).end()
    assert set(served[-2:]) == {BURSTING, OTHER}


def test_who_waits_no_more_holds_nobody_up(start: Start) -> None:
    one, two = start(), start()
    assert one.next({BURSTING: 1}) == BURSTING
    assert two.next({OTHER: 1}) == NOBODY
    one.end()
    assert one.next({BURSTING: 1}) == NOBODY
    two.turns.nobody_waits()
    in_time(lambda: one.next({BURSTING: 1}) == BURSTING, what="the other's waiters are forgotten")


def test_what_a_dead_process_has_told_is_soon_forgotten(start: Start, url: str) -> None:
    one, two = start(waits_s=0.5), start(waits_s=0.5)
    assert one.next({BURSTING: 1}) == BURSTING
    assert two.next({OTHER: 1}) == NOBODY
    one.end()
    in_time(lambda: one.next({BURSTING: 1}) == BURSTING, what="the other's waiters are forgotten")
    with redis.Redis.from_url(url) as client:
        assert len(client.hkeys(WAITING)) == 1


def test_a_place_whose_answer_was_lost_is_free_again(relay: Relay, through: str, start: Start) -> None:
    """Redis has heard the question and named an account; the process has decided by itself meanwhile."""
    beyond, near = start(through, timeout_s=0.1), start()

    def asked() -> bool:
        """Whether Redis heard it: on a busy machine the line may just have fallen."""
        in_time(lambda: beyond.counts.is_up, what="the line is up")
        relay.hold()
        assert beyond.next({BURSTING: 1, OTHER: 2}) is None
        is_heard = near.turns.at_fal() == 1
        if not is_heard:
            relay.release()
        return is_heard

    in_time(asked, what="Redis has given a place")
    relay.release()
    in_time(lambda: near.turns.at_fal() == 0, what="the place has been given back")


# --- the gates of several processes -----------------------------------------------------------------------------


def running(processes: list[Child]) -> list[int]:
    """At each process, all accounts together."""
    return [sum(child.ask("state")["running"].values()) for child in processes]


def until_all_are_taken(processes: list[Child], most: int = 4) -> None:
    """Every place, and never one more than there are."""

    def all_taken() -> bool:
        taken = sum(running(processes))
        assert taken <= most
        return taken == most

    until(all_taken, what="all places are taken")


def until_heard(url: str, account: int) -> None:
    with redis.Redis.from_url(url) as client:
        until(
            lambda: any(f" {account}:" in told.decode() for told in client.hvals(WAITING)),
            what="Redis has heard that a call of the account waits",
        )


def test_who_has_left_holds_nobody_up_and_keeps_no_place(relay: Relay, through: str, start: Start) -> None:
    """Its process may be remembered for a minute here; its turn comes when it waits no more."""
    near = start()
    with children(through, 1, FOUR | {"ABHIAPI_FAL_QUEUE_S": "0"}, lease_s="60") as (child,):
        assert [near.next({OTHER: 0}, most=4) for _ in range(4)] == [OTHER] * 4
        child.ask(f"turns 1 {BURSTING}")
        until(lambda: child.ask("state")["waiting"] == 0, what="the waiter has left")
        near.end()
        in_time(lambda: near.next({OTHER: 0}, most=4) == OTHER, what="nobody else waits")
        near.end()
        near.turns.nobody_waits()

        def asked() -> bool:
            """Whether Redis heard it: the line may have fallen, since what its process asked before is held up too."""
            until(child.is_shared, what="the line is up")
            relay.hold()
            child.ask(f"turns 1 {BURSTING}")
            in_time(lambda: near.turns.at_fal() == 4 or not child.is_shared(), what="it is heard, or the line falls")
            is_heard = near.turns.at_fal() == 4
            if not is_heard:
                relay.release()
            return is_heard

        in_time(asked, what="Redis has given a place")
        until(lambda: child.ask("state")["waiting"] == 0, what="the waiter has left")
        relay.release()
        in_time(lambda: near.turns.at_fal() == 3, what="the place has been given back")
        assert running([child]) == [0]


def test_one_call_at_a_process_is_next_beside_a_burst_at_another_unless_it_is_killed(url: str) -> None:
    """The burst has all places and waits for more: each time that one of its calls ends, the other account is next.

    What waits at a process that was killed is remembered for two seconds here.
    """
    with children(url, 2, FOUR) as pair:
        bursting, other = pair
        bursting.ask(f"turns 24 {BURSTING}")
        until_all_are_taken(pair)
        for _ in range(5):
            other.ask(f"turns 1 {OTHER}")
            until_heard(url, OTHER)
            assert bursting.ask(f"over 1 {BURSTING}") == 1
            until_all_are_taken(pair)
            assert other.running(OTHER) == 1
            assert other.ask(f"over 1 {OTHER}") == 1
            until_all_are_taken(pair)
            assert bursting.running(BURSTING) == 4
        other.ask(f"turns 1 {OTHER}")
        until_heard(url, OTHER)
        other.popen.kill()
        assert bursting.ask(f"over 1 {BURSTING}") == 1
        until_all_are_taken([bursting])


def test_accounts_have_equal_shares_over_all_processes_and_a_killed_ones_places_are_free_again(url: str) -> None:
    """Sixty calls of two accounts come to two processes, most of an account's to one of them."""
    with children(url, 2, FOUR) as pair:
        for child, of_bursting, of_other in zip(pair, (22, 8), (8, 22), strict=True):
            child.ask(f"turns {of_bursting} {BURSTING}")
            child.ask(f"turns {of_other} {OTHER}")
        until_all_are_taken(pair)
        for account in (BURSTING, OTHER):
            until_heard(url, account)
        ended = 0
        while ended < 16:
            for child in pair:
                for account in (BURSTING, OTHER):
                    ended += child.ask(f"over 1 {account}")
                    until_all_are_taken(pair)
        assert [sum(child.running(account) for child in pair) for account in (BURSTING, OTHER)] == [2, 2]
        killed, alive = sorted(pair, key=lambda child: -sum(running([child])))
        assert running([killed]) > [0]
        killed.popen.kill()
        until_all_are_taken([alive])


def test_without_redis_each_process_gives_turns_and_with_it_all_do_again(own_redis: RedisServer) -> None:
    url = own_redis.url()
    with children(url, 2, FOUR) as pair:
        own_redis.kill()
        for child in pair:
            child.ask(f"turns 8 {BURSTING}")
            until_all_are_taken([child])
        own_redis.start()
        for child in pair:
            until(child.is_shared, what="Redis is back")
            assert child.ask(f"over 4 {BURSTING}") == 4
        until_all_are_taken(pair)
