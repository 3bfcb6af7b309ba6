-- Make the consumer group, and let go what a vanished stream left behind.
-- KEYS ready, keys, total
-- ARGV group, prefix of the backlog lists
-- Returns 1 if it made the group, 0 if there is one.
-- The group starts at 0, never at $: what was enqueued while there was none is delivered too. A key whose ready entry
-- went with the stream would stay blocked: its head is gone, the next in its backlog takes the place.
local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if made.err then return string.find(made.err, 'BUSYGROUP', 1, true) and 0 or made end
local kept = 0
local states = redis.call('HGETALL', KEYS[2])
for i = 1, #states, 2 do
  local key, state = states[i], states[i + 1]
  if state ~= 'held' and #redis.call('XRANGE', KEYS[1], state, state) == 0 then
    local following = redis.call('LPOP', ARGV[2] .. key)
    if following then
      local id = redis.call('XADD', KEYS[1], '*', 'k', key, 'd', following, 'a', '0', 'n', '0')
      redis.call('HSET', KEYS[2], key, id)
    else
      redis.call('HDEL', KEYS[2], key)
    end
  end
  kept = kept + redis.call('LLEN', ARGV[2] .. key) + redis.call('HEXISTS', KEYS[2], key)
end
redis.call('SET', KEYS[3], kept)
return 1
