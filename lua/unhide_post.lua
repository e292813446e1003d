#!lua
-- Shows a hidden post again: with its comments, its count and its place in the feed.
-- KEYS[1] post      post:{p}:<id>      hash
-- KEYS[2] hidden    hidden:{p}:<id>    hash
-- KEYS[3] comments  comments:{p}:<id>  stream
-- KEYS[4] segments  segments:{p}:<id>  list
-- KEYS[5] erased    erased:{p}:<id>    set
-- KEYS[6] feed      feed:{p}           zset
-- KEYS[7] changes   changes:{p}        zset
-- KEYS[8] gone      gone:{p}           zset
-- KEYS[9] due       due:{p}            zset
-- ARGV[1] now  ms since 1970; empty: Redis' clock
-- ARGV[2] id   post id
-- Returns 1, or 0 if it was not hidden
-- Refuses NOPOST
--
-- lease_due moves the post from `due` to image work: its JPEG was erased, or was never made.
local post, hidden, comments, segments, erased = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local feed, changes, gone, due = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local now, id = now_ms(ARGV[1]), ARGV[2]
if #KEYS ~= 9 or #ARGV ~= 2 then
  return redis.error_reply('ERR wrong arguments')
end

local status = redis.call('HGET', hidden, 'status')
if not status and redis.call('EXISTS', post) == 0 then
  return redis.error_reply('NOPOST no such post')
end
local revision = next_revision(now, changes, gone)

if not status then
  return 0
end
redis.call('RENAME', hidden, post)
redis.call('HDEL', post, 'hidden_at')
redis.call('ZADD', due, now, id)
if status == 'ready' then
  redis.call('ZADD', feed, (count_comments(comments, segments, erased)), id)
  redis.call('ZADD', changes, revision, id)
  redis.call('ZREM', gone, id)
end
return 1
