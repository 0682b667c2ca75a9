"""Customers' names that are slow to resolve: they keep their own account waiting, and not for long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import gevent
import pytest

from abhiapi import outbound
from abhiapi.outbound import NotDelivered, Outbound
from abhiapi.webhookwire import target_of

GOOD = target_of("https://good.example/")


class Names:
    """A resolver that answers of ``slow`` names only when the test is over."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.slow_now = 0

    def __call__(self, host: str, port: int) -> list[str]:
        if host.startswith("slow"):
            self.slow_now += 1
            self.over.wait(30)
        return ["127.0.0.1"]


@pytest.fixture
def names() -> Iterator[Names]:
    made = Names()
    yield made
    made.over.set()


def outcome(out: Outbound, host: str, account: str) -> tuple[str, float]:
    began = time.monotonic()
    try:
        out.resolve(target_of(f"https://{host}/"), account)
    except NotDelivered as error:
        return str(error), time.monotonic() - began
    return "resolved", time.monotonic() - began


def test_one_accounts_dead_name_server_keeps_no_other_account_waiting(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """failures.md B9-67: the threads that resolve are few, and the system's look-up cannot be interrupted."""
    monkeypatch.setattr(outbound, "RESOLVE_S", 1)
    out = Outbound(lambda _: True, names)
    stuck = [gevent.spawn(outcome, out, f"slow{n}.example", "attacker") for n in range(3 * outbound.RESOLVERS)]
    gevent.sleep(0)
    assert out.resolve(GOOD, "customer") == ["127.0.0.1"]
    gevent.joinall(stuck, timeout=20)
    # They gave up in time themselves, those that found no thread as well, and their threads hang on: still not all.
    assert all("not resolved within" in one.value[0] and one.value[1] < 5 for one in stuck)
    assert names.slow_now == outbound.RESOLVING_PER_ACCOUNT < outbound.RESOLVERS
    assert out.resolve(GOOD, "customer") == ["127.0.0.1"]
    assert outcome(out, "good.example", "attacker")[0] != "resolved"


def test_where_everybody_has_dead_names_one_is_told_in_time(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "RESOLVE_S", 1)
    out = Outbound(lambda _: True, names)
    stuck = [gevent.spawn(outcome, out, "slow.example", f"account-{n}") for n in range(outbound.RESOLVERS)]
    gevent.joinall(stuck, timeout=20)
    said, seconds = outcome(out, "good.example", "customer")
    assert "not resolved within" in said
    assert seconds < 5
    names.over.set()
    with gevent.Timeout(20):
        while outcome(out, "good.example", "customer")[0] != "resolved":
            gevent.sleep(0.01)


def test_many_names_of_one_account_are_resolved_when_they_can_be(names: Names) -> None:
    """The places of an account are waited for: who has quick names sees nothing of them."""
    out = Outbound(lambda _: True, names)
    many = [gevent.spawn(outcome, out, f"quick{n}.example", "customer") for n in range(200)]
    gevent.joinall(many, timeout=20)
    assert {one.value[0] for one in many} == {"resolved"}


def test_a_name_that_hangs_does_not_hold_up_the_end_of_the_process(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "RESOLVE_S", 1)
    out = Outbound(lambda _: True, names)
    outcome(out, "slow.example", "attacker")
    began = time.monotonic()
    out.close()
    assert time.monotonic() - began < 5
