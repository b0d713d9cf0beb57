-- For wrk: init() takes the method and the size of the body, done() writes figures that need no parsing of units.
function init(arguments)
  wrk.method = arguments[1] or "GET"
  local size = tonumber(arguments[2] or "0")
  if size > 0 then
    wrk.body = string.rep("x", size)
  end
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "p50": %.4f, "p99": %.4f, "cut": %d, "refused": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.timeout, errors.status))
end
