#!lua flags=no-writes
-- Lists a user's open uploads, besides those of forms, which nobody can go on with.
-- KEYS[1] uploads  uploads:{p}:<user>  hash: open upload -> bytes reserved
-- ARGV[1] now      ms; empty: Redis' clock
-- ARGV[2] prefix   of the upload keys of this partition, to which ids are appended
-- Returns {{id, offset, length, metadata, expires ms}, …} in no order
-- Refuses nothing
-- The quota bounds the list.
local uploads = KEYS[1]
local now, prefix = now_ms(ARGV[1]), ARGV[2]

local found, rows = {}, redis.call('HGETALL', uploads)
for i = 1, #rows, 2 do
  if not rows[i + 1]:match('^form ') then
    local row = redis.call('HMGET', prefix .. rows[i], 'offset', 'length', 'metadata', 'expires')
    if row[2] and now < tonumber(row[4] or 0) then
      found[#found + 1] = {rows[i], unpack(row)}
    end
  end
end
return found
