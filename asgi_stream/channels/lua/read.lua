-- A stretch of the log after a cursor, and the state beside it.
-- ARGV: candidate epoch, known epoch, known top, cursor epoch, cursor offset, max events, max bytes, ttl ms
local known_top, cursor, max_events, max_bytes = tonumber(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local epoch, top, first = open_log(ARGV[1], ARGV[2], known_top, tonumber(ARGV[8]))
local reset, missed, start = '', -1, first - 1
if ARGV[4] ~= '' then
  if ARGV[4] ~= epoch or cursor > top then
    reset = 'epoch'
  elseif cursor < start then
    reset, missed = 'trimmed', start - cursor
  else
    start = cursor
  end
end
local frames, weight, at, full = {}, 0, start, false
while at < top and #frames < max_events and not full do
  local entries = redis.call('XRANGE', log, (at + 1) .. '-0', '+', 'COUNT', math.min(64, max_events - #frames))
  if #entries == 0 then
    -- Evicted: Redis had no memory left, and took the log before its state.
    reset, missed, start, at = 'trimmed', top - at, top, top
    redis.call('HSET', meta, 'f', top + 1)
    frames = {}
    break
  end
  for _, entry in ipairs(entries) do
    local frame = entry[2][2]
    if weight > 0 and weight + #frame > max_bytes then
      full = true
      break
    end
    frames[#frames + 1] = frame
    weight = weight + #frame
    at = at + 1
  end
end
local m = redis.call('HMGET', meta, 'b', 's', 'a', 't', 'l', 'c')
local now = now_ms()
return {epoch, top, first, tonumber(m[1]), m[2], tonumber(m[3] or 0), now - tonumber(m[4]),
  m[6] and 1 or 0, (m[5] and tonumber(m[5]) < now) and 1 or 0, start, reset, missed, frames}
