#!lua flags=allow-oom
-- Ends a partition's timeline after a restore: tokens of changes that were issued in it are refused from now on.
-- KEYS[1] epoch     epoch:{p}     string
-- KEYS[2] restored  restored:{p}  string
-- ARGV[1] now       ms; empty: Redis' clock
-- ARGV[2] name      of the new timeline, letters and digits
-- Returns OK
-- Refuses nothing
-- The time of the restore never goes back: backups of a timeline that was left earlier began before it, too.
local epoch, restored = KEYS[1], KEYS[2]
local now, name = now_ms(ARGV[1]), ARGV[2]
if #KEYS ~= 2 or #ARGV ~= 2 or not name:match('^%w+$') then
  return redis.error_reply('ERR wrong arguments')
end

local before = redis.pcall('GET', restored) -- of another type it is replaced
before = type(before) == 'string' and tonumber(before) or 0
redis.call('SET', restored, string.format('%.0f', math.max(now, before)))
return redis.call('SET', epoch, name)
