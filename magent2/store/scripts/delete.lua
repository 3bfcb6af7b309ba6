-- Remove a record, if it has the expected version.
-- KEYS record, fence
-- ARGV expected version ('' for any, 0 for none), kept_ms, token (or left out)
-- Says LEASELOST, CONFLICT. Returns 1 if it was there, else 0.
local record, fence, token = KEYS[1], KEYS[2], ARGV[3]
if token then
  local highest = redis.call('GET', fence)
  if highest and token < highest then return redis.error_reply('LEASELOST') end
end
local there = redis.call('HGET', record, 'v') or '0'
if ARGV[1] ~= '' and ARGV[1] ~= there then return redis.error_reply('CONFLICT') end
if token then redis.call('SET', fence, token, 'PX', ARGV[2]) end
return redis.call('DEL', record)
