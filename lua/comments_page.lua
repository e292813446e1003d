#!lua flags=no-writes
-- Reads a page of a post's comments, newest first.
-- KEYS[1] post      post:{p}:<id>      hash; of a hidden post its `hidden`
-- KEYS[2] comments  comments:{p}:<id>  stream
-- ARGV[1] before     comment id: the page begins with the next older comment; empty: with the newest one
-- ARGV[2] limit      comments in the page
-- ARGV[3] max_bytes  the page ends when its authors and texts have this many bytes
-- Returns {more 0|1, {{comment id, author, text}, …}}
-- Refuses NOPOST
local post, comments = KEYS[1], KEYS[2]
local before, limit, max_bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

if redis.call('EXISTS', post) == 0 then
  return redis.error_reply('NOPOST no such post')
end
local rows, more, size = {}, 0, 0
local newest = before == '' and '+' or '(' .. before
for _, entry in ipairs(redis.call('XREVRANGE', comments, newest, '-', 'COUNT', limit + 1)) do
  if #rows == limit or size >= max_bytes then
    more = 1
    break
  end
  local author, text = entry[2][2], entry[2][4]
  size = size + #author + #text
  rows[#rows + 1] = {entry[1], author, text}
end
return {more, rows}
