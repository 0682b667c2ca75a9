"""What every storage engine offers, in one shape: databases, sessions that write, open transactions.

Knows no table and no engine. A write is a function of an open `Tx`; `Database.write` runs it in a short transaction
of its own, `committer.GroupCommitter` in a shared one. Where SQL itself differs between engines, a function stands
here that each engine spells its own way, so that one statement serves all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any, TypeVar

from sqlalchemy import BigInteger, Integer, Table, Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import Executable
from sqlalchemy.sql.functions import FunctionElement

from abhiapi.errors import DatabaseUnavailable
from abhiapi.liveness import ProcessLock

T = TypeVar("T")
Row = tuple[Any, ...]
Written = tuple[Executable, Mapping[str, Any]]  # a statement and its parameters

CLI_PATIENCE_S = 15  # a command waits this long for its turn to write
HAS_NUL = "the text has a NUL character in it, which cannot be stored"  # PostgreSQL cannot, so no engine does
FIND_OUT_S = 60  # and asks for so long what came of a commit whose answer was lost
ASK_AGAIN_S = 1

_in_transaction: ContextVar[bool] = ContextVar("abhiapi_in_transaction", default=False)


class Busy(DatabaseUnavailable):
    """Somebody else is writing just now; trying again may help."""


class OutcomeUnknown(DatabaseUnavailable):
    """The connection was lost while a commit was on its way: it may have happened. `Database.has_committed` tells."""

    def __init__(self, mark: tuple[int, int]) -> None:
        super().__init__("the connection to the database was lost during a commit", retry_after_s=5)
        self.mark = mark


class NeverKnown(DatabaseUnavailable):
    """It could not be found out whether something was written: whoever repeats it has to look first."""


def assert_no_transaction() -> None:
    """The other half of the mark that transactions set: nothing may talk to the network inside one."""
    if _in_transaction.get():
        raise AssertionError("the network was used inside a database transaction")


@contextmanager
def marked() -> Iterator[None]:
    token = _in_transaction.set(True)
    try:
        yield
    finally:
        _in_transaction.reset(token)


@dataclass(frozen=True, slots=True)
class RollUp:
    """A table whose rows add up what many operations bring. Both statements take the same parameters, ``of``, ``more``
    and ``last`` of `Tx.add_up` together."""

    move: Executable
    begin: Executable


class Tx(ABC):
    """An open transaction: runs Core statements with named parameters. Hands out plain tuples."""

    __slots__ = ("_sums", "added", "is_writing_sums")

    def __init__(self) -> None:
        self._sums: dict[tuple[Any, ...], tuple[RollUp, dict[str, Any]]] = {}
        self.added = 0  # grows with everything that is added up
        self.is_writing_sums = False  # also after it has failed: an error is that of the sums, whoever had them written

    def add_up(
        self, roll_up: RollUp, *, of: Mapping[str, Any], more: Mapping[str, int], last: Mapping[str, Any] | None = None
    ) -> None:
        """Add to a row of a roll-up, or begin it: in this transaction, and once for all that its operations add.

        ``of`` names the row, ``more`` is added, of ``last`` the newest stays. Until `write_sums` no statement sees it.
        """
        self.added += 1
        key = (id(roll_up), *of.values())
        known = self._sums.get(key)
        if known is None:
            self._sums[key] = roll_up, {**of, **more, **(last or {})}
            return
        sums = known[1]
        for name, amount in more.items():
            sums[name] += amount
        sums.update(last or {})

    def write_sums(self) -> None:
        """Write what was added up. Whoever ends a transaction that writes calls it before."""
        self.is_writing_sums = True
        self._write_sums()
        self.is_writing_sums = False

    def _write_sums(self) -> None:
        while self._sums:
            roll_up, sums = self._sums.pop(next(iter(self._sums)))
            if self.run(roll_up.move, **sums) == 0:
                self.run(roll_up.begin, **sums)

    def forget_sums(self) -> None:
        """The transaction that they belong to is undone."""
        self._sums.clear()
        self.is_writing_sums = False

    def check_sums(self) -> None:
        """Raises `AssertionError` where something that was added up would be lost by a commit."""
        if self._sums:
            raise AssertionError("a transaction is to end before its sums are written")

    @abstractmethod
    def run(self, statement: Executable, **params: Any) -> int:
        """Run a statement; how many rows it changed."""

    # Two statements in one: on a server each journey keeps every other writer waiting. Neither may need to see what
    # the other one does.

    @abstractmethod
    def run_both(self, first: Written, second: Written) -> None:
        """Run two statements that change rows of two tables."""

    @abstractmethod
    def one_and(self, first: Written, look: Written) -> Row | None:
        """The row of a statement that changes one, followed by that of a SELECT, which has one. None: none changed."""

    @abstractmethod
    def one_then(self, first: Written, then: Written) -> Row | None:
        """The row of a statement that changes one; only then the other is run, an INSERT of one row."""

    @abstractmethod
    def one(self, statement: Executable, **params: Any) -> Row | None:
        """The first row."""

    @abstractmethod
    def all(self, statement: Executable, **params: Any) -> list[Row]:
        """Every row."""

    @abstractmethod
    def each(self, statement: Executable, **params: Any) -> Iterator[Row]:
        """The rows one after the other, in bounded memory."""

    @abstractmethod
    def insert(self, statement: Executable, **params: Any) -> int:
        """Run an INSERT into a table with an integer key; the new key."""

    @abstractmethod
    def load(self, table: Table, rows: Iterator[Row]) -> None:
        """Write whole rows into a table, in bounded memory; the columns in their order, keys included."""

    @abstractmethod
    def dangling(self) -> list[tuple[str, str, int]]:
        """Rows that name rows which are gone: (table, table of those that are gone, how many)."""


class Session(ABC):
    """A connection that writes, one transaction after the other. Its troubles come as `DatabaseUnavailable`."""

    tx: Tx

    @abstractmethod
    def begin(self) -> None:
        """Take one's turn to write: from here on nobody else writes, and every statement sees all that is committed."""

    @abstractmethod
    def changes(self) -> int:
        """A number that grows with every row that is written."""

    @abstractmethod
    def is_spoilt(self) -> bool:
        """Whether an error has made the open transaction useless: it can only be rolled back."""

    @abstractmethod
    def commit(self) -> None:
        """Make it durable. Raises `OutcomeUnknown` where that may have happened, and may not."""

    @abstractmethod
    def roll_back(self) -> None:
        """Undo what is not committed, if there is anything. Raises nothing."""

    @abstractmethod
    def close(self) -> None: ...


