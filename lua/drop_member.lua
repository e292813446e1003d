#!lua flags=allow-oom
-- Removes a member of a zset that cannot be the id of a post or an upload.
-- KEYS[1] zset, of posts or uploads
-- ARGV[1] member, as the zset holds it
-- Returns 1, or 0 if the zset does not have this member
-- Refuses nothing
local zset = KEYS[1]
local member = ARGV[1]
if #KEYS ~= 1 or #ARGV ~= 1 then
  return redis.error_reply('ERR wrong arguments')
end

return redis.call('ZREM', zset, member)
