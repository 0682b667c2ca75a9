"""What the operations of a group add to rows that they share: written once, with the group or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from types import NoneType
from typing import Any

import gevent
import pytest
from sqlalchemy import select

from abhiapi import accounts, audit, calls, ledger, tables
from abhiapi.committer import GroupCommitter
from abhiapi.days import periods
from abhiapi.db import Database, Tx, Written
from abhiapi.db_postgres_tx import PostgresTx
from abhiapi.db_sqlite import SqliteTx
from tests.harness import Clock
from tests.rows import Customer, settled

pytestmark = pytest.mark.engines


@pytest.fixture
def writer(database: Database) -> Iterator[GroupCommitter]:
    made = GroupCommitter(database)
    yield made
    made.close()


def together(writer: GroupCommitter, *ops: Callable[[Tx], object]) -> list[BaseException | None]:
    """What each of these writes fails with, made so that they are one group."""
    greenlets = [gevent.spawn(writer.write, op, patience_s=5) for op in ops]
    gevent.joinall(greenlets)
    return [greenlet.exception for greenlet in greenlets]


def uses(database: Database) -> list[tuple[int, int]]:
    """Calls and charges as they were rolled up, by day."""
    statement = select(tables.usage_daily.c.calls, tables.usage_daily.c.charged_micros)
    return [(row[0], row[1]) for row in database.read(lambda tx: tx.all(statement))]


def less_than_nothing(customer: Customer) -> Callable[[Tx], object]:
    """An operation whose sum no row may hold."""
    row = {"of_account_id": customer.account_id, "of_day": 1, "of_model": "m", "of_key_id": customer.key_id}
    less = {"more_calls": -1, "more_charged_micros": 0, "more_fal_cost_nano_usd": 0}
    return lambda tx: tx.add_up(calls._ROLLED["usage_daily"], of=row, more=less)


def test_what_a_group_adds_to_a_row_is_written_once(
    database: Database, writer: GroupCommitter, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else fails in the group: what was added by an operation that failed is gone with it."""
    customer = Customer.new(database, clock)
    held = [customer.admit() for _ in range(5)]
    seen: list[bool] = []
    moved = calls._MOVE["usage_daily"]
    engine, name = (PostgresTx, "_executed") if database.engine == "postgresql" else (SqliteTx, "_execute")
    execute = getattr(engine, name)

    def noted(tx: Tx, statement: Any, params: Any) -> Any:
        seen.append(b"UPDATE usage_daily" in statement if isinstance(statement, bytes) else statement is moved)
        return execute(tx, statement, params)

    monkeypatch.setattr(engine, name, noted)

    def ends(call: calls.OpenCall, *, fails: bool = False) -> Callable[[Tx], object]:
        def end(tx: Tx) -> None:
            calls.finish(tx, call, settled(5), now_ms=clock.now_ms)
            if fails:
                raise ValueError("a bug")

        return end

    errors = together(writer, *(ends(call, fails=number == 2) for number, call in enumerate(held)))
    assert [type(error) for error in errors] == [NoneType, NoneType, ValueError, NoneType, NoneType]
    assert uses(database) == [(4, 20)]
    assert seen.count(True) == 1
    customer.finish(held[2], settled(5))
    assert uses(database) == [(5, 25)]
    assert database.read(audit.verify).problems == []


def test_a_sum_that_breaks_a_constraint_is_its_operation_s_alone(
    database: Database, writer: GroupCommitter, clock: Clock
) -> None:
    customer = Customer.new(database, clock)
    call = customer.admit()
    errors = together(
        writer,
        lambda tx: calls.finish(tx, call, settled(5), now_ms=clock.now_ms),
        less_than_nothing(customer),
        lambda tx: accounts.create(tx, "bob", now_ms=1),
    )
    assert [error is None for error in errors] == [True, False, True]
    assert "check" in str(errors[1]).lower()
    assert uses(database) == [(1, 5)]
    assert [account.name for account in database.read(accounts.everyone)] == ["ann", "bob"]
    assert database.read(audit.verify).problems == []


def test_a_sum_that_breaks_a_constraint_is_no_fault_of_who_has_it_written(
    database: Database, writer: GroupCommitter, clock: Clock
) -> None:
    """A charge above its hold has the sums written before its group ends, and with them what others added."""
    customer = Customer.new(database, clock)
    call = customer.admit(held_micros=2)
    errors = together(
        writer,
        less_than_nothing(customer),
        lambda tx: calls.finish(tx, call, settled(5), now_ms=clock.now_ms),
    )
    assert [error is None for error in errors] == [False, True]
    assert uses(database) == [(1, 5)]
    assert database.read(audit.verify).problems == []


def test_who_was_written_is_not_told_of_another_s_failure(
    database: Database, writer: GroupCommitter, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a group is written one by one, and a bug ends it in the middle."""
    customer = Customer.new(database, clock)
    call = customer.admit()
    check, looks = writer._place.check, iter((False, False, True))

    def looked() -> None:
        check()
        if next(looks, False):
            raise ValueError("a bug")

    monkeypatch.setattr(writer._place, "check", looked)
    errors = together(
        writer,
        lambda tx: calls.finish(tx, call, settled(5), now_ms=clock.now_ms),
        less_than_nothing(customer),
    )
    assert [type(error) for error in errors] == [NoneType, ValueError]
    assert uses(database) == [(1, 5)]


def test_two_statements_that_went_together_in_one_way_may_go_in_another(database: Database, clock: Clock) -> None:
    """What depended on the first then does not, once it has gone beside it."""
    customer = Customer.new(database, clock, credits=1)
    day, month = periods(clock.now_ms)

    def pair(tx: Tx, number: int, amount: int) -> tuple[Written, Written]:
        of = {"account": customer.account_id, "amount": amount, "key": customer.key_id, "day": day, "month": month}
        row = {
            "call_id": number, "account_id": customer.account_id, "key_id": customer.key_id,
            "price_id": customer.price_id, "process_id": customer.process_id, "mode": "sync", "state": "held",
            "held_micros": amount, "deadline_at": 1, "created_at": 1,
            "charged_micros": 0, "refunded_micros": 0, "adjusted_micros": 0,
        }  # fmt: skip
        return (ledger._HOLD, of), (calls._ADMIT, row)

    def both_ways(tx: Tx) -> list[int]:
        tx.run_both(*pair(tx, 1, 1))
        assert tx.one_then(*pair(tx, 2, 10**9)) is None
        return [row[0] for row in tx.all(select(tables.calls.c.call_id))]

    assert database.write(both_ways) == [1]


def test_no_transaction_ends_before_its_sums_are_written(database: Database) -> None:
    with closing(database.session(patience_s=5)) as session:
        session.begin()
        session.tx.add_up(calls._ROLLED["usage_daily"], of={"of_account_id": 1}, more={"more_calls": 1})
        with pytest.raises(AssertionError, match="sums"):
            session.commit()
        session.roll_back()
