#!lua flags=no-writes
-- Walks over all keys of a server, or over the members of a zset, some at a time.
-- KEYS[1] zset; none: all keys
-- ARGV[1] cursor where the last call ended; 0 at first
-- ARGV[2] count  about how many to look at, which bounds the script's time
-- Returns {cursor, 0 at the end, {key, type, …} or {member, score, …}}
-- Refuses nothing
-- What is there from the first call to the last is told at least once, what comes or goes meanwhile maybe.
local zset = KEYS[1]
local cursor, count = ARGV[1], ARGV[2]
if #ARGV ~= 2 or not tonumber(cursor) or not tonumber(count) then
  return redis.error_reply('ERR wrong arguments')
end

if zset then
  return redis.call('ZSCAN', zset, cursor, 'COUNT', count)
end
local page = redis.call('SCAN', cursor, 'COUNT', count)
local found = {}
for _, key in ipairs(page[2]) do
  local kind = redis.call('TYPE', key)
  found[#found + 1] = key
  found[#found + 1] = kind.ok or kind -- fakeredis answers with a plain string
end
return {page[1], found}
