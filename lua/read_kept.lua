#!lua flags=no-writes
-- Reads the hidden comments of a post, for an operator.
-- KEYS[1] kept  kept:{p}:<id>  hash: comment id -> ["author","text"], or the comment's new id
-- Returns {comment id, value, …}, in no order
-- Refuses nothing
--
-- The list is short: an operator hid each of its comments.
local kept = KEYS[1]

return redis.call('HGETALL', kept)
