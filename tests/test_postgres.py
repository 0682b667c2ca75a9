"""What PostgreSQL alone has to prove: nobody freezes while it is waited for, and no commit is in doubt."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString

import gevent
import psycopg
import pytest
from sqlalchemy import text

from abhiapi import accounts, db_base, db_postgres, migrations, migrations_postgres, processes
from abhiapi.committer import GroupCommitter
from abhiapi.db import Busy, Database, Tx, database_at
from abhiapi.errors import DatabaseUnavailable, SchemaError
from abhiapi.migrations import migrate
from tests.harness import Clock, environment, until
from tests.postgres import Postgres
from tests.rows import Customer

pytestmark = pytest.mark.engines("postgresql")


def create(name: str) -> Any:
    return lambda tx: accounts.create(tx, name, now_ms=1).account_id


def names(database: Database) -> list[str]:
    return [account.name for account in database.read(accounts.everyone)]


def raw(url: str) -> psycopg.Connection[Any]:
    return psycopg.connect(url, autocommit=True)


WAIT = """
from gevent import monkey; monkey.patch_all()
import sys, gevent
from sqlalchemy import text
from abhiapi.db import database_at
database = database_at(sys.argv[1])
ticks = 0
def tick():
    global ticks
    while True:
        ticks += 1
        gevent.sleep(0.001)
ticking = gevent.spawn(tick)
jobs = [gevent.spawn(database.read, lambda tx: tx.one(text("SELECT pg_sleep(0.3)"))) for _ in range(3)]
gevent.joinall(jobs, raise_error=True)
print(ticks)
"""


def test_greenlets_go_on_while_others_wait_for_the_server(database_url: str) -> None:
    """psycopg has to notice that gevent has patched what it waits by."""
    done = subprocess.run(
        [sys.executable, "-c", WAIT, database_url], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


NO_NAMES = """
from gevent import monkey; monkey.patch_all()
import os, _socket, gevent
from abhiapi import accounts, db_postgres
from abhiapi.db import database_at
from abhiapi.errors import DatabaseUnavailable
sleep = monkey.get_original("time", "sleep")
_socket.getaddrinfo = lambda *of, **more: sleep(60)
db_postgres.REACH_S = 0.5
ticks = 0
def tick():
    global ticks
    while True:
        ticks += 1
        gevent.sleep(0.001)
gevent.spawn(tick)
reader = database_at("postgresql://abhiapi@database.example/ledger").reads()
looks = [gevent.spawn(reader.read, accounts.everyone) for _ in range(3)]
gevent.joinall(looks, timeout=30)
print(ticks, *{type(look.exception).__name__ for look in looks}, flush=True)
os._exit(0)
"""


def test_a_name_server_that_says_nothing_stops_no_greenlet_and_is_not_waited_for_long() -> None:
    """The limit for a connection begins when the name is known, so that the look-up needs another."""
    done = subprocess.run(
        [sys.executable, "-c", NO_NAMES], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    ticks, *outcomes = done.stdout.split()
    assert int(ticks) > 20
    assert outcomes == ["DatabaseUnavailable"]


def test_writers_take_turns_and_whoever_waits_too_long_is_told_so(database: Database, database_url: str) -> None:
    with raw(database_url) as other:
        other.execute("BEGIN")
        other.execute("SELECT pg_advisory_xact_lock(1094862921)")
        with pytest.raises(Busy) as trouble:
            database.write(create("ann"), patience_s=0)
        assert names(database) == []  # reading goes on
        other.execute("ROLLBACK")
    assert trouble.value.status == 503
    database.write(create("ann"), patience_s=0)


def test_what_a_role_has_by_default_changes_no_write(database: Database, database_url: str) -> None:
    """Under REPEATABLE READ a writer would not see what the one before it committed while it waited for its turn."""
    name = database_url.rpartition("/")[2]
    with raw(database_url) as other:
        other.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'")
        other.execute(f"ALTER DATABASE {name} SET statement_timeout = '1ms'")
    found = text("SELECT current_setting('transaction_isolation'), current_setting('statement_timeout')")
    for one in (database, database_at(database_url + "?options=-c%20default_transaction_isolation%3Dserializable")):
        assert one.write(lambda tx: tx.one(found)) == ("read committed", "0")


def test_a_broken_constraint_undoes_the_group_and_harms_no_neighbour(database: Database) -> None:
    writer = GroupCommitter(database)
    writer.write(create("ann"), patience_s=5)
    with pytest.raises(psycopg.IntegrityError):
        writer.write(lambda tx: tx.run(text("UPDATE accounts SET held_micros = -1")), patience_s=5)
    writer.write(create("bob"), patience_s=5)
    writer.close()
    assert names(database) == ["ann", "bob"]


def test_an_operation_that_goes_on_after_a_failed_statement_is_a_bug_and_writes_nothing(database: Database) -> None:
    """PostgreSQL answers such a COMMIT with a silent ROLLBACK."""

    def careless(tx: Tx) -> None:
        accounts.create(tx, "lost", now_ms=1)
        try:
            tx.run(text("UPDATE accounts SET held_micros = -1"))
        except psycopg.IntegrityError:
            pass

    with pytest.raises(AssertionError, match="went on"):
        database.write(careless)
    assert names(database) == []


def test_numbers_come_back_as_integers(database: Database, clock: Clock) -> None:
    Customer.new(database, clock)
    row = database.read(
        lambda tx: tx.one(text("SELECT SUM(balance_micros), 1 = 1, last_hash FROM accounts GROUP BY 3"))
    )
    assert row is not None
    assert [type(value) for value in row] == [int, int, bytes]
    with pytest.raises(ValueError, match="invalid literal"):
        database.read(lambda tx: tx.one(text("SELECT 1.5")))


class Relay:
    """A way to the server that can be cut at a COMMIT: before it was passed on, or after it was done, unanswered."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.cut_at: str = ""  # "before" or "after" the next COMMIT
        threading.Thread(target=self._serve, daemon=True).start()

    def url(self, direct: str) -> str:
        return direct.replace(f":{self._port}/", f":{self._listener.getsockname()[1]}/")

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._port))
            doomed = threading.Event()
            for task in (self._onwards, self._back):
                threading.Thread(target=task, args=(near, far, doomed), daemon=True).start()

    def _onwards(self, near: socket.socket, far: socket.socket, doomed: threading.Event) -> None:
        while data := _received(near):
            if self.cut_at and b"COMMIT\0" in data:
                when, self.cut_at = self.cut_at, ""
                if when == "before":
                    break
                doomed.set()
            far.sendall(data)
        _cut(near, far)

    def _back(self, near: socket.socket, far: socket.socket, doomed: threading.Event) -> None:
        while data := _received(far):
            if doomed.is_set():
                break
            near.sendall(data)
        _cut(near, far)


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except OSError:
        return b""


