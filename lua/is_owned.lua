#!lua flags=no-writes
-- Tells which of a post's objects are still needed or scheduled for removal.
-- KEYS[1] post      post:{p}:<id>      hash
-- KEYS[2] hidden    hidden:{p}:<id>    hash
-- KEYS[3] gone      gone:{p}           zset
-- KEYS[4] due       due:{p}            zset
-- KEYS[5] segments  segments:{p}:<id>  list
-- KEYS[6] retired   retired:{p}        zset
-- ARGV[1] id       post id
-- ARGV[2…] stored  names of segments in the store
-- Returns {1 if the original and the JPEG are or else 0, the post's field `thumbhash` or false, the names of those
--   segments that are, …}
-- Refuses nothing
--
-- A deleted post is in `due` until its original is erased. It may be in `gone` for longer. Its segments are in `retired`.
local post, hidden, gone, due, segments, retired = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local id, args = ARGV[1], ARGV
local first_stored = 2

local known = redis.call('EXISTS', post, hidden) > 0 or redis.call('ZSCORE', gone, id) or redis.call('ZSCORE', due, id)
local owned = {known and 1 or 0, redis.call('HGET', post, 'thumbhash')}
local all_retired, named = redis.call('ZSCORE', retired, id .. '/'), {}
if args[first_stored] then
  for _, entry in ipairs(redis.call('LRANGE', segments, 0, -1)) do
    named[entry:match('%S+$')] = true
  end
end
for number = first_stored, #args do
  local name = args[number]
  if all_retired or named[name] or redis.call('ZSCORE', retired, id .. '/' .. name) then
    owned[#owned + 1] = name
  end
end
return owned
