-- What producers and those who stop them ask.
-- ARGV: verb, candidate epoch, ttl ms, then
--   touch: attempt, seconds it is good for (ms)      attempt: –      cancel: reason      revoke, revoked: –
local verb, ttl = ARGV[1], tonumber(ARGV[3])
if verb == 'revoked' then
  -- A question only: it leaves nothing behind.
  return {'ok', redis.call('HGET', meta, 'r') or '0'}
end
local epoch = open_log(ARGV[2], '', 0, ttl)
local m = redis.call('HMGET', meta, 's', 'a', 'c', 'x')
local attempt = tonumber(m[2] or 0)
local now = now_ms()
if verb == 'touch' then
  if tonumber(ARGV[4]) > 0 and tonumber(ARGV[4]) < attempt then return {'superseded', attempt} end
  if not m[4] then redis.call('HSET', meta, 't', now, 'l', now + tonumber(ARGV[5])) end
elseif verb == 'attempt' then
  if not m[4] then
    attempt = redis.call('HINCRBY', meta, 'a', 1)
    redis.call('HSET', meta, 't', now)
  end
elseif verb == 'cancel' then
  if not m[4] and not m[3] then
    redis.call('HSET', meta, 'c', ARGV[4])
    m[3] = ARGV[4]
  end
elseif verb == 'revoke' then
  redis.call('HSET', meta, 'r', now)
end
if redis.call('PTTL', meta) < ttl then redis.call('PEXPIRE', meta, ttl) end
redis.call('PEXPIRE', log, ttl)
return {'ok', m[1], attempt, m[3] or '', epoch}
