-- Add a message to a queue: as the ready entry of its key, or behind it in the key's backlog.
-- KEYS ready, keys, backlog, total
-- ARGV key, data, only_if_idle (0|1), key_backlog, queue_backlog
-- Says KEYBUSY, QUEUEFULL. Returns OK.
local scheduled = redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1
if scheduled and ARGV[3] == '1' then return redis.error_reply('KEYBUSY') end
if tonumber(redis.call('GET', KEYS[4]) or '0') >= tonumber(ARGV[5]) then return redis.error_reply('QUEUEFULL') end
if scheduled then
  if redis.call('LLEN', KEYS[3]) >= tonumber(ARGV[4]) then return redis.error_reply('QUEUEFULL') end
  redis.call('RPUSH', KEYS[3], ARGV[2])
else
  local id = redis.call('XADD', KEYS[1], '*', 'k', ARGV[1], 'd', ARGV[2], 'a', '0', 'n', '0')
  redis.call('HSET', KEYS[2], ARGV[1], id)
end
redis.call('INCR', KEYS[4])
return redis.status_reply('OK')
