#!lua flags=no-writes
-- Reads which segments a post has, and which of their comments are erased.
-- KEYS[1] segments  segments:{p}:<id>  list
-- KEYS[2] erased    erased:{p}:<id>    set
-- Returns {{entry, …} oldest first, {id, …}}
-- Refuses nothing
local segments, erased = KEYS[1], KEYS[2]

return {redis.call('LRANGE', segments, 0, -1), redis.call('SMEMBERS', erased)}
