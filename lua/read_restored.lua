#!lua flags=no-writes
-- Reads when a partition's data were last restored.
-- KEYS[1] restored  restored:{p}  string
-- Returns ms since 1970, or 0 if the data were never restored
-- Refuses nothing
local restored = KEYS[1]

return tonumber(redis.call('GET', restored) or 0)
