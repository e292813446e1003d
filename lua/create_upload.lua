#!lua
-- Opens an upload and reserves its bytes in the user's quota.
-- KEYS[1] upload   upload:{p}:<id>     hash
-- KEYS[2] uploads  uploads:{p}:<user>  hash: open upload -> bytes reserved
-- KEYS[3] due      due:{p}             zset
-- KEYS[4] making   making:{p}:<user>   zset: of the owner
-- KEYS[5] once     once:{p}:…          string; only if the request has an Idempotency-Key
-- ARGV[1] now             ms since 1970; empty: Redis' clock
-- ARGV[2] id              upload id
-- ARGV[3] owner           user
-- ARGV[4] reserve         bytes: the upload's length, or the most that a form may bring
-- ARGV[5] form            0|1; 1: the upload of a form, where the length of the image is known only at its end
-- ARGV[6] metadata        as the client sent it; may be empty
-- ARGV[7] expiry_ms       the upload expires this long from now if no chunk comes
-- ARGV[8] max_bytes       bytes that one upload may have
-- ARGV[9] max_open        open uploads that a user may have, forms not counted
-- ARGV[10] quota          bytes that a user may have reserved for uploads; as many again for forms
-- ARGV[11] prefix         of this partition's upload keys; an upload id is appended
-- ARGV[12] request        digest of the request
-- ARGV[13] remember_ms    how long the Idempotency-Key is remembered
-- ARGV[14] max_processing how many posts of a user may be processing
-- ARGV[15] posts          prefix of this partition's post keys; a post id is appended
-- ARGV[16] concat         partial, if the upload is to be a part of another one; otherwise empty
-- Returns {upload id, 0}, or {upload id, 1} if the Idempotency-Key was used for the same request before
-- Refuses REUSED TOOLARGE QUOTA BUSY
--
-- QUOTA begins with the seconds until the user's next upload expires.
-- Forms have a separate quota, so that forms on a slow line do not keep a user from opening resumable uploads.
-- An upload that has expired does not count, even if no worker has erased it yet. So after those seconds the same
-- request succeeds.
-- A form becomes a post as soon as it ends, and create_post refuses BUSY. So a form is refused here, before its body.
local upload, uploads, due, making, idempotency = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now, id, owner, reserve = now_ms(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4])
local form, metadata, expiry_ms = ARGV[5], ARGV[6], tonumber(ARGV[7])
local max_bytes, max_open, quota, prefix = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10]), ARGV[11]
local request, remember_ms = ARGV[12], ARGV[13]
local max_processing, posts, concat = tonumber(ARGV[14]), ARGV[15], ARGV[16]
if #KEYS < 4 or #ARGV ~= 16 or (reserve or -1) < 0 or (form ~= '0' and form ~= '1')
  or not (expiry_ms and max_bytes and max_open and quota and tonumber(remember_ms) and max_processing) then
  return redis.error_reply('ERR wrong arguments')
end

local answer = idempotency and replay(idempotency, request)
if answer then
  return answer
end
if reserve > max_bytes then
  return redis.error_reply('TOOLARGE an image may have up to ' .. max_bytes .. ' bytes')
end
local refusal = form == '1' and refuse_busy(making, posts, max_processing)
if refusal then
  return refusal
end
local total, open, others = reserve, 0, {}
local rows = redis.call('HGETALL', uploads)
for i = 1, #rows, 2 do
  local of_form = rows[i + 1]:match('^form (%d+)$')
  if (of_form ~= nil) == (form == '1') then
    local size = tonumber(of_form or rows[i + 1])
    total, open = total + size, open + 1
    others[rows[i]] = size
  end
end
if form == '1' then
  open = 0 -- only bytes limit the number of forms
end
if open >= max_open or total > quota then
  local soonest
  for other, size in pairs(others) do
    local expires = tonumber(redis.call('HGET', prefix .. other, 'expires')) or 0
    if expires <= now then
      total, open = total - size, open - 1
    elseif expires < (soonest or math.huge) then
      soonest = expires
    end
  end
  if soonest and (open >= max_open or total > quota) then
    return redis.error_reply('QUOTA ' .. math.ceil((soonest - now) / 1000) .. ' you have too many '
      .. (form == '1' and 'forms under way: wait until one ends' or 'open uploads: finish or delete one first'))
  end
end

redis.call('HSET', upload, 'owner', owner, 'offset', 0, 'expires', now + expiry_ms)
if form == '0' then
  redis.call('HSET', upload, 'length', reserve, 'metadata', metadata)
end
if concat ~= '' then
  redis.call('HSET', upload, 'concat', concat)
end
redis.call('HSET', uploads, id, form == '1' and 'form ' .. reserve or reserve)
redis.call('ZADD', due, now + expiry_ms, id)
if idempotency then
  redis.call('SET', idempotency, request .. ' ' .. id, 'PX', remember_ms)
end
return {id, 0}
