#!lua flags=no-writes
-- Reads a page of one partition's posts of a user, newest first.
-- KEYS[1] leaves  leaves:{p}  zset
-- ARGV[1] user        the author
-- ARGV[2] prefix      with which the user's entries in the leaves begin
-- ARGV[3] after       post id of the cursor, behind which the page begins; empty: the first page
-- ARGV[4] statuses    the statuses of the posts to return, each between two spaces: " ready failed "
-- ARGV[5] limit       posts in the page
-- ARGV[6] max_bytes   the page ends when its captions and comments have this many bytes
-- ARGV[7] max_looked  the page ends when it has looked at this many posts, which bounds the script's time
-- ARGV[8] leaf        prefix of this partition's leaf keys
-- ARGV[9] posts       prefix of this partition's post keys; a post id is appended
-- ARGV[10] latests    prefix of this partition's `latest` keys
-- ARGV[11] streams    prefix of this partition's comment streams
-- ARGV[12] segments   prefix of this partition's lists of segments
-- ARGV[13] erased     prefix of this partition's sets of erased comments
-- Returns {through, rows, skipped}
--   `through` is the id of the last post that the page looked at; empty if the user has no older posts.
--   A row is what read_post returns of a post that is not ready.
--   `skipped` is a list of ids. It is there only if the page left out posts that cannot be shown, because a field is
--   missing or a key has a wrong type.
-- Refuses nothing
--
-- A post that has another author is not the user's: two users may have the same prefix, which contains a digest.
-- A post that is looked at takes about 2 µs, a row about 10 µs.
local leaves = KEYS[1]
local user, prefix, after, statuses = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local limit, max_bytes, max_looked = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local leaf, posts, latests = ARGV[8], ARGV[9], ARGV[10]
local streams, segments, erased = ARGV[11], ARGV[12], ARGV[13]

local rows, size, looked, through, skipped = {}, 0, 0, '', nil
local upper = '(' .. prefix .. (after == '' and '~' or after) -- no id is behind ~
repeat
  local first = redis.call('ZREVRANGEBYLEX', leaves, upper, '-', 'LIMIT', 0, 1)[1]
  local entries = {}
  if first then
    entries = redis.call('ZREVRANGEBYLEX', leaf .. first, upper, '[' .. prefix, 'LIMIT', 0, max_looked - looked + 1)
    upper = '(' .. first
  end
  for _, entry in ipairs(entries) do
    if #rows == limit or size >= max_bytes or looked == max_looked then
      return {through, rows, skipped}
    end
    local id = entry:sub(#prefix + 1)
    looked, through = looked + 1, id
    local status = redis.pcall('HGET', posts .. id, 'status') -- alone, because most posts may have another one
    if type(status) == 'string' and statuses:find(' ' .. status .. ' ', 1, true) then
      local row = redis.pcall('HMGET', posts .. id, 'author', 'caption', 'status', 'thumbhash', 'code', 'detail')
      local latest = redis.pcall('LRANGE', latests .. id, 0, -1)
      local counted, count = pcall(count_comments, streams .. id, segments .. id, erased .. id)
      if row[1] == user and row[2] and (row[4] or status ~= 'ready') and not latest.err and counted then
        size = size + #row[2]
        for _, comment in ipairs(latest) do
          size = size + #comment
        end
        rows[#rows + 1] = {id, count, row[1], row[2], row[3], row[4], row[5], row[6], latest}
      elseif row[1] == user then
        skipped = skipped or {}
        skipped[#skipped + 1] = id
      end
    end
  end
until not first or first:sub(1, #prefix) ~= prefix
return {'', rows, skipped}
