#!lua flags=allow-oom
-- Deletes a comment for its author.
-- KEYS[1] post      post:{p}:<id>      hash; of a hidden post its `hidden`
-- KEYS[2] comments  comments:{p}:<id>  stream
-- KEYS[3] latest    latest:{p}:<id>    list
-- KEYS[4] feed      feed:{p}           zset
-- KEYS[5] changes   changes:{p}        zset
-- KEYS[6] gone      gone:{p}           zset
-- KEYS[7] kept      kept:{p}:<id>      hash: hidden comments; only for an operator, who deletes these too
-- ARGV[1] now           ms since 1970; empty: Redis' clock
-- ARGV[2] id            post id
-- ARGV[3] comment       comment id
-- ARGV[4] user          who deletes it
-- ARGV[5] latest_count  how many comments `latest` holds
-- Returns 1
-- Refuses NOPOST NOCOMMENT FORBIDDEN
local post, comments, latest, feed, changes, gone, kept = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local now, id, comment, user, latest_count = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if #KEYS < 6 or #KEYS > 7 or #ARGV ~= 5 or not tonumber(latest_count) then
  return redis.error_reply('ERR wrong arguments')
end

if redis.call('EXISTS', post) == 0 then
  return redis.error_reply('NOPOST no such post')
end
local entry = redis.call('XRANGE', comments, comment, comment)[1]
local copy = not entry and kept and redis.call('HGET', kept, comment)
if not entry and (not copy or copy:sub(1, 1) ~= '[') then
  return redis.error_reply('NOCOMMENT no such comment')
end
local author = entry and entry[2][2] or cjson.decode(copy)[1]
if author ~= user then
  return redis.error_reply('FORBIDDEN only the author of a comment may delete it')
end
local revision = next_revision(now, changes, gone)

if not entry then
  return redis.call('HDEL', kept, comment)
end
remove_comment(comments, latest, feed, changes, id, comment, latest_count, revision)
return 1
