#!lua
-- Opens an upload and reserves its bytes against the user's quota.
-- KEYS[1] upload   upload:{p}:<id>     hash
-- KEYS[2] uploads  uploads:{p}:<user>  hash: open upload -> bytes reserved
-- KEYS[3] due      due:{p}             zset
-- KEYS[4] once     once:{p}:…          string; only with an Idempotency-Key
-- ARGV[1] now      ms; empty: Redis' clock
-- ARGV[2] id       upload id
-- ARGV[3] owner    user
-- ARGV[4] length   bytes; empty: a form, whose end is told by the form
-- ARGV[5] metadata as the client sent it; may be empty
-- ARGV[6] expiry   ms without a byte until it expires
-- ARGV[7] largest  bytes one upload may have
-- ARGV[8] open     uploads a user may have open
-- ARGV[9] quota    bytes a user may have reserved
-- ARGV[10] request digest of the request, to tell a repetition from another one
-- ARGV[11] keep    ms the idempotency key is kept
-- Returns {id, repeated 0|1}
-- Refuses REUSED TOOLARGE QUOTA
-- A form reserves the largest size: how long it is shows only at its end.
local upload, uploads, due, once = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now, id, owner, length, metadata = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local expiry, largest, open, quota = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local request, keep = ARGV[10], ARGV[11]
if #KEYS < 3 or #ARGV ~= 11 or not (expiry and largest and open and quota and tonumber(keep))
  or (length ~= '' and (tonumber(length) or -1) < 0) then
  return redis.error_reply('ERR wrong arguments')
end

local kept = once and redis.call('GET', once)
if kept then
  local digest, made = kept:match('^(%S+) (%S+)$')
  if digest ~= request then
    return redis.error_reply('REUSED this Idempotency-Key was used for another request')
  end
  return {made, 1}
end

local bytes = tonumber(length) or largest
if bytes > largest then
  return redis.error_reply('TOOLARGE an image may have up to ' .. largest .. ' bytes')
end
local reserved = bytes
local sizes = redis.call('HVALS', uploads)
for _, size in ipairs(sizes) do
  reserved = reserved + tonumber(size)
end
if #sizes >= open or reserved > quota then
  return redis.error_reply('QUOTA finish or delete one of your open uploads first')
end
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end

redis.call('HSET', upload, 'owner', owner, 'offset', 0, 'expires', now + expiry)
if length ~= '' then
  redis.call('HSET', upload, 'length', length, 'metadata', metadata)
end
redis.call('HSET', uploads, id, bytes)
redis.call('ZADD', due, now + expiry, id)
if once then
  redis.call('SET', once, request .. ' ' .. id, 'PX', keep)
end
return {id, 0}