def _cut(*sockets: socket.socket) -> None:
    for sock in sockets:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other direction was faster
        sock.close()


@pytest.fixture
def relay(postgres: Postgres) -> Iterator[Relay]:
    made = Relay(postgres.port)
    yield made
    made.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_came_of_a_commit_whose_answer_was_lost_is_found_out(
    relay: Relay, database: Database, database_url: str, when: str
) -> None:
    """Neither a failure that was none nor a write that is done twice; by a server's writer and by a command."""
    writer = GroupCommitter(database_at(relay.url(database_url)))
    writer.write(create("ann"), patience_s=5)
    tried: list[str] = []

    def count(tx: Tx) -> int:
        tried.append("")
        return accounts.create(tx, "bob", now_ms=1).account_id

    relay.cut_at = when
    writer.write(count, patience_s=20)
    writer.close()
    assert len(tried) == (2 if when == "before" else 1)
    command = database_at(relay.url(database_url))
    command.write(create("cid"))
    relay.cut_at = when
    if when == "before":
        with pytest.raises(DatabaseUnavailable, match="nothing was written"):
            command.write(create("dan"))
    else:
        command.write(create("dan"))
    assert names(database) == ["ann", "bob", "cid", *(["dan"] if when == "after" else [])]


def test_a_command_asks_until_the_outcome_is_known_and_else_says_that_it_is_not(
    relay: Relay, database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain failure would be repeated, and the credit there twice."""
    monkeypatch.setattr(db_base, "ASK_AGAIN_S", 0.01)
    command = database_at(relay.url(database_url))
    has_committed, tries = command.has_committed, 0

    def at_last(mark: tuple[int, int]) -> bool:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise DatabaseUnavailable("not yet")
        return has_committed(mark)

    def never(mark: tuple[int, int]) -> bool:
        raise DatabaseUnavailable("not yet")

    monkeypatch.setattr(command, "has_committed", at_last)
    command.write(create("ann"))
    relay.cut_at = "after"
    command.write(create("bob"))
    assert tries == 3
    monkeypatch.setattr(command, "has_committed", never)
    monkeypatch.setattr(db_base, "FIND_OUT_S", 0.05)
    relay.cut_at = "after"
    with pytest.raises(db_base.NeverKnown, match=r"not known whether this was written.*abhiapi ledger show"):
        command.write(create("cid"))
    assert names(database) == ["ann", "bob", "cid"]


def test_an_outcome_that_nobody_can_tell_yet_is_waited_for_and_those_who_come_meanwhile_are_refused(
    relay: Relay, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = database_at(relay.url(database_url))
    writer = GroupCommitter(reached)
    writer.write(create("ann"), patience_s=5)
    refused: list[DatabaseUnavailable] = []
    has_committed = reached.has_committed

    def not_yet(mark: tuple[int, int]) -> bool:
        if not refused:
            gevent.spawn(refuse)
            gevent.sleep(0)
            raise DatabaseUnavailable("not yet")
        return has_committed(mark)

    def refuse() -> None:
        with pytest.raises(DatabaseUnavailable) as trouble:
            writer.write(create("late"), patience_s=0)
        refused.append(trouble.value)

    monkeypatch.setattr(reached, "has_committed", not_yet)
    relay.cut_at = "after"
    writer.write(create("bob"), patience_s=0)
    assert [error.message for error in refused] == ["not yet"]
    assert names(reached) == ["ann", "bob"]
    writer.close()


def test_a_reader_outlives_the_death_of_its_connection(database: Database, database_url: str) -> None:
    reads = database.reads()
    database.write(create("ann"))
    assert len(reads.read(accounts.everyone)) == 1
    with raw(database_url) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    assert len(reads.read(accounts.everyone)) == 1
    database.write(create("bob"))
    reads.close()


def test_a_process_is_dead_when_its_lock_was_free_for_long_enough(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restarted server frees every lock while the processes live: they take them again, and nobody is swept."""
    now = [0.0]
    monkeypatch.setattr(db_postgres, "monotonic", lambda: now[0])
    number = database.write(lambda tx: processes.start(tx, pid=1, now_ms=1))
    lock = database.process_lock()
    lock.take_place(number)
    observer = database_at(database_url)
    assert observer.dead({number: 1}) == set()
    with raw(database_url) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            " WHERE application_name LIKE 'abhiapi-process-%' AND datname = current_database()"
        )
    assert observer.dead({number: 1}) == set()  # seen free for the first time
    now[0] += db_postgres.FREE_FOR_S
    lock.keep()
    assert observer.dead({number: 1}) == set()  # it lives
    lock.release()
    until(lambda: _is_free(database_url), what="the server notices the end of the session")
    assert observer.dead({number: 1}) == set()
    now[0] += db_postgres.FREE_FOR_S - 1
    assert observer.dead({number: 1}) == set()
    now[0] += 1
    assert observer.dead({number: 1}) == {number}
    assert observer.is_dead(number, 1)


