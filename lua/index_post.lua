#!lua flags=allow-oom
-- Checks that a post is in the list of its author's posts. If `repair` is 1, it also adds the post if it is missing.
-- KEYS[1] post    post:{p}:<id>  hash; of a hidden post its `hidden`
-- KEYS[2] leaves  leaves:{p}     zset
-- ARGV[1] author        whose list it is; nothing is done if the post has another author, or does not exist any more
-- ARGV[2] entry         of the post
-- ARGV[3] leaf          prefix of this partition's leaf keys
-- ARGV[4] leaf_entries  how many entries a leaf may have
-- ARGV[5] repair        0|1
-- Returns 1 if it is missing, or was missing until now; otherwise 0
-- Refuses nothing
local post, leaves = KEYS[1], KEYS[2]
local author, entry, leaf, leaf_entries, repair = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
if #KEYS ~= 2 or #ARGV ~= 5 or not (leaf_entries and tonumber(repair)) then
  return redis.error_reply('ERR wrong arguments')
end

if redis.call('HGET', post, 'author') ~= author then
  return 0
end
local first = redis.call('ZREVRANGEBYLEX', leaves, '[' .. entry, '-', 'LIMIT', 0, 1)[1]
if first and tonumber(redis.call('ZSCORE', leaf .. first, entry)) == 0 then
  return 0
end
if repair == '1' then
  add_entry(leaves, leaf, entry, leaf_entries)
end
return 1
