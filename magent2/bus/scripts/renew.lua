-- Renew the leases that are still the caller's.
-- KEYS ready
-- ARGV group, consumer, then entry id and delivery count of each
-- Returns the ids that are somebody else's now. A plain XCLAIM would steal them back.
local lost = {}
for i = 3, #ARGV, 2 do
  local id = ARGV[i]
  local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  if pending.err or not pending[1] or pending[1][2] ~= ARGV[2] or pending[1][4] ~= tonumber(ARGV[i + 1]) then
    lost[#lost + 1] = id
  else
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'JUSTID')
  end
end
return lost
