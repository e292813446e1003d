#!lua
-- Makes one complete upload of partial uploads, and takes over their chunks and their reserved bytes.
-- KEYS[1] upload   upload:{p}:<id>     hash: of the final upload, which is new
-- KEYS[2] chunks   chunks:{p}:<id>     list: of the final upload
-- KEYS[3] uploads  uploads:{p}:<user>  hash: open upload -> bytes reserved
-- KEYS[4] due      due:{p}             zset
-- KEYS[5] once     once:{p}:…          string; only if the request has an Idempotency-Key
-- ARGV[1] now            ms since 1970; empty: Redis' clock
-- ARGV[2] id             upload id of the final upload
-- ARGV[3] owner          user
-- ARGV[4] parts          upload ids, in order, with a space between
-- ARGV[5] concat         Upload-Concat as the client sent it
-- ARGV[6] metadata       as the client sent it; may be empty
-- ARGV[7] expiry_ms      the final upload expires this long from now
-- ARGV[8] max_bytes      bytes that one upload may have
-- ARGV[9] max_chunks     chunks that an upload may have
-- ARGV[10] prefix        of this partition's upload keys; an upload id is appended
-- ARGV[11] chunk_prefix  of this partition's chunk lists; an upload id is appended
-- ARGV[12] request       digest of the request
-- ARGV[13] remember_ms   how long the Idempotency-Key is remembered
-- Returns {upload id, 0}, or {upload id, 1} if the Idempotency-Key was used for the same request before, or if these
--   parts are an upload already
-- Refuses REUSED NOUPLOAD EXPIRED CONCAT INCOMPLETE TOOLARGE CHUNKS
--
-- The script writes a few fields for each part, however many chunks there are: `chunks` of the final upload is the list
-- of its parts. A part keeps its own list of chunks, so every chunk object is still named by the upload it is stored
-- under. Of the part's hash only `final` and `length` are left. So the part takes no bytes, and is used once.
-- A client that did not get the answer sends the same parts again. `final` of the first one leads to their upload.
-- The reserved bytes only move. So a quota never refuses this.
local upload, chunks, uploads, due, idempotency = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now, id, owner, parts, concat = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local metadata, expiry_ms, max_bytes, max_chunks = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local prefix, chunk_prefix, request, remember_ms = ARGV[10], ARGV[11], ARGV[12], ARGV[13]
if #KEYS < 4 or #ARGV ~= 13 or not parts:match('%S')
  or not (expiry_ms and max_bytes and max_chunks and tonumber(remember_ms)) then
  return redis.error_reply('ERR wrong arguments')
end

local answer = idempotency and replay(idempotency, request)
if answer then
  return answer
end
if redis.call('EXISTS', upload) == 1 then -- the same call again: an id is used once
  return {id, 0}
end
local made = redis.call('HGET', prefix .. parts:match('%S+'), 'final')
if made and redis.call('HGET', prefix .. made, 'owner') == owner
  and table.concat(redis.call('LRANGE', chunk_prefix .. made, 0, -1), ' ') == parts then
  return {made, 1}
end
local length, count, seen = 0, 0, {}
for part in parts:gmatch('%S+') do
  local row = redis.call('HMGET', prefix .. part, 'owner', 'offset', 'length', 'expires', 'concat', 'post')
  local offset, expected, expires = tonumber(row[2]), tonumber(row[3]), tonumber(row[4])
  if row[1] ~= owner or row[6] or seen[part] then
    return redis.error_reply('NOUPLOAD no such upload: ' .. part .. '; a part can be used once')
  end
  if now >= expires then
    return redis.error_reply('EXPIRED this upload has expired: ' .. part)
  end
  if row[5] ~= 'partial' then
    return redis.error_reply('CONCAT this upload is not a part: ' .. part)
  end
  if offset < expected then
    return redis.error_reply('INCOMPLETE the upload ' .. part .. ' is at ' .. offset .. ' of ' .. expected)
  end
  seen[part] = true
  length, count = length + offset, count + redis.call('LLEN', chunk_prefix .. part)
end
if length > max_bytes then
  return redis.error_reply('TOOLARGE an image may have up to ' .. max_bytes .. ' bytes, these parts have ' .. length)
end
if count > max_chunks then
  return redis.error_reply('CHUNKS these parts have ' .. count .. ' chunks, ' .. max_chunks
    .. ' are allowed: delete them and send larger ones')
end

for part in parts:gmatch('%S+') do
  redis.call('RPUSH', chunks, part)
  redis.call('HSET', prefix .. part, 'final', id)
  redis.call('HDEL', prefix .. part, 'owner', 'offset', 'metadata', 'expires', 'concat')
  redis.call('HDEL', uploads, part)
  redis.call('ZREM', due, part)
end
redis.call('HSET', upload, 'owner', owner, 'offset', length, 'expires', now + expiry_ms, 'length', length,
  'metadata', metadata, 'concat', concat)
redis.call('HSET', uploads, id, length)
redis.call('ZADD', due, now + expiry_ms, id)
if idempotency then
  redis.call('SET', idempotency, request .. ' ' .. id, 'PX', remember_ms)
end
return {id, 0}
