"""What tests of the ledger start from: an account with credit, its key, a price, a process, and calls of theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from itertools import count
from typing import TypeVar

from abhiapi import accounts, calls, keys, ledger, prices, pricing, processes, spending
from abhiapi.db import Database, Tx
from abhiapi.metering import Verdict
from abhiapi.money import Micros
from abhiapi.settings import Settings
from tests.harness import WEBHOOK_KEY, Clock

T = TypeVar("T")
MODEL = "fal-ai/flux/dev"
FLUX_MICROS = Micros(26_250)  # one megapixel at 0.025 USD and 5 percent
FLUX_NANO_USD = 25_000_000
MINUTE_MS = 60_000
DEAD_PID = 2**22 + 1  # larger than Linux ever gives to a process


@cache
def flux() -> pricing.Price:
    return pricing.Catalogue(pricing.shipped_rules(), [], Decimal("0.05")).price_of(MODEL)


def credit(credits: int) -> Micros:
    return Micros(credits * 1000)


def settled(charge_micros: int = FLUX_MICROS, fal_cost_nano_usd: int | None = FLUX_NANO_USD) -> Verdict:
    return Verdict("settled", Micros(charge_micros), "1", "fal", fal_cost_nano_usd)


def server_settings(database_url: str, **more: str) -> Settings:
    """The settings of a server over this database whose fal is not there."""
    return Settings.from_env(
        {
            "FAL_KEY": "id:secret",
            "ABHIAPI_DATABASE_URL": database_url,
            "ABHIAPI_WEBHOOK_KEY": WEBHOOK_KEY,
            "ABHIAPI_FAL_RUN_URL": "http://127.0.0.1:9",
        }
        | more
    )


@dataclass
class Customer:
    """An account with credit and a key, and the process that works on its calls. Each step is its own transaction."""

    write: Callable[[Callable[[Tx], T]], T]
    clock: Clock
    account_id: int
    key: str
    key_id: int
    price_id: int
    process_id: int
    numbers: count[int]

    @classmethod
    def new(cls, database: Database, clock: Clock, *, name: str = "ann", credits: int = 1000) -> Customer:
        def make(tx: Tx) -> Customer:
            now = clock.now_ms
            account = accounts.create(tx, name, now_ms=now)
            if credits:
                ledger.topup(tx, account.account_id, credit(credits), ref=None, note=None, now_ms=now)
            key, stored = keys.create(tx, account.account_id, name=None, expires_at=None, now_ms=now)
            price_id = prices.version_of(tx, flux(), now_ms=now)
            process_id = processes.start(tx, pid=DEAD_PID, now_ms=now)
            first = account.account_id * 1_000_000
            return cls(
                database.write, clock, account.account_id, key, stored.key_id, price_id, process_id, count(first)
            )

        return database.write(make)

    def open_call(self, held_micros: int = FLUX_MICROS) -> calls.OpenCall:
        return calls.OpenCall(next(self.numbers), self.account_id, self.key_id, MODEL, Micros(held_micros))

    def admission(
        self, call: calls.OpenCall, *, mode: calls.Mode = "sync", deadline_in_ms: int = MINUTE_MS
    ) -> calls.Admission:
        now = self.clock.now_ms
        return calls.Admission(
            call=call,
            price_id=self.price_id,
            process_id=self.process_id,
            mode=mode,
            deadline_at=now + deadline_in_ms,
            created_at=now,
        )

    def hold(self, amount_micros: Micros) -> None:
        """Credit set aside for no call in particular."""
        now = self.clock.now_ms
        self.write(lambda tx: ledger.hold(tx, self.account_id, amount_micros, key_id=self.key_id, now_ms=now))

    def limit(self, *, day: int | None = None, month: int | None = None) -> None:
        """Spending limits of the key, in credits."""
        in_a_day, in_a_month = (None if credits is None else credit(credits) for credits in (day, month))
        self.write(
            lambda tx: spending.set_limits(
                tx, self.key_id, day_limit_micros=in_a_day, month_limit_micros=in_a_month, now_ms=self.clock.now_ms
            )
        )

    def limits(self) -> spending.Limits | None:
        return self.write(lambda tx: spending.of_key(tx, self.key_id, now_ms=self.clock.now_ms))

    def admit(self, held_micros: int = FLUX_MICROS, *, deadline_in_ms: int = MINUTE_MS) -> calls.OpenCall:
        """A call with its credit held."""
        call = self.open_call(held_micros)
        admission = self.admission(call, deadline_in_ms=deadline_in_ms)
        self.write(lambda tx: calls.admit(tx, admission))
        return call

    def finish(self, call: calls.OpenCall, verdict: Verdict) -> Micros:
        """End a call's hold; the balance afterwards."""
        return self.write(lambda tx: calls.finish(tx, call, verdict, now_ms=self.clock.now_ms))

    def settle(self, charge_micros: int = FLUX_MICROS, *, held_micros: int = FLUX_MICROS) -> calls.OpenCall:
        """A call from its admission to its charge."""
        call = self.admit(held_micros)
        self.finish(call, settled(charge_micros))
        return call

    def topup(self, credits: int, *, ref: str | None = None, note: str | None = None) -> ledger.Entry:
        amount = credit(credits)
        return self.write(
            lambda tx: ledger.topup(tx, self.account_id, amount, ref=ref, note=note, now_ms=self.clock.now_ms)
        )

    def account(self) -> accounts.Account:
        return self.write(lambda tx: accounts.by_id(tx, self.account_id))

    def standing(self) -> tuple[int, int]:
        """(balance, held) in micros."""
        account = self.account()
        return account.balance_micros, account.held_micros
