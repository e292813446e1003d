-- A script for wrk: sends requests whose paths it takes at random from a list, and prints the result as one line of JSON.
-- wrk … -- METHOD paths-file [body-file]
local requests = {}

local function read_file(path)
  local file = assert(io.open(path, 'rb'))
  local data = file:read('*a')
  file:close()
  return data
end

function init(args)
  local body = args[3] and read_file(args[3])
  for path in io.lines(args[2]) do
    requests[#requests + 1] = wrk.format(args[1], path, nil, body)
  end
  math.randomseed(os.time())
end

function request()
  return requests[math.random(#requests)]
end

function done(summary, latency)
  local errors = summary.errors
  local shares = {0.01, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 99.99, 100}
  local percentiles = {}
  for i, share in ipairs(shares) do
    percentiles[i] = string.format('[%g,%d]', share, latency:percentile(share))
  end
  print(string.format('{"requests":%d,"microseconds":%d,"errors":%d,"max":%d,"percentiles":[%s]}',
    summary.requests, summary.duration,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout, latency.max,
    table.concat(percentiles, ',')))
end
