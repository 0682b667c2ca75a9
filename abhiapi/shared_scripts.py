"""What is decided in Redis, as Lua scripts: each is one decision, by Redis's own clock.

Arguments and scores are microseconds where they are times. Knows nothing of connections (`redis_line`), nor of what is
asked when (`shared_counts`, `shared_turns`).
"""

from __future__ import annotations

import hashlib

_NOW = "local t = redis.call('TIME') local now = t[1] * 1000000 + t[2] "
# What a clock that was ahead has left would count for as long as it was: no score is later than it can be now.
_AT_MOST = """
local function at_most(key, latest)
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', key, string.format('(%.0f', latest), '+inf')) do
    redis.call('ZADD', key, latest, member)
  end
end
"""
_STANDING = (
    _AT_MOST
    + """
local function standing(key, window)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now - window)
  at_most(key, now)
  local oldest = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  return redis.call('ZCARD', key), oldest[2] and (oldest[2] + window - now) or window
end
"""
)
_PLACE = """
local function place(key, member, lease)
  redis.call('ZADD', key, now + lease, member)
  redis.call('PEXPIRE', key, math.ceil(lease / 1000))
end
"""
# KEYS: places, minute, what is there while Redis has forgotten nothing that the process has told it.
# ARGV: member, at once, per minute, lease, window. The place first: its refusal counts nothing.
ENTER = _NOW + _STANDING + _PLACE + """
if redis.call('EXISTS', KEYS[3]) == 0 then return {3, 0, 0} end
local lease, window = tonumber(ARGV[4]), tonumber(ARGV[5])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
at_most(KEYS[1], now + lease)
local used, resets = standing(KEYS[2], window)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return {1, used, resets} end
if used >= tonumber(ARGV[3]) then  -- until as many have left the minute as are too many
  local beyond = used - tonumber(ARGV[3])
  return {2, used, redis.call('ZRANGE', KEYS[2], beyond, beyond, 'WITHSCORES')[2] + window - now}
end
place(KEYS[1], ARGV[1], lease)
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('PEXPIRE', KEYS[2], math.ceil(window / 1000))
return {0, used + 1, resets}
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
RENEW = _NOW + _PLACE + "for i, key in ipairs(KEYS) do place(key, ARGV[i + 1], tonumber(ARGV[1])) end"
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
# Whose turn it is at fal, of all who wait at any process; and a place, if it is the turn of one who waits at this one.
# KEYS: places, waiting, last turns. ARGV: process, its next place, at once, lease, patience, how long last turns are
# kept, how many calls wait at it, and "account:ms" for each account of theirs: how long the oldest has waited.
# What waits where is a hash: of each process when it was told, how many at once there, and those accounts. A process's
# list replaces the one before, and is nothing after so much patience. Two waiters of one account in the same second
# are equally old, and the process that asks goes first: a place moves to another process only for a reason.
NEXT = _NOW + _AT_MOST + _PLACE + """
local asking, at_once, patience = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[5])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
at_most(KEYS[1], now + ARGV[4])
at_most(KEYS[3], now)
redis.call('HSET', KEYS[2], asking, string.format('%.0f %s %s', now, ARGV[3], ARGV[8]))
redis.call('PEXPIRE', KEYS[2], math.ceil(patience / 1000))
local running = redis.call('ZCARD', KEYS[1])
if running >= at_once then return {0, running} end

local waits, number, lowest = {}, 0, at_once
local told = redis.call('HGETALL', KEYS[2])
for i = 1, #told, 2 do
  local at, most, accounts = string.match(told[i + 1], '^(%d+) (%d+) (.*)$')
  if math.abs(now - at) >= patience then
    redis.call('HDEL', KEYS[2], told[i])
  else
    lowest = math.min(lowest, tonumber(most))
    for account, ms in string.gmatch(accounts, '(%d+):(%d+)') do
      local since, wait = at - ms * 1000, waits[account]
      local second = math.floor(since / 1000000)
      if not wait then
        number, wait = number + 1, {since = since, second = second, process = told[i]}
        waits[account] = wait
      end
      if since < wait.since then wait.since = since end
      if second < wait.second or (second == wait.second and told[i] == asking) then
        wait.second, wait.process = second, told[i]
      end
    end
  end
end
if running >= lowest then return {0, running} end

local places = {}
if number > 1 then
  for _, member in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    local account = string.match(member, ':(%d+)$')  -- none: taken by an older version
    if account then places[account] = (places[account] or 0) + 1 end
  end
end
local first, fewest, longest
for account, wait in pairs(waits) do
  local has = places[account] or 0
  if not first or has <= fewest then
    local since = math.max(wait.since, tonumber(redis.call('ZSCORE', KEYS[3], account) or 0))
    if not first or has < fewest or since < longest then first, fewest, longest = account, has, since end
  end
end
if not first or waits[first].process ~= asking then return {0, running} end

place(KEYS[1], ARGV[2] .. ':' .. first, tonumber(ARGV[4]))
redis.call('ZADD', KEYS[3], now, first)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - ARGV[6])
redis.call('PEXPIRE', KEYS[3], math.ceil(ARGV[6] / 1000))
if ARGV[7] == '1' then redis.call('HDEL', KEYS[2], asking) end
return {tonumber(first), running + 1}
"""  # fmt: skip
# KEYS: places.
TAKEN = _NOW + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
return redis.call('ZCARD', KEYS[1])
"""  # fmt: skip
SCRIPTS = (ENTER, LEAVE, HIT, RENEW, FORGET, RECOUNT, NEXT, TAKEN)
SHA = {script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest() for script in SCRIPTS}
