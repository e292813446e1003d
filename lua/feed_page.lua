#!lua flags=no-writes
-- Reads a page of one partition's feed: most comments first, of equal counts the newest first.
-- KEYS[1] feed     feed:{p}     zset
-- KEYS[2] changes  changes:{p}  zset
-- KEYS[3] gone     gone:{p}     zset
-- KEYS[4] epoch    epoch:{p}    string
-- ARGV[1] count    the place behind which the page begins: a comment count; empty: at the start
-- ARGV[2] id       and a post id
-- ARGV[3] limit    posts
-- ARGV[4] bytes    the page ends when its rows have as many
-- ARGV[5] posts    prefix of the post keys of this partition, to which ids are appended
-- ARGV[6] latests  prefix of its latest lists
-- Returns {epoch, newest revision, more 0|1, {row, …}, {id, …}}; the first two are told of the first page only
--   A row's lines: id, comment count, author, thumbhash, the latest comments as a JSON array, and the caption, which
--   may have lines of its own. The last is there only if members were skipped: they have no whole post
-- Refuses nothing
-- A cursor is a place in the order, not a row: where its post has moved or gone, the place is found by the count
-- and, in the run of equal counts, by a binary search over ids. A row is one string, because Redis takes a fifth
-- longer to answer nested arrays, and whoever reads them twice as long. O(log n), or O(log² n) in a run of n.
local feed, changes, gone, epoch = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local score, count, id = ARGV[1], tonumber(ARGV[1]), ARGV[2]
local limit, bytes, posts, latests = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], ARGV[6]

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
    if #rows == limit or size >= bytes then
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
return {redis.call('GET', epoch) or '0', newest_revision(changes, gone), more, rows, skipped}
