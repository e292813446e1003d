#!lua flags=no-writes
-- Reads an upload.
-- KEYS[1] upload  upload:{p}:<id>  hash
-- KEYS[2] chunks  chunks:{p}:<id>  list of chunk names, or of parts
-- ARGV[1] now           ms since 1970; empty: Redis' clock
-- ARGV[2] with_names    0|1: whether to return the chunk names
-- ARGV[3] chunk_prefix  of this partition's chunk lists; an upload id is appended
-- Returns {owner, offset, length, metadata, expiry time in ms since 1970, post, concat, final, expired 0|1, chunk
--   names}; a field that the upload does not have is false, and without with_names the list is empty
-- Refuses nothing
--
-- An unknown upload is not refused: of an upload that was dropped only the chunks are left, and the outbox reads them.
-- The names are optional because there may be thousands, and a request of tus needs none.
local upload, chunks = KEYS[1], KEYS[2]
local now, with_names, chunk_prefix = now_ms(ARGV[1]), ARGV[2] == '1', ARGV[3]

local row = redis.call('HMGET', upload, 'owner', 'offset', 'length', 'metadata', 'expires', 'post', 'concat', 'final')
row[9] = row[5] and now >= tonumber(row[5]) and 1 or 0
row[10] = with_names and list_chunks(chunks, chunk_prefix) or {}
return row
