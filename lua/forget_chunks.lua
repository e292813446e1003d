#!lua flags=allow-oom
-- Forgets the names of an upload's chunks after the chunk objects were erased.
-- KEYS[1] upload  upload:{p}:<id>  hash; absent if the upload did not become a post
-- KEYS[2] chunks  chunks:{p}:<id>  list of chunk names, or of parts
-- KEYS[3] due     due:{p}          zset
-- ARGV[1] id            upload id
-- ARGV[2] remember_ms   how long the upload's post is still found by the upload's id
-- ARGV[3] prefix        of this partition's upload keys; an upload id is appended
-- ARGV[4] chunk_prefix  of this partition's chunk lists; an upload id is appended
-- Returns 1
-- Refuses nothing
--
-- The upload's own list goes last: as long as it is there, a repeated call finds the parts.
local upload, chunks, due = KEYS[1], KEYS[2], KEYS[3]
local id, remember_ms, prefix, chunk_prefix = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if #KEYS ~= 3 or #ARGV ~= 4 or not tonumber(remember_ms) then
  return redis.error_reply('ERR wrong arguments')
end

if (redis.call('LINDEX', chunks, 0) or ''):match('^u') then
  for _, part in ipairs(redis.call('LRANGE', chunks, 0, -1)) do
    redis.call('UNLINK', prefix .. part, chunk_prefix .. part)
  end
end
redis.call('UNLINK', chunks)
redis.call('ZREM', due, id)
if redis.call('TTL', upload) == -1 then -- an expired upload already has a TTL, which stays
  redis.call('PEXPIRE', upload, remember_ms)
end
return 1
