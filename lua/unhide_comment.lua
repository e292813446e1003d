#!lua
-- Adds a hidden comment to its post again, as the newest one.
-- KEYS[1] post      post:{p}:<id>      hash; of a hidden post its `hidden`
-- KEYS[2] comments  comments:{p}:<id>  stream
-- KEYS[3] segments  segments:{p}:<id>  list
-- KEYS[4] erased    erased:{p}:<id>    set
-- KEYS[5] latest    latest:{p}:<id>    list
-- KEYS[6] feed      feed:{p}           zset
-- KEYS[7] changes   changes:{p}        zset
-- KEYS[8] gone      gone:{p}           zset
-- KEYS[9] kept      kept:{p}:<id>      hash: comment id -> ["author","text"], or the comment's new id
-- ARGV[1] now           ms since 1970; empty: Redis' clock
-- ARGV[2] id            post id
-- ARGV[3] comment       comment id
-- ARGV[4] latest_count  how many comments `latest` holds
-- Returns the id that the comment has now
-- Refuses NOPOST NOCOMMENT
--
-- The id is a new one, because a stream takes no entry before its newest. `kept` remembers it, so that the same call
-- again finds the same comment.
local post, comments, segments, erased, latest = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local feed, changes, gone, kept = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local now, id, comment, latest_count = now_ms(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4])
if #KEYS ~= 9 or #ARGV ~= 4 or not latest_count then
  return redis.error_reply('ERR wrong arguments')
end

if redis.call('EXISTS', post) == 0 then
  return redis.error_reply('NOPOST no such post')
end
local copy = redis.call('HGET', kept, comment)
if not copy and not redis.call('XRANGE', comments, comment, comment)[1] then
  return redis.error_reply('NOCOMMENT no such hidden comment')
end
local revision = next_revision(now, changes, gone)

if not copy then
  return comment -- it is not hidden
end
if copy:sub(1, 1) ~= '[' then
  return copy
end
local author, text = unpack(cjson.decode(copy))
local new = append_comment(comments, segments, now, author, text)
redis.call('HSET', kept, comment, new)
redis.call('LPUSH', latest, cjson.encode({new, author, text}))
redis.call('LTRIM', latest, 0, latest_count - 1)
redis.call('ZADD', feed, 'XX', (count_comments(comments, segments, erased)), id) -- XX: a hidden post stays out of it
redis.call('ZADD', changes, 'XX', revision, id)
return new
