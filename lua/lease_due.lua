#!lua flags=allow-oom
-- Leases what is due: each is looked at again when its lease has run out, unless it was settled by then.
-- KEYS[1] due    due:{p}   zset: post or upload id, scored by when to look at it, ms
-- KEYS[2] gone   gone:{p}  zset: deleted post, scored by its revision
-- ARGV[1] now    ms; empty: Redis' clock
-- ARGV[2] room   how many posts there is room for in the queue of image work
-- ARGV[3] lease  ms
-- ARGV[4] most   how many are looked at from either end, which bounds the script's time
-- ARGV[5] posts  prefix of the post keys of this partition, to which ids are appended
-- Returns {{id, lease, 'upload' | 'image' | 'erase', revision of the deletion or 0}, …}
-- Refuses nothing
-- The lease is the score it sets: whoever comes with another one holds a hint that was given again.
-- Where more is due than is looked at, the newest is looked at too: what needs no room does not wait behind posts that
-- do. Whatever becomes due is the newest at that moment.
local due, gone = KEYS[1], KEYS[2]
local now, room, lease, most, posts = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5]
if #KEYS ~= 2 or #ARGV ~= 5 or not (room and lease and tonumber(most)) then
  return redis.error_reply('ERR wrong arguments')
end

if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local leased = {}
local function look(ids)
  for _, id in ipairs(ids) do
    local kind = 'erase'
    if id:sub(1, 1) == 'u' then
      kind = 'upload'
    elseif redis.call('EXISTS', posts .. id) == 1 then
      kind = 'image'
    end
    if kind ~= 'image' or room > 0 then
      if kind == 'image' then
        room = room - 1
      end
      redis.call('ZADD', due, now + lease, id)
      leased[#leased + 1] = {id, now + lease, kind, redis.call('ZSCORE', gone, id) or 0}
    end
  end
  return #ids
end
if look(redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, most)) == tonumber(most) then
  look(redis.call('ZREVRANGEBYSCORE', due, now, '-inf', 'LIMIT', 0, most))
end
return leased
