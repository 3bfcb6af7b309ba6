-- End a delivery, if it is still the caller's.
-- KEYS ready, keys, backlog, total, held, due, woken
-- ARGV group, consumer, entry id, delivery count, key, how (ack|again|hold), counted (0|1), for_ms
-- Says LEASELOST. Returns OK.
-- The entry is acknowledged and deleted in one step: Redis 6.2 keeps a deleted entry pending for ever otherwise.
local ready, keys, key = KEYS[1], KEYS[2], ARGV[5]
local pending = redis.pcall('XPENDING', ready, ARGV[1], ARGV[3], ARGV[3], 1)
if pending.err or not pending[1] or pending[1][2] ~= ARGV[2] or pending[1][4] ~= tonumber(ARGV[4]) then
  return redis.error_reply('LEASELOST')
end
local fields = {}
local entry = redis.call('XRANGE', ready, ARGV[3], ARGV[3])[1]
if entry then
  for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
end
redis.call('XACK', ready, ARGV[1], ARGV[3])
redis.call('XDEL', ready, ARGV[3])
if not entry then return redis.error_reply('LEASELOST') end

local function schedule(data, attempts, starts)
  redis.call('HSET', keys, key, redis.call('XADD', ready, '*', 'k', key, 'd', data, 'a', attempts, 'n', starts))
end

local woken = redis.call('SREM', KEYS[7], key) == 1
if ARGV[6] == 'ack' then
  if tonumber(redis.call('GET', KEYS[4]) or '0') > 0 then redis.call('DECR', KEYS[4]) end
  local following = redis.call('LPOP', KEYS[3])
  if following then schedule(following, 0, 0) else redis.call('HDEL', keys, key) end
  return redis.status_reply('OK')
end
-- the lapsed leases of this entry count, and this delivery does if it is `counted`
local attempts = tonumber(fields['a']) + tonumber(ARGV[4]) - 1 + tonumber(ARGV[7])
local starts = tonumber(fields['n']) + tonumber(ARGV[4])
if ARGV[6] == 'again' or woken then
  schedule(fields['d'], attempts, starts)
else
  local now = redis.call('TIME')
  redis.call('HSET', KEYS[5], key, attempts .. ' ' .. starts .. ' ' .. fields['d'])
  redis.call('ZADD', KEYS[6], now[1] * 1000 + math.floor(now[2] / 1000) + tonumber(ARGV[8]), key)
  redis.call('HSET', keys, key, 'held')
end
return redis.status_reply('OK')
