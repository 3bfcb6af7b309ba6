-- Let a held key go now; tell a delivery in flight not to wait.
-- KEYS ready, keys, held, due, woken
-- ARGV group, key
local state = redis.call('HGET', KEYS[2], ARGV[2])
if not state then return 0 end
if state ~= 'held' then
  local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], state, state, 1)
  if not pending.err and pending[1] then redis.call('SADD', KEYS[5], ARGV[2]) end
  return 0
end
local attempts, starts, data = string.match(redis.call('HGET', KEYS[3], ARGV[2]), '^(%d+) (%d+) (.*)$')
redis.call('HDEL', KEYS[3], ARGV[2])
redis.call('ZREM', KEYS[4], ARGV[2])
local id = redis.call('XADD', KEYS[1], '*', 'k', ARGV[2], 'd', data, 'a', attempts, 'n', starts)
redis.call('HSET', KEYS[2], ARGV[2], id)
return 1
