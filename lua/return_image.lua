#!lua flags=allow-oom
-- Takes back attempts at a post's image that failed for a reason other than the image.
-- KEYS[1] post  post:{p}:<id>  hash
-- ARGV[1] attempt  number of the attempt that calls; it must be the current one
-- ARGV[2] left     how many attempts still count
-- Returns 1, or 0 if the post is not processing or another attempt is the current one
-- Refuses nothing
--
-- The lease stays: the post is leased again when it ends. If the script is called twice, the second call finds another
-- attempt number and changes nothing.
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
