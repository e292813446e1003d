#!lua flags=allow-oom
-- Leases the entries of `due` whose time has come. An entry that is still there when its lease ends is due again.
-- KEYS[1] due    due:{p}    zset: id of an upload or of a deleted or failed post, scored by its time in ms since 1970
-- KEYS[2] gone   gone:{p}   zset: deleted post, scored by its revision
-- KEYS[3] turns  turns:{p}  zset: user, scored by their place
-- ARGV[1] now       ms since 1970; empty: Redis' clock
-- ARGV[2] lease_ms  length of the lease
-- ARGV[3] limit     entries that are read, which bounds the script's time
-- ARGV[4] posts     prefix of this partition's post keys; a post id is appended
-- ARGV[5] making    prefix of this partition's `making` keys; a user is appended
-- Returns {{id, lease, 'upload' | 'erase', ms since 1970 when the post was deleted or failed, or 0}, …}
-- Refuses nothing
--
-- `lease` is the score that the script sets: the time at which the lease ends. end_lease compares it. If the score has
-- changed, the entry was leased again.
-- A failed post is in `due` because a job that was running when it failed may still store a JPEG, which is erased.
-- Before `making` existed, posts that wait for their image were in `due`. In data of that time they move to `making`
-- here.
local due, gone, turns = KEYS[1], KEYS[2], KEYS[3]
local now, lease_ms, limit, posts, making = now_ms(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5]
if #KEYS ~= 3 or #ARGV ~= 5 or not (lease_ms and limit) then
  return redis.error_reply('ERR wrong arguments')
end

local leased = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, limit)) do
  local upload = id:sub(1, 1) == 'u'
  local row = upload and {} or redis.call('HMGET', posts .. id, 'author', 'status', 'failed_at')
  local author, status, failed_at = row[1], row[2], row[3]
  if author and status ~= 'failed' then
    if status == 'processing' or status == 'ready' then
      redis.call('ZADD', making .. author, 'NX', now, id)
      redis.call('ZADD', turns, 'LT', now, author)
    end
    redis.call('ZREM', due, id)
  else
    redis.call('ZADD', due, now + lease_ms, id)
    local ended = author and failed_at or redis.call('ZSCORE', gone, id)
    leased[#leased + 1] = {id, now + lease_ms, upload and 'upload' or 'erase', ended or 0}
  end
end
return leased
