#!lua flags=no-writes
-- Lists a user's open uploads. Uploads of forms are left out, because no client can resume them.
-- KEYS[1] uploads  uploads:{p}:<user>  hash: open upload -> bytes reserved
-- ARGV[1] now     ms since 1970; empty: Redis' clock
-- ARGV[2] prefix  of this partition's upload keys; an upload id is appended
-- Returns {{id, offset, length, metadata, expiry time in ms since 1970, concat}, …}, in no order
-- Refuses nothing
--
-- The user's quota bounds the list.
local uploads = KEYS[1]
local now, prefix = now_ms(ARGV[1]), ARGV[2]

local open, rows = {}, redis.call('HGETALL', uploads)
for i = 1, #rows, 2 do
  local id, reserved = rows[i], rows[i + 1]
  if not reserved:match('^form ') then
    local row = redis.call('HMGET', prefix .. id, 'offset', 'length', 'metadata', 'expires', 'concat')
    if row[2] and now < tonumber(row[4] or 0) then
      open[#open + 1] = {id, unpack(row)}
    end
  end
end
return open
