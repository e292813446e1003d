#!lua flags=no-writes
-- Reads a page of a post's comments, newest first.
-- KEYS[1] post      post:{p}:<id>      hash; of a hidden post its `hidden`
-- KEYS[2] comments  comments:{p}:<id>  stream
-- KEYS[3] segments  segments:{p}:<id>  list
-- KEYS[4] erased    erased:{p}:<id>    set
-- ARGV[1] before     comment id: the page begins with the next older comment; empty: with the newest one
-- ARGV[2] limit      comments in the page
-- ARGV[3] max_bytes  the page ends when its authors and texts have this many bytes
-- Returns {more 0|1, {{comment id, author, text}, …}}. If the page continues in the store, it also returns the entries of
--   the segments where it does, newest first, and the ids in `erased`; `more` means nothing then
-- Refuses NOPOST
--
-- All comments in the store are older than those in the stream.
local post, comments, segments, erased = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local before, limit, max_bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

if redis.call('EXISTS', post) == 0 then
  return redis.error_reply('NOPOST no such post')
end
local rows, size = {}, 0
local newest = before == '' and '+' or '(' .. before
for _, entry in ipairs(redis.call('XREVRANGE', comments, newest, '-', 'COUNT', limit + 1)) do
  if #rows == limit or size >= max_bytes then
    return {1, rows}
  end
  local author, text = entry[2][2], entry[2][4]
  size = size + #author + #text
  rows[#rows + 1] = {entry[1], author, text}
end
local tail = redis.call('LINDEX', segments, -1)
local sealed = tail and tail:match('^%S+ (%d+)') - redis.call('SCARD', erased) or 0
if sealed == 0 or #rows == limit or size >= max_bytes then
  return {sealed > 0 and 1 or 0, rows}
end
local place = redis.call('LLEN', segments) - 1
if before ~= '' then
  place = math.min(place, (find_segment(segments, before)))
end
local gone = redis.call('SMEMBERS', erased)
return {0, rows, list_segments(segments, place, limit + 1 - #rows + #gone), gone}
