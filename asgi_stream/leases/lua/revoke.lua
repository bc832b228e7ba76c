-- ARGV: lease, or '' for all of the user's; ttl; grace; prefix. Returns how many were taken away.

local held, waiting, waiters, refused = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local ttl, now = tonumber(ARGV[2]), clock()
local count = 0
redis.call('ZREMRANGEBYSCORE', held, '-inf', now)
for _, id in ipairs(redis.call('ZRANGE', held, 0, -1)) do
    local lease = string.match(id, '^[^#]+')
    if ARGV[1] == '' or ARGV[1] == lease then
        redis.call('ZREM', held, id)
        if id == lease then
            redis.call('ZADD', refused, now + ttl, lease)
            keep(refused, ttl)
            tell(ARGV[4], lease, 'revoked')
            count = count + 1
        end
    end
end
give(held, waiting, waiters, now, tonumber(ARGV[3]), ARGV[4])
return count
