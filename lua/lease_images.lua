#!lua flags=allow-oom
-- Leases posts whose image is to be made: one post a turn, and the turns go round the users who have such posts.
-- KEYS[1] turns    turns:{p}  zset: user, scored by their place among those who wait, or by when they have work again
-- ARGV[1] now      ms; empty: Redis' clock
-- ARGV[2] room     how many posts the queue takes
-- ARGV[3] lease    ms
-- ARGV[4] most     how many users are looked at, which bounds the script's time
-- ARGV[5] making   prefix of the users' `making` keys of this partition, to which users are appended
-- ARGV[6] posts    prefix of the post keys of this partition, to which ids are appended
-- Returns {{post id, lease}, …}
-- Refuses nothing
-- The lease is the score it sets: a hint with another score is an old one.
-- A served user's new place is the time of this turn, behind everybody who waits: the least recently served is first.
-- A user without work leaves `turns` when their place comes up, not before. So whoever posts again at once keeps the
-- place, and gains nothing over users who have queued many posts.
local turns, now, room, lease = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local most, making, posts = tonumber(ARGV[4]), ARGV[5], ARGV[6]
if #KEYS ~= 1 or #ARGV ~= 6 or not (room and lease and most) then
  return redis.error_reply('ERR wrong arguments')
end

if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local STEP = 1 / 1024 -- ms between turns of the same millisecond; a double holds it exactly at today's times
local soon = '(' .. now + 1 -- places within this millisecond count as reached

local leased, looked = {}, 0
local place = tonumber(redis.call('ZREVRANGEBYSCORE', turns, soon, '-inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]) or now
place = math.max(place, now)
while room > 0 and looked < most do
  local user = redis.call('ZRANGEBYSCORE', turns, '-inf', soon, 'LIMIT', 0, 1)[1]
  if not user then
    break
  end
  looked = looked + 1
  local queue = making .. user
  local first = redis.call('ZRANGE', queue, 0, 0, 'WITHSCORES')
  local id, due = first[1], tonumber(first[2])
  local status = id and redis.call('HGET', posts .. id, 'status')
  if not id then
    redis.call('ZREM', turns, user)
  elseif status ~= 'processing' and status ~= 'ready' then
    redis.call('ZREM', queue, id) -- it has no image to be made, and would be handed out for ever
  elseif due > now then
    redis.call('ZADD', turns, due, user)
  else
    redis.call('ZADD', queue, now + lease, id)
    leased[#leased + 1] = {id, now + lease}
    room = room - 1
    place = place + STEP
    redis.call('ZADD', turns, place, user)
  end
end
return leased
