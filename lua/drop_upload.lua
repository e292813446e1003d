#!lua flags=allow-oom
-- Ends an upload that did not become a post, and schedules the erasure of its chunks.
-- KEYS[1] upload   upload:{p}:<id>     hash
-- KEYS[2] chunks   chunks:{p}:<id>     list of chunk names, or of parts
-- KEYS[3] uploads  uploads:{p}:<user>  hash
-- KEYS[4] due      due:{p}             zset
-- ARGV[1] now           ms since 1970; empty: Redis' clock
-- ARGV[2] id            upload id
-- ARGV[3] grace_ms      time that the caller has to erase the chunks itself; after it, `due` does
-- ARGV[4] remember_ms   how long the upload is reported as expired; empty: it is forgotten at once
-- ARGV[5] chunk_prefix  of this partition's chunk lists; an upload id is appended
-- Returns the names of its chunks
-- Refuses NOUPLOAD
--
-- The order: this script, so that no chunk can be appended any more. Then the objects are erased. Then forget_chunks
-- forgets their names. So every chunk object has its name in Redis until it is erased.
local upload, chunks, uploads, due = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now, id, grace_ms, remember_ms = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4]
local chunk_prefix = ARGV[5]
if #KEYS ~= 4 or #ARGV ~= 5 or not (grace_ms and (remember_ms == '' or tonumber(remember_ms))) then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', upload, 'offset', 'owner', 'post')
local offset, owner, post = row[1], row[2], row[3]
if not offset or post then
  return redis.error_reply('NOUPLOAD no such upload')
end

local names = list_chunks(chunks, chunk_prefix)
redis.call('UNLINK', upload)
if remember_ms ~= '' then
  redis.call('HSET', upload, 'owner', owner, 'expires', 0)
  redis.call('PEXPIRE', upload, remember_ms)
end
redis.call('HDEL', uploads, id)
redis.call('ZADD', due, now + grace_ms, id)
return names
