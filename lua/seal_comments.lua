#!lua flags=allow-oom
-- Takes the oldest comments of a post out of the stream. A segment in the store holds them from now on.
-- KEYS[1] comments  comments:{p}:<id>  stream
-- KEYS[2] segments  segments:{p}:<id>  list
-- KEYS[3] epoch     epoch:{p}          string
-- ARGV[1] timeline  as read_sealing returned it
-- ARGV[2] tail      the newest entry of `segments`, as read_sealing returned it
-- ARGV[3] first     id of the first comment in the segment
-- ARGV[4] last      id of the last one
-- ARGV[5] count     number of comments in the segment
-- ARGV[6] name      of the segment
-- ARGV[7] cluster   1 on a Redis Cluster, otherwise empty
-- Returns `count`, or 0 if it was sealed under this name before
-- Refuses STALE
--
-- Nothing that a reader sees changes, so the post gets no new revision.
-- It writes only if the stream begins with exactly these comments. Ids may be used again after a restore or a failover, so
-- the timeline must be the same, too.
-- A stream that becomes empty is deleted. The entry then has the last id that the stream ever had, even if that comment
-- was deleted: the ids of new comments must be greater.
local comments, segments, epoch = KEYS[1], KEYS[2], KEYS[3]
local timeline, tail, first, last, count, name = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]
local cluster = ARGV[7]
if #KEYS ~= 3 or #ARGV ~= 7 or not count or name == '' then
  return redis.error_reply('ERR wrong arguments')
end

local newest = redis.call('LINDEX', segments, -1) or ''
if newest:match(' (%S+)$') == name then
  return 0
end
if newest ~= tail or timeline ~= (redis.call('GET', epoch) or '0') .. replication(cluster) then
  return redis.error_reply('STALE these comments are not the oldest ones of this post')
end
local head = redis.call('XRANGE', comments, '-', last, 'COUNT', count + 1)
if #head ~= count or head[1][1] ~= first or head[count][1] ~= last then
  return redis.error_reply('STALE these comments are not the oldest ones of this post')
end
local following = redis.call('XRANGE', comments, '(' .. last, '+', 'COUNT', 1)[1]

local through = count + (newest:match('^%S+ (%d+)') or 0)
if following then
  redis.call('XTRIM', comments, 'MINID', '=', following[1])
else
  local stream = redis.call('XINFO', 'STREAM', comments)
  for i = 1, #stream, 2 do
    if stream[i] == 'last-generated-id' then
      last = stream[i + 1]
    end
  end
  redis.call('DEL', comments)
end
redis.call('RPUSH', segments, string.format('%s %d %s', last, through, name))
return count
