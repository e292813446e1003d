#!lua
-- Shows a post whose original and JPEG are stored.
-- KEYS[1] post      post:{p}:<id>      hash
-- KEYS[2] comments  comments:{p}:<id>  stream
-- KEYS[3] feed      feed:{p}           zset
-- KEYS[4] changes   changes:{p}        zset
-- KEYS[5] gone      gone:{p}           zset
-- KEYS[6] due       due:{p}            zset
-- ARGV[1] now        ms since 1970; empty: Redis' clock
-- ARGV[2] id         post id
-- ARGV[3] image      what the post says of its JPEG: see docs/keys.md, Posts
-- ARGV[4] making     prefix of this partition's `making` keys; the author is appended
-- Returns 1 if it is shown from now on, 0 if it was shown before
-- Refuses NOPOST STALE
--
-- The first attempt that succeeds publishes the post, even if it is not the current attempt, as long as the post is
-- processing. The upload is due at once, so that its chunks are erased.
-- If the post was shown before, its JPEG was made again, maybe by another encoder. Then only `image` changes.
local post, comments, feed, changes, gone, due = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local now, id, image, making = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
if #KEYS ~= 6 or #ARGV ~= 4 then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', post, 'status', 'upload', 'author', 'thumbhash')
local status, upload, queue = row[1], row[2], making .. (row[3] or '')
if not status then
  return redis.error_reply('NOPOST no such post')
end
if status == 'failed' then
  return redis.error_reply('STALE this post has failed')
end
if status == 'ready' then
  if image ~= row[4] then
    redis.call('ZADD', changes, next_revision(now, changes, gone), id)
    redis.call('HSET', post, 'thumbhash', image)
  end
  redis.call('ZREM', queue, id)
  return 0
end
local revision = next_revision(now, changes, gone)

redis.call('HSET', post, 'status', 'ready', 'thumbhash', image)
redis.call('HDEL', post, 'attempt', 'upload', 'trace')
redis.call('ZADD', feed, redis.call('XLEN', comments), id)
redis.call('ZADD', changes, revision, id)
redis.call('ZREM', queue, id)
if upload then
  redis.call('ZADD', due, now, upload)
end
return 1
