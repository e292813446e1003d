#!lua flags=no-writes
-- Reads the id that a request with an Idempotency-Key created.
-- KEYS[1] once  once:{p}:…  string: digest of the request and id
-- Returns the id, or false if the key is not known
-- Refuses nothing
local idempotency = KEYS[1]

local stored = redis.call('GET', idempotency)
return stored and stored:match('^%S+ (%S+)$')
