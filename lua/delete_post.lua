#!lua flags=allow-oom
-- Deletes a post and its comments for the post's author, and schedules the erasure of its objects.
-- KEYS[1] post      post:{p}:<id>      hash; of a hidden post its `hidden`
-- KEYS[2] comments  comments:{p}:<id>  stream
-- KEYS[3] segments  segments:{p}:<id>  list
-- KEYS[4] erased    erased:{p}:<id>    set
-- KEYS[5] latest    latest:{p}:<id>    list
-- KEYS[6] feed      feed:{p}           zset
-- KEYS[7] changes   changes:{p}        zset
-- KEYS[8] gone      gone:{p}           zset
-- KEYS[9] sealing   sealing:{p}        zset
-- KEYS[10] due      due:{p}            zset
-- KEYS[11] making   making:{p}:<user>  zset: of the user who deletes it
-- KEYS[12] kept     kept:{p}:<id>      hash: hidden comments
-- KEYS[13] leaves   leaves:{p}         zset
-- KEYS[14] retired  retired:{p}        zset
-- ARGV[1] now          ms since 1970; empty: Redis' clock
-- ARGV[2] id           post id
-- ARGV[3] user         who deletes it
-- ARGV[4] keep_ms      how long a backup may still name the post's bytes
-- ARGV[5] remember_ms  how long a deletion is reported as a change
-- ARGV[6] expected     the state that the post must have: "status comment-count newest-comment", with "-" for no
--                      comment; empty: any state
-- ARGV[7] entry        of the post in the list of its author's posts
-- ARGV[8] leaf         prefix of this partition's leaf keys
-- Returns 1
-- Refuses NOPOST FORBIDDEN PRECONDITION
--
-- A deletion also removes deletions from `gone` that are older than remember_ms. It does not remove itself, so the
-- newest revision stays in Redis.
-- A reader sees changes of a post only in the three values of `expected`. They are compared here, so no change can
-- come between the comparison and the deletion.
-- `due` erases the JPEG at once. It erases the original or the chunks when no kept backup can bring the post back. In
-- `retired` the same is true for all segments of the post.
local post, comments, segments, erased, latest = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local feed, changes, gone, sealing, due = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local making, kept, leaves, retired = KEYS[11], KEYS[12], KEYS[13], KEYS[14]
local now, id, user = now_ms(ARGV[1]), ARGV[2], ARGV[3]
local keep_ms, remember_ms, expected = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local entry, leaf = ARGV[7], ARGV[8]
if #KEYS ~= 14 or #ARGV ~= 8 or not (keep_ms and remember_ms) then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', post, 'author', 'upload', 'status')
local author, upload, status = row[1], row[2], row[3]
if not author then
  return redis.error_reply('NOPOST no such post')
end
if author ~= user then
  return redis.error_reply('FORBIDDEN only the author of a post may delete it')
end
if expected ~= '' then
  local newest = redis.call('LINDEX', latest, 0)
  newest = newest and cjson.decode(newest)[1] or '-'
  if expected ~= string.format('%s %d %s', status, count_comments(comments, segments, erased), newest) then
    return redis.error_reply('PRECONDITION the post has changed')
  end
end
local revision = next_revision(now, changes, gone)
local first = redis.call('ZREVRANGEBYLEX', leaves, '[' .. entry, '-', 'LIMIT', 0, 1)[1] or '0'

if redis.call('EXISTS', segments) == 1 then
  redis.call('ZADD', retired, revision + keep_ms, id .. '/')
end
redis.call('UNLINK', post, comments, segments, erased, latest, kept)
redis.call('ZREM', sealing, id)
redis.call('ZREM', feed, id)
redis.call('ZREM', changes, id)
redis.call('ZREM', making, id)
redis.call('ZREM', leaf .. first, entry)
if first ~= '0' and redis.call('EXISTS', leaf .. first) == 0 then
  redis.call('ZREM', leaves, first)
end
redis.call('ZADD', gone, revision, id)
redis.call('ZREMRANGEBYSCORE', gone, '-inf', now - remember_ms)
redis.call('ZADD', due, now, id)
if upload then
  redis.call('ZADD', due, now + keep_ms, upload)
end
return 1
