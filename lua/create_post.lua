#!lua
-- Makes a post of a finished upload, and puts it among its author's image work.
-- KEYS[1] upload   upload:{p}:<id>     hash
-- KEYS[2] post     post:{p}:<id>       hash
-- KEYS[3] uploads  uploads:{p}:<user>  hash
-- KEYS[4] due      due:{p}             zset
-- KEYS[5] making   making:{p}:<user>   zset
-- KEYS[6] turns    turns:{p}           zset
-- KEYS[7] once     once:{p}:…          string; only with an Idempotency-Key
-- ARGV[1] now      ms; empty: Redis' clock
-- ARGV[2] upload   upload id
-- ARGV[3] id       post id
-- ARGV[4] author   user
-- ARGV[5] caption  may be empty
-- ARGV[6] request  digest of the request
-- ARGV[7] keep     ms the idempotency key is kept
-- ARGV[8] processing how many posts of a user may be processing
-- ARGV[9] lease    ms for which lease_images hands out a post, which is also how long its job may take
-- ARGV[10] posts   prefix of the post keys of this partition, to which ids are appended
-- Returns {post id, repeated: 0 made now, 1 its Idempotency-Key was used, 2 the upload had become this post}
-- Refuses REUSED NOUPLOAD EXPIRED INCOMPLETE EMPTY BUSY
-- A user who had no turn goes before those who had one within two leases. Without this head start they would go behind
-- one who was served a moment ago. It ends, so that new users cannot hold up the others for ever.
-- Whose turn lies ahead was last served a lease before it, when what they had was leased.
local upload, post, uploads, due, making, turns = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local once, processing, lease, posts = KEYS[7], tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10]
local now, upload_id, id, author, caption = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local request, keep = ARGV[6], ARGV[7]
if #KEYS < 6 or #ARGV ~= 10 or not (tonumber(keep) and processing and lease) then
  return redis.error_reply('ERR wrong arguments')
end

local answer = once and replay(once, request)
if answer then
  return answer
end

local row = redis.call('HMGET', upload, 'owner', 'offset', 'length', 'expires', 'post')
local owner, offset, length, expires, made = row[1], tonumber(row[2]), tonumber(row[3]), tonumber(row[4]), row[5]
if owner ~= author then
  return redis.error_reply('NOUPLOAD no such upload')
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
  local refusal = refuse_busy(making, posts, processing)
  if refusal then
    return refusal
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
redis.call('HSET', upload, 'post', id, 'length', row[2]) -- the worker compares it with the sum of the chunks
redis.call('HDEL', upload, 'metadata', 'expires', 'offset')
redis.call('HDEL', uploads, upload_id)
redis.call('ZREM', due, upload_id)
redis.call('ZADD', making, now, id)
local turn = tonumber(redis.call('ZSCORE', turns, author))
if not turn then
  redis.call('ZADD', turns, now - 2 * lease, author)
elseif turn >= now + 1 then
  redis.call('ZADD', turns, math.min(turn - lease, now), author)
end
return {id, 0}
