#!lua flags=no-writes
-- Reads a post in any status.
-- KEYS[1] post      post:{p}:<id>      hash
-- KEYS[2] comments  comments:{p}:<id>  stream
-- KEYS[3] segments  segments:{p}:<id>  list
-- KEYS[4] erased    erased:{p}:<id>    set
-- KEYS[5] latest    latest:{p}:<id>    list
-- ARGV[1] id        post id
-- Returns a ready post as one string, as a row of feed_page.lua, because the caller reads that in half the time. Otherwise
--   {id, comment count, author, caption, status, thumbhash, code, detail, latest comments}; a field that the post does not
--   have is false
-- Refuses NOPOST
local post, comments, segments, erased, latest = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local id = ARGV[1]

local row = redis.call('HMGET', post, 'author', 'caption', 'status', 'thumbhash', 'code', 'detail')
if not row[1] then
  return redis.error_reply('NOPOST no such post')
end
local author, caption, status, thumbhash = row[1], row[2], row[3], row[4]
local count, newest = count_comments(comments, segments, erased), redis.call('LRANGE', latest, 0, -1)
if status == 'ready' and caption and thumbhash then
  return id .. '\n' .. count .. '\n' .. author .. '\n' .. thumbhash .. '\n[' .. table.concat(newest, ',') .. ']\n' .. caption
end
return {id, count, author, caption, status, thumbhash, row[5], row[6], newest}
