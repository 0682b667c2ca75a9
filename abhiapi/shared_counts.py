"""Calls per minute and calls at once as all processes count them together, in Redis.

Windows and places are sorted sets, never counters: a call's member in the set of its key's minute has the time at
which it was made as its score, its member in the set of places the time at which the place ends unless it is renewed.
Each decision is one Lua script by Redis's own clock, so neither the number of processes nor the clocks of their
machines matter. All of it may be lost: what this process knows of the last minute is told again to a Redis that comes
back. ``None`` for an answer means that Redis is away and the caller decides by itself.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Any, Literal

import gevent

from abhiapi.redis_line import TIMEOUT_S, Command, RedisAway, RedisLine
from abhiapi.shared_scripts import ENTER, FORGET, HIT, LEAVE, RECOUNT, RENEW, SCRIPTS, SHA
from abhiapi.windows import Standing

log = logging.getLogger("abhiapi")

LEASE_S = 45.0  # after which a killed process's places are free
RENEW_S = 10.0
WINDOW_S = 60
TOLD_AT_ONCE = 250  # calls in one command: Redis is not kept from others for long
RECENT_MAX, LEFT_MAX = 100_000, 20_000
_MICROS = 1_000_000

Running = Callable[[], Iterable[tuple[int, str]]]

Verdict = Literal["admitted", "at_once", "minute"]
_VERDICTS: tuple[Verdict, ...] = ("admitted", "at_once", "minute")
_FORGOTTEN = 3  # instead of a verdict: Redis does not know any more what it was told by this process
TELL_AGAIN_S = 1.0  # all calls of a batch hear that it has forgotten: one of them tells it again


class SharedCounts:
    """The counts of all processes. What is asked while Redis is away is answered with None."""

    def __init__(
        self,
        url: str,
        running: Running,
        *,
        lease_s: float = LEASE_S,
        renew_s: float = RENEW_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """``running``: the calls of this process that hold a place, as (key, member)."""
        self._all_running = [running]
        self._known = f"abhiapi:known:{secrets.token_hex(8)}"
        self._told_again_at = -TELL_AGAIN_S
        self.lease = int(lease_s * _MICROS)
        self._lease_s, self._renew_s = lease_s, renew_s
        self._recent: deque[tuple[float, int, str]] = deque(maxlen=RECENT_MAX)  # calls admitted here in the last minute
        self._left: deque[tuple[float, int, str]] = deque(maxlen=LEFT_MAX)  # places that Redis may still count
        self._to_tell: deque[tuple[float, int, str]] | None = None  # of the recent ones, to a Redis that comes back
        self._line = RedisLine(url, SCRIPTS, missed=self._missed, last_words=self._last_words, timeout_s=timeout_s)
        self._renewer = gevent.spawn(self._renew_for_ever)

    @property
    def is_up(self) -> bool:
        return self._line.is_up

    def close(self) -> None:
        self._renewer.kill()
        self._line.close()

    def enter(self, key_id: int, member: str, *, at_once: int, per_minute: int) -> tuple[Verdict, Standing] | None:
        """Take a place and count one call of the minute, or neither."""
        window = WINDOW_S * _MICROS
        names = (places_of(key_id), _minute(key_id), self._known)
        answer = self.ask(ENTER, names, member, at_once, per_minute, self.lease, window)
        if answer is not None and answer[0] == _FORGOTTEN:
            self._tell_again()
            answer = self.ask(ENTER, names, member, at_once, per_minute, self.lease, window)
        if answer is None or answer[0] == _FORGOTTEN:
            self._left_behind(key_id, member)  # Redis may have heard it: if the call is not made, nobody gives it back
            return None
        return _VERDICTS[answer[0]], _standing(answer[1:])

    def admitted(self, key_id: int, member: str) -> None:
        """A call was admitted, by Redis or without it: told again if Redis forgets, or has not heard of it."""
        entry = (monotonic(), key_id, member)
        since = entry[0] - WINDOW_S
        while self._recent and self._recent[0][0] <= since:
            self._recent.popleft()
        self._recent.append(entry)
        if self._to_tell is not None:
            self._to_tell.append(entry)

    def leave(self, key_id: int, member: str) -> Standing | None:
        """Give a place back; how the key's minute stands then."""
        answer = self.ask(LEAVE, (places_of(key_id), _minute(key_id)), member, WINDOW_S * _MICROS)
        if answer is None:
            self._left_behind(key_id, member)
        return None if answer is None else _standing(answer)

    def standing(self, key_id: int) -> Standing | None:
        answer = self.ask(LEAVE, (places_of(key_id), _minute(key_id)), "", WINDOW_S * _MICROS)
        return None if answer is None else _standing(answer)

    def give_back(self, key_id: int, *members: str) -> None:
        """Give places back without waiting until Redis has heard it."""
        try:
            self._line.tell(*_command(FORGET, [places_of(key_id)] * len(members), *members))
        except RedisAway:
            for member in members:
                self._left_behind(key_id, member)

    def also_running(self, running: Running) -> None:
        """Renew these places too."""
        self._all_running.append(running)

    def hit(self, key: str, member: str, *, amount: int, limit: int, window_s: int) -> tuple[bool, Standing] | None:
        """Count in a window of its own, apart from calls; an amount of 0 only looks."""
        answer = self.ask(HIT, (f"abhiapi:window:{key}",), member, amount, limit, window_s * _MICROS)
        return None if answer is None else (answer[0] == 0, _standing(answer[1:]))

    def ask(self, script: str, names: tuple[str, ...], *arguments: str | int) -> Any:
        """What a script answers; None while Redis is away, which may have heard it all the same."""
        try:
            return self._line.ask("EVALSHA", SHA[script], len(names), *names, *arguments)
        except RedisAway:
            return None

    def tell(self, *command: str | int) -> None:
        """Raises `RedisAway` where Redis is known to be away."""
        self._line.tell(*command)

    def _left_behind(self, key_id: int, member: str) -> None:
        now = monotonic()
        while self._left and self._left[0][0] <= now - self._lease_s:
            self._left.popleft()  # its deadline has passed in Redis too
        self._left.append((now, key_id, member))

    def _renew_for_ever(self) -> None:
        """Keep the places of long calls. Told in the order of leaving: a place given back is never taken again."""
        while True:
            gevent.sleep(self._renew_s)
            try:
                for command in self._renewals():
                    self._line.tell(*command)
                self._line.tell("PEXPIRE", self._known, int(self._lease_s * 1000))
            except RedisAway:
                pass  # it will be told when it is back
            except Exception:  # a bug: without this line long calls would lose their places
                log.exception("places were not renewed, and will be tried again")

    def _tell_again(self) -> None:
        """All that Redis has lost although it never was away, before anything else is asked."""
        now = monotonic()
        if now - self._told_again_at < TELL_AGAIN_S:
            return
        self._told_again_at = now
        log.warning("Redis has forgotten what it was told, and is told again")
        recent = list(self._recent)
        commands = [self._recount(recent[at : at + TOLD_AT_ONCE]) for at in range(0, len(recent), TOLD_AT_ONCE)]
        try:
            for command in [*commands, *self._renewals(), self._say_known()]:
                self._line.tell(*command)
        except RedisAway:
            pass  # it will be told when it is back

    def _say_known(self) -> Command:
        return ("SET", self._known, 1, "PX", int(self._lease_s * 1000))

    def _running(self) -> list[tuple[int, str]]:
        return [place for running in self._all_running for place in running()]

    def _renewals(self) -> list[Command]:
        calls = self._running()
        commands: list[Command] = []
        for start in range(0, len(calls), TOLD_AT_ONCE):
            part = calls[start : start + TOLD_AT_ONCE]
            names = [places_of(key_id) for key_id, _ in part]
            commands.append(_command(RENEW, names, self.lease, *(member for _, member in part)))
        return commands

    def _missed(self) -> Iterator[list[Command]]:
        """The calls of the last minute, for a Redis that has been away: all but the last few."""
        self._to_tell = to_tell = self._recent.copy()
        while len(to_tell) > TOLD_AT_ONCE:
            yield [self._recount([to_tell.popleft() for _ in range(TOLD_AT_ONCE)])]

    def _last_words(self) -> list[Command]:
        """The last few of them, the places that were given back meanwhile, and those that are held."""
        to_tell, self._to_tell = self._to_tell, None
        words = [self._recount(list(to_tell))] if to_tell else []
        held = {member for _, member in self._running()}
        left = [entry for entry in self._left if entry[2] not in held]
        self._left.clear()
        for start in range(0, len(left), TOLD_AT_ONCE):
            part = left[start : start + TOLD_AT_ONCE]
            words.append(_command(FORGET, [places_of(key_id) for _, key_id, _ in part], *(entry[2] for entry in part)))
        return [*words, *self._renewals(), self._say_known()]

    def _recount(self, calls: list[tuple[float, int, str]]) -> Command:
        now = monotonic()
        told: list[str | int] = []
        for made_at, _, member in calls:
            told += [member, int((now - made_at) * _MICROS)]
        return _command(RECOUNT, [_minute(key_id) for _, key_id, _ in calls], WINDOW_S * _MICROS, *told)


def _command(script: str, names: list[str], *arguments: str | int) -> Command:
    return ("EVALSHA", SHA[script], len(names), *names, *arguments)


def _standing(answer: list[Any]) -> Standing:
    return Standing(answer[0], answer[1] / _MICROS)


def places_of(key_id: int) -> str:
    return f"abhiapi:{{{key_id}}}:places"


def _minute(key_id: int) -> str:
    return f"abhiapi:{{{key_id}}}:minute"
