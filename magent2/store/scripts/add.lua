-- Append to a ledger, unless the id is there.
-- KEYS entries, positions, fence
-- ARGV id, data, ttl_ms ('' leaves the expiry as it is), kept_ms, token (or left out)
-- Says LEASELOST. Returns 1 if it was appended, else 0.
local entries, positions, fence, token = KEYS[1], KEYS[2], KEYS[3], ARGV[5]
if token then
  local highest = redis.call('GET', fence)
  if highest and token < highest then return redis.error_reply('LEASELOST') end
  redis.call('SET', fence, token, 'PX', ARGV[4])
end
local added = 0
if redis.call('HEXISTS', positions, ARGV[1]) == 0 then
  redis.call('HSET', positions, ARGV[1], redis.call('RPUSH', entries, ARGV[2]) - 1)
  added = 1
end
if ARGV[3] ~= '' then
  -- one moment for both keys: two PEXPIRE may be a millisecond apart, and a ledger would lose its entries but not its ids
  local time = redis.call('TIME')
  local expires = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[3])
  redis.call('PEXPIREAT', entries, expires)
  redis.call('PEXPIREAT', positions, expires)
end
return added
