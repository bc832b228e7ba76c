-- What every script begins with. KEYS[1] is the log (a stream whose entry ids are offsets), KEYS[2] its state (a hash):
--   e epoch   o top   f first offset kept   b bytes kept   s state   x ending   a attempt
--   t last event or sign of life, ms   l until when the producer promised to be alive, ms   c why it is to be cancelled
--   k when the time to live was renewed, ms
--   r when tickets were revoked, ms   w whose run it is, JSON
--   p:<producer> "<sequence> <first> <last>" of its last append
local log, meta = KEYS[1], KEYS[2]

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Returns epoch, top, first. A log that is missing, or older than what the caller knows, begins a new epoch.
local function open_log(candidate, known_epoch, known_top, ttl)
  local m = redis.call('HMGET', meta, 'e', 'o', 'f')
  local epoch, top, first = m[1], tonumber(m[2]), tonumber(m[3])
  if epoch and not (epoch == known_epoch and top < known_top) then
    return epoch, top, first
  end
  local kept = {}
  if epoch then
    -- A replica with older data was promoted. Its events' ids belong to the old epoch: nobody can tell which of them
    -- a viewer has seen.
    kept = redis.call('HMGET', meta, 'a', 'c', 'r', 'w')
  end
  redis.call('DEL', log, meta)
  redis.call('HSET', meta, 'e', candidate, 'o', 0, 'f', 1, 'b', 0, 's', 'waiting', 't', now_ms())
  if kept[1] then redis.call('HSET', meta, 'a', kept[1]) end
  if kept[2] then redis.call('HSET', meta, 'c', kept[2]) end
  if kept[3] then redis.call('HSET', meta, 'r', kept[3]) end
  if kept[4] then redis.call('HSET', meta, 'w', kept[4]) end
  redis.call('PEXPIRE', meta, ttl)
  return candidate, 0, 1
end

local function base36(n)
  local digits = ''
  repeat
    local d = n % 36
    digits = string.sub('0123456789abcdefghijklmnopqrstuvwxyz', d + 1, d + 1) .. digits
    n = (n - d) / 36
  until n == 0
  return digits
end
