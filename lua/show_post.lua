#!lua flags=no-writes
-- Reads all that Redis knows of a post, hidden or not, for an operator.
-- KEYS[1] post      post:{p}:<id>      hash
-- KEYS[2] hidden    hidden:{p}:<id>    hash
-- KEYS[3] comments  comments:{p}:<id>  stream
-- KEYS[4] segments  segments:{p}:<id>  list
-- KEYS[5] erased    erased:{p}:<id>    set
-- KEYS[6] kept      kept:{p}:<id>      hash
-- KEYS[7] feed      feed:{p}           zset
-- KEYS[8] changes   changes:{p}        zset
-- KEYS[9] gone      gone:{p}           zset
-- KEYS[10] due      due:{p}            zset
-- ARGV[1] id  post id
-- Returns {hidden 0|1, number of comments, how many of them are in the stream, number of erased comments, number of
--   entries in `kept`, score in `feed`, revision in `changes`, revision in `gone`, time in `due`, {field, value, …}};
--   what the post does not have is false
-- Refuses NOPOST
local post, hidden, comments, segments, erased = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local kept, feed, changes, gone, due = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local id = ARGV[1]

local fields = redis.call('HGETALL', post)
local is_hidden = #fields == 0 and 1 or 0
if is_hidden == 1 then
  fields = redis.call('HGETALL', hidden)
end
if #fields == 0 then
  return redis.error_reply('NOPOST no such post')
end
local count, hot = count_comments(comments, segments, erased)
return {is_hidden, count, hot, redis.call('SCARD', erased), redis.call('HLEN', kept), redis.call('ZSCORE', feed, id),
  redis.call('ZSCORE', changes, id), redis.call('ZSCORE', gone, id), redis.call('ZSCORE', due, id), fields}
