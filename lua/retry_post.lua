#!lua
-- Puts a failed post back among its author's image work, if it failed for one given reason.
-- KEYS[1] post  post:{p}:<id>  hash
-- KEYS[2] turns turns:{p}      zset
-- ARGV[1] now   ms; empty: Redis' clock
-- ARGV[2] id    post id
-- ARGV[3] code  the reason it must have failed for
-- ARGV[4] making prefix of the users' `making` keys of this partition, to which the author is appended
-- Returns 1, or 0 if it did not fail for that reason
-- Refuses nothing
-- A failed post keeps its bytes until it is deleted: its original, or the chunks of the upload that it still names.
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
