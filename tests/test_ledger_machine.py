"""The ledger against a dict: random movements, replays and crashes on a real file, and the books after every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from abhiapi import accounts, audit, calls, keys, ledger, prices, reports, runtime, spending, sweep
from abhiapi.days import periods
from abhiapi.db import Tx
from abhiapi.errors import InsufficientCredits, KeyLimitReached, Refused
from abhiapi.metering import Verdict, released
from abhiapi.money import Micros
from tests.harness import Clock
from tests.rows import MODEL, credit, flux, server_settings, settled

pytestmark = pytest.mark.engines

DAY_MS = 86_400_000
NAMES = st.sampled_from(("ann", "bob"))
AMOUNTS = st.sampled_from((50_000, 12_345, 1, 26_250, 10**7)).map(Micros)
HOLDS = st.sampled_from((60_000, 90_000, 26_250, 12_345, 0)).map(Micros)
CHANGES = st.sampled_from((-10_000, 0, 1, -80_000, 100_000, None))  # from its hold to a call's charge; None: a release
REFUNDS = st.sampled_from((10_000, 26_250, 1, None))
TIMES = st.sampled_from((1, DAY_MS, 50_000, 100_000))
REFS = st.sampled_from((None, "pay-1", "pay-2"))
WHICH = st.integers(0, 3)  # picks one of the latest calls there are

# One rule with a table of its own, since hypothesis would leave out rules at random, and without calls nothing happens.
_HOLD = st.tuples(st.just("hold"), NAMES, st.lists(HOLDS, min_size=2, max_size=4), st.integers(1, 100_000))
_END = st.tuples(st.just("end"), WHICH, CHANGES)
STEPS = st.one_of(
    _HOLD,
    _HOLD,
    _END,
    _END,
    st.tuples(st.just("topup"), NAMES, AMOUNTS, REFS),
    st.tuples(st.just("adjust"), NAMES, AMOUNTS, st.sampled_from((1, -1))),
    st.tuples(st.just("leave_to_the_operator"), WHICH),
    st.tuples(st.just("replay"), WHICH, AMOUNTS),
    st.tuples(st.just("refund"), WHICH, REFUNDS, TIMES),
    st.tuples(st.just("sweep_the_overdue"), TIMES),
    st.tuples(st.just("crash")),
)


@dataclass
class Books:
    """What an account must look like."""

    account_id: int
    key_id: int
    amounts: list[int] = field(default_factory=list)  # of the entries, oldest first
    refs: dict[str, int] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)  # open call -> its hold
    charged: dict[int, int] = field(default_factory=dict)  # settled call -> charge less refunds
    ended: int = 0
    limits: tuple[int, int] | None = None  # of its key, in a day and a month
    counted: dict[int, tuple[int, int]] = field(default_factory=dict)  # call -> (its admission, what it counts)
    debt_allowed: int = 0  # what charges took beyond their holds, and the operator took down

    @property
    def balance(self) -> int:
        return sum(self.amounts)

    @property
    def available(self) -> int:
        return self.balance - sum(self.held.values())

    def is_within_limits(self, amount: int, now_ms: int) -> bool:
        """Whether the key may spend so much more, in this day and in this month."""
        if self.limits is None:
            return True
        spent = [0, 0]
        for admitted_at, counts in self.counted.values():
            for which, (theirs, ours) in enumerate(zip(periods(admitted_at), periods(now_ms), strict=True)):
                spent[which] += counts if theirs == ours else 0
        return all(limit - used >= amount for limit, used in zip(self.limits, spent, strict=True))


@dataclass(frozen=True)
class Made:
    """A call that was admitted."""

    name: str
    call: calls.OpenCall
    deadline_at: int


class Ledger(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.clock = Clock()
        self.numbers = count(1)
        self.held: list[Made] = []  # those a living process works on
        self.unknown: list[Made] = []  # those left to the operator
        self.ended: list[Made] = []
        self.rt = self._started()
        self.books = {name: self.rt.write(lambda tx, name=name: self._account(tx, name)) for name in ("ann", "bob")}

    def _started(self) -> runtime.Runtime:
        return runtime.start(server_settings(f"sqlite:///{self.folder.name}/abhiapi.db"), now_ms=self.clock, rules=())

    def _account(self, tx: Tx, name: str) -> Books:
        now, start = self.clock.now_ms, credit(200)
        account = accounts.create(tx, name, now_ms=now)
        _, key = keys.create(tx, account.account_id, name=None, expires_at=None, now_ms=now)
        ledger.topup(tx, account.account_id, start, ref=None, note=None, now_ms=now)
        self.price_id = prices.version_of(tx, flux(), now_ms=now)
        books = Books(account.account_id, key.key_id, amounts=[start])
        if name == "bob":
            books.limits = day, month = credit(150), credit(400)
            spending.set_limits(tx, key.key_id, day_limit_micros=day, month_limit_micros=month, now_ms=now)
        return books

    @rule(step=STEPS)
    def step(self, step: tuple[Any, ...]) -> None:
        operation, *arguments = step
        needed = {
            "end": self.held + self.unknown,
            "leave_to_the_operator": self.held,
            "refund": self.ended,
            "replay": self.ended,
        }
        if needed.get(operation, True):
            getattr(self, operation)(*arguments)

    def topup(self, name: str, amount: Micros, ref: str | None) -> None:
        books = self.books[name]

        def op(tx: Tx) -> ledger.Entry:
            return ledger.topup(tx, books.account_id, amount, ref=ref, note="n", now_ms=self.clock.tick())

        if ref is not None and books.refs.get(ref, amount) != amount:
            with pytest.raises(Refused):
                self.rt.write(op)
            return
        entry = self.rt.write(op)
        assert entry.repeated == (ref in books.refs)
        if not entry.repeated:
            books.amounts.append(amount)
            assert (entry.seq, entry.balance_after_micros) == (len(books.amounts), books.balance)
        if ref is not None:
            books.refs[ref] = amount

    def adjust(self, name: str, amount: Micros, sign: int) -> None:
        books, change = self.books[name], Micros(sign * amount)
        self.rt.write(lambda tx: ledger.adjust(tx, books.account_id, change, note="n", now_ms=self.clock.tick()))
        books.amounts.append(change)
        books.debt_allowed += max(0, -change)

    def hold(self, name: str, amounts: list[Micros], deadline_in_ms: int) -> None:
        books = self.books[name]
        for amount in amounts:
            now = self.clock.tick()
            call = calls.OpenCall(next(self.numbers), books.account_id, books.key_id, MODEL, amount)
            admission = calls.Admission(call, self.price_id, self.rt.process_id, "sync", now + deadline_in_ms, now)
            refusal = InsufficientCredits if amount > books.available else KeyLimitReached
            if amount > books.available or not books.is_within_limits(amount, now):
                with pytest.raises(refusal):
                    self.rt.write(lambda tx, admission=admission: calls.admit(tx, admission))
                continue
            self.rt.write(lambda tx, admission=admission: calls.admit(tx, admission))
            books.held[call.call_id] = amount
            books.counted[call.call_id] = now, amount
            self.held.append(Made(name, call, admission.deadline_at))
            assert books.available >= 0

    def end(self, which: int, change: int | None) -> None:
        """A charge below, at or above its hold, of nothing too; or a release."""
        made = _latest([*self.held, *self.unknown], which)
        charge = 0 if change is None else max(0, made.call.held_micros + change)
        balance = self._finish(made.call, released("upstream_timeout") if change is None else settled(charge))
        books = self.books[made.name]
        self._has_ended(made)
        books.counted[made.call.call_id] = books.counted[made.call.call_id][0], charge
        if charge:
            books.amounts.append(-charge)
            books.charged[made.call.call_id] = charge
        books.debt_allowed += max(0, charge - made.call.held_micros)
        assert balance == books.balance

    def leave_to_the_operator(self, which: int) -> None:
        made = _latest(self.held, which)
        self.held.remove(made)
        self._finish(made.call, Verdict("unknown", reason="no_units"))
        self.unknown.append(made)

    def replay(self, which: int, charge: Micros) -> None:
        made = _latest(self.ended, which)
        for verdict in (settled(charge), released("again"), Verdict("unknown", reason="again")):
            with pytest.raises(calls.CallEnded):
                self._finish(made.call, verdict)

    def refund(self, which: int, amount: Micros | None, after_ms: int) -> None:
        self.clock.tick(after_ms)
        charged = [made for made in self.ended if made.call.call_id in self.books[made.name].charged]
        made = _latest(charged or self.ended, which)
        books, call_id = self.books[made.name], made.call.call_id
        left = books.charged.get(call_id, 0)
        wanted = left if amount is None else amount
        if not 0 < wanted <= left:
            with pytest.raises(Refused):
                self.rt.write(lambda tx: calls.refund(tx, call_id, amount, now_ms=self.clock.tick()))
            return
        self.rt.write(lambda tx: calls.refund(tx, call_id, amount, now_ms=self.clock.tick()))
        books.amounts.append(wanted)
        books.charged[call_id] -= wanted
        books.counted[call_id] = books.counted[call_id][0], books.charged[call_id]

    def crash(self) -> None:
        """As SIGKILL does it: the kernel closes what the process had open, and the next one sweeps what it held."""
        _die(self.rt)
        self.rt = self._started()
        assert sweep.run_once(self.rt) == len(self.held)
        self._swept(self.held)

    def sweep_the_overdue(self, after_ms: int) -> None:
        now = self.clock.tick(after_ms)
        overdue = [made for made in self.held if made.deadline_at < now - sweep.GRACE_MS]
        assert sweep.run_once(self.rt) == len(overdue)
        self._swept(overdue)

    @invariant()
    def the_books_are_right(self) -> None:
        """Rows 27 of B3 and 38 of B5: what is kept twice is recounted after every step."""
        finding = self.rt.reader.read(audit.verify)
        assert finding.problems == []
        assert finding.entries == sum(len(books.amounts) for books in self.books.values())
        for books in self.books.values():
            account = self.rt.reader.read(lambda tx, of=books.account_id: accounts.by_id(tx, of))
            assert (account.balance_micros, account.held_micros) == (books.balance, sum(books.held.values()))
            assert account.available_micros >= -books.debt_allowed
            usage = self.rt.reader.read(lambda tx, of=books.account_id: reports.usage(tx, "key", account_id=of))
            total = reports.total(usage)
            assert (total.calls, total.charged_micros) == (books.ended, sum(books.charged.values()))

    def teardown(self) -> None:
        self.rt.close()
        self.folder.cleanup()

    def _finish(self, call: calls.OpenCall, verdict: Verdict) -> Micros:
        return self.rt.write(lambda tx: calls.finish(tx, call, verdict, now_ms=self.clock.tick()))

    def _swept(self, gone: list[Made]) -> None:
        for made in list(gone):
            self._has_ended(made)

    def _has_ended(self, made: Made) -> None:
        books = self.books[made.name]
        books.counted[made.call.call_id] = books.counted[made.call.call_id][0], 0  # the charge, if any, is put in after
        del books.held[made.call.call_id]
        books.ended += 1
        (self.held if made in self.held else self.unknown).remove(made)
        self.ended.append(made)


def _latest(made: list[Made], which: int) -> Made:
    return made[-1 - which % len(made)]


def _die(rt: runtime.Runtime) -> None:
    """Close what the kernel would close, and nothing else: the lock's file and the row of the process stay."""
    rt.writer._greenlet.kill()
    rt.writer._disconnect()
    rt.reader.close()
    rt.writer._thread.kill()
    rt.lock._file.close()


TestLedger = Ledger.TestCase
TestLedger.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
