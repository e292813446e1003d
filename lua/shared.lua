-- Functions that several scripts use. storage's loader puts this text behind the first line of every script.
-- The last four write, the others only read. A function that refuses returns the refusal, and the script returns it to
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

-- Returns the names of an upload's chunks, in order. `chunks` of a final upload (tus, "Concatenation") has the ids of its
-- parts instead. Their chunks stay in the parts' own lists, and their names begin with the part: `<part>/<name>`.
local function list_chunks(chunks, chunk_prefix)
  local names = redis.call('LRANGE', chunks, 0, -1)
  if not (names[1] or ''):match('^u') then
    return names
  end
  local all = {}
  for _, part in ipairs(names) do
    for _, name in ipairs(redis.call('LRANGE', chunk_prefix .. part, 0, -1)) do
      all[#all + 1] = part .. '/' .. name
    end
  end
  return all
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

-- Returns the number of a post's comments: those in the stream and those in the store, without the deleted ones. The
-- second value is how many are in the stream.
-- An entry of `segments` is `<last id> <through> <name>`; `through` counts the comments of this and all older segments.
local function count_comments(comments, segments, erased)
  local hot, tail = redis.call('XLEN', comments), redis.call('LINDEX', segments, -1)
  if not tail then
    return hot, hot
  end
  return hot + tail:match('^%S+ (%d+)') - redis.call('SCARD', erased), hot
end

-- Returns the place of the first segment whose last id is not below a comment's id. Returns the number of segments if
-- there is none. The second value is the segment's entry, or false.
local function find_segment(segments, comment)
  local ms, sequence = comment:match('^(%d+)-(%d+)$')
  ms, sequence = tonumber(ms), tonumber(sequence)
  local first, stop = 0, redis.call('LLEN', segments)
  while first < stop do
    local middle = math.floor((first + stop) / 2)
    local last_ms, last_sequence = redis.call('LINDEX', segments, middle):match('^(%d+)-(%d+) ')
    last_ms = tonumber(last_ms)
    if last_ms < ms or (last_ms == ms and tonumber(last_sequence) < sequence) then
      first = middle + 1
    else
      stop = middle
    end
  end
  return first, redis.call('LINDEX', segments, first)
end

-- Returns entries of segments, newest first: the one at `place`, and then older ones until these hold `wanted` comments.
-- A reader may need none of the comments in the first one.
local function list_segments(segments, place, wanted)
  local entries, through, rows = {}, nil, 0
  repeat
    local entry = redis.call('LINDEX', segments, place)
    local before = place > 0 and redis.call('LINDEX', segments, place - 1):match('^%S+ (%d+)') or 0
    if through then
      rows = rows + through - before
    end
    through, place = before, place - 1
    entries[#entries + 1] = entry
  until place < 0 or rows >= wanted
  return entries
end

-- Returns what `latest` holds once `comment` is removed, newest first. Returns nil where the store must be read first.
-- `hot` says that the comment is in the stream. `tail` and `refill` are what the caller has read in the store: the newest
-- entry of `segments`, and a JSON array of the newest comments there, newest first; erased ones have only their id. They
-- count only if `tail` is still the newest entry. The second value is what is known without the store.
local function newest_without(comments, segments, erased, comment, hot, latest_count, tail, refill)
  local rows = {}
  for _, entry in ipairs(redis.call('XREVRANGE', comments, '+', '-', 'COUNT', latest_count + 1)) do
    if entry[1] ~= comment and #rows < latest_count + 0 then
      rows[#rows + 1] = cjson.encode({entry[1], entry[2][2], entry[2][4]})
    end
  end
  local newest = redis.call('LINDEX', segments, -1)
  if #rows == latest_count + 0 or not newest then
    return rows
  end
  local sealed = newest:match('^%S+ (%d+)') - redis.call('SCARD', erased) - (hot and 0 or 1)
  local missing = math.min(latest_count - #rows, sealed)
  for _, row in ipairs(missing > 0 and tail == newest and cjson.decode(refill) or {}) do
    if missing > 0 and row[1] ~= comment and redis.call('SISMEMBER', erased, row[1]) == 0 then
      if not row[2] then -- the caller took it for erased, and read it before a restore
        break
      end
      rows[#rows + 1], missing = cjson.encode(row), missing - 1
    end
  end
  return missing <= 0 and rows or nil, rows
end

-- Adds a comment to its post's stream. Returns its id, which is greater than every id that the post's comments ever had.
-- This also holds if the clock went back, if the newest comment was deleted, or if all comments are in the store: then
-- the stream is gone, and the newest segment's last id is the greatest one.
local function append_comment(comments, segments, now, author, text)
  local start, tail = string.format('%.0f-*', now), redis.call('LINDEX', segments, -1)
  local ms, sequence = (tail or ''):match('^(%d+)-(%d+) ')
  if ms and tonumber(ms) >= now then
    start = string.format('%s-%d', ms, sequence + 1)
  end
  local comment = redis.pcall('XADD', comments, start, 'author', author, 'text', text)
  if type(comment) == 'table' then -- Redis refused the id because the stream had a greater one
    local stream = redis.call('XINFO', 'STREAM', comments)
    for i = 1, #stream, 2 do
      if stream[i] == 'last-generated-id' then
        ms, sequence = stream[i + 1]:match('^(%d+)-(%d+)$')
        comment = string.format('%s-%d', ms, sequence + 1)
      end
    end
    redis.call('XADD', comments, comment, 'author', author, 'text', text)
  end
  return comment
end

-- Removes a comment from the stream, or marks it as erased if it is in the store. `rows` is what `latest` holds then.
-- XX: a hidden post is not in `changes`, and stays out.
-- The segment is compacted after `compact_ms`, or at once if many comments are erased: pages get all of their ids.
local function remove_comment(comments, erased, latest, changes, sealing, id, comment, rows, revision, now, compact_ms)
  if redis.call('XDEL', comments, comment) == 0 then
    redis.call('SADD', erased, comment)
    local many = redis.call('SCARD', erased) >= 1000 -- a page then takes 0.2 ms
    redis.call('ZADD', sealing, 'LT', many and now or now + compact_ms, id)
  end
  redis.call('DEL', latest)
  for _, row in ipairs(rows) do
    redis.call('RPUSH', latest, row)
  end
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
