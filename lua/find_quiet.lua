#!lua flags=allow-oom
-- Finds posts that have not changed for some time, so that their comments are sealed.
-- KEYS[1] changes  changes:{p}  zset
-- KEYS[2] sealing  sealing:{p}  zset
-- KEYS[3] quiet    quiet:{p}    string: the revision up to which posts were looked at
-- ARGV[1] now       ms since 1970; empty: Redis' clock
-- ARGV[2] quiet_ms  the time
-- ARGV[3] limit     posts that are looked at, which bounds the script's time
-- ARGV[4] streams   prefix of this partition's comment streams
-- Returns the number of posts that were looked at
-- Refuses nothing
--
-- A post that changes gets a greater revision than all others. So each post is looked at once after each of its changes.
-- If the clock has gone back, posts were looked at too early, and are looked at again.
local changes, sealing, quiet = KEYS[1], KEYS[2], KEYS[3]
local now, quiet_ms, limit, streams = now_ms(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
if #KEYS ~= 3 or #ARGV ~= 4 or not (quiet_ms and limit) then
  return redis.error_reply('ERR wrong arguments')
end

local looked, upto = tonumber(redis.call('GET', quiet) or 0), now - quiet_ms
local since = math.min(looked, upto)
local from, to = string.format('(%.0f', since), string.format('%.0f', upto)
local found = redis.call('ZRANGEBYSCORE', changes, from, to, 'WITHSCORES', 'LIMIT', 0, limit)

for i = 1, #found, 2 do
  if redis.call('EXISTS', streams .. found[i]) == 1 then
    redis.call('ZADD', sealing, 'NX', now, found[i])
  end
end
local reached = tonumber(found[#found] or since)
if reached ~= looked then
  redis.call('SET', quiet, string.format('%.0f', reached))
end
return #found / 2
