#!lua flags=no-writes
-- Reads a page of one partition's feed: the most comments first, and of posts with equal counts the newest first.
-- KEYS[1] feed     feed:{p}     zset
-- KEYS[2] changes  changes:{p}  zset
-- KEYS[3] gone     gone:{p}     zset
-- KEYS[4] epoch    epoch:{p}    string
-- ARGV[1] count      comment count of the cursor, behind which the page begins; empty: the first page
-- ARGV[2] id         post id of the cursor
-- ARGV[3] limit      posts in the page
-- ARGV[4] max_bytes  the page ends when its rows have this many bytes
-- ARGV[5] posts      prefix of this partition's post keys; a post id is appended
-- ARGV[6] latests    prefix of this partition's `latest` keys
-- ARGV[7] cluster    1 on a Redis Cluster, otherwise empty
-- Returns {timeline, newest revision, more 0|1, rows, skipped}
--   Only the first page has the timeline and the revision; the others have '0' and 0.
--   A row is one string of lines: id, comment count, author, thumbhash, the latest comments as a JSON array, and the
--   caption, which may contain line breaks.
--   `skipped` is a list of ids. It is there only if the page left out posts that cannot be shown, because a field is
--   missing or a key has a wrong type.
-- Refuses nothing
--
-- A cursor is a place in the order, not a row. Its post may have got another count or may be deleted. Then the script
-- finds the place by the count and, among posts with this count, by a binary search over their ids.
-- A row is one string because Redis takes a fifth longer to send nested arrays, and the client takes twice as long to
-- read them.
-- Time is O(log n), or O(log² n) if n posts have the cursor's count and its post is not there.
local feed, changes, gone, epoch = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local score, count, id = ARGV[1], tonumber(ARGV[1]), ARGV[2]
local limit, max_bytes, posts, latests, cluster = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], ARGV[6], ARGV[7]

local start = 0
if count and tonumber(redis.call('ZSCORE', feed, id)) == count then
  start = redis.call('ZREVRANK', feed, id) + 1
elseif count then
  start = redis.call('ZCOUNT', feed, '(' .. score, '+inf')
  local stop = start + redis.call('ZCOUNT', feed, score, score)
  while start < stop do
    local middle = math.floor((start + stop) / 2)
    if redis.call('ZREVRANGE', feed, middle, middle)[1] < id then
      stop = middle
    else
      start = middle + 1
    end
  end
end

local rows, more, size, concat = {}, 0, 0, table.concat
local skipped, members
repeat
  members = redis.call('ZREVRANGE', feed, start, start + limit, 'WITHSCORES')
  for i = 1, #members, 2 do
    if #rows == limit or size >= max_bytes then
      more = 1
      break
    end
    local member = members[i]
    local row = redis.pcall('HMGET', posts .. member, 'author', 'thumbhash', 'caption')
    local latest = redis.pcall('LRANGE', latests .. member, 0, -1)
    if row[1] and row[2] and row[3] and not latest.err then
      local line = member .. '\n' .. members[i + 1] .. '\n' .. row[1] .. '\n' .. row[2]
        .. '\n[' .. concat(latest, ',') .. ']\n' .. row[3]
      size = size + #line
      rows[#rows + 1] = line
    else
      skipped = skipped or {}
      skipped[#skipped + 1] = member
    end
  end
  start = start + limit + 1
until more == 1 or #members < 2 * (limit + 1)
if count then
  return {'0', 0, more, rows, skipped}
end
return {timeline(epoch, cluster), newest_revision(changes, gone), more, rows, skipped}
