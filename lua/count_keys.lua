#!lua flags=no-writes
-- Counts the keys of a server.
-- Returns their number
-- Refuses nothing
return redis.call('DBSIZE')
