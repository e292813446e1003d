#!lua flags=allow-oom
-- Leases posts whose image is to be made: one post a turn, and the turns go round the users who have such posts.
-- KEYS[1] turns    turns:{p}  zset: user, scored by their place among those who wait, or by when they have work again
-- ARGV[1] now      ms; empty: Redis' clock
-- ARGV[2] room     how many posts the queue takes
-- ARGV[3] lease    ms
-- ARGV[4] attempts after how many attempts the leases that start_image sets stop doubling
-- ARGV[5] most     how many users are looked at, which bounds the script's time
-- ARGV[6] making   prefix of the users' `making` keys of this partition, to which users are appended
-- ARGV[7] posts    prefix of the post keys of this partition, to which ids are appended
-- Returns {{post id, lease}, …}
-- Refuses nothing
-- The lease is the score it sets: a hint with another score is an old one.
-- A served user's new place is the time of this turn, behind everybody who waits: the least recently served is first.
-- A user without work leaves `turns` when their place comes up, not before. So whoever posts again at once keeps the
-- place, and gains nothing over users who have queued many posts.
-- Scores further ahead than any lease were set by a clock that had jumped forward. They are due now.
local turns, room, lease, attempts = KEYS[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local now, most, making, posts = now_ms(ARGV[1]), tonumber(ARGV[5]), ARGV[6], ARGV[7]
if #KEYS ~= 1 or #ARGV ~= 7 or not (room and lease and attempts and most) then
  return redis.error_reply('ERR wrong arguments')
end

local STEP = 1 / 1024 -- ms between turns of the same millisecond; a double holds it exactly at today's times
local WATCHED = 64 -- scores of one user that are checked in one turn; twice what `busy` allows by default
local soon = '(' .. now + 1 -- places within this millisecond count as reached
local late = '(' .. now + lease -- no later score is set in `turns`, and none in `making` without an attempt

for _, user in ipairs(redis.call('ZRANGEBYSCORE', turns, late, '+inf', 'LIMIT', 0, most)) do
  redis.call('ZADD', turns, now, user)
end

local function end_leases_of_a_wrong_clock(queue)
  local found = redis.call('ZREVRANGEBYSCORE', queue, '+inf', late, 'WITHSCORES', 'LIMIT', 0, WATCHED)
  for i = 1, #found, 2 do
    local begun = math.max(tonumber(redis.call('HGET', posts .. found[i], 'attempt')) or 0, 1)
    if tonumber(found[i + 1]) > now + lease * 2 ^ math.min(begun - 1, attempts) then
      redis.call('ZADD', queue, now, found[i])
    end
  end
end

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
  end_leases_of_a_wrong_clock(queue)
  local first = redis.call('ZRANGE', queue, 0, 0, 'WITHSCORES')
  local id, due = first[1], tonumber(first[2])
  local status = id and redis.call('HGET', posts .. id, 'status')
  if not id then
    redis.call('ZREM', turns, user)
  elseif status ~= 'processing' and status ~= 'ready' then
    redis.call('ZREM', queue, id) -- it has no image to be made, and would be handed out for ever
  elseif due > now then
    redis.call('ZADD', turns, math.min(due, now + lease), user)
  else
    redis.call('ZADD', queue, now + lease, id)
    leased[#leased + 1] = {id, now + lease}
    room = room - 1
    place = place + STEP
    redis.call('ZADD', turns, place, user)
  end
end
return leased
