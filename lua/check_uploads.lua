#!lua flags=allow-oom
-- Holds a user's uploads against quota and outbox, and if wanted makes both true again.
-- KEYS[1] uploads  uploads:{p}:<user>  hash: open upload -> bytes reserved
-- KEYS[2] due      due:{p}             zset
-- ARGV[1] now      ms; empty: Redis' clock
-- ARGV[2] id       of one upload, which if it is open must be in both; empty: all that bytes are reserved for must be open
-- ARGV[3] prefix   of the upload keys of this partition, to which ids are appended
-- ARGV[4] largest  bytes that a form reserves at most
-- ARGV[5] repair   0|1
-- Returns {upload id, what is wrong, …}
-- Refuses nothing
-- Bytes reserved for nothing would lock the user out one day; an upload that is not due would never expire.
local uploads, due = KEYS[1], KEYS[2]
local now, id, prefix, largest, repair = now_ms(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5] == '1'
if #KEYS ~= 2 or #ARGV ~= 5 or not largest then
  return redis.error_reply('ERR wrong arguments')
end

local found = {}
local function wrong(upload, flaw, ...)
  found[#found + 1] = upload
  found[#found + 1] = flaw
  if repair then
    redis.call(...)
  end
end

if id == '' then
  for _, upload in ipairs(redis.call('HKEYS', uploads)) do
    local row = redis.pcall('HMGET', prefix .. upload, 'offset', 'post') -- of another type it is not open
    if not row[1] or row[2] then
      wrong(upload, '0 bytes are reserved for it and it is not open', 'HDEL', uploads, upload)
    end
  end
  return found
end
local row = redis.call('HMGET', prefix .. id, 'offset', 'length', 'post', 'expires')
if row[1] and not row[3] then
  local reserved, wanted = redis.call('HGET', uploads, id) or 'none', row[2] or 'form ' .. largest
  if reserved ~= wanted and (row[2] or not reserved:match('^form %d+$')) then
    wrong(id, '0 reserved for it are ' .. reserved .. ', not ' .. wanted, 'HSET', uploads, id, wanted)
  end
  if not redis.call('ZSCORE', due, id) then
    wrong(id, '0 it is open and not due', 'ZADD', due, tonumber(row[4]) or now, id)
  end
end
return found
