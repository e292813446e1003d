#!lua flags=no-writes
-- Reads what an idempotency key has made.
-- KEYS[1] once  once:{p}:…  string: digest of the request and id
-- Returns the id, or false
-- Refuses nothing
local once = KEYS[1]

local kept = redis.call('GET', once)
return kept and kept:match('^%S+ (%S+)$')
