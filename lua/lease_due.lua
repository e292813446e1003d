#!lua flags=allow-oom
-- Leases uploads and erasures that are due: each is due again when its lease has run out, unless it was settled by then.
-- KEYS[1] due    due:{p}    zset: id of an upload or of a deleted or failed post, scored by when to look at it, ms
-- KEYS[2] gone   gone:{p}   zset: deleted post, scored by its revision
-- KEYS[3] turns  turns:{p}  zset: user, scored by their turn of image work
-- ARGV[1] now    ms; empty: Redis' clock
-- ARGV[2] lease  ms
-- ARGV[3] most   how many are looked at, which bounds the script's time
-- ARGV[4] posts  prefix of the post keys of this partition, to which ids are appended
-- ARGV[5] making prefix of the users' `making` keys of this partition, to which users are appended
-- Returns {{id, lease, 'upload' | 'erase', ms when the post was deleted or failed, or 0}, …}
-- Refuses nothing
-- The lease is the score it sets. A caller with another score holds an older lease, and the work was given again since.
-- A failed post is due because a job that ran when it failed may still store a JPEG: that is erased.
-- Posts whose image is to be made stood in `due` too, before `making` existed. Such a post, in data of that time, goes
-- there now.
local due, gone, turns = KEYS[1], KEYS[2], KEYS[3]
local now, lease, most, posts, making = now_ms(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5]
if #KEYS ~= 3 or #ARGV ~= 5 or not (lease and most) then
  return redis.error_reply('ERR wrong arguments')
end

local leased = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, most)) do
  local upload = id:sub(1, 1) == 'u'
  local row = upload and {} or redis.call('HMGET', posts .. id, 'author', 'status', 'failed_at')
  local author, status = row[1], row[2]
  if author and status ~= 'failed' then
    if status == 'processing' or status == 'ready' then
      redis.call('ZADD', making .. author, 'NX', now, id)
      redis.call('ZADD', turns, 'LT', now, author)
    end
    redis.call('ZREM', due, id)
  else
    redis.call('ZADD', due, now + lease, id)
    local ended = author and row[3] or redis.call('ZSCORE', gone, id)
    leased[#leased + 1] = {id, now + lease, upload and 'upload' or 'erase', ended or 0}
  end
end
return leased
