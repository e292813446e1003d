#!lua flags=allow-oom
-- Removes a key that only remembers something of one user, such as a used Idempotency-Key or a rate limit.
-- KEYS[1] key, of one user
-- Returns 1, or 0 if there is no such key
-- Refuses nothing
local key = KEYS[1]
if #KEYS ~= 1 or #ARGV ~= 0 then
  return redis.error_reply('ERR wrong arguments')
end

return redis.call('UNLINK', key)
