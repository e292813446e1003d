#!lua flags=allow-oom
-- Forgets an upload's chunks, after their objects were erased.
-- KEYS[1] upload  upload:{p}:<id>  hash; absent if it became no post
-- KEYS[2] chunks  chunks:{p}:<id>  list of chunk names
-- KEYS[3] due     due:{p}          zset
-- ARGV[1] id      upload id
-- ARGV[2] tell    ms for which asking again for the upload's post still finds it
-- Returns 1
-- Refuses nothing
local upload, chunks, due = KEYS[1], KEYS[2], KEYS[3]
local id, tell = ARGV[1], ARGV[2]
if #KEYS ~= 3 or #ARGV ~= 2 or not tonumber(tell) then
  return redis.error_reply('ERR wrong arguments')
end

redis.call('UNLINK', chunks)
redis.call('ZREM', due, id)
if redis.call('TTL', upload) == -1 then
  redis.call('PEXPIRE', upload, tell)
end
return 1
