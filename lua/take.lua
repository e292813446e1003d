#!lua
-- Takes from rate limits: decides which of the requests that a process has collected are within their limits.
-- KEYS[1] rate  rate:{p}:…  string; of the first charge. Each further charge has one key more
-- ARGV[1] now       ms since 1970; empty: Redis' clock
-- ARGV[2] quota     units that the first charge's limit allows at once
-- ARGV[3] window_ms in which a whole quota comes back, evenly
-- ARGV[4] cost      units of one request; below 0: units to give back
-- ARGV[5] count     requests of this charge. Each further charge has four arguments more, like these
-- Returns for each charge three numbers, one after the other: requests that are allowed, which are the first of the
--   `count`; units that are left; ms until another unit is there, or, if some were refused, until `cost` units are
-- Refuses nothing
--
-- This is the GCRA as a leaky bucket (ITU-T I.371, annex A, "continuous-state leaky bucket algorithm"). `rate` is
-- `<units in use> <ms since 1970>`. The units in use drain evenly. The other form of the algorithm stores one time, but
-- a double is exact to 0.0002 ms there, which is too coarse for limits in bytes.
-- Nothing of this is durable: REPL_NONE writes no append-only file, so a call waits for no fsync. After a restart of
-- Redis all limits begin anew.
-- `rate` expires when nothing is in use any more. A refused request writes nothing.
-- If the clock went back, the units in use drain from the new time on.
local rates, now, charges = KEYS, now_ms(ARGV[1]), ARGV
local correct = #rates > 0 and #charges == 1 + 4 * #rates
for i = 2, #charges do
  correct = correct and tonumber(charges[i])
end
if not correct then
  return redis.error_reply('ERR wrong arguments')
end

redis.set_repl(redis.REPL_NONE)
local verdicts, max, floor, ceil = {}, math.max, math.floor, math.ceil
for i, rate in ipairs(rates) do
  local quota, cost, count = charges[4 * i - 2] + 0, charges[4 * i] + 0, charges[4 * i + 1] + 0
  local ms_per_unit = charges[4 * i - 1] / quota
  local used, stored = 0, redis.call('GET', rate)
  if stored then
    local before, at = stored:match('^(%S+) (%d+)$')
    used = max(0, (tonumber(before) or 0) - max(0, now - (at or now)) / ms_per_unit)
  end
  local allowed = count
  if cost > 0 and used + count * cost > quota then -- a millionth of a unit is the tolerance for rounding
    allowed = max(0, math.min(count, floor((quota - used) / cost + 1e-6)))
  end
  if allowed > 0 then
    used = max(0, used + allowed * cost)
    if used > 0 then
      redis.call('SET', rate, used .. ' ' .. now, 'PX', ceil(used * ms_per_unit))
    else
      redis.call('DEL', rate)
    end
  end
  local left = max(0, floor(quota - used + 1e-6))
  local missing = allowed < count and cost or math.min(left + 1, quota)
  verdicts[3 * i - 2], verdicts[3 * i - 1] = allowed, left
  verdicts[3 * i] = ceil(max(0, used + missing - quota - 1e-6) * ms_per_unit)
end
return verdicts
