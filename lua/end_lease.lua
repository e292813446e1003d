#!lua flags=allow-oom
-- Ends a lease: removes the entry from `due`, or sets the time when it is due again.
-- KEYS[1] due  due:{p}  zset
-- ARGV[1] id     post or upload id
-- ARGV[2] lease  the score that the lease set
-- ARGV[3] again  when it is due again, ms since 1970; empty: never
-- Returns 1, or 0 if the entry is gone or has another score, because this lease has already ended
-- Refuses nothing
local due = KEYS[1]
local id, lease, again = ARGV[1], tonumber(ARGV[2]), ARGV[3]
if #KEYS ~= 1 or #ARGV ~= 3 or not (lease and (again == '' or tonumber(again))) then
  return redis.error_reply('ERR wrong arguments')
end

if tonumber(redis.call('ZSCORE', due, id)) ~= lease then
  return 0
end
if again == '' then
  redis.call('ZREM', due, id)
else
  redis.call('ZADD', due, again, id)
end
return 1
