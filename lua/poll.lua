#!lua flags=no-writes
-- Reads what waiting requests want to know of one partition: its newest revision, and which posts were processed.
-- KEYS[1] changes  changes:{p}  zset
-- KEYS[2] gone     gone:{p}     zset
-- KEYS[3] epoch    epoch:{p}    string
-- KEYS[4…] posts   post:{p}:<id>  hash: any number of them
-- ARGV[1] cluster  1 on a Redis Cluster, otherwise empty
-- Returns {timeline, newest revision, place, …}; a place is the number of a post, from 1 on, that is not processing or
--   does not exist
-- Refuses nothing
--
-- A post takes 0.5 to 0.8 µs. The posts are whole keys, because a prefix and ids would take a third longer.
local changes, gone, epoch = KEYS[1], KEYS[2], KEYS[3]
local cluster = ARGV[1]
local keys = KEYS

local reply = {(redis.call('GET', epoch) or '0') .. replication(cluster), newest_revision(changes, gone)}
local call = redis.pcall -- a key of a wrong type counts as processed: who waits for it gets the error of the read
for place = 1, #keys - 3 do
  if call('HGET', keys[place + 3], 'status') ~= 'processing' then
    reply[#reply + 1] = place
  end
end
return reply
