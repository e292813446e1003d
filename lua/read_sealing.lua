#!lua flags=no-writes
-- Reads what is to be sealed of a post, its oldest comments in the stream, and whether there is something to compact.
-- KEYS[1] comments  comments:{p}:<id>  stream
-- KEYS[2] segments  segments:{p}:<id>  list
-- KEYS[3] erased    erased:{p}:<id>    set
-- KEYS[4] changes   changes:{p}        zset
-- KEYS[5] epoch     epoch:{p}          string
-- ARGV[1] now           ms since 1970; empty: Redis' clock
-- ARGV[2] id            post id
-- ARGV[3] hot_comments  how many of the newest comments stay in the stream
-- ARGV[4] quiet_ms      a post that has not changed for this time keeps none of them
-- ARGV[5] limit         comments that a segment holds
-- ARGV[6] max_bytes     bytes of authors and texts after which a segment is full
-- ARGV[7] cluster       1 on a Redis Cluster, otherwise empty
-- Returns {timeline, the newest entry of `segments` or empty, {id, author, text, …} of the comments that the next segment
--   takes, oldest first, number of erased comments}
-- Refuses nothing
--
-- A post that changes fills whole segments only. A hidden post is not in `changes` and counts as one that changes.
local comments, segments, erased, changes, epoch = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now, id, hot_comments, quiet_ms = now_ms(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local limit, max_bytes, cluster = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]

local quiet = now - (redis.call('ZSCORE', changes, id) or now) >= quiet_ms
local left = redis.call('XLEN', comments) - (quiet and 0 or hot_comments)
local rows, size = {}, 0
if left > 0 and (quiet or left >= limit) then
  for _, entry in ipairs(redis.call('XRANGE', comments, '-', '+', 'COUNT', math.min(left, limit))) do
    if size >= max_bytes then
      break
    end
    local author, text = entry[2][2], entry[2][4]
    size = size + #author + #text
    rows[#rows + 1], rows[#rows + 2], rows[#rows + 3] = entry[1], author, text
  end
end
local timeline = (redis.call('GET', epoch) or '0') .. replication(cluster)
return {timeline, redis.call('LINDEX', segments, -1) or '', rows, redis.call('SCARD', erased)}
