#!lua
-- Begins an attempt at a post's image, and the attempt's own lease.
-- KEYS[1] post   post:{p}:<id>  hash
-- KEYS[2] due    due:{p}        zset
-- ARGV[1] now    ms; empty: Redis' clock
-- ARGV[2] id     post id
-- ARGV[3] lease  the lease under which the work was handed out
-- ARGV[4] span   ms of the first attempt's lease; each further one has twice the time
-- ARGV[5] most   attempts
-- ARGV[6] making prefix of the users' `making` keys of this partition, to which the author is appended
-- Returns {attempt, upload id or false}; attempt 0: all were used, the post is failed now
-- Refuses NOPOST STALE
-- An attempt counts when its work starts: what only waited in a queue was not tried. A ready post has work when a
-- restore brought it back without its JPEG.
local post, due, now, id, lease = KEYS[1], KEYS[2], now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local span, most, making = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
if #KEYS ~= 2 or #ARGV ~= 6 or not (lease and span and most) then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', post, 'status', 'attempt', 'upload', 'author')
local status, attempt, upload, queue = row[1], tonumber(row[2]) or 0, row[3], making .. (row[4] or '')
if not status then
  return redis.error_reply('NOPOST no such post')
end
if status == 'failed' or tonumber(redis.call('ZSCORE', queue, id)) ~= lease then
  return redis.error_reply('STALE this work was handed out again')
end

if attempt >= most and status == 'processing' then
  redis.call('HSET', post, 'status', 'failed', 'code', 'exhausted',
    'detail', 'the image could not be made in ' .. most .. ' attempts', 'failed_at', now)
  redis.call('ZREM', queue, id)
  redis.call('ZADD', due, now, id)
  return {0, upload}
end
redis.call('HSET', post, 'attempt', attempt + 1)
redis.call('ZADD', queue, now + span * 2 ^ math.min(attempt, most), id)
return {attempt + 1, upload}
