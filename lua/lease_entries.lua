#!lua flags=allow-oom
-- Leases entries of a sorted set whose time has come. An entry that is still there when its lease ends is due again.
-- KEYS[1] sealing  sealing:{p}  zset; or retired:{p}
-- ARGV[1] now         ms since 1970; empty: Redis' clock
-- ARGV[2] lease_ms    length of the lease
-- ARGV[3] limit       entries that are leased
-- ARGV[4] longest_ms  an entry that is due later than this comes from a clock that had jumped forward, and is due at once
-- Returns {{entry, lease}, …}; `lease` is the score that the script sets: the time at which the lease ends
-- Refuses nothing
local sealing = KEYS[1]
local now, lease_ms, limit, longest_ms = now_ms(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if #KEYS ~= 1 or #ARGV ~= 4 or not (lease_ms and limit and longest_ms) then
  return redis.error_reply('ERR wrong arguments')
end

local due = redis.call('ZRANGEBYSCORE', sealing, '-inf', now, 'LIMIT', 0, limit)
local later = string.format('(%.0f', now + longest_ms)
for _, entry in ipairs(redis.call('ZRANGEBYSCORE', sealing, later, '+inf', 'LIMIT', 0, limit - #due)) do
  due[#due + 1] = entry
end

for number, entry in ipairs(due) do
  redis.call('ZADD', sealing, now + lease_ms, entry)
  due[number] = {entry, now + lease_ms}
end
return due
