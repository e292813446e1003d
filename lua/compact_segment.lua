#!lua flags=allow-oom
-- Replaces a segment by one without its erased comments.
-- KEYS[1] segments  segments:{p}:<id>  list
-- KEYS[2] erased    erased:{p}:<id>    set
-- KEYS[3] retired   retired:{p}        zset
-- KEYS[4] changes   changes:{p}        zset
-- KEYS[5] gone      gone:{p}           zset
-- ARGV[1] now      ms since 1970; empty: Redis' clock
-- ARGV[2] id       post id
-- ARGV[3] entry    the segment's entry in `segments`
-- ARGV[4] name     of the new segment; - if no comment is left
-- ARGV[5] keep_ms  how long a backup may still name the old segment
-- ARGV[6…] erased  ids of the erased comments that the new segment lacks
-- Returns their number, or 0 if the segment was replaced by this name before
-- Refuses STALE
--
-- The entries of all newer segments are written again, because they count the comments of this one, too. An entry without
-- comments stays: the ids of new comments must be greater than its last id.
-- RPUSH takes half of the time that an LSET for each entry would take. The list never becomes empty.
local segments, erased, retired, changes, gone = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now, id, entry, name, keep_ms = now_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local args = ARGV
local first_id = 6
if #KEYS ~= 5 or #args < first_id or not (keep_ms and entry:match('^%d+%-%d+ %d+ %S+$')) then
  return redis.error_reply('ERR wrong arguments')
end

local place, current = find_segment(segments, entry:match('^%S+')) -- its last id never changes
if name ~= '-' and current and current:match('%S+$') == name then
  return 0
end
if current ~= entry then
  return redis.error_reply('STALE this segment was replaced')
end
for number = first_id, #args do
  if redis.call('SISMEMBER', erased, args[number]) == 0 then
    return redis.error_reply('STALE a comment is not erased')
  end
end
local newer = redis.call('LRANGE', segments, place, -1)
local replaced_at = math.max(now, newest_revision(changes, gone)) -- the clock may have gone back

local count = #args - first_id + 1
for number, other in ipairs(newer) do
  local last, through, kept = other:match('^(%S+) (%d+) (%S+)$')
  newer[number] = string.format('%s %d %s', last, through - count, number == 1 and name or kept)
end
if place > 0 then
  redis.call('LTRIM', segments, 0, place - 1)
end
for number = 1, #newer, 1000 do
  redis.call('RPUSH', segments, unpack(newer, number, math.min(number + 999, #newer)))
end
if place == 0 then
  redis.call('LTRIM', segments, #newer, -1)
end
for number = first_id, #args do
  redis.call('SREM', erased, args[number])
end
redis.call('ZADD', retired, replaced_at + keep_ms, id .. '/' .. entry:match(' (%S+)$'))
return count
