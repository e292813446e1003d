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
-- Nothing of this is durable: REPL_NONE writes no append-only file, so a call waits for no fsync. After a restart of
-- Redis all limits begin anew.
-- This is the GCRA as a leaky bucket (ITU-T I.371, annex A, "continuous-state leaky bucket algorithm"). `rate` is
-- `<units in use> <ms since 1970>`. The units in use drain evenly. The other form of the algorithm stores one time, but
-- a double is exact to 0.0002 ms there, which is too coarse for limits in bytes.
-- `rate` expires a minute after nothing is in use any more. Redis writes the removal of an expired key into the
-- append-only file, with an fsync. With the minute this happens once for a user who comes back all the time, and not
-- before each of the requests.
-- A refused request writes nothing. If the clock went back, the units in use drain from the new time on.
local rates, now, charges = KEYS, now_ms(ARGV[1]), ARGV
local correct = #rates > 0 and #charges == 1 + 4 * #rates
for i = 2, #charges do
  correct = correct and tonumber(charges[i])
end
if not correct then
  return redis.error_reply('ERR wrong arguments')
end

redis.set_repl(redis.REPL_NONE)
local decisions = {}
for i, rate in ipairs(rates) do
  local quota, window_ms, cost, count = charges[4 * i - 2], charges[4 * i - 1], charges[4 * i], charges[4 * i + 1]
  decisions[3 * i - 2], decisions[3 * i - 1], decisions[3 * i] = take(rate, now, quota, window_ms, cost + 0, count + 0)
end
return decisions
