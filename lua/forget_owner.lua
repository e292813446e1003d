#!lua flags=allow-oom
-- Removes the owner's name from an upload that has ended.
-- KEYS[1] upload  upload:{p}:<id>  hash
-- ARGV[1] user
-- Returns 1, or 0 if the upload is open, or is not this user's
-- Refuses nothing
--
-- The other fields stay until its chunks are erased: the outbox needs the post that the upload became.
local upload = KEYS[1]
local user = ARGV[1]
if #KEYS ~= 1 or #ARGV ~= 1 then
  return redis.error_reply('ERR wrong arguments')
end

local row = redis.call('HMGET', upload, 'owner', 'offset')
if row[1] ~= user or row[2] then
  return 0
end
return redis.call('HDEL', upload, 'owner')
