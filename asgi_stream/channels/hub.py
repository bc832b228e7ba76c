"""One subscription per channel and process, however many viewers: what comes is read once and given to all [C4].

A viewer holds one `Leg` per channel: how far it has come. Legs that are up to date and idle are *live*: a new frame is
written to them at once, from the task that read it. All others catch up in their own tasks, from the channel's ring of
recent frames or from the broker, and become live again. Nothing is queued per viewer [C5].

A channel pauses while it is not known to be whole (no subscription yet, a connection lost, an offset missing): frames
that come meanwhile are kept aside until one read has filled the gap [C2].
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from asgi_stream import events
from asgi_stream.channels.broker import Broker, Subscriber
from asgi_stream.channels.commands import Append, Page, Read
from asgi_stream.channels.model import ChannelInfo, Position, epoch_of, is_ending, offset_of
from asgi_stream.config import ChannelConfig
from asgi_stream.errors import BackendError, RunEndedError
from asgi_stream.sse.encode import encode_block

logger = logging.getLogger("asgi_stream")

RING_FRAMES = 128
RING_BYTES = 256 * 1024
LINGER = 5.0
"""Seconds for which a channel without viewers stays subscribed: a reload of a page needs no new subscription."""
CHECK_AFTER = 30.0
"""Seconds of silence after which a running channel is compared with the broker; others after four times as many."""
PAGE_BYTES = 128 * 1024
"""What is read of a log at once for a viewer: it is held while that viewer is written to."""
YIELD_AFTER = 500
"""Viewers written to before the event loop runs others."""


class Viewer(Protocol):
    """Who looks at one or more channels."""

    def push(self, body: bytes) -> bool:
        """Write *body* now; False when that takes longer: the viewer's own task finishes it, and catches up."""

    def wake(self) -> None:
        """Let the viewer's own task look at its legs."""

    def idle(self) -> None:
        """Nothing has come for a long time, and nobody promised anything."""

    def revoke(self, channel: str | None, user: str | None) -> None:
        """Somebody ended the streams of a channel, or of a user."""

    def tick(self, now: float) -> float:
        """Called at about the time that was asked for; returns the next."""


class Leg:
    """How far a viewer has come in a channel: everything up to ``cursor`` in ``epoch`` was sent."""

    __slots__ = ("channel", "cursor", "ended", "epoch", "mark", "viewer")

    def __init__(self, viewer: Viewer, channel: HubChannel, after: Position | None) -> None:
        self.viewer = viewer
        self.channel = channel
        self.epoch = after.epoch if after else None
        self.cursor = after.offset if after else 0
        self.ended = after is not None and after.ending
        self.mark = channel.bytes  # the channel's count of bytes when this leg was last up to date

    @property
    def up_to_date(self) -> bool:
        """Whether there is nothing to send."""
        channel = self.channel
        return self.ended or (channel.epoch is not None and self.epoch == channel.epoch and self.cursor == channel.top)

    @property
    def backlog(self) -> int:
        """Bytes that have come since this leg was last up to date."""
        return 0 if self.ended else self.channel.bytes - self.mark

    @property
    def position(self) -> Position | None:
        return None if self.epoch is None else Position(self.epoch, self.cursor, self.ended)


