#!lua flags=no-writes
-- Reads what has changed in one partition since a revision: posts that are ready, as they are now, and deleted posts.
-- KEYS[1] changes  changes:{p}  zset: ready post, scored by the revision of its last change
-- KEYS[2] gone     gone:{p}     zset: deleted post, scored by the revision of its deletion
-- KEYS[3] epoch    epoch:{p}    string
-- ARGV[1] since      revision; empty: the newest one, after which there is no change yet
-- ARGV[2] limit      posts in the page
-- ARGV[3] max_bytes  the page ends when its captions and comments have this many bytes
-- ARGV[4] posts      prefix of this partition's post keys; a post id is appended
-- ARGV[5] latests    prefix of this partition's `latest` keys
-- ARGV[6] streams    prefix of this partition's comment streams
-- ARGV[7] segments   prefix of this partition's lists of segments
-- ARGV[8] erased     prefix of this partition's sets of erased comments
-- ARGV[9] cluster    1 on a Redis Cluster, otherwise empty
-- Returns {timeline, revision of the page's last post or `since`, more 0|1, rows, skipped}
--   A row is what read_post returns of a post that is not ready, or {id} of a deleted post.
--   `skipped` is a list of ids. It is there only if the page left out posts that cannot be shown, because a field is
--   missing or a key has a wrong type.
-- Refuses nothing
--
-- A post is once in `changes` or once in `gone`, however often it changed. The script merges the two by revision.
-- Its time is O(log n + size of the page).
local changes, gone, epoch = KEYS[1], KEYS[2], KEYS[3]
local since, limit, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local posts, latests, streams, segments, erased, cluster = ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9]

local current = (redis.call('GET', epoch) or '0') .. replication(cluster)
if not since then
  return {current, newest_revision(changes, gone), 0, {}}
end
local rows, more, size, skipped = {}, 0, 0, nil
local full = 2 * (limit + 1) -- a list of this length may continue behind its last entry
local changed, deleted, c, d
repeat
  local from = string.format('(%.0f', since)
  changed = redis.call('ZRANGEBYSCORE', changes, from, '+inf', 'WITHSCORES', 'LIMIT', 0, limit + 1)
  deleted = redis.call('ZRANGEBYSCORE', gone, from, '+inf', 'WITHSCORES', 'LIMIT', 0, limit + 1)
  c, d = 1, 1
  -- If posts were skipped, one list may be used up while it continues in Redis. Its next entries may come before those
  -- of the other list. So the loop ends there, and both lists are read again.
  while (changed[c] or #changed < full) and (deleted[d] or #deleted < full) and (changed[c] or deleted[d]) do
    if #rows == limit or size >= max_bytes then
      more = 1
      break
    end
    if not deleted[d] or (changed[c] and tonumber(changed[c + 1]) < tonumber(deleted[d + 1])) then
      local id = changed[c]
      local row = redis.pcall('HMGET', posts .. id, 'author', 'caption', 'status', 'thumbhash', 'code', 'detail')
      local latest = redis.pcall('LRANGE', latests .. id, 0, -1)
      local counted, count = pcall(count_comments, streams .. id, segments .. id, erased .. id)
      since, c = tonumber(changed[c + 1]), c + 2
      if row[1] and row[2] and row[3] and not latest.err and counted then
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
      rows[#rows + 1] = {deleted[d]}
      since, d = tonumber(deleted[d + 1]), d + 2
    end
  end
until more == 1 or (not changed[c] and not deleted[d] and #changed < full and #deleted < full)
return {current, since, more, rows, skipped}
