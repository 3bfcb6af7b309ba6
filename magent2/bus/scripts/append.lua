-- Append entries to a topic and tell its readers.
-- KEYS stream, fences, dedup (or the stream again where there is no dedup id)
-- ARGV maxlen (0: never trim), ttl_ms (0: never expire), writer ('' for none), token, seq,
--      dedup digest, has_dedup (0|1), dedup_ttl_ms, dedup origin, payload, …
-- Says LEASELOST, DEDUPCONFLICT. Returns {cursor before, cursor of the last, duplicate (0|1), origin}
-- What is published on the channel named as the stream: `before id:bytes id:bytes …\n` and the payloads, joined.
local stream, fences, dedup = KEYS[1], KEYS[2], KEYS[3]
local writer, token, seq = ARGV[3], ARGV[4], tonumber(ARGV[5])
if writer ~= '' then
  local known = redis.call('HGET', fences, writer)
  if known then
    local highest, seen, before, last = string.match(known, '^(%S+) (%d+) (%S+) (%S+)$')
    if token < highest then return redis.error_reply('LEASELOST') end
    if token == highest and seq <= tonumber(seen) then return {before, last, 0, ARGV[9]} end
  end
end
if ARGV[7] == '1' then
  local known = redis.call('GET', dedup)
  if known then
    local before, last, digest, origin = string.match(known, '^(%S+) (%S+) (%S*) (%S*)$')
    if digest ~= ARGV[6] then return redis.error_reply('DEDUPCONFLICT') end
    -- the writer is the newest all the same: from here on an older one is refused
    if writer ~= '' then
      redis.call('HSET', fences, writer, token .. ' ' .. seq .. ' ' .. before .. ' ' .. last)
      if ARGV[2] ~= '0' then redis.call('PEXPIRE', fences, ARGV[2]) end
    end
    return {before, last, 1, origin}
  end
end

local newest = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
local before = newest and newest[1] or '0-0'
local last = before
local index, payloads = {}, {}
for i = 10, #ARGV do
  if ARGV[1] == '0' then
    last = redis.call('XADD', stream, '*', 'd', ARGV[i])
  else
    last = redis.call('XADD', stream, 'MAXLEN', '~', ARGV[1], '*', 'd', ARGV[i])
  end
  index[#index + 1] = last .. ':' .. #ARGV[i]
  payloads[#payloads + 1] = ARGV[i]
end
if ARGV[2] ~= '0' then redis.call('PEXPIRE', stream, ARGV[2]) end
if writer ~= '' then
  redis.call('HSET', fences, writer, token .. ' ' .. seq .. ' ' .. before .. ' ' .. last)
  if ARGV[2] ~= '0' then redis.call('PEXPIRE', fences, ARGV[2]) end
end
if ARGV[7] == '1' then 
  redis.call('SET', dedup, before .. ' ' .. last .. ' ' .. ARGV[6] .. ' ' .. ARGV[9], 'PX', ARGV[8])
end
if #index > 0 then
  redis.call('PUBLISH', stream, before .. ' ' .. table.concat(index, ' ') .. '\n' .. table.concat(payloads))
end
return {before, last, 0, ARGV[9]}
