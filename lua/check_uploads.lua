#!lua flags=allow-oom
-- Checks that a user's open uploads are the ones with reserved bytes and are due. If `repair` is 1, it makes that true.
-- KEYS[1] uploads  uploads:{p}:<user>  hash: open upload -> bytes reserved
-- KEYS[2] due      due:{p}             zset
-- ARGV[1] now       ms since 1970; empty: Redis' clock
-- ARGV[2] id        checks this upload: if it is open, it must have reserved bytes and be due;
--                   empty: checks that all uploads with reserved bytes are open
-- ARGV[3] prefix    of this partition's upload keys; an upload id is appended
-- ARGV[4] max_form  bytes that a form reserves at most
-- ARGV[5] repair    0|1
-- Returns {upload id, flaw, …}; a flaw begins with 0, because no invariant has a number for it
-- Refuses nothing
--
-- Bytes that stay reserved for no upload would use up the user's quota. An upload that is not due would never expire.
local uploads, due = KEYS[1], KEYS[2]
local now, id, prefix, max_form, repair = now_ms(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5] == '1'
if #KEYS ~= 2 or #ARGV ~= 5 or not max_form then
  return redis.error_reply('ERR wrong arguments')
end

local flaws = {}
local function report(upload, flaw, ...) -- the other arguments are the command that repairs it
  flaws[#flaws + 1] = upload
  flaws[#flaws + 1] = flaw
  if repair then
    redis.call(...)
  end
end

if id == '' then
  for _, upload in ipairs(redis.call('HKEYS', uploads)) do
    local row = redis.pcall('HMGET', prefix .. upload, 'offset', 'post') -- an error, for a wrong type, is: not open
    if not row[1] or row[2] then
      report(upload, '0 bytes are reserved for it and it is not open', 'HDEL', uploads, upload)
    end
  end
  return flaws
end
local row = redis.call('HMGET', prefix .. id, 'offset', 'length', 'post', 'expires')
local offset, length, post, expires = row[1], row[2], row[3], row[4]
if offset and not post then
  local reserved, expected = redis.call('HGET', uploads, id) or 'none', length or 'form ' .. max_form
  if reserved ~= expected and (length or not reserved:match('^form %d+$')) then
    report(id, '0 reserved for it are ' .. reserved .. ', not ' .. expected, 'HSET', uploads, id, expected)
  end
  if not redis.call('ZSCORE', due, id) then
    report(id, '0 it is open and not due', 'ZADD', due, tonumber(expires) or now, id)
  end
end
return flaws
