#!lua flags=allow-oom
-- Removes a member of a zset that can be no post and no upload.
-- KEYS[1] zset, of posts or uploads
-- ARGV[1] member
-- Returns 1, or 0 if it was not there
-- Refuses nothing
local zset = KEYS[1]
local member = ARGV[1]
if #KEYS ~= 1 or #ARGV ~= 1 then
  return redis.error_reply('ERR wrong arguments')
end

return redis.call('ZREM', zset, member)
