"""Calls per minute and calls at once as all processes count them together, in Redis.

Windows and places are sorted sets, never counters: a call's member in the set of its key's minute has the time at
which it was made as its score, its member in the set of places the time at which the place ends unless it is renewed.
Each decision is one Lua script by Redis's own clock, so neither the number of processes nor the clocks of their
machines matter. All of it may be lost: what this process knows of the last minute is told again to a Redis that comes
back. ``None`` for an answer means that Redis is away and the caller decides by itself.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Any, Literal

import gevent

from abhiapi.redis_line import TIMEOUT_S, Command, RedisAway, RedisLine
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


# Arguments that many scripts share: times are microseconds, by Redis's clock.
_NOW = "local t = redis.call('TIME') local now = t[1] * 1000000 + t[2] "
_STANDING = """
local function standing(key, window)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now - window)
  local oldest = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  return redis.call('ZCARD', key), oldest[2] and (oldest[2] + window - now) or window
end
local function place(key, member, lease)
  redis.call('ZADD', key, now + lease, member)
  redis.call('PEXPIRE', key, math.ceil(lease / 1000))
end
"""
# KEYS: places, minute. ARGV: member, at once, per minute, lease, window. The place first: its refusal counts nothing.
ENTER = _NOW + _STANDING + """
local lease, window = tonumber(ARGV[4]), tonumber(ARGV[5])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local used, resets = standing(KEYS[2], window)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return {1, used, resets} end
if used >= tonumber(ARGV[3]) then return {2, used, resets} end
place(KEYS[1], ARGV[1], lease)
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('PEXPIRE', KEYS[2], math.ceil(window / 1000))
return {0, used + 1, resets}
"""  # fmt: skip
# KEYS: places. ARGV: member, at once (0: only look), lease.
TAKE = _NOW + _STANDING + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local running = redis.call('ZCARD', KEYS[1])
if running >= tonumber(ARGV[2]) then return {1, running} end
place(KEYS[1], ARGV[1], tonumber(ARGV[3]))
return {0, running + 1}
"""  # fmt: skip
# KEYS: places, minute. ARGV: member (none: only look), window.
LEAVE = _NOW + _STANDING + """
redis.call('ZREM', KEYS[1], ARGV[1])
return {standing(KEYS[2], tonumber(ARGV[2]))}
"""  # fmt: skip
# KEYS: window. ARGV: members' beginning, how many to count (0: only look), limit, window.
HIT = _NOW + _STANDING + """
local amount, window = tonumber(ARGV[2]), tonumber(ARGV[4])
local used, resets = standing(KEYS[1], window)
if used + amount > tonumber(ARGV[3]) then return {2, used, resets} end
for i = 1, amount do redis.call('ZADD', KEYS[1], now, ARGV[1] .. ':' .. i) end
if amount > 0 then redis.call('PEXPIRE', KEYS[1], math.ceil(window / 1000)) end
return {0, used + amount, resets}
"""  # fmt: skip
# KEYS: the places of each member. ARGV: lease, members. Also tells a Redis that has forgotten them.
RENEW = _NOW + _STANDING + "for i, key in ipairs(KEYS) do place(key, ARGV[i + 1], tonumber(ARGV[1])) end"
# KEYS: the places of each member. ARGV: members.
FORGET = "for i, key in ipairs(KEYS) do redis.call('ZREM', key, ARGV[i]) end"
# KEYS: the minute of each call. ARGV: window, then each call's member and age. A call that is known keeps its time.
RECOUNT = _NOW + """
local window = tonumber(ARGV[1])
for i, key in ipairs(KEYS) do
  redis.call('ZADD', key, 'NX', now - ARGV[2 * i + 1], ARGV[2 * i])
  redis.call('PEXPIRE', key, math.ceil(window / 1000))
end
"""  # fmt: skip
SCRIPTS = (ENTER, TAKE, LEAVE, HIT, RENEW, FORGET, RECOUNT)
_SHA = {script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest() for script in SCRIPTS}


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
        self._lease = int(lease_s * _MICROS)
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
        answer = self._ask(ENTER, (_places(key_id), _minute(key_id)), member, at_once, per_minute, self._lease, window)
        if answer is None:
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
        answer = self._ask(LEAVE, (_places(key_id), _minute(key_id)), member, WINDOW_S * _MICROS)
        if answer is None:
            self._left_behind(key_id, member)
        return None if answer is None else _standing(answer)

    def standing(self, key_id: int) -> Standing | None:
        answer = self._ask(LEAVE, (_places(key_id), _minute(key_id)), "", WINDOW_S * _MICROS)
        return None if answer is None else _standing(answer)

    def take(self, key_id: int, member: str, at_once: int) -> tuple[bool, int] | None:
        """Take a place alone: whether there was one, and how many are taken now. With 0 at once it only looks."""
        answer = self._ask(TAKE, (_places(key_id),), member, at_once, self._lease)
        if answer is None:
            self._left_behind(key_id, member)
            return None
        return answer[0] == 0, answer[1]

    def give_back(self, key_id: int, member: str) -> None:
        """Give a place back without waiting until Redis has heard it."""
        try:
            self._line.tell(*_command(FORGET, [_places(key_id)], member))
        except RedisAway:
            self._left_behind(key_id, member)

    def also_running(self, running: Running) -> None:
        """Renew these places too."""
        self._all_running.append(running)

    def hit(self, key: str, member: str, *, amount: int, limit: int, window_s: int) -> tuple[bool, Standing] | None:
        """Count in a window of its own, apart from calls; an amount of 0 only looks."""
        answer = self._ask(HIT, (f"abhiapi:window:{key}",), member, amount, limit, window_s * _MICROS)
        return None if answer is None else (answer[0] == 0, _standing(answer[1:]))

    def _ask(self, script: str, names: tuple[str, ...], *arguments: str | int) -> list[int] | None:
        try:
            answer: list[int] = self._line.ask("EVALSHA", _SHA[script], len(names), *names, *arguments)
        except RedisAway:
            return None
        return answer

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
            except RedisAway:
                pass  # it will be told when it is back
            except Exception:  # a bug: without this line long calls would lose their places
                log.exception("places were not renewed, and will be tried again")

    def _running(self) -> list[tuple[int, str]]:
        return [place for running in self._all_running for place in running()]

    def _renewals(self) -> list[Command]:
        calls = self._running()
        commands: list[Command] = []
        for start in range(0, len(calls), TOLD_AT_ONCE):
            part = calls[start : start + TOLD_AT_ONCE]
            names = [_places(key_id) for key_id, _ in part]
            commands.append(_command(RENEW, names, self._lease, *(member for _, member in part)))
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
            words.append(_command(FORGET, [_places(key_id) for _, key_id, _ in part], *(entry[2] for entry in part)))
        return words + self._renewals()

    def _recount(self, calls: list[tuple[float, int, str]]) -> Command:
        now = monotonic()
        told: list[str | int] = []
        for made_at, _, member in calls:
            told += [member, int((now - made_at) * _MICROS)]
        return _command(RECOUNT, [_minute(key_id) for _, key_id, _ in calls], WINDOW_S * _MICROS, *told)


def _command(script: str, names: list[str], *arguments: str | int) -> Command:
    return ("EVALSHA", _SHA[script], len(names), *names, *arguments)


def _standing(answer: list[Any]) -> Standing:
    return Standing(answer[0], answer[1] / _MICROS)


def _places(key_id: int) -> str:
    return f"abhiapi:{{{key_id}}}:places"


def _minute(key_id: int) -> str:
    return f"abhiapi:{{{key_id}}}:minute"
