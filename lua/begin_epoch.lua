#!lua flags=allow-oom
-- Begins a new timeline of a partition after a restore: change tokens of the old timeline are refused from then on.
-- KEYS[1] epoch     epoch:{p}     string
-- KEYS[2] restored  restored:{p}  string
-- ARGV[1] now   ms since 1970; empty: Redis' clock
-- ARGV[2] name  of the new timeline; letters and digits
-- Returns OK
-- Refuses nothing
--
-- `restored` never goes back, even if the clock did. Backups of every earlier timeline began before this time.
local epoch, restored = KEYS[1], KEYS[2]
local now, name = now_ms(ARGV[1]), ARGV[2]
if #KEYS ~= 2 or #ARGV ~= 2 or not name:match('^%w+$') then
  return redis.error_reply('ERR wrong arguments')
end

local before = redis.pcall('GET', restored) -- an error if the key has a wrong type: then SET replaces it
before = type(before) == 'string' and tonumber(before) or 0
redis.call('SET', restored, string.format('%.0f', math.max(now, before)))
return redis.call('SET', epoch, name)
