#!lua flags=allow-oom
-- Leases posts whose image is to be made. Users take turns, and each turn leases one post.
-- KEYS[1] turns  turns:{p}  zset: user, scored by their place in ms since 1970
-- ARGV[1] now           ms since 1970; empty: Redis' clock
-- ARGV[2] capacity      how many posts the queue has space for
-- ARGV[3] lease_ms      length of the lease
-- ARGV[4] max_attempts  after this many attempts the leases that start_image sets stop doubling
-- ARGV[5] max_users     users that are visited, which bounds the script's time
-- ARGV[6] making        prefix of this partition's `making` keys; a user is appended
-- ARGV[7] posts         prefix of this partition's post keys; a post id is appended
-- Returns {{post id, lease, traceparent or false}, …}
-- Refuses nothing
--
-- `lease` is the score that the script sets in `making`: the time at which the lease ends. A hint in the queue that has
-- another score is an old one.
-- What happens to a user whose place is reached:
--   a post waits             it is leased. The user's new place is the time of this turn, behind all users who wait.
--                            So the user who was served least recently is always first.
--   all posts are leased     the user's new place is the end of the first lease, but at most lease_ms from now
--   the first post is not    the post leaves `making`, and the user's place stays
--   to be made
--   `making` is empty        the user leaves `turns`, but not before the place is reached. So a user who posts again
--                            at once has the old place, and no advantage over a user who has queued many posts.
-- A score may be further ahead than any lease: a clock that had jumped forward set it. It is set to now.
local turns = KEYS[1]
local now, capacity, lease_ms = now_ms(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local max_attempts, max_users, making, posts = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6], ARGV[7]
if #KEYS ~= 1 or #ARGV ~= 7 or not (capacity and lease_ms and max_attempts and max_users) then
  return redis.error_reply('ERR wrong arguments')
end

local STEP = 1 / 1024 -- ms between turns of the same ms; a double represents it exactly at today's times
local MAX_CHECKED = 64 -- scores of one user that are checked in one turn; twice what BUSY allows by default
local reached = '(' .. now + 1 -- places before this score are reached: those of the current ms count
local too_late = '(' .. now + lease_ms -- no later score is set in `turns`, and in `making` only by an attempt

for _, user in ipairs(redis.call('ZRANGEBYSCORE', turns, too_late, '+inf', 'LIMIT', 0, max_users)) do
  redis.call('ZADD', turns, now, user)
end

local function end_leases_of_a_wrong_clock(queue)
  local found = redis.call('ZREVRANGEBYSCORE', queue, '+inf', too_late, 'WITHSCORES', 'LIMIT', 0, MAX_CHECKED)
  for i = 1, #found, 2 do
    local attempt = math.max(tonumber(redis.call('HGET', posts .. found[i], 'attempt')) or 0, 1)
    if tonumber(found[i + 1]) > now + lease_ms * 2 ^ math.min(attempt - 1, max_attempts) then
      redis.call('ZADD', queue, now, found[i])
    end
  end
end

local leased, visited = {}, 0
local place = tonumber(redis.call('ZREVRANGEBYSCORE', turns, reached, '-inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]) or now
place = math.max(place, now)
while capacity > 0 and visited < max_users do
  local user = redis.call('ZRANGEBYSCORE', turns, '-inf', reached, 'LIMIT', 0, 1)[1]
  if not user then
    break
  end
  visited = visited + 1
  local queue = making .. user
  end_leases_of_a_wrong_clock(queue)
  local first = redis.call('ZRANGE', queue, 0, 0, 'WITHSCORES')
  local id, due = first[1], tonumber(first[2])
  local row = id and redis.call('HMGET', posts .. id, 'status', 'trace')
  local status = row and row[1]
  if not id then
    redis.call('ZREM', turns, user)
  elseif status ~= 'processing' and status ~= 'ready' then
    redis.call('ZREM', queue, id) -- it has no image to be made, and would be leased for ever
  elseif due > now then
    redis.call('ZADD', turns, math.min(due, now + lease_ms), user)
  else
    redis.call('ZADD', queue, now + lease_ms, id)
    leased[#leased + 1] = {id, now + lease_ms, row[2]}
    capacity = capacity - 1
    place = place + STEP
    redis.call('ZADD', turns, place, user)
  end
end
return leased
