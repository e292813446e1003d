#!lua flags=allow-oom
-- Forgets the names of an upload's chunks after the chunk objects were erased.
-- KEYS[1] upload  upload:{p}:<id>  hash; absent if the upload did not become a post
-- KEYS[2] chunks  chunks:{p}:<id>  list of chunk names
-- KEYS[3] due     due:{p}          zset
-- ARGV[1] id           upload id
-- ARGV[2] remember_ms  how long the upload's post is still found by the upload's id
-- Returns 1
-- Refuses nothing
local upload, chunks, due = KEYS[1], KEYS[2], KEYS[3]
local id, remember_ms = ARGV[1], ARGV[2]
if #KEYS ~= 3 or #ARGV ~= 2 or not tonumber(remember_ms) then
  return redis.error_reply('ERR wrong arguments')
end

redis.call('UNLINK', chunks)
redis.call('ZREM', due, id)
if redis.call('TTL', upload) == -1 then -- an expired upload already has a TTL, which stays
  redis.call('PEXPIRE', upload, remember_ms)
end
return 1
