"""Limits as a library: the moving window at its edges, places that cannot leak, memory that stays small."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from limits import RateLimitItemPerMinute
from limits.storage import storage_from_string
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter

from abhiapi.errors import RateLimited, TooManyConcurrent
from abhiapi.limits import STORAGE_URI, CallLimits, ExactMemoryStorage
from abhiapi.settings import UPLOAD_S, Settings

KEY, OTHER = 1, 2


class Seconds:
    """The time of the limits; passes when told."""

    def __init__(self) -> None:
        self.now = 1_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


def call_limits(seconds: Seconds, *, per_minute: int = 3, at_once: int = 2, timeout_s: int = 10) -> CallLimits:
    settings = {
        "ABHIAPI_RATE_PER_MINUTE": str(per_minute),
        "ABHIAPI_CONCURRENCY": str(at_once),
        "ABHIAPI_UPSTREAM_TIMEOUT_S": str(timeout_s),
    }
    return CallLimits(Settings.from_env(settings), now=seconds)


def shown(limits: CallLimits, key_id: int = KEY) -> tuple[str, ...]:
    """Limit, remaining, reset."""
    return tuple(value for _, value in limits.headers(key_id, "free"))


def test_no_minute_wherever_it_begins_holds_one_call_too_many(seconds: Seconds) -> None:
    """Calls at 0, 20 and 40 s: the next fit at 60, 80 and 100 s, and not a second earlier."""
    limits = call_limits(seconds)
    start = seconds.now
    admitted = []
    for second in range(121):
        seconds.now = start + second
        if second < 60 and second % 20:
            continue
        try:
            limits.enter(KEY, "free").release()
            admitted.append(second)
        except RateLimited:
            pass
    assert admitted == [0, 20, 40, 60, 80, 100, 120]


def test_a_refused_call_is_told_when_the_next_one_fits(seconds: Seconds) -> None:
    limits = call_limits(seconds, per_minute=1)
    limits.enter(KEY, "free").release()
    seconds.now += 13
    with pytest.raises(RateLimited) as refusal:
        limits.enter(KEY, "free")
    wait_s = refusal.value.retry_after_s
    assert wait_s is not None
    assert 47 <= wait_s <= 48
    seconds.now += wait_s
    limits.enter(KEY, "free").release()


def test_refusals_do_not_prolong_themselves(seconds: Seconds) -> None:
    limits = call_limits(seconds, per_minute=1)
    limits.enter(KEY, "free").release()
    for _ in range(59):
        seconds.now += 1
        with pytest.raises(RateLimited):
            limits.enter(KEY, "free")
    seconds.now += 1
    limits.enter(KEY, "free").release()


def test_a_refusal_for_concurrency_does_not_use_up_the_minute(seconds: Seconds) -> None:
    limits = call_limits(seconds, per_minute=3, at_once=1)
    first = limits.enter(KEY, "free")
    before = shown(limits)
    for _ in range(10):
        with pytest.raises(TooManyConcurrent):
            limits.enter(KEY, "free")
    assert shown(limits) == before
    first.release()
    limits.enter(KEY, "free").release()
    assert shown(limits)[1] == "1"


def test_a_refusal_for_the_minute_takes_no_place(seconds: Seconds) -> None:
    limits = call_limits(seconds, per_minute=1, at_once=2)
    limits.enter(KEY, "free")
    for _ in range(5):
        with pytest.raises(RateLimited):
            limits.enter(KEY, "free")
    assert limits.in_flight() == 1


def test_a_place_given_back_twice_is_one_place(seconds: Seconds) -> None:
    limits = call_limits(seconds, per_minute=100, at_once=2)
    first, _second = limits.enter(KEY, "free"), limits.enter(KEY, "free")
    first.release()
    first.release()
    third = limits.enter(KEY, "free")
    first.release()
    with pytest.raises(TooManyConcurrent):
        limits.enter(KEY, "free")
    third.release()
    limits.enter(KEY, "free")


def test_places_lost_with_their_calls_come_back_at_their_deadline(seconds: Seconds) -> None:
    """Nobody releases them; a burst as wide as the limit is admitted again all the same."""
    limits = call_limits(seconds, per_minute=100, at_once=2)
    for _ in range(3):
        lost = [limits.enter(KEY, "free") for _ in range(2)]
        seconds.now = int(lost[0].deadline)
        with pytest.raises(TooManyConcurrent):
            limits.enter(KEY, "free")
        seconds.now += 1
    limits.enter(KEY, "free")
    assert limits.in_flight() == 1


def test_no_place_is_given_away_while_its_call_can_still_run(seconds: Seconds) -> None:
    limits = call_limits(seconds, timeout_s=7)
    longest_s = Settings.from_env({"ABHIAPI_UPSTREAM_TIMEOUT_S": "7"}).longest_call_s
    assert limits.enter(KEY, "free").deadline - seconds.now >= UPLOAD_S + longest_s


def test_an_overdue_place_released_late_frees_nobody_elses(seconds: Seconds) -> None:
    limits = call_limits(seconds, per_minute=100, at_once=1)
    late = limits.enter(KEY, "free")
    seconds.now += 10**6
    limits.enter(KEY, "free")
    late.release()
    with pytest.raises(TooManyConcurrent):
        limits.enter(KEY, "free")


def test_keys_are_counted_apart(seconds: Seconds) -> None:
    limits = call_limits(seconds, per_minute=1, at_once=1)
    limits.enter(KEY, "free")
    limits.enter(OTHER, "free").release()
    assert (shown(limits)[1], shown(limits, OTHER)[1], shown(limits, 3)[1]) == ("0", "0", "1")


def test_the_headers_say_when_the_oldest_call_leaves_the_minute(seconds: Seconds) -> None:
    limits = call_limits(seconds)
    start = seconds.now
    limits.enter(KEY, "free").release()
    seconds.now += 10
    limits.enter(KEY, "free").release()
    assert shown(limits) == ("3", "1", str(start + 61))


def test_plans_have_limits_of_their_own(seconds: Seconds) -> None:
    limits = call_limits(seconds, per_minute=1, at_once=1)
    taken = [limits.enter(KEY, "pro") for _ in range(40)]
    with pytest.raises(TooManyConcurrent, match="40 calls"):
        limits.enter(KEY, "pro")
    assert len(taken) == limits.in_flight() == 40


def test_nothing_is_kept_of_thousands_of_keys_that_are_idle(seconds: Seconds) -> None:
    limits = call_limits(seconds)
    for key_id in range(20_000):
        if key_id % 200 == 0:
            seconds.now += 61
        limits.enter(key_id, "free").release()
    kept = limits._window.storage._times  # type: ignore[attr-defined]
    assert len(kept) < 5_000
    assert limits._places == {}


def test_a_long_window_forgets_nothing_while_many_short_ones_come_and_go(seconds: Seconds) -> None:
    """Tries of a password are counted for a quarter of an hour, however many others ask for something meanwhile."""
    storage = ExactMemoryStorage(now=seconds)
    window = MovingWindowRateLimiter(storage)
    long = RateLimitItemPerMinute(1, 15)
    assert window.hit(long, "tries of a password")
    seconds.now += 300
    for number in range(10_000):
        window.hit(RateLimitItemPerMinute(1), str(number))
    assert not window.hit(long, "tries of a password")
    seconds.now += 601
    assert window.hit(long, "tries of a password")


@pytest.fixture
def storage() -> Iterator[ExactMemoryStorage]:
    """What Flask-Limiter makes of our address for its own routes."""
    made = storage_from_string(STORAGE_URI)
    assert isinstance(made, ExactMemoryStorage)
    yield made
    made.reset()


def test_the_storage_does_what_the_library_asks_of_one(storage: ExactMemoryStorage) -> None:
    window, item = MovingWindowRateLimiter(storage), RateLimitItemPerMinute(3)
    assert [window.hit(item, "a", cost=2), window.hit(item, "a", cost=2), window.hit(item, "a")] == [True, False, True]
    assert not window.test(item, "a")
    assert window.get_window_stats(item, "a").remaining == 0
    assert storage.get(item.key_for("a")) == 3
    assert storage.get_expiry(item.key_for("a")) > 0
    assert storage.check()
    window.clear(item, "a")
    assert (storage.get(item.key_for("a")), storage.get_expiry(item.key_for("a"))) == (0, 0)
    assert window.hit(item, "b")
    assert storage.reset() == 1
    assert window.get_window_stats(item, "b").remaining == 3


def test_only_moving_windows_are_counted(storage: ExactMemoryStorage) -> None:
    with pytest.raises(NotImplementedError):
        FixedWindowRateLimiter(storage).hit(RateLimitItemPerMinute(1), "a")
    assert storage.base_exceptions is ValueError
