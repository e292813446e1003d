#!lua flags=allow-oom
-- Takes back attempts at a post's image that did not fail because of the image.
-- KEYS[1] post     post:{p}:<id>  hash
-- ARGV[1] attempt  number of the attempt that asks; it must be the current one
-- ARGV[2] left     how many attempts still count
-- Returns 1, or 0 if the post is not processing or another attempt is the current one
-- Refuses nothing
-- The lease stays: the work is handed out again when it ends. Called twice, the second call finds another number.
local post = KEYS[1]
local attempt, left = ARGV[1], tonumber(ARGV[2])
if #KEYS ~= 1 or #ARGV ~= 2 or not tonumber(attempt) or not left or left < 0 then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', post, 'status', 'attempt')
if row[1] ~= 'processing' or row[2] ~= attempt then
  return 0
end
redis.call('HSET', post, 'attempt', left)
return 1
