#!lua flags=no-writes,allow-cross-slot-keys
-- Walks over all keys of a server, or over the members of a zset, a few at a time.
-- KEYS[1] zset, whose members are read; absent: all keys
-- ARGV[1] cursor  returned by the last call; 0 for the first call
-- ARGV[2] count   about how many keys or members to read, which bounds the script's time
-- Returns {cursor, which is 0 at the end, {key, type, …} or {member, score, …}}
-- Refuses nothing
--
-- A node of a Cluster has keys of many slots. Without allow-cross-slot-keys a script may read those of one slot only.
-- A key or member that exists during the whole walk is returned at least once. One that is added or removed meanwhile
-- may be returned or not.
local zset = KEYS[1]
local cursor, count = ARGV[1], ARGV[2]
if #ARGV ~= 2 or not tonumber(cursor) or not tonumber(count) then
  return redis.error_reply('ERR wrong arguments')
end

if zset then
  return redis.call('ZSCAN', zset, cursor, 'COUNT', count)
end
local page = redis.call('SCAN', cursor, 'COUNT', count)
local keys = {}
for _, key in ipairs(page[2]) do
  local kind = redis.call('TYPE', key)
  keys[#keys + 1] = key
  keys[#keys + 1] = kind.ok or kind -- fakeredis answers with a plain string
end
return {page[1], keys}
