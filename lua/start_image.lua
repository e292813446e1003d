#!lua
-- Begins an attempt at a post's image, with a lease of its own.
-- KEYS[1] post  post:{p}:<id>  hash
-- KEYS[2] due   due:{p}        zset
-- ARGV[1] now           ms since 1970; empty: Redis' clock
-- ARGV[2] id            post id
-- ARGV[3] lease         the lease under which lease_images handed out the post
-- ARGV[4] lease_ms      length of the first attempt's lease; it doubles with each further attempt
-- ARGV[5] max_attempts  attempts that a post has
-- ARGV[6] making        prefix of this partition's `making` keys; the author is appended
-- Returns {attempt, upload id or false}; attempt 0: all attempts were used, and the post has now failed
-- Refuses NOPOST STALE
--
-- An attempt counts when its work starts. A post that only waited in the queue was not tried.
-- A ready post has work if a restore brought it back without its JPEG. It never fails.
local post, due = KEYS[1], KEYS[2]
local now, id, lease = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local lease_ms, max_attempts, making = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
if #KEYS ~= 2 or #ARGV ~= 6 or not (lease and lease_ms and max_attempts) then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', post, 'status', 'attempt', 'upload', 'author')
local status, attempt, upload, queue = row[1], tonumber(row[2]) or 0, row[3], making .. (row[4] or '')
if not status then
  return redis.error_reply('NOPOST no such post')
end
if status == 'failed' or tonumber(redis.call('ZSCORE', queue, id)) ~= lease then
  return redis.error_reply('STALE this work was leased again')
end

if attempt >= max_attempts and status == 'processing' then
  redis.call('HSET', post, 'status', 'failed', 'code', 'exhausted',
    'detail', 'the image could not be made in ' .. max_attempts .. ' attempts', 'failed_at', now)
  redis.call('ZREM', queue, id)
  redis.call('ZADD', due, now, id)
  return {0, upload}
end
redis.call('HSET', post, 'attempt', attempt + 1)
redis.call('ZADD', queue, now + lease_ms * 2 ^ math.min(attempt, max_attempts), id)
return {attempt + 1, upload}
