"""Fairness at fal: so many calls at once over all customers, in fair turns, a bounded wait, and no hold till then."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gevent
import pytest
import requests

from abhiapi.errors import UpstreamBroken, UpstreamBusy, UpstreamUnreachable
from abhiapi.fairness import RAISE_S, RETRY_AFTER_MAX_S, Turn, Turns
from abhiapi.gate import Gate
from abhiapi.telemetry import Times
from tests import raw_http
from tests.harness import Fal, Server, until
from tests.scripted import PICTURE, House, answer

BURSTING, OTHER, THIRD = 1, 2, 3


def arrived(turns: Turns, account_id: int, number: int = 1) -> list[Turn]:
    made = [Turn(account_id, 0) for _ in range(number)]
    for turn in made:
        turns.arrive(turn)
    return made


def begun(turns: Turns, now: float = 0) -> list[Turn]:
    """The turns that begin now, in order."""
    found = []
    while turns.has_room(now) and (turn := turns.next(now)):
        found.append(turn)
    return found


# --- whose turn it is -------------------------------------------------------------------------------------------


def test_one_call_beside_a_burst_of_two_hundred_is_next() -> None:
    turns = Turns(10)
    burst = arrived(turns, BURSTING, 210)
    assert begun(turns) == burst[:10]
    (other,) = arrived(turns, OTHER)
    assert (begun(turns), turns.waiting) == ([], 201)
    turns.end(burst[0], 1)
    assert begun(turns, 1) == [other]
    turns.end(burst[1], 1)
    assert begun(turns, 1) == [burst[10]]


def test_one_account_alone_may_use_everything_and_gives_way_as_others_come() -> None:
    turns = Turns(6)
    arrived(turns, BURSTING, 100)
    running = begun(turns)
    assert [turn.account_id for turn in running] == [BURSTING] * 6
    arrived(turns, OTHER, 100)
    arrived(turns, THIRD, 100)
    for turn in running:
        turns.end(turn, 1)
        begun(turns, 1)
    shares = [turn.account_id for turn in turns.running]
    assert sorted(shares) == [BURSTING, BURSTING, OTHER, OTHER, THIRD, THIRD]


def test_accounts_take_turns_and_within_an_account_the_oldest_call_is_first() -> None:
    turns = Turns(1)
    waiting = {account: arrived(turns, account, 3) for account in (BURSTING, OTHER, THIRD)}
    served = []
    while found := begun(turns):
        served += found
        turns.end(found[0], 0)
    assert served == [waiting[account][number] for number in range(3) for account in (BURSTING, OTHER, THIRD)]
    assert not turns.waiting
    assert not turns.running


def test_who_leaves_the_queue_is_passed_over_and_who_has_begun_cannot_leave() -> None:
    turns = Turns(1)
    first, gone, last = arrived(turns, BURSTING, 3)
    assert begun(turns) == [first]
    assert (turns.leave(first), turns.leave(gone), turns.leave(gone)) == (False, True, False)
    assert (turns.end(first, 1), turns.end(first, 1)) == (True, False)
    assert begun(turns, 1) == [last]
    turns.end(last, 2)
    assert not turns.leave(last)
    assert turns.next(2) is None


# --- the limit that fal teaches ---------------------------------------------------------------------------------


def test_what_fal_was_working_on_is_the_limit_until_it_is_raised_one_by_one() -> None:
    turns = Turns(10)
    turns.lower(4, 100)
    assert [turns.limit(100 + seconds) for seconds in (0, RAISE_S - 1, RAISE_S)] == [4, 4, 5]
    assert turns.limit(100 + 3 * RAISE_S + 1) == 7
    turns.lower(6, 100 + 3 * RAISE_S + 1)
    assert turns.limit(100 + 4 * RAISE_S) == 6  # the wait begins anew
    assert turns.limit(10_000) == 10  # never above the setting


def test_a_refusal_with_nothing_else_at_fal_leaves_one_at_a_time() -> None:
    """Somebody else uses the operator's account."""
    turns = Turns(10)
    turns.lower(0, 0)
    assert turns.limit(0) == 1


def test_a_burst_above_fals_limit_finds_it_at_once() -> None:
    """Ten at fal, which takes four: six are refused, one after the other."""
    turns = Turns(10)
    running = arrived(turns, BURSTING, 10)
    begun(turns)
    for turn in running[4:]:
        turns.end(turn, 1)
        turns.lower(len(turns.running), 1)
    assert turns.limit(1) == 4


