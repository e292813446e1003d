#!lua
-- Makes a post of a finished upload, and puts it into the outbox of image work.
-- KEYS[1] upload   upload:{p}:<id>     hash
-- KEYS[2] post     post:{p}:<id>       hash
-- KEYS[3] uploads  uploads:{p}:<user>  hash
-- KEYS[4] due      due:{p}             zset
-- KEYS[5] once     once:{p}:…          string; only with an Idempotency-Key
-- ARGV[1] now      ms; empty: Redis' clock
-- ARGV[2] upload   upload id
-- ARGV[3] id       post id
-- ARGV[4] author   user
-- ARGV[5] caption  may be empty
-- ARGV[6] request  digest of the request
-- ARGV[7] keep     ms the idempotency key is kept
-- Returns {post id, repeated: 0 made now, 1 its Idempotency-Key was used, 2 the upload had become this post}
-- Refuses REUSED NOUPLOAD EXPIRED INCOMPLETE EMPTY
local upload, post, uploads, due, once = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now, upload_id, id, author, caption = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local request, keep = ARGV[6], ARGV[7]
if #KEYS < 4 or #ARGV ~= 7 or not tonumber(keep) then
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

local row = redis.call('HMGET', upload, 'owner', 'offset', 'length', 'expires', 'post')
local owner, offset, length, expires, made = row[1], tonumber(row[2]), tonumber(row[3]), tonumber(row[4]), row[5]
if owner ~= author then
  return redis.error_reply('NOUPLOAD no such upload')
end
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
if not made then
  if now >= expires then
    return redis.error_reply('EXPIRED this upload has expired')
  end
  if length and offset < length then
    return redis.error_reply('INCOMPLETE the upload is at ' .. offset .. ' of ' .. length)
  end
  if offset == 0 then
    return redis.error_reply('EMPTY the image is empty')
  end
end

if once then
  redis.call('SET', once, request .. ' ' .. (made or id), 'PX', keep)
end
if made then
  return {made, 2}
end
redis.call('HSET', post, 'author', author, 'caption', caption, 'status', 'processing',
  'attempt', 0, 'upload', upload_id)
redis.call('HSET', upload, 'post', id, 'length', row[2]) -- whoever joins the chunks checks their sum against it
redis.call('HDEL', upload, 'metadata', 'expires', 'offset')
redis.call('HDEL', uploads, upload_id)
redis.call('ZREM', due, upload_id)
redis.call('ZADD', due, now, id)
return {id, 0}
