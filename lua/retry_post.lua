#!lua
-- Puts a post that failed for one given reason back into its author's image work.
-- KEYS[1] post   post:{p}:<id>  hash
-- KEYS[2] turns  turns:{p}      zset
-- ARGV[1] now     ms since 1970; empty: Redis' clock
-- ARGV[2] id      post id
-- ARGV[3] code    the reason for which it must have failed
-- ARGV[4] making  prefix of this partition's `making` keys; the author is appended
-- Returns 1, or 0 if it has not failed for this reason
-- Refuses nothing
--
-- A retry is possible because a failed post keeps its bytes until it is deleted: its original, or the chunks of the
-- upload that its hash still names.
local post, turns = KEYS[1], KEYS[2]
local now, id, code, making = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
if #KEYS ~= 2 or #ARGV ~= 4 then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', post, 'status', 'code', 'author')
local author = row[3]
if row[1] ~= 'failed' or row[2] ~= code or not author then
  return 0
end
redis.call('HSET', post, 'status', 'processing', 'attempt', 0)
redis.call('HDEL', post, 'code', 'detail', 'failed_at')
redis.call('ZADD', making .. author, now, id)
redis.call('ZADD', turns, 'LT', now, author)
return 1
