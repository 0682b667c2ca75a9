"""One connection to Redis for a whole process, and what happens when Redis is slow or gone.

What greenlets ask while a batch is on its way gathers and leaves together as the next one, so that Redis hears a
process's commands in the order in which they were asked, over one connection, however many callers wait. A batch that
is not answered within tens of milliseconds ends the line for everybody at once: `RedisAway`, without another wait,
until the one greenlet that owns the connection has it back. What Redis must be told before anybody asks again is said
first. Knows nothing of limits, and nothing about money may ever come through here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import gevent
import redis
from gevent.event import AsyncResult, Event
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool
from redis.retry import Retry

log = logging.getLogger("abhiapi")

TIMEOUT_S = 0.05  # longest wait for Redis's answer to a batch
CONNECT_S = 1.0  # and for a connection: nobody waits for that
ANSWER_S = 1.0  # a caller waits no longer than this, come what may
KEEP_ALIVE_S = 10.0  # a line that has been idle this long is tried, so that no caller finds it dead
BATCH_MAX = 256  # commands in one batch
PAUSE_S, PAUSE_MAX_S = 0.02, 1.0  # before the next try to come back: doubled each time, and forgotten when all was well
WELL_S = 30.0
PROBE = "abhiapi:probe"

Command = tuple[str | bytes | int, ...]


class RedisAway(Exception):
    """Redis did not answer in time, or not as it should. Whether it has heard the command is not known."""


class RedisLine:
    """Commands to one Redis, in order. ``ask`` waits for two batches at most."""

    def __init__(
        self,
        url: str,
        scripts: Sequence[str] = (),
        *,
        missed: Callable[[], Iterable[list[Command]]] = tuple,
        last_words: Callable[[], list[Command]] = list,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """``missed`` gives what a Redis that is back must hear, part by part; ``last_words`` what goes with the first
        command that is asked of it again, so that nothing gets in between."""
        self._url, self._timeout_s = url, timeout_s
        self._scripts = scripts
        self._missed, self._last_words = missed, last_words
        self._connection: Any = None  # redis-py's calls have no types
        self._gathered: list[tuple[Command, AsyncResult[Any] | None]] = []
        self._wake = Event()
        self._tried = Event()  # the first connection has been made, or not
        self._pause_s = 0.0
        self.is_up = False
        self._owner = gevent.spawn(self._live)
        self._tried.wait(CONNECT_S)

    def ask(self, *command: str | bytes | int) -> Any:
        """Redis's answer. Raises `RedisAway`, at once where Redis is known to be away."""
        if not self.is_up:
            raise RedisAway
        answer: AsyncResult[Any] = AsyncResult()
        self._gathered.append((command, answer))
        self._wake.set()
        try:
            return answer.get(timeout=ANSWER_S)
        except gevent.Timeout as error:
            raise RedisAway("this process was too busy to hear the answer") from error

    def tell(self, *command: str | bytes | int) -> None:
        """Say something whose answer nobody waits for. Raises `RedisAway` where Redis is known to be away."""
        if not self.is_up:
            raise RedisAway
        self._gathered.append((command, None))
        self._wake.set()

    def close(self) -> None:
        self.is_up = False
        self._owner.kill()
        self._drop()

    def _live(self) -> None:
        while True:
            self._come_back()
            since = monotonic()
            self._fall(self._serve())
            if monotonic() - since > WELL_S:
                self._pause_s = 0.0

    def _serve(self) -> Exception:
        """Send what is asked until something goes wrong: what."""
        while True:
            self._wake.wait(KEEP_ALIVE_S)
            self._wake.clear()
            batch, self._gathered = self._gathered[:BATCH_MAX], self._gathered[BATCH_MAX:]
            if self._gathered:
                self._wake.set()
            trouble = self._exchange(batch or [(("PING",), None)])
            if trouble is not None:
                return trouble

    def _exchange(self, batch: list[tuple[Command, AsyncResult[Any] | None]]) -> Exception | None:
        """Send commands together and hand out their answers. What went wrong, if anything did."""
        connection = self._connection
        trouble: Exception | None = None
        waiting = [answer for _, answer in batch]
        try:
            packed = connection.pack_commands([command for command, _ in batch])
            connection.send_packed_command(packed, check_health=False)
            while waiting:
                answer = waiting[0]
                try:
                    value = _read(connection)
                except redis.ResponseError as error:  # no memory, read-only, scripts gone: it answers, and is no use
                    trouble = error
                    value = RedisAway(str(error))
                del waiting[0]
                if answer is None:
                    continue
                if isinstance(value, Exception):
                    answer.set_exception(value)
                else:
                    answer.set(value)
        except Exception as error:  # whatever it is, nobody may be left waiting
            trouble = error
            for answer in waiting:
                if answer is not None:
                    answer.set_exception(RedisAway(str(error)))
        return trouble

    def _fall(self, error: Exception) -> None:
        self.is_up = False
        self._drop()
        gathered, self._gathered = self._gathered, []
        for _, answer in gathered:
            if answer is not None:
                answer.set_exception(RedisAway(str(error)))
        log.warning("Redis is away (%s): until it is back, limits are counted by each process for itself", error)

    def _come_back(self) -> None:
        """Try until Redis answers, tell it what it has missed, and open the line."""
        while True:
            gevent.sleep(self._pause_s)
            self._pause_s = min(PAUSE_MAX_S, max(PAUSE_S, 2 * self._pause_s))
            try:
                self._drop()
                self._connection = self._connected()
                trouble = self._tell_missed()
            except Exception as error:  # whatever it is: this greenlet is the only one that can mend it
                trouble = error
            if trouble is None:
                log.info("Redis answers: limits are shared between processes")
                self._tried.set()
                return
            if not self._tried.is_set():
                log.warning("Redis cannot be used (%s): limits are counted by each process for itself", trouble)
                self._tried.set()

    def _connected(self) -> Any:
        connection = _connection(self._url, self._timeout_s)
        timeout = gevent.Timeout(CONNECT_S, redis.TimeoutError("no connection within a second"))  # name look-ups too
        with timeout:
            connection.connect()
            for script in self._scripts:
                connection.send_command("SCRIPT", "LOAD", script, check_health=False)
                connection.read_response()
            # A replica, or a Redis without room, answers PING and takes no call.
            connection.send_command("SET", PROBE, 1, "PX", 1000, check_health=False)
            connection.read_response()
        return connection

    def _tell_missed(self) -> Exception | None:
        for commands in self._missed():
            trouble = self._exchange([(command, None) for command in commands])
            if trouble is not None:
                return trouble
        self._gathered = [(command, None) for command in self._last_words()]
        if self._gathered:
            self._wake.set()
        self.is_up = True
        return None

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What an operator wants to know of a Redis."""

    version: str
    latency_ms: int
    eviction_policy: str


def look(url: str) -> Seen:
    """Ask a Redis how it is. Raises `RedisAway` with a reason that shows no password."""
    connection = _connection(url, CONNECT_S)

    def ask(*command: str | int) -> Any:
        connection.send_command(*command, check_health=False)
        return connection.read_response()

    try:
        connection.connect()
        ask("SET", PROBE, 1, "PX", 1000)
        started = monotonic()
        ask("PING")
        latency_ms = int((monotonic() - started) * 1000)
        lines = ask("INFO").decode("utf-8", "replace").splitlines()
    except (redis.RedisError, OSError) as error:
        raise RedisAway(str(error)) from error
    finally:
        connection.disconnect()
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    return Seen(told.get("redis_version", "unknown"), latency_ms, told.get("maxmemory_policy", "unknown"))


def _connection(url: str, timeout_s: float) -> Any:
    options = ConnectionPool.from_url(url, driver_info=None, protocol=2)  # which reads the URL, and makes no connection
    return options.connection_class(
        **options.connection_kwargs
        | {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": CONNECT_S,
            "retry": Retry(NoBackoff(), 0),
        }
    )


def _read(connection: Any) -> Any:
    try:
        return connection.read_response(disconnect_on_error=False)
    except redis.TimeoutError:
        if not connection.can_read(0):
            raise
        return connection.read_response()  # it has answered: this process was too busy to look
