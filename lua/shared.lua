-- Functions that several scripts use. storage's loader puts this text behind the first line of every script.
-- The last three write, the others only read. A function that refuses returns the refusal, and the script returns it to
-- the caller. The script's header lists the word under `Refuses`.
-- Every call of a script creates all of these functions, about 0.04 µs for each. So there are few of them, and none
-- uses another one, which would cost twice as much.
-- luacheck: ignore 211 (a local function that this file does not use)

-- Returns the time in ms since 1970: `given` if it is a number, otherwise Redis' clock.
local function now_ms(given)
  local now = tonumber(given)
  if now then
    return now
  end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Returns the newest revision in a partition; 0 if nothing has changed there yet.
local function newest_revision(changes, gone)
  local changed = redis.call('ZREVRANGE', changes, 0, 0, 'WITHSCORES')[2]
  local deleted = redis.call('ZREVRANGE', gone, 0, 0, 'WITHSCORES')[2]
  return math.max(changed or 0, deleted or 0)
end

-- Returns the revision of the next change in a partition. It is greater than all earlier ones, even if the clock went
-- back or two changes come in the same ms.
local function next_revision(now, changes, gone)
  local changed = redis.call('ZREVRANGE', changes, 0, 0, 'WITHSCORES')[2]
  local deleted = redis.call('ZREVRANGE', gone, 0, 0, 'WITHSCORES')[2]
  return math.max(now, (changed or 0) + 1, (deleted or 0) + 1)
end

-- Returns the end of the names of timelines: '' on a single Redis, and on a Cluster (`cluster` is 1) a part of the
-- replication id. A token of another timeline may name changes that do not exist any more. A restore gives `epoch`, with
-- which the name begins, another value. A failover may take changes back, too, and each replica that is promoted changes
-- its replication id before it serves.
local function replication(cluster)
  if cluster ~= '1' then
    return ''
  end
  return redis.call('INFO', 'replication'):match('master_replid:(%x%x%x%x%x%x%x%x)')
end

-- Returns the answer to a repeated request, {id, 1}, or nil if its Idempotency-Key is new.
-- Refuses REUSED if the key's first request was a different one.
local function replay(idempotency, request)
  local stored = redis.call('GET', idempotency)
  if not stored then
    return nil
  end
  local digest, id = stored:match('^(%S+) (%S+)$')
  if digest ~= request then
    return redis.error_reply('REUSED this Idempotency-Key was used for another request')
  end
  return {id, 1}
end

-- Refuses BUSY if an author already has `allowed` posts in processing. Otherwise returns nil.
-- After a restore `making` also holds ready posts, which do not count. They were put there first, so the posts in
-- processing have the highest scores. Reading twice `allowed` members is enough to find `allowed` of them.
local function refuse_busy(making, posts, allowed)
  if redis.call('ZCARD', making) < allowed then
    return nil
  end
  local count = 0
  for _, id in ipairs(redis.call('ZREVRANGE', making, 0, 2 * allowed - 1)) do
    if redis.call('HGET', posts .. id, 'status') == 'processing' then
      count = count + 1
    end
  end
  if count >= allowed then
    return redis.error_reply('BUSY you have ' .. count .. ' posts in processing: wait until one of them is ready')
  end
end

-- Adds a post to the list of its author's posts. It may be there already.
-- The lists of all users are one sequence of entries in lexical order, in leaves of at most `leaf_entries`. `leaves` has
-- the first possible entry of each leaf, which is also the leaf's name; that of the lowest leaf is 0. A full leaf is
-- split: its upper half becomes a new leaf.
local function add_entry(leaves, leaf, entry, leaf_entries)
  local first = redis.call('ZREVRANGEBYLEX', leaves, '[' .. entry, '-', 'LIMIT', 0, 1)[1]
  if not first then
    first = '0'
    redis.call('ZADD', leaves, 0, first)
  end
  if redis.call('ZCARD', leaf .. first) >= leaf_entries then
    local half = math.floor(leaf_entries / 2)
    local middle = redis.call('ZRANGE', leaf .. first, half, half)[1]
    redis.call('ZRANGESTORE', leaf .. middle, leaf .. first, half, -1)
    redis.call('ZADD', leaves, 0, middle)
    redis.call('ZREMRANGEBYRANK', leaf .. first, half, -1)
    -- Redis finds the half. Lua's own comparison follows the server's locale, where CH may come after CZ.
    first = redis.call('ZREVRANGEBYLEX', leaves, '[' .. entry, '-', 'LIMIT', 0, 1)[1]
  end
  redis.call('ZADD', leaf .. first, 0, entry)
end

-- Removes a comment from its post's stream, and corrects what is derived from the stream.
-- `latest` is always filled again, whichever comment was removed. So there is one path only, and it also corrects a
-- `latest` that is wrong. XX: a hidden post is not in `feed` and `changes`, and stays out.
local function remove_comment(comments, latest, feed, changes, id, comment, latest_count, revision)
  redis.call('XDEL', comments, comment)
  redis.call('DEL', latest)
  for _, newest in ipairs(redis.call('XREVRANGE', comments, '+', '-', 'COUNT', latest_count)) do
    redis.call('RPUSH', latest, cjson.encode({newest[1], newest[2][2], newest[2][4]}))
  end
  redis.call('ZADD', feed, 'XX', redis.call('XLEN', comments), id)
  redis.call('ZADD', changes, 'XX', revision, id)
end

-- Takes `cost` units for each of `count` requests from a limit of `quota` units in `window_ms`. See take.lua.
-- Returns how many requests are allowed, the units that are left, and the ms until more are there.
local function take(rate, now, quota, window_ms, cost, count)
  local ms_per_unit = window_ms / quota
  local used, stored = 0, redis.call('GET', rate)
  if stored then
    local before, at = stored:match('^(%S+) (%d+)$')
    used = math.max(0, (tonumber(before) or 0) - math.max(0, now - (at or now)) / ms_per_unit)
  end
  local allowed = count
  if cost > 0 and used + count * cost > quota + 0 then -- a millionth of a unit is the tolerance for rounding
    allowed = math.max(0, math.min(count, math.floor((quota - used) / cost + 1e-6)))
  end
  if allowed > 0 then
    used = math.max(0, used + allowed * cost)
    if used > 0 then
      redis.call('SET', rate, used .. ' ' .. now, 'PX', math.ceil(used * ms_per_unit) + 60000) -- take.lua says why
    else
      redis.call('DEL', rate)
    end
  end
  local left = math.max(0, math.floor(quota - used + 1e-6))
  local missing = allowed < count and cost or math.min(left + 1, quota)
  return allowed, left, math.ceil(math.max(0, used + missing - quota - 1e-6) * ms_per_unit)
end
