#!lua
-- Moves an upload's offset to the end of a chunk that is already durable in the object store.
-- KEYS[1] upload  upload:{p}:<id>  hash
-- KEYS[2] chunks  chunks:{p}:<id>  list of chunk names, in order
-- KEYS[3] due     due:{p}          zset
-- ARGV[1] now         ms since 1970; empty: Redis' clock
-- ARGV[2] id          upload id
-- ARGV[3] from        offset at which the chunk begins, bytes
-- ARGV[4] size        of the chunk, bytes
-- ARGV[5] name        of the chunk
-- ARGV[6] expiry_ms   the upload expires this long after its last chunk
-- ARGV[7] max_length  bytes that an upload without a length may have
-- ARGV[8] max_chunks  chunks that an upload may have
-- Returns {offset, expiry time in ms since 1970}
-- Refuses NOUPLOAD EXPIRED OFFSET TOOLARGE CHUNKS
--
-- The script compares the offset and then sets it. So no lock is needed: a request that is late finds a different
-- offset and changes nothing.
-- If the script is called again for the same chunk, it finds the chunk's name at the end of `chunks` and returns the
-- same answer.
local upload, chunks, due = KEYS[1], KEYS[2], KEYS[3]
local now, id, from, size, name = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local expiry_ms, max_length, max_chunks = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
if #KEYS ~= 3 or #ARGV ~= 8 or not (from and (size or 0) > 0 and expiry_ms and max_length and max_chunks) then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', upload, 'offset', 'length', 'post', 'expires')
local offset, length, post, expires = tonumber(row[1]), tonumber(row[2]) or max_length, row[3], tonumber(row[4])
if not offset or post then
  return redis.error_reply('NOUPLOAD no such upload')
end
if now >= expires then
  return redis.error_reply('EXPIRED this upload has expired')
end
if offset ~= from then
  if redis.call('LINDEX', chunks, -1) == name then
    return {offset, expires}
  end
  return redis.error_reply('OFFSET the upload is at ' .. offset)
end
if from + size > length then
  return redis.error_reply('TOOLARGE the upload ends at ' .. length)
end
if redis.call('LLEN', chunks) >= max_chunks then
  return redis.error_reply('CHUNKS this upload already has ' .. max_chunks .. ' chunks: delete it and send larger ones')
end

redis.call('RPUSH', chunks, name)
redis.call('HSET', upload, 'offset', from + size, 'expires', now + expiry_ms)
redis.call('ZADD', due, now + expiry_ms, id)
return {from + size, now + expiry_ms}
