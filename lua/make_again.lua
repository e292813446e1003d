#!lua flags=allow-oom
-- Puts a ready post whose JPEG is missing back into the outbox of image work.
-- KEYS[1] post  post:{p}:<id>  hash
-- KEYS[2] due   due:{p}        zset
-- ARGV[1] now   ms; empty: Redis' clock
-- ARGV[2] id    post id
-- Returns 1, or 0 if it is not ready, or due already
-- Refuses nothing
local post, due = KEYS[1], KEYS[2]
local now, id = tonumber(ARGV[1]), ARGV[2]
if #KEYS ~= 2 or #ARGV ~= 2 then
  return redis.error_reply('ERR wrong arguments')
end

if redis.call('HGET', post, 'status') ~= 'ready' then
  return 0
end
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
return redis.call('ZADD', due, 'NX', now, id)
