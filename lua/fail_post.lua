#!lua flags=allow-oom
-- Ends the processing of a post whose image can never be made. Its bytes are kept until the post is deleted.
-- KEYS[1] post  post:{p}:<id>  hash
-- KEYS[2] due   due:{p}        zset
-- ARGV[1] now      ms since 1970; empty: Redis' clock
-- ARGV[2] id       post id
-- ARGV[3] attempt  number of the attempt that failed
-- ARGV[4] code     one word
-- ARGV[5] detail   a sentence for people
-- ARGV[6] making   prefix of this partition's `making` keys; the author is appended
-- Returns 1
-- Refuses NOPOST STALE
--
-- Only the current attempt may fail a post. An older attempt may have failed only because it was late.
-- The post is due at once: an older attempt may still store a JPEG, which must be erased.
local post, due = KEYS[1], KEYS[2]
local now, id, attempt, code, detail, making = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
if #KEYS ~= 2 or #ARGV ~= 6 or not tonumber(attempt) then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', post, 'status', 'attempt', 'upload', 'author')
local status, current, upload, queue = row[1], row[2], row[3], making .. (row[4] or '')
if not status then
  return redis.error_reply('NOPOST no such post')
end
if status ~= 'processing' or current ~= attempt then
  return redis.error_reply('STALE another attempt is the current one')
end

redis.call('HSET', post, 'status', 'failed', 'code', code, 'detail', detail, 'failed_at', now)
redis.call('ZREM', queue, id)
redis.call('ZADD', due, now, id)
if upload then
  redis.call('ZADD', due, now, upload)
end
return 1
