-- Forget a ledger.
-- KEYS entries, positions, fence
-- ARGV kept_ms, token (or left out)
-- Says LEASELOST. Returns OK.
local fence, token = KEYS[3], ARGV[2]
if token then
  local highest = redis.call('GET', fence)
  if highest and token < highest then return redis.error_reply('LEASELOST') end
  redis.call('SET', fence, token, 'PX', ARGV[1])
end
redis.call('UNLINK', KEYS[1], KEYS[2])
return redis.status_reply('OK')
