#!lua flags=allow-oom
-- Ends the lease of a post whose comments were sealed and compacted.
-- KEYS[1] sealing  sealing:{p}      zset
-- KEYS[2] erased   erased:{p}:<id>  set
-- ARGV[1] now         ms since 1970; empty: Redis' clock
-- ARGV[2] id          post id
-- ARGV[3] lease       the score that the lease set
-- ARGV[4] compact_ms  how long the text of a deleted comment may stay in its segment
-- Returns 1, or 0 if the post is gone or has another score, because this lease has already ended
-- Refuses nothing
--
-- A comment that was erased during the lease could not set an earlier time. So the post stays if it has erased comments.
local sealing, erased = KEYS[1], KEYS[2]
local now, id, lease, compact_ms = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
if #KEYS ~= 2 or #ARGV ~= 4 or not (lease and compact_ms) then
  return redis.error_reply('ERR wrong arguments')
end

if tonumber(redis.call('ZSCORE', sealing, id)) ~= lease then
  return 0
end
if redis.call('EXISTS', erased) == 1 then
  redis.call('ZADD', sealing, now + compact_ms, id)
else
  redis.call('ZREM', sealing, id)
end
return 1
