#!lua flags=no-writes
-- Tells whether a post's objects are still needed or scheduled for erasure.
-- KEYS[1] post    post:{p}:<id>    hash
-- KEYS[2] hidden  hidden:{p}:<id>  hash
-- KEYS[3] gone    gone:{p}         zset
-- KEYS[4] due     due:{p}          zset
-- ARGV[1] id      post id
-- Returns 1 if the post is in one of the four keys, else 0
-- Refuses nothing
--
-- A deleted post is in `due` until its original is erased. It may be in `gone` for longer.
local post, hidden, gone, due = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local id = ARGV[1]

if redis.call('EXISTS', post, hidden) > 0 or redis.call('ZSCORE', gone, id) or redis.call('ZSCORE', due, id) then
  return 1
end
return 0
