"""One client that looks at channels: what it is sent, when, and how that ends.

Its own task sends what it has missed, and waits otherwise. While it waits, new frames are written by the hub: the first
step of ``send`` is taken as this viewer's task and in its context, and only when that does not finish it does the task
itself wake and finish it. That costs a tenth of waking a task for every frame.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import time
import types
from asyncio import _enter_task, _leave_task
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from asgi_stream import events
from asgi_stream.asgi.parking import Parking
from asgi_stream.asgi.shutdown import OpenStreams, abort_connection
from asgi_stream.channels.hub import Hub, Leg
from asgi_stream.channels.model import Position, created_at
from asgi_stream.errors import BackendError
from asgi_stream.events import CloseReason, StreamEvent
from asgi_stream.leases.handover import Terms
from asgi_stream.sse.encode import PING, encode

logger = logging.getLogger("asgi_stream")

CHUNK = 64 * 1024
"""Bytes of missed frames that are sent at once."""
AVAILABLE_WITHIN = 10.0
"""Seconds that a stream waits for Redis to answer before it ends with `close` (`unavailable`) [C6]."""
STUCK_AFTER = 5.0
"""Seconds for which one write of a viewer with too long a backlog may take."""
GIVEN_UP_AFTER = 60.0
"""Seconds for which any write may take."""

FOREVER = float("inf")


@dataclass(frozen=True, slots=True)
class ViewerSettings:
    """Seconds, and what happens to a viewer that reads too slowly."""

    start_within: float = 1.0
    heartbeat: float = 15.0
    max_age: float | None = None
    expires_at: float | None = None  # Unix seconds: when the right to read ends
    slow: Literal["disconnect", "drop_oldest"] = "disconnect"
    user: str | None = None  # by whom its streams can be closed


class ChannelViewer:
    """Streams channels to one client, from its first byte to its last. Used once."""

    __slots__ = (
        "_backlog",
        "_begun",
        "_close_reason",
        "_context",
        "_done",
        "_eager",
        "_ends_at",
        "_failure",
        "_good_until",
        "_headers",
        "_hub",
        "_legs",
        "_loop",
        "_parking",
        "_pending",
        "_ping_due",
        "_send",
        "_sent_at",
        "_settings",
        "_started",
        "_status",
        "_streams",
        "_task",
        "_terms",
        "_writing",
    )

    def __init__(
        self,
        hub: Hub,
        names: Sequence[str],
        cursors: Sequence[Position | None],
        settings: ViewerSettings,
        *,
        status: int,
        headers: list[tuple[bytes, bytes]],
        streams: OpenStreams,
        task: asyncio.Task[Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Any],
        terms: Terms,
    ) -> None:
        self._hub = hub
        self._loop = hub.loop
        self._settings = settings
        self._status = status
        self._headers = headers
        self._streams = streams
        self._task = task
        self._send = send
        self._terms = terms
        self._good_until = terms.good_until  # later nothing is sent without asking whether the lease still holds
        self._context = contextvars.copy_context()
        self._parking = Parking(receive)
        self._backlog = hub.config.viewer_backlog_bytes
        self._begun = self._sent_at = self._loop.time()
        self._ends_at = self._end_of_life()
        self._close_reason: CloseReason | None = None
        self._pending: tuple[Any, Any] | None = None
        self._failure: BaseException | None = None
        self._eager = len(names) == 1
        self._started = False
        self._done = False
        self._ping_due = False
        self._writing = False  # a `send` takes longer than one step
        self._legs = [hub.join(self, name, after) for name, after in zip(names, cursors, strict=True)]

    async def run(self) -> None:
        """Stream to the end."""
        self._terms.watch(self.close)
        self._streams.add(self)
        self._hub.at(self, self._next_tick(self._begun))
        try:
            await self._stream()
        except OSError as exc:  # how servers report a lost client in `send`
            if isinstance(exc, TimeoutError):  # an OSError, too, but a middleware's
                raise
            logger.debug("a viewer left: %r", exc)
        finally:
            self._done = True
            for leg in self._legs:
                self._hub.leave(leg)
            self._streams.discard(self)
            self._parking.close()
            self._let_go()

    # What others ask of it

    def shutdown(self) -> None:
        """The server goes [O1]."""
        self.close("shutdown")

    def cut(self) -> None:
        """Drop the connection of a client that does not read."""
        abort_connection(self._send)
        self._parking.gone = True
        self._parking.call()

    def close(self, reason: CloseReason) -> None:
        """End this connection with a `close` event; the run goes on."""
        if self._close_reason is None:
            self._close_reason = reason
            self._parking.call()

    def idle(self) -> None:
        self.close("idle")

    def revoke(self, channel: str | None, user: str | None) -> None:
        if (user is not None and user == self._settings.user) or any(leg.channel.name == channel for leg in self._legs):
            self.close("revoked")

    def wake(self) -> None:
        self._parking.call()

    def push(self, body: bytes) -> bool:
        self._sent_at = now = self._loop.time()
        message = {"type": "http.response.body", "body": body, "more_body": True}
        sending = self._send(message) if now < self._good_until else self._send_if_held(message)
        if type(sending) is not types.CoroutineType:
            sending = sending.__await__()
        loop, task = self._loop, self._task
        reader = asyncio.current_task(loop)
        # The step runs as this viewer's task: a timeout that a middleware has around its `send` then cancels this
        # viewer when it expires, not the hub that delivers to all.
        if reader is not None:
            _leave_task(loop, reader)
        _enter_task(loop, task)
        try:
            held = self._context.run(_first_step, sending)
        except StopIteration:
            return True
        except BaseException as exc:
            self._failure = exc
            self._parking.call()
            return False
        finally:
            _leave_task(loop, task)
            if reader is not None:
                _enter_task(loop, reader)
        if held is None:
            self._eager = False  # a checkpoint: this `send` never finishes in one step
        self._pending = sending, held
        self._writing = True
        self._parking.call()
        return False

    def tick(self, now: float) -> float:
        if self._done:
            return FOREVER
        if now >= self._ends_at:
            expired = self._settings.expires_at is not None and time.time() >= self._settings.expires_at
            self.close("expired" if expired else "max_age")
            self._ends_at = FOREVER
        silence = now - self._sent_at
        if self._writing:
            backlog = max(leg.backlog for leg in self._legs)
            if silence >= GIVEN_UP_AFTER or (
                silence >= STUCK_AFTER and backlog > self._backlog and self._settings.slow == "disconnect"
            ):
                logger.info("a viewer reads too slowly: %d bytes behind; its connection is dropped", backlog)
                self.cut()
            return now + 1.0
        if silence >= self._settings.heartbeat and self._started:
            if self._legs[0] in self._legs[0].channel.live:
                if not self.push(PING):
                    self._unpark()
            else:
                self._ping_due = True
                self._parking.call()
        return self._next_tick(now)

    def _next_tick(self, now: float) -> float:
        return min(max(self._sent_at, now - 1.0) + self._settings.heartbeat, self._ends_at)

    def _end_of_life(self) -> float:
        settings = self._settings
        ends_at = FOREVER if settings.max_age is None else self._begun + settings.max_age
        if settings.expires_at is not None:
            ends_at = min(ends_at, self._begun + settings.expires_at - time.time())
        return ends_at

    # Its own task

    async def _stream(self) -> None:
        if not await self._until_known():
            return
        if all(self._has_seen_the_end(leg) for leg in self._legs):
            if not self._started:
                await self._answer(204)
            else:
                await self._finish(b"")
            return
        for leg in self._legs:
            await self._begin(leg)
        while not self._parking.gone:
            if self._pending is not None:
                pending, self._pending = self._pending, None
                await _rest(*pending)
                self._writing = False
                continue
            if self._failure is not None:
                raise self._failure
            for leg in self._legs:
                await self._catch_up(leg)
            if all(leg.ended for leg in self._legs):
                await self._finish(b"")
                return
            if self._close_reason is not None:
                await self._finish(self._goodbye(self._close_reason))
                return
            if self._ping_due:
                self._ping_due = False
                await self._body(PING)
            if self._park():
                await self._parking.wait()
                self._unpark()

    async def _until_known(self) -> bool:
        """Wait until every channel's log was read; False if that took too long or the client left."""
        timer: asyncio.TimerHandle | None = None
        try:
            while any(leg.channel.epoch is None for leg in self._legs):
                waited = self._loop.time() - self._begun
                if self._parking.gone:
                    return False
                if self._close_reason is None and waited >= AVAILABLE_WITHIN:
                    self._close_reason = "unavailable"
                if self._close_reason is not None:
                    await self._finish(self._goodbye(self._close_reason))
                    return False
                if waited >= self._settings.start_within and not self._started:
                    await self._body(PING)
                for leg in self._legs:
                    leg.channel.waiting.add(leg)
                if timer is None:
                    due = AVAILABLE_WITHIN if self._started else self._settings.start_within
                    timer = self._loop.call_at(self._begun + due, self._parking.call)
                await self._parking.wait()
                self._unpark()
                if timer.when() <= self._loop.time():
                    timer = None
        finally:
            if timer is not None:
                timer.cancel()
        return True

    def _has_seen_the_end(self, leg: Leg) -> bool:
        channel = leg.channel
        if not leg.ended and channel.ended and leg.epoch == channel.epoch and leg.cursor == channel.top:
            leg.ended = True
        return leg.ended

    async def _begin(self, leg: Leg) -> None:
        """Say where this client stands, before anything else: a drop before the first event is resumable, too."""
        channel = leg.channel
        if leg.epoch is None:
            assert channel.epoch is not None
            assert channel.info is not None
            leg.epoch = channel.epoch
            if channel.ring and channel.ring[0][0] == channel.info.first:
                leg.cursor = channel.info.first - 1
            elif channel.top:
                page = await self._hub.read(channel.name, None)
                leg.epoch, leg.cursor = page.info.epoch, page.start
        data = {"v": 1, "channel": channel.name, "state": channel.state, "ts": events.now_ms()}
        await self._body(encode(StreamEvent(data, "ready", self._position())))
        if channel.top == 0 and not leg.ended:
            created = created_at(channel.name)
            if created is not None and created + self._hub.config.history_seconds < time.time():
                # It was made long ago, and nothing is left of it.
                leg.cursor, leg.ended = 0, True
                await self._body(encode(events.reset("expired", event_id=self._position())))

    async def _catch_up(self, leg: Leg) -> None:
        """Send what this client has missed."""
        while not leg.up_to_date and self._close_reason is None and not self._parking.gone:
            channel = leg.channel
            if leg.epoch == channel.epoch:
                if leg.backlog > self._backlog and self._settings.slow == "drop_oldest":
                    # Never over the ending: whoever has not seen it would come back for it.
                    skipped, leg.cursor = leg.cursor, max(leg.cursor, channel.newest(self._backlog // 2))
                    leg.mark = channel.bytes
                    missed = leg.cursor - skipped
                    if missed:
                        await self._body(encode(events.reset("slow", missed=missed, event_id=self._position())))
                recent = channel.recent(leg.cursor, CHUNK) if leg.cursor < channel.top else None
                if recent is not None:
                    leg.cursor += len(recent)
                    leg.ended = channel.ended and leg.cursor == channel.top
                    await self._frames(leg, recent)
                    continue
            try:
                after = None if leg.epoch is None else Position(leg.epoch, leg.cursor)
                page = await self._hub.read(channel.name, after)
            except BackendError as exc:
                logger.debug("a viewer has to wait for history: %s", exc)
                channel.waiting.add(leg)
                self._loop.call_later(0.5, self._parking.call)
                await self._parking.wait()
                self._unpark()
                continue
            if page.reset is not None:
                leg.epoch, leg.cursor = page.info.epoch, page.start
                reason = "epoch" if page.reset == "epoch" else "trimmed"
                await self._body(encode(events.reset(reason, missed=page.missed, event_id=self._position())))  # type: ignore[arg-type]
            if page.info.epoch != channel.epoch:
                channel.sync()
                if not page.records:
                    return
            # What is beyond the channel's top comes live.
            top = channel.top if page.info.epoch == channel.epoch else page.info.top
            records = [record for record in page.records if record.position.offset <= top]
            if records:
                leg.cursor = records[-1].position.offset
                leg.ended = records[-1].position.ending
                await self._frames(leg, [record.frame for record in records])
            elif page.reset is None and leg.epoch == channel.epoch and leg.cursor != channel.top:
                # This process has heard less than the client, which was at another; or more than there is.
                channel.sync()
                channel.waiting.add(leg)
                await self._parking.wait()
                self._unpark()
        if leg.up_to_date:
            leg.mark = leg.channel.bytes

    def _park(self) -> bool:
        """Let the hub write what comes, or wake this task; False if there is something to do already."""
        for leg in self._legs:
            if leg.ended:
                continue
            if self._eager and leg.up_to_date:
                leg.channel.live.add(leg)
            elif leg.channel.epoch is not None and not leg.up_to_date and leg.channel.whole:
                self._unpark()
                return False
            else:
                leg.channel.waiting.add(leg)
        return True

    def _unpark(self) -> None:
        for leg in self._legs:
            leg.channel.live.discard(leg)
            leg.channel.waiting.discard(leg)

    # Bytes

    def _position(self) -> str:
        """The id that stands for the whole position: of each channel, in the order of the request."""
        return "~".join("0" if leg.position is None else str(leg.position) for leg in self._legs)

    async def _frames(self, leg: Leg, frames: list[bytes]) -> None:
        if len(self._legs) == 1:
            await self._body(frames[0] if len(frames) == 1 else b"".join(frames))
            return
        # On a stream of several channels each event says whose it is, and its id is the position in all of them.
        cursor, ended = leg.cursor, leg.ended
        parts = []
        name = leg.channel.name.encode()
        for n, frame in enumerate(frames, 1):
            leg.cursor = cursor - len(frames) + n
            leg.ended = ended and n == len(frames)
            block = frame[: frame.rindex(b"id: ")]
            if block.endswith(b"}\n") and b"data: {" in block:
                block = b'%b,"channel":"%b"}\n' % (block[:-2], name)
            parts.append(b"%bid: %b\n\n" % (block, self._position().encode()))
        await self._body(b"".join(parts))

    async def _body(self, body: bytes) -> None:
        if self._loop.time() >= self._good_until:
            await self._ask_leave()
            if self._close_reason is not None:
                return
        if not self._started:
            await self._start(self._status)
        self._sent_at = self._loop.time()
        self._writing = True
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self._writing = False

    async def _start(self, status: int) -> None:
        self._started = True
        await self._send({"type": "http.response.start", "status": status, "headers": self._headers})

    async def _finish(self, body: bytes) -> None:
        if not self._started:
            await self._start(self._status)
        self._let_go()
        self._writing = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _answer(self, status: int) -> None:
        self._started = True
        self._let_go()
        await self._send({"type": "http.response.start", "status": status, "headers": []})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _goodbye(self, reason: CloseReason) -> bytes:
        # Between one and five seconds, so that the clients of a server that restarts do not come back together.
        return encode(events.close(reason, retry=random.randint(1000, 5000)))

    async def _ask_leave(self) -> None:
        self._good_until = await self._terms.renew()

    async def _send_if_held(self, message: Any) -> None:
        await self._ask_leave()
        if self._close_reason is None:
            await self._send(message)

    def _let_go(self) -> None:
        self._terms.release()


def _first_step(sending: Any) -> Any:
    return sending.send(None) if hasattr(sending, "send") else next(sending)


@types.coroutine
def _rest(sending: Any, held: Any) -> Generator[Any, Any, None]:
    """Finish a `send` that was begun elsewhere, with what it waits for."""
    while True:
        if held is not None:
            held._asyncio_future_blocking = True
        try:
            yield held
        except BaseException as exc:
            try:
                held = sending.throw(exc)
            except StopIteration:
                return
        else:
            try:
                held = _first_step(sending)
            except StopIteration:
                return