class Place(ABC):
    """Where a server's ledger was when it started. What it keeps in memory belongs to that one."""

    @abstractmethod
    def check(self) -> None:
        """Raises `DatabaseUnavailable` where it is gone, or something else stands there."""


class Reads(ABC):
    """Quick look-ups in the event loop of a server, such as a key by its digest."""

    @abstractmethod
    def read(self, op: Callable[[Tx], T]) -> T:
        """Run ``op``, whose every statement sees the latest committed state. Raises `DatabaseUnavailable`."""

    @abstractmethod
    def close(self) -> None: ...


class Database(ABC):
    """The database by URL. Cheap to make; opens connections when they are needed (see `committer` for servers)."""

    name: str  # for people: without a password
    engine: str
    waits_cooperatively: bool  # whether other greenlets go on while this one waits for it

    @abstractmethod
    def session(self, *, patience_s: float, answer_s: float | None = None) -> Session:
        """A connection to write with, whose `begin` waits at most so long for its turn.

        ``answer_s``: when a server gives up a statement of it, whose writer has given up by then.
        """

    @abstractmethod
    def reads(self) -> Reads: ...

    @abstractmethod
    def place(self) -> Place: ...

    @abstractmethod
    def read(self, op: Callable[[Tx], T]) -> T:
        """Run ``op`` on one unchanging snapshot of the database."""

    @abstractmethod
    def has_committed(self, mark: tuple[int, int]) -> bool:
        """What came of a commit whose outcome is unknown. Raises `DatabaseUnavailable` while nobody can tell."""

    @abstractmethod
    def is_trouble(self, error: BaseException) -> bool:
        """Whether an error is the database's trouble rather than a bug or a broken constraint."""

    @abstractmethod
    def translated(self, error: BaseException) -> DatabaseUnavailable:
        """What the database's own trouble is to the rest of the program."""

    @abstractmethod
    def process_lock(self) -> ProcessLock:
        """What will say that this process lives. See `liveness`."""

    @abstractmethod
    def dead(self, pids: Mapping[int, int]) -> set[int]:
        """Which of these processes (number: pid) are dead, as far as can be told by now."""

    @abstractmethod
    def living(self, pids: Mapping[int, int]) -> set[int]:
        """Which of these processes (number: pid) show just now that they live."""

    @abstractmethod
    def is_dead(self, process_id: int, pid: int) -> bool:
        """Whether a process is certainly dead; asks nobody that has to be waited for. See `watch`."""

    @abstractmethod
    def watch(self, process_id: int, pid: int, when_waiting: Callable[[int], object]) -> None:
        """Look at a process for as long as `is_dead` needs to be sure. For commands, which have seen nothing yet.

        ``when_waiting`` hears of the seconds that it may take, where it takes any.
        """

    @contextmanager
    def translating(self) -> Iterator[None]:
        """The database's trouble as `DatabaseUnavailable`; bugs and broken constraints keep their traceback."""
        try:
            yield
        except Exception as error:
            if not self.is_trouble(error):
                raise
            raise self.translated(error) from error

    def write(self, op: Callable[[Tx], T], *, patience_s: float = CLI_PATIENCE_S) -> T:
        """Run ``op`` in a transaction of its own and make it durable. For the command line: may block the process."""
        session = self.session(patience_s=patience_s)
        try:
            session.begin()
            return self._written(session, op)
        finally:
            session.close()

    def _written(self, session: Session, op: Callable[[Tx], T]) -> T:
        """Run ``op`` in a transaction that has begun, and end it."""
        try:
            with marked(), self.translating():
                result = op(session.tx)
                session.tx.write_sums()
            session.commit()
        except OutcomeUnknown as lost:
            if not self._has_committed_after_all(lost):
                raise DatabaseUnavailable(f"nothing was written: {lost.message}", retry_after_s=5) from lost
        finally:
            session.roll_back()
        return result

    def _has_committed_after_all(self, lost: OutcomeUnknown) -> bool:
        """What came of a commit, asked for again and again. Raises `NeverKnown` where nobody could tell in all that
        time."""
        give_up = monotonic() + FIND_OUT_S
        while True:
            try:
                return self.has_committed(lost.mark)
            except DatabaseUnavailable as error:
                if monotonic() > give_up:
                    raise NeverKnown(
                        f"{lost.message}, and it is not known whether this was written: look before you repeat it, "
                        "for money at `abhiapi ledger show`",
                        retry_after_s=5,
                    ) from error
            sleep(ASK_AGAIN_S)


