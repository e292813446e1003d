#!lua
-- Takes a comment away from its post, for an operator, and keeps a copy.
-- KEYS[1] post      post:{p}:<id>      hash; of a hidden post its `hidden`
-- KEYS[2] comments  comments:{p}:<id>  stream
-- KEYS[3] segments  segments:{p}:<id>  list
-- KEYS[4] erased    erased:{p}:<id>    set
-- KEYS[5] latest    latest:{p}:<id>    list
-- KEYS[6] feed      feed:{p}           zset
-- KEYS[7] changes   changes:{p}        zset
-- KEYS[8] gone      gone:{p}           zset
-- KEYS[9] sealing   sealing:{p}        zset
-- KEYS[10] kept     kept:{p}:<id>      hash: comment id -> ["author","text"]
-- ARGV[1] now           ms since 1970; empty: Redis' clock
-- ARGV[2] id            post id
-- ARGV[3] comment       comment id
-- ARGV[4] latest_count  how many comments `latest` holds
-- ARGV[5] compact_ms    how long the text of a hidden comment may stay in its segment
-- ARGV[6] segment       as in delete_comment
-- ARGV[7] row           as in delete_comment
-- ARGV[8] tail          as in delete_comment
-- ARGV[9] refill        as in delete_comment
-- Returns 1, or 0 if it was hidden before, or else what delete_comment returns where the store must be read
-- Refuses NOPOST NOCOMMENT
--
-- The comment leaves the stream or its segment, as if it was deleted. So the number of comments does not contain it.
local post, comments, segments, erased, latest = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local feed, changes, gone, sealing, kept = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local now, id, comment, latest_count, compact_ms = now_ms(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local segment, row, tail, refill = ARGV[6], ARGV[7], ARGV[8], ARGV[9]
if #KEYS ~= 10 or #ARGV ~= 9 or not (latest_count and compact_ms) then
  return redis.error_reply('ERR wrong arguments')
end

if redis.call('EXISTS', post) == 0 then
  return redis.error_reply('NOPOST no such post')
end
local entry = redis.call('XRANGE', comments, comment, comment)[1]
local copy = redis.call('HGET', kept, comment)
if not entry and copy and copy:sub(1, 1) ~= '[' then
  return redis.error_reply('NOCOMMENT this comment was shown again as ' .. copy)
end
local _, own = nil, false
if not entry and not copy then
  _, own = find_segment(segments, comment)
  if not own or redis.call('SISMEMBER', erased, comment) == 1 then
    return redis.error_reply('NOCOMMENT no such comment')
  end
end
local revision = next_revision(now, changes, gone)

if not entry and copy then
  return 0
end
local rows = newest_without(comments, segments, erased, comment, entry, latest_count, tail, refill)
if not rows then
  local newest = list_segments(segments, redis.call('LLEN', segments) - 1, latest_count + 1 + redis.call('SCARD', erased))
  return {own or '', newest, redis.call('SMEMBERS', erased)}
end
if own and own ~= segment then
  return {own, {}, {}}
end
redis.call('HSET', kept, comment, entry and cjson.encode({entry[2][2], entry[2][4]}) or row)
remove_comment(comments, erased, latest, changes, sealing, id, comment, rows, revision, now, compact_ms)
redis.call('ZADD', feed, 'XX', (count_comments(comments, segments, erased)), id) -- XX: a hidden post stays out of it
return 1
