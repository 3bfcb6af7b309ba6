-- How full a queue is.
-- KEYS ready, total, due
-- ARGV group
-- Returns {total, in flight, held, ms the oldest ready message has waited}
local total = tonumber(redis.call('GET', KEYS[2]) or '0')
local held = redis.call('ZCARD', KEYS[3])
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1])
local in_flight = pending.err and 0 or pending[1]
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
local delivered = '-'
for _, group in ipairs(groups.err and {} or groups) do
  local info = {}
  for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
  if info['name'] == ARGV[1] then delivered = '(' .. info['last-delivered-id'] end
end
local age = 0
local oldest = redis.call('XRANGE', KEYS[1], delivered, '+', 'COUNT', 1)[1]
if oldest then
  local time = redis.call('TIME')
  age = math.max(0, time[1] * 1000 + math.floor(time[2] / 1000) - tonumber(string.match(oldest[1], '^%d+')))
end
return {total, in_flight, held, age}
