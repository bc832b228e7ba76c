-- KEYS: held and refused of each user. ARGV: ttl, then for each user how many leases, and of each: lease, weight, limit.
-- Returns for each lease 1 (kept), 2 (was gone, and is held again), 0 (lost), -1 (was taken away).

local ttl = tonumber(ARGV[1])
local now = clock()
local results = {}
local at = 2
for n = 1, #KEYS, 2 do
    local held, refused = KEYS[n], KEYS[n + 1]
    redis.call('ZREMRANGEBYSCORE', held, '-inf', now)
    local taken = redis.call('EXISTS', refused) == 1
    local count = tonumber(ARGV[at])
    at = at + 1
    for _ = 1, count do
        local lease, weight, limit = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
        at = at + 3
        local result
        if taken and redis.call('ZSCORE', refused, lease) then
            drop(held, lease, weight)
            result = -1
        elseif redis.call('ZSCORE', held, lease) then
            hold(held, lease, weight, now, ttl)
            result = 1
        elseif redis.call('ZCARD', held) + weight <= limit then
            hold(held, lease, weight, now, ttl)
            result = 2
        else
            result = 0
        end
        results[#results + 1] = result
    end
end
return results
