#!lua flags=allow-oom
-- Puts a post whose JPEG is missing back into its author's image work.
-- KEYS[1] post   post:{p}:<id>  hash
-- KEYS[2] turns  turns:{p}      zset
-- KEYS[3] due    due:{p}        zset
-- ARGV[1] now     ms since 1970; empty: Redis' clock
-- ARGV[2] id      post id
-- ARGV[3] making  prefix of this partition's `making` keys; the author is appended
-- Returns 1, or 0 if its image is not to be made, or is already in `making`
-- Refuses nothing
--
-- It takes posts that are ready. It also takes posts that are processing and in `due`, where image work was before
-- `making` existed.
local post, turns, due = KEYS[1], KEYS[2], KEYS[3]
local now, id, making = now_ms(ARGV[1]), ARGV[2], ARGV[3]
if #KEYS ~= 3 or #ARGV ~= 3 then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', post, 'author', 'status')
local author, status = row[1], row[2]
if status ~= 'ready' and not (status == 'processing' and redis.call('ZSCORE', due, id)) then
  return 0
end
redis.call('ZADD', turns, 'LT', now, author)
redis.call('ZREM', due, id)
return redis.call('ZADD', making .. author, 'NX', now, id)
