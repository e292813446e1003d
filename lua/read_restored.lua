#!lua flags=no-writes
-- Reads when a partition's data were last restored, or up to which revision its posts were looked at (find_quiet).
-- KEYS[1] restored  restored:{p}  string; or quiet:{p}
-- Returns ms since 1970, or 0 if the data were never restored; false if the value is no number
-- Refuses nothing
local restored = KEYS[1]

return tonumber(redis.call('GET', restored) or 0)
