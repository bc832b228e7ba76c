-- ARGV: lease, weight, limit, ttl, policy, how long who waits is believed, grace, prefix of the processes' channels.
-- Returns {1, used}, or {0, used, how many wait before it}.

local held, waiting, waiters, refused = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local lease, weight, limit, ttl = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local policy, patience, grace, prefix = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]
local now, micros = clock()

redis.call('ZREMRANGEBYSCORE', held, '-inf', now)
if redis.call('ZSCORE', held, lease) then
    return {1, redis.call('ZCARD', held)} -- sent twice, or given meanwhile
end
give(held, waiting, waiters, now, grace, prefix)
if redis.call('ZSCORE', held, lease) then
    return {1, redis.call('ZCARD', held)}
end
local used = redis.call('ZCARD', held)
local free = used + weight <= limit
if free and redis.call('EXISTS', waiting) == 0 then
    hold(held, lease, weight, now, ttl)
    return {1, used + weight}
end
if policy == 'wait' then
    if not redis.call('ZSCORE', waiting, lease) then
        local last = redis.call('ZRANGE', waiting, -1, -1, 'WITHSCORES')[2]
        redis.call('ZADD', waiting, math.max(micros, tonumber(last or 0) + 1), lease)
    end
    redis.call('HSET', waiters, lease, string.format('%.0f:%d:%d', now + patience, weight, limit))
    keep(waiting, patience)
    keep(waiters, patience)
    return {0, used, redis.call('ZRANK', waiting, lease)}
end
if policy == 'evict_oldest' and weight <= limit then
    -- A lease's id says when it was taken: <process>:<number>:<ms>:…
    local oldest = {}
    for _, id in ipairs(redis.call('ZRANGE', held, 0, -1)) do
        if not string.find(id, '#', 1, true) then
            local number, since = string.match(id, '^[^:]+:(%d+):(%d+)')
            oldest[#oldest + 1] = {id, tonumber(since or 0), tonumber(number or 0)}
        end
    end
    table.sort(oldest, function(a, b)
        if a[2] ~= b[2] then
            return a[2] < b[2]
        end
        return a[3] < b[3]
    end)
    for _, entry in ipairs(oldest) do
        if redis.call('ZCARD', held) + weight <= limit then
            break
        end
        drop(held, entry[1], 100)
        redis.call('ZADD', refused, now + ttl, entry[1])
        keep(refused, ttl)
        tell(prefix, entry[1], 'superseded')
    end
    hold(held, lease, weight, now, ttl)
    return {1, redis.call('ZCARD', held)}
end
return {0, used, redis.call('ZCARD', waiting)}
