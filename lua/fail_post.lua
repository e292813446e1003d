#!lua flags=allow-oom
-- Ends a post whose image can never be made. Its bytes are kept until it is deleted.
-- KEYS[1] post    post:{p}:<id>  hash
-- KEYS[2] due     due:{p}        zset
-- ARGV[1] now     ms; empty: Redis' clock
-- ARGV[2] id      post id
-- ARGV[3] attempt the attempt that failed
-- ARGV[4] code    one word
-- ARGV[5] detail  a sentence for people
-- ARGV[6] making  prefix of the users' `making` keys of this partition, to which the author is appended
-- Returns 1
-- Refuses NOPOST STALE
-- Only the current attempt may fail a post: an older one may have met its end by being late.
-- The post is due, so that a JPEG is erased which an older attempt stores after this.
local post, due, making = KEYS[1], KEYS[2], ARGV[6]
local now, id, attempt, code, detail = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
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