def test_time_in_which_nobody_could_look_makes_no_process_dead(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that came up for a moment, and was away again: whoever lives had no chance to take its lock."""
    now = [0.0]
    monkeypatch.setattr(db_postgres, "monotonic", lambda: now[0])
    observer = database_at(database_url)
    assert observer.dead({7: 1}) == set()

    def away(_: object) -> None:
        raise DatabaseUnavailable("the database cannot be used")

    with monkeypatch.context() as for_a_while:
        for_a_while.setattr(observer, "pooled", away)
        with pytest.raises(DatabaseUnavailable):
            observer.dead({7: 1})
    assert not observer.is_dead(7, 1)
    now[0] += db_postgres.FREE_FOR_S
    assert observer.dead({7: 1}) == set()
    now[0] += db_postgres.FREE_FOR_S + 1  # this process stood still
    assert observer.dead({7: 1}) == set()
    now[0] += db_postgres.FREE_FOR_S
    assert observer.dead({7: 1}) == {7}


def test_a_lock_is_taken_anew_where_the_server_says_nothing(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a failover that left the old connection hanging: others would take the process for dead."""
    lock = database.process_lock()
    assert isinstance(lock, db_postgres.ServerLock)
    lock.take_place(7)
    silent = lock._connection
    assert silent is not None

    def nothing(*_: object) -> None:
        silent.close()  # the server notices its end, and frees the lock
        until(lambda: _is_free(database_url), what="the server notices the end of the session")
        gevent.sleep(60)

    monkeypatch.setattr(silent, "execute", nothing)
    monkeypatch.setattr(db_postgres, "LOCK_S", 1)
    lock.keep()
    assert lock._connection not in (None, silent)
    assert database.dead({7: 1}) == set()
    assert database._free_since == {}  # type: ignore[attr-defined]
    lock.release()
    lock.keep()
    assert lock._connection is None  # nobody comes back after the end


def _is_free(url: str) -> bool:
    with raw(url) as other:
        row = other.execute(
            "SELECT count(*) FROM pg_stat_activity "
            " WHERE application_name LIKE 'abhiapi-process-%' AND datname = current_database()"
        ).fetchone()
        return row == (0,)


def test_a_standby_is_refused_and_its_answers_are_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are local to a server: on a standby every process of the primary's looks dead, and no commit made."""
    server = Postgres.start()
    try:
        server.make_template()
        server.become_standby()
        url = server.url("fresh")
        with pytest.raises(DatabaseUnavailable):
            database_at(url + "?target_session_attrs=any").reads().read(accounts.everyone)
        misled = database_at(url)
        assert isinstance(misled, db_postgres.PostgresDatabase)
        with pytest.raises(DatabaseUnavailable, match="name the primary"):
            misled.connect(in_full=True)
        monkeypatch.setitem(misled._parameters, "target_session_attrs", "any")  # as behind some proxies
        assert misled.read(accounts.everyone) == []
        with pytest.raises(DatabaseUnavailable, match="standby"):
            misled.dead({1: 1})
        with pytest.raises(DatabaseUnavailable, match="standby"):
            misled.has_committed((1, 1))
        with pytest.raises(DatabaseUnavailable):
            misled.write(create("ann"))
        assert misled._free_since == {}
        server.promote()
        misled.write(create("ann"))
        assert misled.dead({1: 1}) == set()
    finally:
        server.remove()


def test_a_database_of_another_program_or_a_newer_version_is_refused(postgres: Postgres, database_url: str) -> None:
    with raw(database_url) as other:
        other.execute("UPDATE abhiapi_schema SET version = 99")
    with pytest.raises(SchemaError, match="newer than this program's"):
        migrate(database_at(database_url))
    with postgres.fresh(empty=True) as url:
        with raw(url) as other:
            other.execute("CREATE TABLE theirs (it bigint)")
        with pytest.raises(SchemaError, match="some other program"):
            migrate(database_at(url))
        with raw(url) as other:
            other.execute("DROP TABLE theirs")
        with ThreadPoolExecutor(4) as pool:
            done = list(pool.map(lambda _: migrate(database_at(url)), range(4)))
        assert len([words for words in done if words]) == 1
        assert migrate(database_at(url)) is None


def test_what_another_process_makes_between_two_questions_is_ours(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgres.fresh(empty=True) as url, raw(url) as connection:
        ask = connection.execute

        def asked(query: LiteralString) -> psycopg.Cursor[Any]:
            answer = ask(query)
            migrate(database_at(url))
            return answer

        monkeypatch.setattr(connection, "execute", asked)
        assert migrations_postgres.version_of(connection, "it") == migrations.VERSION


def test_an_empty_schema_that_comes_first_hides_no_ledger(database_url: str) -> None:
    """One of the user's own name does, by PostgreSQL's default: a second, empty ledger would be made in it."""
    with raw(database_url) as other:
        other.execute("CREATE SCHEMA AUTHORIZATION CURRENT_USER")
    assert migrate(database_at(database_url)) is None


def test_a_password_is_in_no_message(postgres: Postgres) -> None:
    database = database_at(f"postgresql://ann:hush-hush@127.0.0.1:{postgres.port}/nowhere?connect_timeout=3")
    with pytest.raises(DatabaseUnavailable) as trouble:
        migrate(database)
    assert "nowhere" in trouble.value.message
    assert "hush" not in trouble.value.message + database.name
    with pytest.raises(DatabaseUnavailable) as trouble:
        database.write(create("ann"))
    assert "127.0.0.1" not in trouble.value.message  # which a customer may read


def test_steps_come_in_pairs() -> None:
    assert migrations_postgres.BORN + len(migrations_postgres.STEPS) == migrations.VERSION


def test_a_read_that_came_through_is_not_undone_by_how_its_connection_ends(
    database: Database, database_url: str
) -> None:
    """The server ends a snapshot that idles, as behind a backup that takes its time: what was read is good."""

    def read(tx: Tx) -> int:
        found = len(tx.all(text("SELECT 1")))
        with raw(database_url) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        return found

    assert database.read(read) == 1
    assert names(database) == []
    limits = text("SELECT current_setting('idle_in_transaction_session_timeout'), current_setting('statement_timeout')")
    assert isinstance(database, db_postgres.PostgresDatabase)
    assert database.read_at_leisure(lambda tx: tx.one(limits)) == ("0", "0")
    assert database.read(lambda tx: tx.one(limits)) == ("15s", "1min")


def test_what_is_too_large_is_no_trouble_of_the_databases(database: Database) -> None:
    """It would be tried for as long as a charge is, and the caller told to come back."""
    for statement in ("SELECT 1 / 0", "SELECT repeat('a', 2000000000)", "UPDATE accounts SET held_micros = -1"):
        create_and = [text(statement)]
        with pytest.raises(psycopg.Error):
            database.write(lambda tx, doing=create_and: (create("ann")(tx), tx.all(doing[0])))  # type: ignore[misc]
    assert database.is_trouble(psycopg.errors.ProgramLimitExceeded()) is False
    assert database.is_trouble(psycopg.errors.AdminShutdown()) is True