class position(FunctionElement[int]):
    """Where a text first stands in another, from 1; 0: nowhere."""

    name = "position"
    inherit_cache = True
    type = Integer()


class utc(FunctionElement[str]):
    """A time in seconds since 1970 in a form of digits: ``utc('%Y-%m', seconds)``."""

    name = "utc"
    inherit_cache = True
    type = Text()


class month_start(FunctionElement[int]):
    """The first second of the month (UTC) in which a time in seconds since 1970 lies."""

    name = "month_start"
    inherit_cache = True
    type = BigInteger()


_ARGUMENTS: dict[str, dict[type[FunctionElement[Any]], str]] = {
    "sqlite": {
        position: "instr({0}, {1})",
        utc: "strftime({0}, {1}, 'unixepoch')",
        month_start: "CAST(strftime('%s', {0}, 'unixepoch', 'start of month') AS BIGINT)",
    },
    "postgresql": {
        position: "strpos({0}, {1})",
        utc: "to_char(to_timestamp({1}) AT TIME ZONE 'UTC',"
        " replace(replace(replace({0}, '%%Y', 'YYYY'), '%%m', 'MM'), '%%d', 'DD'))",
        month_start: "CAST(extract(epoch FROM date_trunc('month', to_timestamp({0}) AT TIME ZONE 'UTC')) AS BIGINT)",
    },
}


def _spell(engine: str, kind: type[FunctionElement[Any]]) -> None:
    spelling = _ARGUMENTS[engine][kind]

    @compiles(kind, engine)
    def spelt(element: FunctionElement[Any], compiler: Any, **how: Any) -> str:
        return spelling.format(*(compiler.process(argument, **how) for argument in element.clauses))


for _engine, _kinds in _ARGUMENTS.items():
    for _kind in _kinds:
        _spell(_engine, _kind)
