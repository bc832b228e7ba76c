-- What every script begins with. A user's keys, in this order, all in one slot:
--   1 held      sorted set: lease -> when it expires, in ms of Redis's own clock
--   2 waiting   sorted set: who waits -> when it came
--   3 waiters   hash: who waits -> "when it is given up:weight:limit"
--   4 refused   sorted set: leases that were taken away -> when that may be forgotten
-- A lease of weight n stands n times in the set: as itself and as "<lease>#2" to "<lease>#n".

local function clock()
    local time = redis.call('TIME')
    return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000), tonumber(time[1]) * 1000000 + tonumber(time[2])
end

local function keep(key, ms)
    if redis.call('PTTL', key) < ms then
        redis.call('PEXPIRE', key, ms)
    end
end

local function hold(held, lease, weight, now, ttl)
    redis.call('ZADD', held, now + ttl, lease)
    for n = 2, weight do
        redis.call('ZADD', held, now + ttl, lease .. '#' .. n)
    end
    keep(held, ttl)
end

local function drop(held, lease, weight)
    local gone = redis.call('ZREM', held, lease)
    for n = 2, weight do
        redis.call('ZREM', held, lease .. '#' .. n)
    end
    return gone
end

-- Tell the process that made a lease; its id begins with that process's.
local function tell(prefix, lease, message)
    redis.call('PUBLISH', prefix .. string.match(lease, '^[^:]+'), message .. ' ' .. lease)
end

-- Give what is free to those who wait, the first one first. What is given is good for `grace` ms, until its process
-- has heard of it.
local function give(held, waiting, waiters, now, grace, prefix)
    while true do
        local first = redis.call('ZRANGE', waiting, 0, 0)[1]
        if not first then
            return
        end
        local entry = redis.call('HGET', waiters, first)
        local until_, weight, limit = string.match(entry or '', '^(%d+):(%d+):(%d+)$')
        if until_ and tonumber(until_) > now then
            weight = tonumber(weight)
            if redis.call('ZCARD', held) + weight > tonumber(limit) then
                return
            end
            hold(held, first, weight, now, grace)
            tell(prefix, first, 'granted')
        end
        redis.call('ZREM', waiting, first)
        redis.call('HDEL', waiters, first)
    end
end
