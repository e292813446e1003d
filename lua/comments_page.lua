#!lua flags=no-writes
-- Reads a page of a post's comments, newest first.
-- KEYS[1] post      post:{p}:<id>      hash
-- KEYS[2] comments  comments:{p}:<id>  stream
-- ARGV[1] before    comment id behind which the page begins; empty: at the newest
-- ARGV[2] limit     comments
-- ARGV[3] bytes     the page ends when its texts have as many
-- Returns {more 0|1, {{comment id, author, text}, …}}
-- Refuses NOPOST
local post, comments = KEYS[1], KEYS[2]
local before, limit, bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

if redis.call('EXISTS', post) == 0 then
  return redis.error_reply('NOPOST no such post')
end
local rows, more, size = {}, 0, 0
local newest = before == '' and '+' or '(' .. before
for _, entry in ipairs(redis.call('XREVRANGE', comments, newest, '-', 'COUNT', limit + 1)) do
  if #rows == limit or size >= bytes then
    more = 1
    break
  end
  size = size + #entry[2][2] + #entry[2][4]
  rows[#rows + 1] = {entry[1], entry[2][2], entry[2][4]}
end
return {more, rows}
