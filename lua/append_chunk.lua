#!lua
-- Moves an upload's offset from where it was to behind a chunk that is already durable.
-- KEYS[1] upload  upload:{p}:<id>  hash
-- KEYS[2] chunks  chunks:{p}:<id>  list of chunk names, in order
-- KEYS[3] due     due:{p}          zset
-- ARGV[1] now     ms; empty: Redis' clock
-- ARGV[2] id      upload id
-- ARGV[3] from    the offset the chunk begins at, bytes
-- ARGV[4] bytes   of the chunk
-- ARGV[5] name    of the chunk
-- ARGV[6] expiry  ms without a chunk until the upload expires
-- ARGV[7] largest bytes an upload without a length may have
-- ARGV[8] most    chunks an upload may have
-- Returns {offset, expires ms}
-- Refuses NOUPLOAD EXPIRED OFFSET TOOLARGE CHUNKS
-- A compare-and-set instead of a lock: a request that wakes up late finds another offset and harms nothing.
-- Asked twice it finds its own name at the end, and says the same again.
local upload, chunks, due = KEYS[1], KEYS[2], KEYS[3]
local now, id, from, bytes, name = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local expiry, largest, most = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
if #KEYS ~= 3 or #ARGV ~= 8 or not (from and (bytes or 0) > 0 and expiry and largest and most) then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', upload, 'offset', 'length', 'post', 'expires')
local offset, length, post, expires = tonumber(row[1]), tonumber(row[2]) or largest, row[3], tonumber(row[4])
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
if from + bytes > length then
  return redis.error_reply('TOOLARGE the upload ends at ' .. length)
end
if redis.call('LLEN', chunks) >= most then
  return redis.error_reply('CHUNKS this upload came in ' .. most .. ' pieces: delete it, and send longer ones')
end

redis.call('RPUSH', chunks, name)
redis.call('HSET', upload, 'offset', from + bytes, 'expires', now + expiry)
redis.call('ZADD', due, now + expiry, id)
return {from + bytes, now + expiry}
