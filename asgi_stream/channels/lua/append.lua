-- Append, publish, end: one step [C3].
-- ARGV: candidate epoch, known epoch, known top, attempt, producer, sequence, ending, state, only if lost,
--       max events, max bytes, ttl ms, PUBLISH or SPUBLISH, max entries of the archive, whose run it is, frames …
-- KEYS[3], if there is one: the stream that the archiver reads.
local known_top, attempt, sequence = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[6])
local producer, ending, state = ARGV[5], ARGV[7], ARGV[8]
local max_events, max_bytes, ttl, publish = tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12]), ARGV[13]
local archive, about, frames = KEYS[3], ARGV[15], 16

local m = redis.call('HMGET', meta, 'e', 'o', 'f', 'b', 'x', 'a', 'l', 'c', 'p:' .. producer, 's', 'k', 'w')
local epoch, top, first, bytes = m[1], tonumber(m[2]), tonumber(m[3]), tonumber(m[4])
if not epoch or (epoch == ARGV[2] and top < known_top) then
  epoch, top, first = open_log(ARGV[1], ARGV[2], known_top, ttl)
  bytes = 0
  m = {}
end
if producer ~= '' and m[9] and sequence <= tonumber(string.match(m[9], '^%d+')) then
  local from, to = string.match(m[9], ' (%d+) (%d+)')
  return {'repeated', epoch, tonumber(from), tonumber(to), m[8] or ''}
end
if m[5] then return {'ended', m[5]} end
if attempt > 0 and m[6] and attempt < tonumber(m[6]) then return {'superseded', tonumber(m[6])} end
local now = now_ms()
if ARGV[9] == '1' and (not m[7] or tonumber(m[7]) > now) then return {'alive'} end

local from = top + 1
for i = frames, #ARGV do
  top = top + 1
  local mark = (i == #ARGV and ending ~= '') and '.e\n\n' or '\n\n'
  local frame = ARGV[i] .. 'id: ' .. epoch .. '.' .. base36(top) .. mark
  redis.call('XADD', log, top .. '-0', 'f', frame)
  redis.call(publish, log, frame)
  bytes = bytes + #frame
end

-- The last event is kept whatever it weighs.
while (top - first + 1 > max_events or bytes > max_bytes) and first < top do
  local wanted = math.max(1, math.min(top - first + 1 - max_events, 64))
  local oldest = redis.call('XRANGE', log, '-', '+', 'COUNT', wanted)
  if #oldest == 0 then break end
  for _, entry in ipairs(oldest) do
    if (top - first + 1 > max_events or bytes > max_bytes) and first < top then
      bytes = bytes - #entry[2][2]
      first = first + 1
    end
  end
  redis.call('XTRIM', log, 'MINID', first .. '-0')
end

if archive then
  local known = m[12] or redis.call('HGET', meta, 'w') or ''
  if about == '' then about = known end
  if about ~= known then redis.call('HSET', meta, 'w', about) end
  -- In parts: a command's words are on Lua's stack, which has bounds.
  for begin = frames, #ARGV, 1000 do
    local last = math.min(begin + 999, #ARGV)
    redis.call('XADD', archive, 'MAXLEN', '~', ARGV[14], '*', 'log', log, 'epoch', epoch, 'first', from + begin - frames,
      'about', about, 'frames', cmsgpack.pack({unpack(ARGV, begin, last)}))
  end
end

-- One write for all that changed: calls are what this script costs.
local changed = {'o', top, 'f', first, 'b', bytes, 't', now}
if ending ~= '' then
  changed[9], changed[10], changed[11], changed[12] = 's', ending, 'x', ending
elseif state ~= '' and state ~= m[10] then
  changed[9], changed[10] = 's', state
end
if producer ~= '' then
  changed[#changed + 1] = 'p:' .. producer
  changed[#changed + 1] = sequence .. ' ' .. from .. ' ' .. top
end
-- Expiry is exact to a second, or less where little is kept: not worth two calls for each of many events.
if ending ~= '' or not m[11] or now - tonumber(m[11]) >= math.min(1000, ttl / 16) then
  changed[#changed + 1] = 'k'
  changed[#changed + 1] = now
  redis.call('HSET', meta, unpack(changed))
  redis.call('PEXPIRE', log, ttl)
  redis.call('PEXPIRE', meta, ttl)
  if archive then redis.call('PEXPIRE', archive, 7 * 24 * 3600 * 1000) end
else
  redis.call('HSET', meta, unpack(changed))
end
return {'ok', epoch, from, top, m[8] or ''}