def test_the_wait_that_is_told_grows_with_the_queue_and_has_a_bound() -> None:
    turns = Turns(2)
    assert turns.retry_after_s() == 1
    long = arrived(turns, BURSTING, 2)
    begun(turns)
    for turn in long:
        turns.end(turn, 16)
    told = []
    for _ in range(3):
        arrived(turns, BURSTING, 8)
        told.append(turns.retry_after_s())
    assert 1 < told[0] < told[1] < told[2] <= RETRY_AFTER_MAX_S
    arrived(turns, BURSTING, 10_000)
    assert turns.retry_after_s() == RETRY_AFTER_MAX_S


# --- the gate ---------------------------------------------------------------------------------------------------


def enter(gate: Gate, account_id: int = BURSTING, *, hung_up: bool = False) -> Turn | None:
    return gate.enter(account_id, has_hung_up=lambda: hung_up, before_waiting=lambda: None)


def test_without_the_setting_there_is_no_gate() -> None:
    gate = Gate(0, 5)
    assert [enter(gate) for _ in range(100)] == [None] * 100
    gate.end(None)
    gate.refused(None)
    assert (gate.limit(), gate.waiting()) == (0, 0)


def test_a_waiting_call_goes_on_when_another_ends() -> None:
    gate = Gate(1, 600)
    first = enter(gate)
    waiting = gevent.spawn(enter, gate, OTHER)
    gevent.sleep(0)
    assert (gate.waiting(), waiting.ready()) == (1, False)
    gate.end(first)
    gate.end(first)
    gate.end(waiting.get(timeout=10))
    gate.end(enter(gate))
    assert gate.waiting() == 0


def test_who_hangs_up_while_waiting_leaves_the_queue() -> None:
    gate = Gate(1, 600)
    first = enter(gate)
    with pytest.raises(UpstreamBusy):
        enter(gate, hung_up=True)
    assert gate.waiting() == 0
    gate.end(first)
    gate.end(enter(gate))


def test_a_call_whose_turn_does_not_come_in_time_is_told_when_to_come_again() -> None:
    gate = Gate(1, 0)
    first = enter(gate)
    with pytest.raises(UpstreamBusy) as refusal:
        enter(gate)
    assert refusal.value.retry_after_s is not None
    assert 1 <= refusal.value.retry_after_s <= RETRY_AFTER_MAX_S
    assert gate.waiting() == 0
    gate.end(first)
    gate.end(enter(gate))


# --- the gate before a call -------------------------------------------------------------------------------------


def busy(house: House, queue_s: int = 0) -> Turn | None:
    """A house with one place at fal, which is taken."""
    house.rt.gate = Gate(1, queue_s)
    return enter(house.rt.gate, OTHER)


@pytest.mark.engines
def test_a_call_that_gets_no_turn_is_429_before_fal_and_costs_nothing(house: House) -> None:
    turn = busy(house)
    reply = house.call()
    headers = dict(reply.headers)
    assert (reply.status, b'"upstream_busy"' in reply.body) == (429, True)
    assert 1 <= int(headers["Retry-After"]) <= RETRY_AFTER_MAX_S
    assert (house.fal.sent, house.standing(), house.at_once()) == ([], (1_000_000, 0), 0)
    assert house.books.calls(house.account) == []
    house.rt.gate.end(turn)
    assert house.call().status == 200


@pytest.mark.engines
def test_credit_and_keys_limits_are_looked_at_before_a_call_waits(house: House) -> None:
    """Nobody waits for minutes to hear that they have no credit."""
    busy(house, 600)
    account, key = house.books.account(1)
    house.account, house.key = account, key
    reply = house.call()
    assert (reply.status, b"1 are available" in reply.body) == (402, True)
    assert house.rt.gate.waiting() == 0


@pytest.mark.parametrize(
    "said",
    [
        answer([PICTURE]),
        answer([PICTURE], status=422),
        answer([b"x" * 100_000], ("content-type", "video/mp4"), ("x-fal-billable-units", "1")),
        answer([b"data: 1\n\n"], ("content-type", "text/event-stream"), ("x-fal-billable-units", "1")),
        answer([b"{", UpstreamBroken("cut")]),
        answer([b"nothing"], status=403),
        UpstreamUnreachable("no connection"),
        RuntimeError("a bug"),
    ],
)
def test_a_turn_is_over_however_its_call_ends(house: House, said: object) -> None:
    house.rt.gate = Gate(1, 0)
    house.fal.answer = said  # type: ignore[assignment]
    try:
        reply = house.call()
        if not isinstance(reply.body, bytes):
            next(iter(reply.body))
            reply.body.close()  # the caller hangs up: fal's answer is read to its end
    except RuntimeError:
        pass
    assert house.rt.gate.limit() == 1
    house.rt.gate.end(enter(house.rt.gate))


