#!lua flags=allow-oom
-- Deletes a post with its comments. Its objects are due to be erased.
-- KEYS[1] post      post:{p}:<id>      hash
-- KEYS[2] comments  comments:{p}:<id>  stream
-- KEYS[3] latest    latest:{p}:<id>    list
-- KEYS[4] feed      feed:{p}           zset
-- KEYS[5] changes   changes:{p}        zset
-- KEYS[6] gone      gone:{p}           zset
-- KEYS[7] due       due:{p}            zset
-- KEYS[8] making    making:{p}:<user>  zset: of the user who asks
-- ARGV[1] now       ms; empty: Redis' clock
-- ARGV[2] id        post id
-- ARGV[3] author    user who asks
-- ARGV[4] keep      ms for which a backup may still name its bytes
-- ARGV[5] told      ms for which deletions are told
-- ARGV[6] seen      "status comment-count newest-comment" that the post must still have, "-" for no comment; empty: any
-- Returns 1
-- Refuses NOPOST FORBIDDEN PRECONDITION
-- Deletions that nobody is told of any more are forgotten by the next one, which stays: the newest revision does too.
-- What a reader sees of a post changes only with what `seen` names, so comparing it here leaves no gap for a change.
-- The JPEG is due at once; original or chunks only when no kept backup can bring the post back.
local post, comments, latest, feed, changes, gone = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local due, making = KEYS[7], KEYS[8]
local now, id, author, keep, told = now_ms(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local seen = ARGV[6]
if #KEYS ~= 8 or #ARGV ~= 6 or not keep or not told then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', post, 'author', 'upload', 'status')
local owner, upload, status = row[1], row[2], row[3]
if not owner then
  return redis.error_reply('NOPOST no such post')
end
if owner ~= author then
  return redis.error_reply('FORBIDDEN only its author may delete a post')
end
if seen ~= '' then
  local newest = redis.call('LINDEX', latest, 0)
  newest = newest and cjson.decode(newest)[1] or '-'
  if seen ~= string.format('%s %d %s', status, redis.call('XLEN', comments), newest) then
    return redis.error_reply('PRECONDITION the post has changed')
  end
end
local revision = next_revision(now, changes, gone)

redis.call('UNLINK', post, comments, latest)
redis.call('ZREM', feed, id)
redis.call('ZREM', changes, id)
redis.call('ZREM', making, id)
redis.call('ZADD', gone, revision, id)
redis.call('ZREMRANGEBYSCORE', gone, '-inf', now - told)
redis.call('ZADD', due, now, id)
if upload then
  redis.call('ZADD', due, now + keep, upload)
end
return 1
