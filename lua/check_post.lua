#!lua flags=allow-oom
-- Holds one post against what must be true of every post, and if wanted makes what is derived true again.
-- KEYS[1] post      post:{p}:<id>      hash
-- KEYS[2] comments  comments:{p}:<id>  stream
-- KEYS[3] latest    latest:{p}:<id>    list
-- KEYS[4] feed      feed:{p}           zset
-- KEYS[5] changes   changes:{p}        zset
-- KEYS[6] gone      gone:{p}           zset
-- KEYS[7] turns     turns:{p}          zset
-- ARGV[1] now       ms; empty: Redis' clock
-- ARGV[2] id        post id
-- ARGV[3] shown     how many comments the feed shows
-- ARGV[4] repair    0|1
-- ARGV[5] making    prefix of the users' `making` keys of this partition, to which the author is appended
-- Returns {status or false, number of comments, is its image to be made 0|1, what is wrong, …}
-- Refuses nothing
-- Changes nothing that is right, and nothing that is not derived: a comment without post is told of and stays.
-- A post that lacks a field, or whose keys have a wrong type, cannot be shown; it is in no list then.
-- A flaw begins with the number of the invariant, or with 0 where it breaks none.
local post, comments, latest, feed, changes, gone = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local turns, now, id, shown = KEYS[7], now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local repair, making = ARGV[4] == '1', ARGV[5]
if #KEYS ~= 7 or #ARGV ~= 5 or (shown or 0) < 1 then
  return redis.error_reply('ERR wrong arguments')
end

local whole = true -- the post can be shown
local function holds(key, kind)
  local is = redis.call('TYPE', key)
  is = is.ok or is -- fakeredis answers with a plain string
  whole = whole and (is == kind or is == 'none')
  return is == kind
end
local row, count = {}, 0
if holds(post, 'hash') then
  row = redis.call('HMGET', post, 'status', 'author', 'caption', 'thumbhash')
end
if holds(comments, 'stream') then
  count = redis.call('XLEN', comments)
end
holds(latest, 'list')
local status, author = row[1] or false, row[2] or ''
local score, revision = redis.call('ZSCORE', feed, id), redis.call('ZSCORE', changes, id)
local queue = making .. author
local waits = redis.call('ZSCORE', queue, id) and 1 or 0
local found = {status, count, waits}
local function wrong(flaw, ...)
  found[#found + 1] = flaw
  if repair and ... then
    redis.call(...)
  end
end

for i, field in ipairs({'status', 'author', 'caption', status == 'ready' and 'thumbhash' or nil}) do
  if row[i] == false then
    whole = false
    wrong('0 its ' .. field .. ' is missing')
  end
end

if status == 'ready' and whole then
  if tonumber(score) ~= count then
    wrong('1 its score is ' .. (score or 'missing') .. ', it has ' .. count .. ' comments', 'ZADD', feed, count, id)
  end
  local rows = {}
  for _, entry in ipairs(redis.call('XREVRANGE', comments, '+', '-', 'COUNT', shown)) do
    local fields = {}
    for i = 1, #entry[2], 2 do
      fields[entry[2][i]] = entry[2][i + 1]
    end
    rows[#rows + 1] = cjson.encode({entry[1], fields.author, fields.text})
  end
  if table.concat(rows, '\n') ~= table.concat(redis.call('LRANGE', latest, 0, -1), '\n') then
    wrong('2 its latest comments are not the newest of its stream')
    if repair then
      redis.call('DEL', latest)
      if #rows > 0 then
        redis.call('RPUSH', latest, unpack(rows))
      end
    end
  end
  if not revision then
    wrong('0 it is missing among the changes', 'ZADD', changes, next_revision(now, changes, gone), id)
  end
else
  local why = status == 'ready' and 'cannot be shown' or 'not ready'
  if score then
    wrong('1 it is in the feed and ' .. why, 'ZREM', feed, id)
  end
  if revision then
    wrong('0 it is among the changes and ' .. why, 'ZREM', changes, id)
  end
  if status ~= 'ready' and (count > 0 or redis.call('EXISTS', latest) == 1) then
    wrong('0 it has comments and is not ready')
  end
  if status == 'processing' and waits == 0 then
    wrong('3 it is processing and not in making', 'ZADD', queue, now, id)
    waits = repair and 1 or 0
  elseif status and status ~= 'processing' and status ~= 'failed' and status ~= 'ready' then
    wrong('3 its status is ' .. status)
  end
end
if waits == 1 and not redis.call('ZSCORE', turns, author) then
  wrong('3 its image is to be made and its author has no turn', 'ZADD', turns, now, author)
end
return found