@pytest.mark.engines
def test_a_hold_that_is_refused_gives_its_turn_back(house: House) -> None:
    house.rt.gate = Gate(1, 0)
    _, house.key = house.books.account(1)
    assert house.call().status == 402
    house.rt.gate.end(enter(house.rt.gate))


def test_a_wait_for_a_turn_is_not_time_that_this_service_added() -> None:
    times = Times(arrived=10, held_from=20, sent=21, answered=30, settled=31)
    times.without(8)
    assert (times.added_s, times.fal_s, times.held_from) == (4, 9, 28)


def test_fals_own_refusal_lowers_the_limit_and_is_passed_on(house: House) -> None:
    house.rt.gate = Gate(5, 0)
    others = [enter(house.rt.gate, OTHER) for _ in range(2)]
    kind = ("content-type", "application/json")
    house.fal.answer = answer([b'{"detail":"x"}'], kind, ("x-fal-needs-retry", "1"), status=429)
    assert house.call().status == 429
    assert house.rt.gate.limit() == 2
    house.fal.answer = answer([b'{"detail":"a model\'s own"}'], kind, status=429)
    house.rt.gate.end(others[0])
    assert house.call().status == 429
    assert house.rt.gate.limit() == 2
    assert house.standing() == (1_000_000, 0)


def test_a_burst_of_one_customer_does_not_keep_another_from_fal(fal: Fal, tmp_path: Path) -> None:
    """Two places; twelve calls of one customer are there first, of which one hangs up; another's call is next."""
    with Server.started(tmp_path, fal.url, ABHIAPI_FAL_CONCURRENCY="2", ABHIAPI_FAL_QUEUE_S="120") as server:
        bursting, key = server.books.account(1000)
        other, other_key = server.books.account(1000)
        _, poor_key = server.books.account(1)

        def post(number: int) -> requests.Response:
            return server.post(key, weather=f"hold_until=burst-{tmp_path.name}-{number}")

        def at_fal(name: str) -> int:
            return len(fal.calls(f"hold_until={name}-{tmp_path.name}"))

        with ThreadPoolExecutor(16) as pool:
            burst = [pool.submit(post, number) for number in range(12)]
            until(lambda: waiting(server) == 10, what="ten wait")
            gone = raw_http.connect(server.url)
            gone.sendall(raw_http.request_bytes(key))
            until(lambda: waiting(server) == 11, what="eleven wait")
            gone.close()
            until(lambda: waiting(server) == 10, what="the one that hung up has left")
            assert server.post(poor_key).status_code == 402
            single = pool.submit(server.post, other_key, weather=f"hold_until=other-{tmp_path.name}")
            until(lambda: waiting(server) == 11, what="the other customer's waits too")
            assert (at_fal("burst"), at_fal("other")) == (2, 0)
            assert server.books.standing(bursting)[1] == 2 * 26_250  # nothing is held for those who wait
            first = fal.calls(f"hold_until=burst-{tmp_path.name}")[0]
            weather = {name.lower(): value for name, value in first["headers"]}["x-fal-sandbox"]
            fal.release(weather.partition("=")[2])
            until(lambda: at_fal("other") == 1, what="the other customer's call is at fal")
            assert at_fal("burst") == 2
            fal.release(f"other-{tmp_path.name}")
            for number in range(12):
                fal.release(f"burst-{tmp_path.name}-{number}")
            assert [call.result().status_code for call in [*burst, single]] == [200] * 13
        assert server.books.standing(bursting) == (1_000_000 - 12 * 26_250, 0)
        assert server.books.standing(other) == (1_000_000 - 26_250, 0)
        shown = metrics(server)
        assert "\nabhiapi_fal_limit 2" in shown
        assert "\nabhiapi_fal_wait_seconds_count 15.0" in shown


def metrics(server: Server) -> str:
    return requests.get(f"{server.url}/metrics", timeout=30).text


def waiting(server: Server) -> int:
    (line,) = [line for line in metrics(server).splitlines() if line.startswith("abhiapi_fal_waiting ")]
    return int(float(line.split()[1]))


def test_a_refusal_for_want_of_credit_says_the_same_waiting_or_not(house: House) -> None:
    account, house.key = house.books.account(1)
    house.account = account
    at_once = house.call().body
    busy(house, 600)
    assert house.call().body == at_once
