#!lua flags=no-writes
-- Reads an upload.
-- KEYS[1] upload  upload:{p}:<id>  hash
-- KEYS[2] chunks  chunks:{p}:<id>  list of chunk names
-- ARGV[1] now     ms; empty: Redis' clock
-- ARGV[2] names   0|1: whether the chunk names are wanted
-- Returns {owner, offset, length, metadata, expires ms, post, expired 0|1, chunk names or none}; what is not there is false
-- Refuses nothing
-- The outbox asks also for an upload that was dropped, of which only the chunks are left.
-- Names only where they are wanted: there may be thousands, and a request of tus needs none.
local upload, chunks = KEYS[1], KEYS[2]
local now, names = now_ms(ARGV[1]), ARGV[2] == '1'

local row = redis.call('HMGET', upload, 'owner', 'offset', 'length', 'metadata', 'expires', 'post')
row[7] = row[5] and now >= tonumber(row[5]) and 1 or 0
row[8] = names and redis.call('LRANGE', chunks, 0, -1) or {}
return row
