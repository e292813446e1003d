#!lua flags=no-writes
-- Reads what has changed in one partition since a revision: ready posts as they are now, and deleted ones.
-- KEYS[1] changes  changes:{p}  zset: ready post id, scored by the revision of its last change
-- KEYS[2] gone     gone:{p}     zset: deleted post id, scored by its revision
-- KEYS[3] epoch    epoch:{p}    string
-- ARGV[1] since    revision; empty: the newest, so that nothing has changed since
-- ARGV[2] limit    entries
-- ARGV[3] bytes    the page ends when its captions and comments have as many
-- ARGV[4] prefix   of the post keys of this partition, to which ids are appended
-- ARGV[5] latests  prefix of its latest lists
-- ARGV[6] streams  prefix of its comment streams
-- Returns {epoch, revision of the last entry or since, more 0|1, rows as read_post returns them, or {id} if deleted,
--   {id, …}}; the last is there only if members were skipped: they have no whole post
-- Refuses nothing
-- Each post stands once in one of the two, however often it changed. O(log n + answer).
local changes, gone, epoch = KEYS[1], KEYS[2], KEYS[3]
local since, limit, bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local prefix, latests, streams = ARGV[4], ARGV[5], ARGV[6]

local current = redis.call('GET', epoch) or '0'
if not since then
  return {current, newest_revision(changes, gone), 0, {}}
end
local rows, more, size, skipped = {}, 0, 0, nil
local whole = 2 * (limit + 1) -- length of a list that may have been cut off
local alive, dead, a, d
repeat
  local from = string.format('(%.0f', since)
  alive = redis.call('ZRANGEBYSCORE', changes, from, '+inf', 'WITHSCORES', 'LIMIT', 0, limit + 1)
  dead = redis.call('ZRANGEBYSCORE', gone, from, '+inf', 'WITHSCORES', 'LIMIT', 0, limit + 1)
  a, d = 1, 1
  -- Where members were skipped a list may end early, and its next entries may come before the other list's.
  while (alive[a] or #alive < whole) and (dead[d] or #dead < whole) and (alive[a] or dead[d]) do
    if #rows == limit or size >= bytes then
      more = 1
      break
    end
    if not dead[d] or (alive[a] and tonumber(alive[a + 1]) < tonumber(dead[d + 1])) then
      local id = alive[a]
      local row = redis.pcall('HMGET', prefix .. id, 'author', 'caption', 'status', 'thumbhash', 'code', 'detail')
      local latest = redis.pcall('LRANGE', latests .. id, 0, -1)
      local count = redis.pcall('XLEN', streams .. id)
      since, a = tonumber(alive[a + 1]), a + 2
      if row[1] and row[2] and row[3] and not latest.err and tonumber(count) then
        size = size + #row[1] + #row[2]
        for _, comment in ipairs(latest) do
          size = size + #comment
        end
        rows[#rows + 1] = {id, count, row[1], row[2], row[3], row[4], row[5], row[6], latest}
      else
        skipped = skipped or {}
        skipped[#skipped + 1] = id
      end
    else
      rows[#rows + 1] = {dead[d]}
      since, d = tonumber(dead[d + 1]), d + 2
    end
  end
until more == 1 or (not alive[a] and not dead[d] and #alive < whole and #dead < whole)
return {current, since, more, rows, skipped}
