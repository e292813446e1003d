#!lua flags=allow-oom
-- Deletes a comment for its author.
-- KEYS[1] post      post:{p}:<id>      hash; of a hidden post its `hidden`
-- KEYS[2] comments  comments:{p}:<id>  stream
-- KEYS[3] segments  segments:{p}:<id>  list
-- KEYS[4] erased    erased:{p}:<id>    set
-- KEYS[5] latest    latest:{p}:<id>    list
-- KEYS[6] feed      feed:{p}           zset
-- KEYS[7] changes   changes:{p}        zset
-- KEYS[8] gone      gone:{p}           zset
-- KEYS[9] sealing   sealing:{p}        zset
-- KEYS[10] kept     kept:{p}:<id>      hash: hidden comments; only for an operator, who deletes these too
-- ARGV[1] now           ms since 1970; empty: Redis' clock
-- ARGV[2] id            post id
-- ARGV[3] comment       comment id
-- ARGV[4] user          who deletes it
-- ARGV[5] latest_count  how many comments `latest` holds
-- ARGV[6] compact_ms    how long the text of a deleted comment may stay in its segment
-- ARGV[7] segment       the entry of the segment that the caller has read; empty: none
-- ARGV[8] row           the comment in that segment, as JSON: ["author","text"]
-- ARGV[9] tail          the newest entry of `segments` when the caller has read the store; empty: it has not
-- ARGV[10] refill       the newest comments in the store, as JSON: [["id","author","text"],…]; erased ones have only their id
-- Returns 1 if it is deleted. Otherwise the store must be read, and then the script is called again with what was read:
--   {the entry of the comment's segment, or empty if the comment is in the stream; the newest entries of `segments`,
--   newest first; the ids in `erased`}. The last two are empty if `latest` is known without the store
-- Refuses NOPOST NOCOMMENT FORBIDDEN
local post, comments, segments, erased, latest = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local feed, changes, gone, sealing, kept = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local now, id, comment, user, latest_count = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local compact_ms, segment, row, tail, refill = tonumber(ARGV[6]), ARGV[7], ARGV[8], ARGV[9], ARGV[10]
if #KEYS < 9 or #KEYS > 10 or #ARGV ~= 10 or not (latest_count and compact_ms) then
  return redis.error_reply('ERR wrong arguments')
end

if redis.call('EXISTS', post) == 0 then
  return redis.error_reply('NOPOST no such post')
end
local entry = redis.call('XRANGE', comments, comment, comment)[1]
local copy = not entry and kept and redis.call('HGET', kept, comment)
if copy and copy:sub(1, 1) ~= '[' then
  return redis.error_reply('NOCOMMENT no such comment')
end
local _, own = nil, false
if not entry and not copy then
  _, own = find_segment(segments, comment)
  if not own or redis.call('SISMEMBER', erased, comment) == 1 then
    return redis.error_reply('NOCOMMENT no such comment')
  end
end
local author = entry and entry[2][2] or cjson.decode(copy or (own == segment and row) or '[""]')[1]
if author ~= user and (not own or own == segment) then
  return redis.error_reply('FORBIDDEN only the author of a comment may delete it')
end
local revision = next_revision(now, changes, gone)

if copy then
  return redis.call('HDEL', kept, comment)
end
local rows = newest_without(comments, segments, erased, comment, entry, latest_count, tail, refill)
if not rows then
  local newest = list_segments(segments, redis.call('LLEN', segments) - 1, latest_count + 1 + redis.call('SCARD', erased))
  return {own or '', newest, redis.call('SMEMBERS', erased)}
end
if own and own ~= segment then
  return {own, {}, {}}
end
remove_comment(comments, erased, latest, changes, sealing, id, comment, rows, revision, now, compact_ms)
redis.call('ZADD', feed, 'XX', (count_comments(comments, segments, erased)), id) -- XX: a hidden post stays out of it
return 1
