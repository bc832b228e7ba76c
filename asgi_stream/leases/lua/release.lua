-- ARGV: grace, prefix, then lease and weight for each. Also for one who waits no more.
-- Returns how many are held afterwards.

local held, waiting, waiters = KEYS[1], KEYS[2], KEYS[3]
for n = 3, #ARGV, 2 do
    drop(held, ARGV[n], tonumber(ARGV[n + 1]))
end
if redis.call('EXISTS', waiting) == 1 then
    local now = clock()
    for n = 3, #ARGV, 2 do
        if redis.call('ZREM', waiting, ARGV[n]) == 1 then
            redis.call('HDEL', waiters, ARGV[n])
        end
    end
    redis.call('ZREMRANGEBYSCORE', held, '-inf', now)
    give(held, waiting, waiters, now, tonumber(ARGV[1]), ARGV[2])
end
return redis.call('ZCARD', held)
