#!lua flags=no-writes,allow-cross-slot-keys
-- Reads a page of the feed from several partitions: the most comments first, and of posts with equal counts the newest
-- first.
-- KEYS[1] feed  feed:{p}  zset, of the first of the partitions
-- ARGV[1] count      comment count of the cursor, behind which the page begins; empty: the first page
-- ARGV[2] id         post id of the cursor
-- ARGV[3] limit      posts in the page
-- ARGV[4] max_bytes  the page ends when its rows have this many bytes
-- ARGV[5] share      posts that are read of a partition at a time; up to `limit` posts may come from one partition
-- ARGV[6] cluster    1 on a Redis Cluster, otherwise empty
-- ARGV[7] hints      of each partition in turn the rank where its part of the page probably begins, with spaces between
--                    them; empty: not known
-- ARGV[8] names      of each partition in turn: its keys `feed`, `changes`, `gone` and `epoch`, the prefix of its post
--                    keys and the prefix of its `latest` keys; a post id is appended to the last two
-- Returns {more 0|1, rows, {timeline, newest revision, …} or {rank, …}, skipped}
--   A row is one string of lines: id, comment count, author, thumbhash, the latest comments as a JSON array, and the
--   caption, which may contain line breaks.
--   Timeline and revision are those of each partition in turn, on the first page. On another page it is the rank where
--   the partition's part of the page begins.
--   `skipped` is a list of ids. It is there only if the page left out posts that cannot be shown, because a field is
--   missing or a key has a wrong type.
-- Refuses nothing
--
-- In a Cluster all partitions must be on this node, and the client sends the call by the slot of the first. If another
-- one has been moved away, Redis stops the script.
-- A cursor is a place in the order, not a row. Its post may have got another count or may be deleted. A hint is the
-- place as it was when the cursor was made. Mostly it is still right, and one read shows this and gives the rows.
-- Otherwise the place is searched from the hint outwards. Far from it, and without one, it is found by the count and,
-- among posts with this count, by a binary search over their ids. So a hint that is wrong costs only time.
-- A row is one string because Redis takes a fifth longer to send nested arrays, and the client takes twice as long to
-- read them.
-- Time is O(log n) for each partition, or O(log² n) if n posts have the cursor's count, and neither its post nor the hint
-- is at its place.
local first_feed, score, count, id = KEYS[1], ARGV[1], tonumber(ARGV[1]), ARGV[2]
local limit, max_bytes, share = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local cluster, hints, names = ARGV[6], ARGV[7], ARGV
local first_name, width = 8, 6 -- the names of a partition begin at ARGV[8], and there are six
local reach = 11 -- reads from a hint outwards, up to 1,023 ranks away: half of what the whole search may take
if first_feed ~= names[first_name] then
  return redis.error_reply('ERR wrong arguments')
end

-- Says whether a post with a score is behind the cursor. Behind the last post, where there is none, everything is.
local function is_behind(post, post_score)
  post_score = tonumber(post_score)
  return not post or post_score < count or (post_score == count and post < id)
end

-- Returns the rank of the first post behind the cursor.
local function behind(feed, hint)
  if tonumber(redis.call('ZSCORE', feed, id)) == count then
    return redis.call('ZREVRANK', feed, id) + 1
  end
  local start, stop -- the rank is neither lower nor higher than these
  local rank, step = hint, 1
  for _ = 1, hint and reach or 0 do
    local row = redis.call('ZREVRANGE', feed, rank, rank, 'WITHSCORES')
    if is_behind(row[1], row[2]) then
      start, stop, rank = rank == 0 and 0 or start, rank, math.max(0, hint - step)
    else
      start, rank = rank + 1, hint + step
    end
    if start and stop then
      break
    end
    step = 2 * step
  end
  if not (start and stop) then
    local first = redis.call('ZCOUNT', feed, '(' .. score, '+inf')
    local last = first + redis.call('ZCOUNT', feed, score, score)
    start, stop = math.max(first, start or 0), math.min(last, stop or last)
  end
  while start < stop do
    local middle = math.floor((start + stop) / 2)
    local row = redis.call('ZREVRANGE', feed, middle, middle, 'WITHSCORES')
    if is_behind(row[1], row[2]) then
      stop = middle
    else
      start = middle + 1
    end
  end
  return start
end

-- Returns the rank where a partition's part of the page begins, its members from there on with their scores, and the
-- place of the first of them in this list. With a right hint the list begins with the member before.
local function read_part(feed, hint)
  if count and hint then
    local before = hint > 0 and 2 or 0
    local members = redis.call('ZREVRANGE', feed, hint - before / 2, hint + share - 1, 'WITHSCORES')
    if (before == 0 or (members[1] and not is_behind(members[1], members[2])))
      and is_behind(members[before + 1], members[before + 2]) then
      return hint, members, before + 1
    end
  end
  local start = count and behind(feed, hint) or 0
  return start, redis.call('ZREVRANGE', feed, start, start + share - 1, 'WITHSCORES'), 1
end

-- Each part holds some members of a partition with their scores, and which of them is next: `post`, with `score`.
local parts = {}

-- Goes to the next member of a part. Without one, the part leaves.
local function advance(part, place)
  local at = part.at + 2
  if at == part.full then
    part.start, at, part.full = part.start + share, 1, 2 * share + 1
    part.members = redis.call('ZREVRANGE', part.feed, part.start, part.start + share - 1, 'WITHSCORES')
  end
  part.at, part.post, part.score = at, part.members[at], tonumber(part.members[at + 1])
  if not part.post then
    table.remove(parts, place)
  end
end

local starts, hint_of = {}, hints:gmatch('%d+')
for first = first_name, #names, width do
  local feed, hint = names[first], hint_of()
  local start, members, at = read_part(feed, tonumber(hint))
  starts[#starts + 1] = start
  if members[at] then
    parts[#parts + 1] = {
      feed = feed, posts = names[first + 4], latests = names[first + 5], start = start, members = members, at = at,
      full = at + 2 * share, -- where the list ends if there may be more
      post = members[at], score = tonumber(members[at + 1]),
    }
  end
end

local rows, size, concat = {}, 0, table.concat
local skipped
while parts[1] and #rows < limit and size < max_bytes do
  local part, place = parts[1], 1
  for other = 2, #parts do
    local rival = parts[other]
    if rival.score > part.score or (rival.score == part.score and rival.post > part.post) then
      part, place = rival, other
    end
  end
  local post = part.post
  local row = redis.pcall('HMGET', part.posts .. post, 'author', 'thumbhash', 'caption')
  local latest = redis.pcall('LRANGE', part.latests .. post, 0, -1)
  if row[1] and row[2] and row[3] and not latest.err then
    local line = post .. '\n' .. part.members[part.at + 1] .. '\n' .. row[1] .. '\n' .. row[2]
      .. '\n[' .. concat(latest, ',') .. ']\n' .. row[3]
    size = size + #line
    rows[#rows + 1] = line
  else
    skipped = skipped or {}
    skipped[#skipped + 1] = post
  end
  advance(part, place)
end

local seen = count and starts or {}
if not count then
  local timelines = replication(cluster) -- how all of them end
  for first = first_name, #names, width do
    seen[#seen + 1] = (redis.call('GET', names[first + 3]) or '0') .. timelines
    seen[#seen + 1] = newest_revision(names[first + 1], names[first + 2])
  end
end
return {parts[1] and 1 or 0, rows, seen, skipped}
