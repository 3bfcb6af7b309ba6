-- What somebody must do about once a second: let due messages go, and claim deliveries whose lease lapsed.
-- KEYS ready, keys, held, due, woken
-- ARGV group, consumer, lease_ms, how many to claim at most
-- Returns {ms until the next one is due or -1, {id, delivery count, key, data, attempts, starts}, …}
-- Leases are idle times by the server's own clock: no other clock takes part.
local ready, group, max = KEYS[1], ARGV[1], tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now, 'LIMIT', 0, 100)) do
  local attempts, starts, data = string.match(redis.call('HGET', KEYS[3], key) or '', '^(%d+) (%d+) (.*)$')
  redis.call('HDEL', KEYS[3], key)
  redis.call('ZREM', KEYS[4], key)
  if data then
    local id = redis.call('XADD', ready, '*', 'k', key, 'd', data, 'a', attempts, 'n', starts)
    redis.call('HSET', KEYS[2], key, id)
  end
end

local following = redis.call('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES')
local answer = {following[2] and math.max(0, tonumber(following[2]) - now) or -1}
if max == 0 then return answer end

local cursor = '0-0'
for _ = 1, 20 do
  -- two replies on Redis 6.2, three on later ones; entries deleted meanwhile are nil on 6.2
  local claimed = redis.call('XAUTOCLAIM', ready, group, ARGV[2], ARGV[3], cursor, 'COUNT', max)
  for _, entry in ipairs(claimed[2]) do
    if entry and entry[2] then
      local fields = {}
      for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
      local count = redis.call('XPENDING', ready, group, entry[1], entry[1], 1)[1][4]
      redis.call('SREM', KEYS[5], fields['k'])
      answer[#answer + 1] = {entry[1], count, fields['k'], fields['d'], fields['a'], fields['n']}
      max = max - 1
    end
  end
  cursor = claimed[1]
  if cursor == '0-0' or max <= 0 then break end
end
return answer
