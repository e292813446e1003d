#!lua flags=allow-oom
-- Ends an upload that became no post. Its chunks are still named, and due to be erased.
-- KEYS[1] upload  upload:{p}:<id>     hash
-- KEYS[2] chunks  chunks:{p}:<id>     list of chunk names
-- KEYS[3] uploads uploads:{p}:<user>  hash
-- KEYS[4] due     due:{p}             zset
-- ARGV[1] now     ms; empty: Redis' clock
-- ARGV[2] id      upload id
-- ARGV[3] grace   ms the caller has for erasing the chunks itself, before the outbox does
-- ARGV[4] tell    ms for which the upload is still known as expired; empty: it is forgotten
-- Returns the names of its chunks
-- Refuses NOUPLOAD
-- First nothing can be appended any more, then the objects go, then forget_chunks: a chunk is never without an owner.
local upload, chunks, uploads, due = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now, id, grace, tell = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4]
if #KEYS ~= 4 or #ARGV ~= 4 or not (grace and (tell == '' or tonumber(tell))) then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', upload, 'offset', 'owner', 'post')
if not row[1] or row[3] then
  return redis.error_reply('NOUPLOAD no such upload')
end

redis.call('UNLINK', upload)
if tell ~= '' then
  redis.call('HSET', upload, 'owner', row[2], 'expires', 0)
  redis.call('PEXPIRE', upload, tell)
end
redis.call('HDEL', uploads, id)
redis.call('ZADD', due, now + grace, id)
return redis.call('LRANGE', chunks, 0, -1)
