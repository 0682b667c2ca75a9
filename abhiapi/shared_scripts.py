"""What is decided in Redis, as Lua scripts: each is one decision, by Redis's own clock.

Arguments and scores are microseconds where they are times. Knows nothing of connections (`redis_line`), nor of what is
asked when (`shared_counts`).
"""

from __future__ import annotations

import hashlib

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
SHA = {script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest() for script in SCRIPTS}