class HubChannel:
    """A channel that somebody looks at, or did a moment ago."""

    __slots__ = (
        "_asked",
        "_buffer",
        "_hub",
        "_ring_bytes",
        "_syncing",
        "bytes",
        "checked",
        "ended",
        "epoch",
        "info",
        "legs",
        "linger",
        "live",
        "name",
        "ring",
        "subscribed",
        "top",
        "waiting",
    )

    def __init__(self, hub: Hub, name: str) -> None:
        self.name = name
        self.epoch: str | None = None  # None until the first read
        self.top = 0
        self.bytes = 0
        self.info: ChannelInfo | None = None
        self.ended = False
        self.ring: deque[tuple[int, bytes]] = deque()
        self.legs = 0
        self.live: set[Leg] = set()
        self.waiting: set[Leg] = set()
        self.subscribed = False
        self.checked = 0.0
        self.linger: asyncio.TimerHandle | None = None
        self._asked: Position | None = None
        self._hub = hub
        self._ring_bytes = 0
        self._buffer: list[bytes] = []
        self._syncing: asyncio.Task[None] | None = None

    @property
    def whole(self) -> bool:
        """Whether ``top`` is known to be the end of the log."""
        return self.epoch is not None and self.subscribed and self._syncing is None

    # What comes live

    async def receive(self, frames: Iterable[bytes]) -> None:
        """Take frames in the order of their arrival, and give them to the live viewers."""
        if not self.whole:
            self._buffer.extend(frames)
            return
        pending = list(frames)
        new: list[bytes] = []
        epoch = (self.epoch or "").encode()
        for n, frame in enumerate(pending):
            try:
                offset = offset_of(frame)
            except ValueError:
                logger.warning("channel %s: what somebody else published was left out: %r", self.name, frame[:80])
                continue
            if epoch_of(frame) != epoch or offset > self.top + 1:
                self._buffer.extend(pending[n:])
                self.sync()
                break
            if offset <= self.top:
                continue
            self._keep(offset, frame)
            new.append(frame)
        if new:
            await self._give(new)

    def _keep(self, offset: int, frame: bytes) -> None:
        self.top = offset
        self.bytes += len(frame)
        self.ring.append((offset, frame))
        self._ring_bytes += len(frame)
        while len(self.ring) > RING_FRAMES or (self._ring_bytes > RING_BYTES and len(self.ring) > 1):
            self._ring_bytes -= len(self.ring.popleft()[1])
        if is_ending(frame):
            self.ended = True

    async def _give(self, frames: list[bytes]) -> None:
        """Write what was just kept to the live legs, which stand right before it, and wake who waits for it."""
        self.checked = self._hub.loop.time()
        self.wake_waiting()
        if not self.live:
            return
        body = frames[0] if len(frames) == 1 else b"".join(frames)
        top, mark, ended = self.top, self.bytes, self.ended
        before = top - len(frames)
        written = 0
        for leg in list(self.live):
            if leg not in self.live:  # it left while others ran
                continue
            if leg.cursor != before or top != self.top:  # it, or the channel, went on while others ran
                self.live.discard(leg)
                leg.viewer.wake()
                continue
            leg.cursor, leg.mark, leg.ended = top, mark, ended
            if not leg.viewer.push(body):
                self.live.discard(leg)
            elif ended:
                leg.viewer.wake()
            written += 1
            if written % YIELD_AFTER == 0:
                await asyncio.sleep(0)

    def wake_waiting(self) -> None:
        """Let those look that wait in tasks of their own."""
        waiting, self.waiting = self.waiting, set()
        for leg in waiting:
            leg.viewer.wake()

    def wake_all(self) -> None:
        """Take the live ones' place away: they have to catch up."""
        live, self.live = self.live, set()
        for leg in live:
            leg.viewer.wake()
        self.wake_waiting()

    # What fills gaps

    def sync(self, after: Position | None = None) -> None:
        """Compare with the broker, and go on from what it says. One at a time."""
        self._asked = after
        if self._syncing is None and self.subscribed:
            self._syncing = self._hub.loop.create_task(self._sync())
            self._syncing.add_done_callback(_log_failure)

    def lost(self) -> None:
        """The subscription is gone: what comes now is not known."""
        self.subscribed = False
        self._buffer.clear()
        if self._syncing is not None:
            self._syncing.cancel()
            self._syncing = None

    def drop(self) -> None:
        """Nobody looks any more."""
        self.lost()
        if self.linger is not None:
            self.linger.cancel()

    async def _sync(self) -> None:
        pause = 0.05
        while True:
            known = None if self.epoch is None else Position(self.epoch, self.top)
            arrived = len(self._buffer)
            command = Read(
                self.name, after=known or self._asked, known=known, max_events=RING_FRAMES, max_bytes=RING_BYTES
            )
            try:
                page = await self._hub.broker.run_async(command)
                break
            except Exception as exc:  # whatever it is: a channel that gave up would be silent for ever
                if isinstance(exc, BackendError):
                    logger.warning("channel %s could not be read, trying again: %s", self.name, exc)
                else:
                    logger.exception("channel %s could not be read, trying again", self.name)
                await asyncio.sleep(random.uniform(pause / 2, pause))
                pause = min(pause * 2, 1.0)
        self._syncing = None
        self.checked = self._hub.loop.time()
        self.info = page.info
        # What arrived before the read and is of another epoch than its answer is of an old one.
        epoch = page.info.epoch.encode()
        buffer, self._buffer = self._buffer, []
        buffer = [frame for n, frame in enumerate(buffer) if n >= arrived or _is_of(frame, epoch)]
        if known is not None and page.reset is None and not page.more:
            for record in page.records:
                self._keep(record.position.offset, record.frame)
            if page.records:
                await self._give([record.frame for record in page.records])
            self.wake_waiting()
        else:
            self._begin(page)
            self.wake_all()
        if buffer:
            await self.receive(buffer)

    def _begin(self, page: Page) -> None:
        """Stand where the broker says, with what it gave as the recent frames if that is all there is after them."""
        self.ring.clear()
        self._ring_bytes = 0
        self.epoch = page.info.epoch
        if not page.more:
            for record in page.records:
                self._keep(record.position.offset, record.frame)
        self.top = page.info.top
        self.ended = page.info.ended

    @property
    def state(self) -> str:
        """The run's state, as far as this process has heard."""
        if self.ring:
            last = self.ring[-1][1]
            if self.ended:
                return last[7 : last.index(b"\n")].decode() if last.startswith(b"event: ") else "complete"
            return "queued" if last.startswith(b"event: queued\n") else "running"
        return "waiting" if self.info is None else self.info.state

    def recent(self, cursor: int, limit: int) -> list[bytes] | None:
        """Frames after *cursor*, about *limit* bytes of them; None if the ring does not reach back so far."""
        if not self.ring or self.ring[0][0] > cursor + 1:
            return None
        frames = []
        size = 0
        # From the end: who is nearly up to date, as most are, should not pay for the whole ring.
        behind = self.top - cursor
        begin = len(self.ring) - behind
        for n in range(begin, len(self.ring)):
            frame = self.ring[n][1]
            frames.append(frame)
            size += len(frame)
            if size >= limit:
                break
        return frames

    def newest(self, limit: int) -> int:
        """The cursor before the newest frames that weigh at most *limit* bytes together, and at least the last."""
        size = 0
        cursor = self.top
        for offset, frame in reversed(self.ring):
            size += len(frame)
            if size > limit and offset < self.top:
                break
            cursor = offset - 1
        return cursor


