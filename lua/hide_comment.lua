#!lua
-- Takes a comment away from its post, for an operator, and keeps a copy.
-- KEYS[1] post      post:{p}:<id>      hash; of a hidden post its `hidden`
-- KEYS[2] comments  comments:{p}:<id>  stream
-- KEYS[3] latest    latest:{p}:<id>    list
-- KEYS[4] feed      feed:{p}           zset
-- KEYS[5] changes   changes:{p}        zset
-- KEYS[6] gone      gone:{p}           zset
-- KEYS[7] kept      kept:{p}:<id>      hash: comment id -> ["author","text"]
-- ARGV[1] now           ms since 1970; empty: Redis' clock
-- ARGV[2] id            post id
-- ARGV[3] comment       comment id
-- ARGV[4] latest_count  how many comments `latest` holds
-- Returns 1, or 0 if it was hidden before
-- Refuses NOPOST NOCOMMENT
--
-- The comment leaves the stream, as if it was deleted. So the number of comments stays the length of the stream.
local post, comments, latest, feed, changes, gone, kept = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local now, id, comment, latest_count = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
if #KEYS ~= 7 or #ARGV ~= 4 or not tonumber(latest_count) then
  return redis.error_reply('ERR wrong arguments')
end

if redis.call('EXISTS', post) == 0 then
  return redis.error_reply('NOPOST no such post')
end
local entry = redis.call('XRANGE', comments, comment, comment)[1]
local copy = redis.call('HGET', kept, comment)
if not entry and not copy then
  return redis.error_reply('NOCOMMENT no such comment')
end
if not entry and copy:sub(1, 1) ~= '[' then
  return redis.error_reply('NOCOMMENT this comment was shown again as ' .. copy)
end
local revision = next_revision(now, changes, gone)

if not entry then
  return 0
end
redis.call('HSET', kept, comment, cjson.encode({entry[2][2], entry[2][4]}))
remove_comment(comments, latest, feed, changes, id, comment, latest_count, revision)
return 1
