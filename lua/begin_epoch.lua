#!lua flags=allow-oom
-- Ends a partition's timeline: tokens of changes that were issued in it are refused from now on.
-- KEYS[1] epoch  epoch:{p}  string
-- ARGV[1] name   of the new one, letters and digits
-- Returns OK
-- Refuses nothing
local epoch = KEYS[1]
local name = ARGV[1]
if #KEYS ~= 1 or #ARGV ~= 1 or not name:match('^%w+$') then
  return redis.error_reply('ERR wrong arguments')
end

return redis.call('SET', epoch, name)
