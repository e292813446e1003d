#!lua
-- Adds a comment to a ready post.
-- KEYS[1] post      post:{p}:<id>      hash
-- KEYS[2] comments  comments:{p}:<id>  stream: author, text
-- KEYS[3] segments  segments:{p}:<id>  list of `<last id> <through> <name>`, oldest first
-- KEYS[4] erased    erased:{p}:<id>    set of comment ids
-- KEYS[5] latest    latest:{p}:<id>    list of ["id","author","text"], newest first
-- KEYS[6] feed      feed:{p}           zset
-- KEYS[7] changes   changes:{p}        zset
-- KEYS[8] gone      gone:{p}           zset
-- KEYS[9] sealing   sealing:{p}        zset
-- KEYS[10] once     once:{p}:…         string; only if the request has an Idempotency-Key
-- KEYS[11] rate     rate:{p}:…         string; only if the comment takes from a rate limit in this partition. It is the
--                                      last key: without an Idempotency-Key it is the tenth
-- ARGV[1] now          ms since 1970; empty: Redis' clock
-- ARGV[2] id           post id
-- ARGV[3] author       user
-- ARGV[4] text         the comment's text
-- ARGV[5] latest_count how many comments `latest` holds
-- ARGV[6] request      digest of the request
-- ARGV[7] remember_ms  how long the Idempotency-Key is remembered
-- ARGV[8] seal_at      with this many comments in the stream, the oldest ones are to go to the store; 0: never
-- ARGV[9] quota        units of the rate limit, only if there is one
-- ARGV[10] window_ms   of the rate limit
-- Returns {comment id, 1} if the Idempotency-Key was used for the same request before, otherwise {comment id, 0}. With a
--   rate limit, the 0 and three numbers as take.lua returns them. If the first of them is 0, no comment was added
-- Refuses REUSED NOPOST NOTREADY FAILED
--
-- Only a comment that can be added takes from the limit. What is refused or repeated does not.
-- The score in `feed` is counted, never incremented. So it cannot drift.
local post, comments, segments, erased, latest = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local feed, changes, gone, sealing, idempotency, rate = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local now, id, author, text = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
local latest_count, request, remember_ms = tonumber(ARGV[5]), ARGV[6], ARGV[7]
local seal_at, quota, window_ms = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
if quota and not rate then
  idempotency, rate = nil, idempotency
end
if #KEYS < 9 or #ARGV ~= (rate and 10 or 8) or not (latest_count and tonumber(remember_ms) and seal_at)
  or (rate and not window_ms) then
  return redis.error_reply('ERR wrong arguments')
end

local answer = idempotency and replay(idempotency, request)
if answer then
  return answer
end
local status = redis.call('HGET', post, 'status')
if not status then
  return redis.error_reply('NOPOST no such post')
end
if status == 'failed' then
  return redis.error_reply('FAILED this post has failed: it has no image and takes no comments')
end
if status ~= 'ready' then
  return redis.error_reply('NOTREADY the image of this post is not ready yet')
end

local allowed, left, again_ms
if rate then
  redis.set_repl(redis.REPL_NONE) -- as in take.lua
  allowed, left, again_ms = take(rate, now, quota, window_ms, 1, 1)
  redis.set_repl(redis.REPL_ALL)
  if allowed == 0 then
    return {'', 0, allowed, left, again_ms}
  end
end
local revision = next_revision(now, changes, gone)

local comment = append_comment(comments, segments, now, author, text)
redis.call('LPUSH', latest, cjson.encode({comment, author, text}))
redis.call('LTRIM', latest, 0, latest_count - 1)
local count, hot = count_comments(comments, segments, erased)
redis.call('ZADD', feed, count, id)
redis.call('ZADD', changes, revision, id)
if seal_at > 0 and hot >= seal_at then
  redis.call('ZADD', sealing, 'NX', now, id)
end
if idempotency then
  redis.call('SET', idempotency, request .. ' ' .. comment, 'PX', remember_ms)
end
return {comment, 0, allowed, left, again_ms}
