-- The entry of a ledger with this id.
-- KEYS entries, positions
-- ARGV id
-- Returns its data, or nil.
local position = redis.call('HGET', KEYS[2], ARGV[1])
return position and redis.call('LINDEX', KEYS[1], position)
