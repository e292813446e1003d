#!lua
-- Turns a complete upload into a post, and queues the post for its image.
-- KEYS[1] upload   upload:{p}:<id>     hash
-- KEYS[2] post     post:{p}:<id>       hash
-- KEYS[3] uploads  uploads:{p}:<user>  hash
-- KEYS[4] due      due:{p}             zset
-- KEYS[5] making   making:{p}:<user>   zset: of the author
-- KEYS[6] turns    turns:{p}           zset
-- KEYS[7] leaves   leaves:{p}          zset
-- KEYS[8] once     once:{p}:…          string; only if the request has an Idempotency-Key
-- ARGV[1] now             ms since 1970; empty: Redis' clock
-- ARGV[2] upload_id       upload id
-- ARGV[3] id              post id
-- ARGV[4] author          user
-- ARGV[5] caption         may be empty
-- ARGV[6] request         digest of the request
-- ARGV[7] remember_ms     how long the Idempotency-Key is remembered
-- ARGV[8] max_processing  how many posts of a user may be processing
-- ARGV[9] lease_ms        lease of lease_images, which is also the longest time of a job
-- ARGV[10] posts          prefix of this partition's post keys; a post id is appended
-- ARGV[11] trace          traceparent of the request; empty: there are no traces
-- ARGV[12] entry          of the post in the list of its author's posts
-- ARGV[13] leaf           prefix of this partition's leaf keys
-- ARGV[14] leaf_entries   how many entries a leaf may have
-- Returns {post id, how}; how is 0: the post is new, 1: the Idempotency-Key was used for the same request before,
--   2: the upload had already become this post
-- Refuses REUSED NOUPLOAD EXPIRED CONCAT INCOMPLETE EMPTY BUSY
--
-- The author's place in `turns`:
--   none           two leases ago: the author goes before users who were served within two leases. Without this head
--                  start, a new author would go behind a user who was served a moment ago. The head start ends after
--                  two leases, so new authors cannot hold up the others for ever.
--   in the past    stays: the author already waits
--   in the future  all of the author's posts were leased. lease_images set this place to the end of a lease, so the
--                  author was last served one lease before it. That is the new place, but not later than now.
local upload, post, uploads, due, making, turns = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local leaves, idempotency = KEYS[7], KEYS[8]
local now, upload_id, id, author, caption = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local request, remember_ms = ARGV[6], ARGV[7]
local max_processing, lease_ms, posts = tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10]
local trace, entry, leaf, leaf_entries = ARGV[11], ARGV[12], ARGV[13], tonumber(ARGV[14])
if #KEYS < 7 or #ARGV ~= 14 or not (tonumber(remember_ms) and max_processing and lease_ms and leaf_entries) then
  return redis.error_reply('ERR wrong arguments')
end

local answer = idempotency and replay(idempotency, request)
if answer then
  return answer
end
local row = redis.call('HMGET', upload, 'owner', 'offset', 'length', 'expires', 'post', 'concat')
local owner, offset, length, expires, existing = row[1], tonumber(row[2]), tonumber(row[3]), tonumber(row[4]), row[5]
if owner ~= author then
  return redis.error_reply('NOUPLOAD no such upload')
end
if not existing then
  if now >= expires then
    return redis.error_reply('EXPIRED this upload has expired')
  end
  if row[6] == 'partial' then
    return redis.error_reply('CONCAT this upload is a part: concatenate the parts first')
  end
  if length and offset < length then
    return redis.error_reply('INCOMPLETE the upload is at ' .. offset .. ' of ' .. length)
  end
  if offset == 0 then
    return redis.error_reply('EMPTY the image is empty')
  end
  local refusal = refuse_busy(making, posts, max_processing)
  if refusal then
    return refusal
  end
end

if idempotency then
  redis.call('SET', idempotency, request .. ' ' .. (existing or id), 'PX', remember_ms)
end
if existing then
  return {existing, 2}
end
redis.call('HSET', post, 'author', author, 'caption', caption, 'status', 'processing',
  'attempt', 0, 'upload', upload_id)
if trace ~= '' then
  redis.call('HSET', post, 'trace', trace)
end
add_entry(leaves, leaf, entry, leaf_entries)
redis.call('HSET', upload, 'post', id, 'length', row[2]) -- the worker compares `length` with the sum of the chunks
redis.call('HDEL', upload, 'metadata', 'expires', 'offset', 'concat')
redis.call('HDEL', uploads, upload_id)
redis.call('ZREM', due, upload_id)
redis.call('ZADD', making, now, id)
local place = tonumber(redis.call('ZSCORE', turns, author))
if not place then
  redis.call('ZADD', turns, now - 2 * lease_ms, author)
elseif place >= now + 1 then
  redis.call('ZADD', turns, math.min(place - lease_ms, now), author)
end
return {id, 0}
