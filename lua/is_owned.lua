#!lua flags=no-writes
-- Tells whether anything stands for a post's objects: the post itself, its deletion, or work that is due.
-- KEYS[1] post  post:{p}:<id>  hash
-- KEYS[2] gone  gone:{p}       zset
-- KEYS[3] due   due:{p}        zset
-- ARGV[1] id    post id
-- Returns 1 or 0
-- Refuses nothing
-- What is deleted is in `due` until its original is erased, and may be told of in `gone` for longer.
local post, gone, due = KEYS[1], KEYS[2], KEYS[3]
local id = ARGV[1]

if redis.call('EXISTS', post) == 1 or redis.call('ZSCORE', gone, id) or redis.call('ZSCORE', due, id) then
  return 1
end
return 0
