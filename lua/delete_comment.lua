#!lua flags=allow-oom
-- Deletes one's own comment.
-- KEYS[1] post      post:{p}:<id>      hash
-- KEYS[2] comments  comments:{p}:<id>  stream
-- KEYS[3] latest    latest:{p}:<id>    list
-- KEYS[4] feed      feed:{p}           zset
-- KEYS[5] changes   changes:{p}        zset
-- KEYS[6] gone      gone:{p}           zset
-- ARGV[1] now       ms; empty: Redis' clock
-- ARGV[2] id        post id
-- ARGV[3] comment   comment id
-- ARGV[4] author    user who asks
-- ARGV[5] shown     how many comments the feed shows
-- Returns 1
-- Refuses NOPOST NOCOMMENT FORBIDDEN
-- The latest comments are refilled from the stream, whichever was deleted: one path, and it heals.
local post, comments, latest, feed, changes, gone = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local now, id, comment, author, shown = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if #KEYS ~= 6 or #ARGV ~= 5 or not tonumber(shown) then
  return redis.error_reply('ERR wrong arguments')
end

if redis.call('EXISTS', post) == 0 then
  return redis.error_reply('NOPOST no such post')
end
local entry = redis.call('XRANGE', comments, comment, comment)[1]
if not entry then
  return redis.error_reply('NOCOMMENT no such comment')
end
if entry[2][2] ~= author then
  return redis.error_reply("FORBIDDEN only its author may delete a comment")
end
local revision = next_revision(now, changes, gone)

redis.call('XDEL', comments, comment)
redis.call('DEL', latest)
for _, kept in ipairs(redis.call('XREVRANGE', comments, '+', '-', 'COUNT', shown)) do
  redis.call('RPUSH', latest, cjson.encode({kept[1], kept[2][2], kept[2][4]}))
end
redis.call('ZADD', feed, redis.call('XLEN', comments), id)
redis.call('ZADD', changes, revision, id)
return 1
