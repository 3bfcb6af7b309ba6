-- Write a record, if it has the expected version.
-- KEYS record, versions, fence
-- ARGV data, expected version ('' for any, 0 for none), ttl_ms ('' for no expiry), kept_ms, token (or left out)
-- Says LEASELOST, CONFLICT. Returns the new version.
local record, versions, fence, token = KEYS[1], KEYS[2], KEYS[3], ARGV[5]
if token then
  -- tokens are digits of one length, so the server's collation has no say in `<`
  local highest = redis.call('GET', fence)
  if highest and token < highest then return redis.error_reply('LEASELOST') end
end
local there = redis.call('HGET', record, 'v') or '0'
if ARGV[2] ~= '' and ARGV[2] ~= there then return redis.error_reply('CONFLICT') end
if token then redis.call('SET', fence, token, 'PX', ARGV[4]) end

local version = redis.call('INCR', versions)
if version == 1 then
  -- a new counter, or one that expired: from the clock on, it meets no version of its predecessor.
  -- Milliseconds: Lua keeps only 14 digits when it turns a number into a string
  local time = redis.call('TIME')
  version = math.max(time[1] * 1000 + math.floor(time[2] / 1000), tonumber(there) + 1)
  redis.call('SET', versions, version)
end
redis.call('PEXPIRE', versions, ARGV[4])
redis.call('HSET', record, 'v', version, 'd', ARGV[1])
if ARGV[3] == '' then
  redis.call('PERSIST', record)
else
  redis.call('PEXPIRE', record, ARGV[3])
end
return version
