#!lua flags=allow-oom
-- Checks the invariants of one post. If `repair` is 1, it also makes derived data true again.
-- KEYS[1] post      post:{p}:<id>      hash
-- KEYS[2] comments  comments:{p}:<id>  stream
-- KEYS[3] segments  segments:{p}:<id>  list
-- KEYS[4] erased    erased:{p}:<id>    set
-- KEYS[5] latest    latest:{p}:<id>    list
-- KEYS[6] feed      feed:{p}           zset
-- KEYS[7] changes   changes:{p}        zset
-- KEYS[8] gone      gone:{p}           zset
-- KEYS[9] turns     turns:{p}          zset
-- KEYS[10] hidden   hidden:{p}:<id>    hash
-- KEYS[11] sealing  sealing:{p}        zset
-- ARGV[1] now           ms since 1970; empty: Redis' clock
-- ARGV[2] id            post id
-- ARGV[3] latest_count  how many comments `latest` holds
-- ARGV[4] repair        0|1
-- ARGV[5] making        prefix of this partition's `making` keys; the author is appended
-- ARGV[6] tail          the newest entry of `segments` when the caller has read the store; empty: it has not
-- ARGV[7] refill        the newest comments in the store, as JSON: [["id","author","text"],…]
-- Returns {status or false, or `hidden` and its status, author or empty, number of comments, how many of them are in the
--   stream, number of erased comments, number of segments, 1 if its image is in `making` or else 0, thumbhash or empty,
--   flaw, …}
--   A flaw begins with the number of the invariant that it breaks (see storage/check.py), or with 0 if it breaks none.
-- Refuses nothing
--
-- Where `latest` also has comments of the store, and the caller has not read these, only their ids and their number are
-- checked. A repair then needs `tail` and `refill`.
-- It changes only what is wrong and can be derived. Comments without a ready post are reported and stay.
-- A post that lacks a field, or that has a key of a wrong type, cannot be shown. A repair takes it out of `feed` and
-- `changes`.
local post, comments, segments, erased, latest = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local feed, changes, gone, turns, hidden, sealing = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local now, id, latest_count = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local repair, making, tail, refill = ARGV[4] == '1', ARGV[5], ARGV[6], ARGV[7]
if #KEYS ~= 11 or #ARGV ~= 7 or (latest_count or 0) < 1 then
  return redis.error_reply('ERR wrong arguments')
end

local complete = true -- the post can be shown
local function has_type(key, expected)
  local actual = redis.call('TYPE', key)
  actual = actual.ok or actual -- fakeredis answers with a plain string
  complete = complete and (actual == expected or actual == 'none')
  return actual == expected
end
local row, count, hot, erased_count, segment_count, is_hidden = {}, 0, 0, 0, 0, false
if has_type(post, 'hash') then
  row = redis.call('HMGET', post, 'status', 'author', 'caption', 'thumbhash')
elseif complete and has_type(hidden, 'hash') then
  row, is_hidden = redis.call('HMGET', hidden, 'status', 'author', 'caption', 'thumbhash'), true
end
has_type(comments, 'stream')
has_type(segments, 'list')
has_type(erased, 'set')
if complete then
  count, hot = count_comments(comments, segments, erased), redis.call('XLEN', comments)
  erased_count, segment_count = redis.call('SCARD', erased), redis.call('LLEN', segments)
end
has_type(latest, 'list')
local status, author = row[1] or false, row[2] or ''
local score, revision = redis.call('ZSCORE', feed, id), redis.call('ZSCORE', changes, id)
local queue = making .. author
local queued = redis.call('ZSCORE', queue, id) and 1 or 0
local shown = is_hidden and status and 'hidden ' .. status or status
local result = {shown, author, count, hot, erased_count, segment_count, queued, row[4] or ''}
local function report(flaw, ...) -- the other arguments are the command that repairs it, if there is one
  result[#result + 1] = flaw
  if repair and ... then
    redis.call(...)
  end
end

if not is_hidden and status and redis.call('EXISTS', hidden) == 1 then
  report('0 it is both shown and hidden')
end
for i, field in ipairs({'status', 'author', 'caption', status == 'ready' and 'thumbhash' or nil}) do
  if row[i] == false then
    complete = false
    report('0 its ' .. field .. ' is missing')
  end
end

if status == 'ready' and complete then
  if not is_hidden and tonumber(score) ~= count then
    report('1 its score is ' .. (score or 'missing') .. ', it has ' .. count .. ' comments', 'ZADD', feed, count, id)
  end
  local held = redis.call('LRANGE', latest, 0, -1)
  local newest, in_stream = newest_without(comments, segments, erased, '', true, latest_count, tail, refill)
  local right
  if newest then
    right = table.concat(newest, '\n') == table.concat(held, '\n')
  else -- the rest is in the store
    right = #held == math.min(latest_count, count)
    local ms, sequence = redis.call('LINDEX', segments, -1):match('^(%d+)-(%d+)')
    local below_ms, below_sequence = tonumber(ms), sequence + 1
    for i, text in ipairs(held) do
      if i <= #in_stream then
        right = right and text == in_stream[i]
      else
        local decoded, other = pcall(cjson.decode, text)
        local comment = decoded and type(other) == 'table' and type(other[3]) == 'string' and other[1]
        ms, sequence = tostring(comment):match('^(%d+)-(%d+)$')
        ms, sequence = tonumber(ms), tonumber(sequence)
        right = right and ms and (ms < below_ms or (ms == below_ms and sequence < below_sequence))
          and redis.call('SISMEMBER', erased, comment) == 0
        below_ms, below_sequence = ms, sequence
      end
    end
  end
  if not right then
    report('2 its latest comments are not its newest ones')
    if repair and newest then
      redis.call('DEL', latest)
      if #newest > 0 then
        redis.call('RPUSH', latest, unpack(newest))
      end
    end
  end
  if not is_hidden and not revision then
    report('0 it is missing among the changes', 'ZADD', changes, next_revision(now, changes, gone), id)
  end
end
if is_hidden or status ~= 'ready' or not complete then
  local why = is_hidden and 'hidden' or status == 'ready' and 'cannot be shown' or 'not ready'
  if score then
    report('1 it is in the feed and ' .. why, 'ZREM', feed, id)
  end
  if revision then
    report('0 it is among the changes and ' .. why, 'ZREM', changes, id)
  end
  if status ~= 'ready' and (count > 0 or redis.call('EXISTS', latest, segments, erased) > 0) then
    report('0 it has comments and is not ready')
  end
  if is_hidden and queued == 1 then
    report('0 its image is to be made and it is hidden', 'ZREM', queue, id)
    queued = repair and 0 or 1
  elseif status == 'processing' and queued == 0 and not is_hidden then
    report('3 it is processing and not in making', 'ZADD', queue, now, id)
    queued = repair and 1 or 0
  elseif status and status ~= 'processing' and status ~= 'failed' and status ~= 'ready' then
    report('3 its status is ' .. status)
  end
end
if hot > 0 and segment_count > 0 then
  local last = redis.call('LINDEX', segments, -1):match('^%S+')
  local oldest = redis.call('XRANGE', comments, '-', last, 'COUNT', 1)[1]
  if oldest then
    report('3 its comment ' .. oldest[1] .. ' is in Redis and not newer than its segments')
  end
end
if status and erased_count > 0 and not redis.call('ZSCORE', sealing, id) then
  report('0 it has erased comments and is not in sealing', 'ZADD', sealing, now, id)
end
if queued == 1 and not redis.call('ZSCORE', turns, author) then
  report('3 its image is to be made and its author has no turn', 'ZADD', turns, now, author)
end
return result
