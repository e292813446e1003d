#!lua
-- Opens an upload and reserves its bytes against the user's quota.
-- KEYS[1] upload   upload:{p}:<id>     hash
-- KEYS[2] uploads  uploads:{p}:<user>  hash: open upload -> bytes reserved
-- KEYS[3] due      due:{p}             zset
-- KEYS[4] making   making:{p}:<user>   zset
-- KEYS[5] once     once:{p}:…          string; only with an Idempotency-Key
-- ARGV[1] now      ms; empty: Redis' clock
-- ARGV[2] id       upload id
-- ARGV[3] owner    user
-- ARGV[4] bytes    to reserve: the upload's length, or what a form may bring
-- ARGV[5] form     0|1; how long a form's image is shows only at its end
-- ARGV[6] metadata as the client sent it; may be empty
-- ARGV[7] expiry   ms until it expires, unless a byte comes
-- ARGV[8] largest  bytes one upload may have
-- ARGV[9] open     uploads a user may have open, besides forms
-- ARGV[10] quota   bytes a user may have reserved for uploads, and as many for forms
-- ARGV[11] prefix  of the upload keys of this partition, to which ids are appended
-- ARGV[12] request digest of the request, to tell a repetition from another one
-- ARGV[13] keep    ms the idempotency key is kept
-- ARGV[14] processing how many posts of a user may be processing
-- ARGV[15] posts   prefix of the post keys of this partition, to which ids are appended
-- Returns {id, repeated 0|1}
-- Refuses REUSED TOOLARGE QUOTA BUSY
-- QUOTA tells the seconds until the next one expires.
-- Forms have a quota of their own: a user's forms on a slow line keep no resumable upload out.
-- An upload that has expired counts no longer, also if no worker has erased it yet: the seconds told come true.
-- A form becomes a post at once, so BUSY is refused here, before its body, as create_post would refuse it after.
local upload, uploads, due, making, once = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now, id, owner, bytes, form, metadata = now_ms(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6]
local expiry, largest, open, quota = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local prefix, request, keep, processing, posts = ARGV[11], ARGV[12], ARGV[13], tonumber(ARGV[14]), ARGV[15]
if #KEYS < 4 or #ARGV ~= 15 or not (expiry and largest and open and quota and tonumber(keep) and processing)
  or (bytes or -1) < 0 or (form ~= '0' and form ~= '1') then
  return redis.error_reply('ERR wrong arguments')
end

local answer = once and replay(once, request)
if answer then
  return answer
end

if bytes > largest then
  return redis.error_reply('TOOLARGE an image may have up to ' .. largest .. ' bytes')
end
local refusal = form == '1' and refuse_busy(making, posts, processing)
if refusal then
  return refusal
end
local reserved, count, others = bytes, 0, {}
local rows = redis.call('HGETALL', uploads)
for i = 1, #rows, 2 do
  local of_form = rows[i + 1]:match('^form (%d+)$')
  if (of_form ~= nil) == (form == '1') then
    local size = tonumber(of_form or rows[i + 1])
    reserved, count = reserved + size, count + 1
    others[rows[i]] = size
  end
end
if form == '1' then
  count = 0
end
if count >= open or reserved > quota then
  local soonest
  for other, size in pairs(others) do
    local expires = tonumber(redis.call('HGET', prefix .. other, 'expires')) or 0
    if expires <= now then
      reserved, count = reserved - size, count - 1
    elseif expires < (soonest or math.huge) then
      soonest = expires
    end
  end
  if soonest and (count >= open or reserved > quota) then
    return redis.error_reply('QUOTA ' .. math.ceil((soonest - now) / 1000) .. ' you have too many '
      .. (form == '1' and 'forms under way: let one end first' or 'open uploads: finish or delete one first'))
  end
end

redis.call('HSET', upload, 'owner', owner, 'offset', 0, 'expires', now + expiry)
if form == '0' then
  redis.call('HSET', upload, 'length', bytes, 'metadata', metadata)
end
redis.call('HSET', uploads, id, form == '1' and 'form ' .. bytes or bytes)
redis.call('ZADD', due, now + expiry, id)
if once then
  redis.call('SET', once, request .. ' ' .. id, 'PX', keep)
end
return {id, 0}
