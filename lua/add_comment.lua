#!lua
-- Adds a comment to a ready post.
-- KEYS[1] post      post:{p}:<id>      hash
-- KEYS[2] comments  comments:{p}:<id>  stream: author, text
-- KEYS[3] latest    latest:{p}:<id>    list of ["id","author","text"], newest first
-- KEYS[4] feed      feed:{p}           zset
-- KEYS[5] changes   changes:{p}        zset
-- KEYS[6] gone      gone:{p}           zset
-- KEYS[7] once      once:{p}:…         string; only with an Idempotency-Key
-- ARGV[1] now       ms; empty: Redis' clock
-- ARGV[2] id        post id
-- ARGV[3] author    user
-- ARGV[4] text
-- ARGV[5] shown     how many comments the feed shows
-- ARGV[6] request   digest of the request
-- ARGV[7] keep      ms the idempotency key is kept
-- Returns {comment id, repeated 0|1}
-- Refuses REUSED NOPOST NOTREADY FAILED
-- The id is later than any the stream ever had, also when the clock went back or the last comment was deleted.
-- The score is counted, never incremented: it cannot drift.
local post, comments, latest, feed, changes, gone, once = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local now, id, author, text, shown = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local request, keep = ARGV[6], ARGV[7]
if #KEYS < 6 or #ARGV ~= 7 or not (shown and tonumber(keep)) then
  return redis.error_reply('ERR wrong arguments')
end

local answer = once and replay(once, request)
if answer then
  return answer
end
local status = redis.call('HGET', post, 'status')
if not status then
  return redis.error_reply('NOPOST no such post')
end
if status == 'failed' then
  return redis.error_reply('FAILED no image could be made for this post: it takes no comments')
end
if status ~= 'ready' then
  return redis.error_reply('NOTREADY the image of this post is not ready')
end
local revision = next_revision(now, changes, gone)

local comment = redis.pcall('XADD', comments, string.format('%.0f-*', now), 'author', author, 'text', text)
if type(comment) == 'table' then -- refused: the clock went back
  local facts = redis.call('XINFO', 'STREAM', comments)
  for i = 1, #facts, 2 do
    if facts[i] == 'last-generated-id' then
      local ms, sequence = facts[i + 1]:match('^(%d+)-(%d+)$')
      comment = string.format('%s-%d', ms, sequence + 1)
    end
  end
  redis.call('XADD', comments, comment, 'author', author, 'text', text)
end
redis.call('LPUSH', latest, cjson.encode({comment, author, text}))
redis.call('LTRIM', latest, 0, shown - 1)
redis.call('ZADD', feed, redis.call('XLEN', comments), id)
redis.call('ZADD', changes, revision, id)
if once then
  redis.call('SET', once, request .. ' ' .. comment, 'PX', keep)
end
return {comment, 0}
