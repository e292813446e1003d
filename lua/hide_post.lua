#!lua flags=allow-oom
-- Hides a post in any status from everybody, for an operator. Nothing of it is lost.
-- KEYS[1] post     post:{p}:<id>    hash
-- KEYS[2] hidden   hidden:{p}:<id>  hash: what was in `post`, and hidden_at
-- KEYS[3] feed     feed:{p}         zset
-- KEYS[4] changes  changes:{p}      zset
-- KEYS[5] gone     gone:{p}         zset
-- KEYS[6] due      due:{p}          zset
-- ARGV[1] now     ms since 1970; empty: Redis' clock
-- ARGV[2] id      post id
-- ARGV[3] making  prefix of this partition's `making` keys; the author is appended
-- Returns 1, or 0 if it was hidden before
-- Refuses NOPOST
--
-- A hidden post has its hash under another name. So no other script finds it, and none has to ask whether it is hidden.
-- Its comments stay where they are.
-- Only a ready post was seen by those who follow the changes. So only a ready post goes to `gone`.
-- `due` erases the JPEG. That is also so if the post was hidden before: a restore hides again what was hidden.
local post, hidden, feed, changes, gone, due = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local now, id, making = now_ms(ARGV[1]), ARGV[2], ARGV[3]
if #KEYS ~= 6 or #ARGV ~= 3 then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', post, 'author', 'status')
local author, status = row[1], row[2]
if not author and redis.call('EXISTS', hidden) == 0 then
  return redis.error_reply('NOPOST no such post')
end
local revision = next_revision(now, changes, gone)

redis.call('ZADD', due, now, id)
if not author then
  return 0
end
redis.call('RENAME', post, hidden)
redis.call('HSET', hidden, 'hidden_at', string.format('%.0f', now))
redis.call('ZREM', feed, id)
redis.call('ZREM', changes, id)
redis.call('ZREM', making .. author, id)
if status == 'ready' then
  redis.call('ZADD', gone, revision, id)
end
return 1
