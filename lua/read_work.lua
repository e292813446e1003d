#!lua flags=no-writes
-- Reads how much work waits in a partition, and for how long. It changes nothing.
-- KEYS[1] due    due:{p}    zset: id of an upload or of a deleted or failed post, scored by its time in ms since 1970
-- KEYS[2] turns  turns:{p}  zset: user, scored by their place
-- KEYS[3] sealing  sealing:{p}  zset: post whose comments are to be sealed or compacted, scored by its time
-- ARGV[1] now       ms since 1970; empty: Redis' clock
-- ARGV[2] grace_ms  an entry that is due within this time is leased, or an upload that was dropped
-- ARGV[3] open_ms   an open upload is due within this time
-- ARGV[4] entries   entries of `due` that are read
-- ARGV[5] users     users of `turns` that are read
-- ARGV[6] making    prefix of this partition's `making` keys; a user is appended
-- Returns {due entries, ms that the oldest of them has waited, users who wait for an image, ms that the oldest image of
--   the first of them has waited, open uploads, posts whose comments are to be sealed, ms that the oldest has waited}
-- Refuses nothing
--
-- `entries` and `users` bound the script's time: 5,000 and 20 take 1 ms. So beyond 5,000 open uploads the last number
-- is too low, and an image that waits longer may belong to a user further back.
local due, turns, sealing = KEYS[1], KEYS[2], KEYS[3]
local now, grace_ms, open_ms = now_ms(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local entries, users, making = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
if #KEYS ~= 3 or #ARGV ~= 6 or not (grace_ms and open_ms and entries and users) then
  return redis.error_reply('ERR wrong arguments')
end

local oldest = tonumber(redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')[2]) or now
local oldest_image = now
for _, user in ipairs(redis.call('ZRANGEBYSCORE', turns, '-inf', now, 'LIMIT', 0, users)) do
  oldest_image = math.min(oldest_image, tonumber(redis.call('ZRANGE', making .. user, 0, 0, 'WITHSCORES')[2]) or now)
end
local open = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', due, now + grace_ms, now + open_ms, 'LIMIT', 0, entries)) do
  if id:byte() == 117 then -- u: an upload. Posts that wait for the backup are also due within a day
    open = open + 1
  end
end
return {
  redis.call('ZCOUNT', due, '-inf', now),
  math.max(0, now - oldest),
  redis.call('ZCOUNT', turns, '-inf', now),
  math.max(0, now - oldest_image),
  open,
  redis.call('ZCOUNT', sealing, '-inf', now),
  math.max(0, now - (tonumber(redis.call('ZRANGE', sealing, 0, 0, 'WITHSCORES')[2]) or now)),
}