class Hub:
    """The channels that the viewers of one event loop look at."""

    def __init__(self, broker: Broker, config: ChannelConfig) -> None:
        self.broker = broker
        self.config = config
        self.loop = asyncio.get_running_loop()
        self._channels: dict[str, HubChannel] = {}
        self._subscriber: Subscriber | None = None
        self._reads: dict[tuple[str, str, int], asyncio.Future[Page]] = {}
        self._wheel: dict[int, list[Viewer]] = {}
        self._ticking: asyncio.TimerHandle | None = None
        self._next = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._viewers: dict[Viewer, int] = {}  # with the number of their legs

    def join(self, viewer: Viewer, name: str, after: Position | None) -> Leg:
        """Begin to look at a channel, after a position or from the beginning of its history."""
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = HubChannel(self, name)
            channel._asked = after
            if self._subscriber is None:
                self._subscriber = self.broker.subscriber(self)
            self._subscriber.subscribe(name)
        if channel.linger is not None:
            channel.linger.cancel()
            channel.linger = None
        channel.legs += 1
        self._viewers[viewer] = self._viewers.get(viewer, 0) + 1
        return Leg(viewer, channel, after)

    def leave(self, leg: Leg) -> None:
        """Look no more."""
        channel = leg.channel
        channel.live.discard(leg)
        channel.waiting.discard(leg)
        channel.legs -= 1
        self._viewers[leg.viewer] -= 1
        if not self._viewers[leg.viewer]:
            del self._viewers[leg.viewer]
        if channel.legs == 0:
            channel.linger = self.loop.call_later(LINGER, self._forget, channel)

    def _forget(self, channel: HubChannel) -> None:
        channel.linger = None
        if self._channels.get(channel.name) is channel and channel.legs == 0:
            del self._channels[channel.name]
            channel.drop()
            if self._subscriber is not None:
                self._subscriber.unsubscribe(channel.name)

    async def read(self, name: str, after: Position | None) -> Page:
        """Read a stretch of a channel's log; who asks for the same at the same time shares one answer."""
        key = (name, after.epoch, after.offset) if after else (name, "", 0)
        shared = self._reads.get(key)
        if shared is None:
            task = self.loop.create_task(self.broker.run_async(Read(name, after=after, max_bytes=PAGE_BYTES)))
            shared = self._reads[key] = task

            def done(task: asyncio.Task[Page]) -> None:
                del self._reads[key]
                if not task.cancelled():
                    task.exception()  # those who still wait are told

            task.add_done_callback(done)
        return await asyncio.shield(shared)

    async def aclose(self) -> None:
        """Give the subscription back."""
        subscriber, self._subscriber = self._subscriber, None
        for channel in self._channels.values():
            channel.drop()
        self._channels.clear()
        if self._ticking is not None:
            self._ticking.cancel()
        for task in list(self._tasks):
            task.cancel()
        if subscriber is not None:
            await subscriber.aclose()

    # The broker's listener

    async def on_frames(self, frames: list[tuple[str, bytes]]) -> None:
        if len(frames) == 1:
            name, frame = frames[0]
            channel = self._channels.get(name)
            if channel is not None:
                await channel.receive((frame,))
            return
        grouped: dict[str, list[bytes]] = {}
        for name, frame in frames:
            grouped.setdefault(name, []).append(frame)
        for name, together in grouped.items():
            channel = self._channels.get(name)
            if channel is not None:
                await channel.receive(together)

    def on_subscribed(self, channel: str) -> None:
        found = self._channels.get(channel)
        if found is not None:
            found.subscribed = True
            found.sync(found._asked)

    def on_announcement(self, message: bytes) -> None:
        try:
            told = json.loads(message)
            channel, user = told.get("close_channel"), told.get("close_user")
        except (ValueError, AttributeError):
            logger.warning("an announcement could not be read: %r", message[:200])
            return
        for viewer in list(self._viewers):
            viewer.revoke(channel, user)

    def on_lost(self, channels: list[str]) -> None:
        for name in channels:
            channel = self._channels.get(name)
            if channel is not None:
                channel.lost()

    # Time: one timer for all viewers and channels

    def at(self, viewer: Viewer, when: float) -> None:
        """Call the viewer's `tick()` at about that time of the loop, to the second."""
        self._wheel.setdefault(int(when) + 1, []).append(viewer)
        if self._ticking is None:
            self._next = int(self.loop.time())
            self._ticking = self.loop.call_later(1.0, self._tick)

    def _tick(self) -> None:
        now = self.loop.time()
        while self._next <= now:
            for viewer in self._wheel.pop(self._next, ()):
                when = viewer.tick(now)
                if when < float("inf"):
                    self._wheel.setdefault(max(int(when), int(now)) + 1, []).append(viewer)
            self._next += 1
        for channel in list(self._channels.values()):
            patience = CHECK_AFTER if channel.state == "running" else CHECK_AFTER * 4
            if channel.whole and not channel.ended and now - channel.checked >= patience:
                channel.checked = now
                task = self.loop.create_task(self._check(channel))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                task.add_done_callback(_log_failure)
        self._ticking = self.loop.call_later(1.0, self._tick) if self._wheel or self._channels else None

    async def _check(self, channel: HubChannel) -> None:
        """Silence: is the log where we think it is, and is there anybody who will write to it?"""
        channel.sync()
        if channel._syncing is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([channel._syncing])
        info = channel.info
        if info is None or info.ended:
            return
        if info.lost:
            await self._end_lost(channel.name)
        elif info.idle >= self.config.max_idle_time:
            for leg in [*channel.live, *channel.waiting]:
                leg.viewer.idle()

    async def _end_lost(self, name: str) -> None:
        """Nobody took over the work of a producer that died: the run is over, and whoever notices says so [C7]."""
        ending = events.failed("worker_lost", "the worker of this run was lost", retryable=True, id=name[-8:])
        try:
            await self.broker.run_async(
                Append(name, (encode_block(ending),), ending="failed", state="", only_if_lost=True)
            )
        except (RunEndedError, BackendError) as exc:
            logger.debug("a lost run was not ended here: %s", exc)


def _is_of(frame: bytes, epoch: bytes) -> bool:
    try:
        return epoch_of(frame) == epoch
    except ValueError:
        return False


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("delivery failed", exc_info=task.exception())
