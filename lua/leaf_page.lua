#!lua flags=no-writes
-- Reads some entries of a leaf, with what shows whether they belong there.
-- KEYS[1] leaves  leaves:{p}  zset
-- KEYS[2] leaf    leaf:{p}:…  zset
-- ARGV[1] start   rank of the first entry
-- ARGV[2] count   entries at most, which bounds the script's time
-- ARGV[3] skip    bytes of an entry before its post id
-- ARGV[4] posts   prefix of this partition's post keys; a post id is appended
-- ARGV[5] hidden  prefix of this partition's keys of hidden posts
-- Returns {entry, author, first, …}: the author of the entry's post, empty if there is none, and the first entry of the
--   leaf in which it belongs, empty if there is none
-- Refuses nothing
local leaves, leaf = KEYS[1], KEYS[2]
local start, count, skip = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local posts, hidden = ARGV[4], ARGV[5]

local reply = {}
for _, entry in ipairs(redis.call('ZRANGE', leaf, start, start + count - 1)) do
  local id = entry:sub(skip + 1)
  local author = redis.pcall('HGET', posts .. id, 'author') or redis.pcall('HGET', hidden .. id, 'author')
  reply[#reply + 1] = entry
  reply[#reply + 1] = type(author) == 'string' and author or ''
  reply[#reply + 1] = redis.call('ZREVRANGEBYLEX', leaves, '[' .. entry, '-', 'LIMIT', 0, 1)[1] or ''
end
return reply
