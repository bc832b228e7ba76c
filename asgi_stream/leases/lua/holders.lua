-- Returns the leases held with the ms until they expire, and who waits, in order.

local now = clock()
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local rows = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for n = 2, #rows, 2 do
    rows[n] = string.format('%.0f', tonumber(rows[n]) - now)
end
return {rows, redis.call('ZRANGE', KEYS[2], 0, -1)}
