"""Channels for those who publish and read without a response: `SyncStreamChannel` and `AsyncStreamChannel`."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from asgi_stream import events
from asgi_stream.channels.commands import Append, Appended, Page, Read
from asgi_stream.channels.model import ChannelInfo, Position, Record, check_channel
from asgi_stream.config import ChannelConfig, QueueRedisConfig
from asgi_stream.errors import ConfigurationError, InvalidEventError
from asgi_stream.events import ENDINGS, Ending, StreamEvent
from asgi_stream.sse.encode import encode_block

if TYPE_CHECKING:
    from asgi_stream.runtime import Streaming


class Outgoing:
    """From what is published to commands: frames, their limits, and a producer's id with its sequence [C2]."""

    def __init__(self, channel: str, config: ChannelConfig, about: bytes = b"") -> None:
        self.channel = channel
        self._about = about
        self._config = config
        self._known: Position | None = None
        self.renew()

    def renew(self) -> None:
        """Begin as another producer: in a forked process, or after a command whose outcome is unknown."""
        self.pid = os.getpid()
        self._producer = os.urandom(9).hex()
        self._next = itertools.count(1).__next__

    def frame(self, item: Any, name: str | None = None) -> bytes:
        """Return *item*, a `StreamEvent` or data, as a block. Raises `InvalidEventError`."""
        event = item if isinstance(item, StreamEvent) else StreamEvent(item, name)
        if event.id is not None:
            raise InvalidEventError("id", "a channel gives its events their ids; leave it out")
        block = encode_block(event)
        limit = self._config.max_event_bytes
        if len(block) > limit:
            raise InvalidEventError(
                "data", f"weighs {len(block)} bytes; an event may have {limit} (max_event_bytes of ChannelConfig)"
            )
        return block

    def append(
        self, frames: Iterable[bytes], *, ending: str | None = None, state: str = "running", attempt: int = 0
    ) -> Append:
        """Return the command that appends *frames* as this producer's next."""
        producer, sequence = self._producer, self._next()
        return Append(
            self.channel, tuple(frames), ending, state, attempt, producer, sequence, self._known, about=self._about
        )

    def done(self, appended: Appended) -> None:
        """Remember how far the log goes."""
        if appended.last:
            self._known = Position(appended.epoch, appended.last)


def ending_of(event: StreamEvent | None) -> str | None:
    """The name of the ending that *event* is, if it is one."""
    return event.event if event is not None and event.event in ENDINGS else None


class _Cursor:
    """How far a reader has come, and what it asks for next: for sync and async readers alike."""

    def __init__(self, channel: str, after: str | Position | None) -> None:
        self.channel = channel
        if isinstance(after, str):
            after = Position.parse(after)
        self.after = after
        self.over = after is not None and after.ending

    def next_read(self, limit: int | None = None) -> Read:
        return Read(self.channel, after=self.after) if limit is None else Read(self.channel, self.after, None, limit)

    def feed(self, page: Page) -> list[Record]:
        """Take a page; return the records in it, a `reset` first if there is a gap before them."""
        records = list(page.records)
        self.after = records[-1].position if records else Position(page.info.epoch, page.start)
        self.over = self.after.ending or (page.info.ended and not page.more)
        if page.reset is not None:
            position = Position(page.info.epoch, page.start)
            reason: Any = page.reset
            told = events.reset(reason, missed=page.missed, event_id=str(position))
            records.insert(0, Record(position, encode_block(told) + b"id: %b\n\n" % str(position).encode()))
        return records


class _Channel:
    def __init__(
        self,
        channel_id: str,
        *,
        redis: str | QueueRedisConfig | None = None,
        config: ChannelConfig | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        self.channel_id = check_channel(channel_id)
        if streaming is None:
            from asgi_stream.runtime import current_streaming, streaming_for

            streaming = current_streaming() if redis is None and config is None else streaming_for(redis, config)
        elif redis is not None or config is not None:
            raise ConfigurationError("give either streaming= or redis= and config=")
        self._streaming = streaming
        self._outgoing = Outgoing(channel_id, streaming.channel_settings)

    def _ending(self, ending: Ending, data: dict[str, Any]) -> StreamEvent:
        if ending not in ENDINGS:
            raise ConfigurationError(f"a run ends with one of {', '.join(ENDINGS)}, not {ending!r}")
        return StreamEvent({**data, "ts": events.now_ms()}, ending)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.channel_id!r})"


class SyncStreamChannel(_Channel):
    """A channel for sync code: threads, scripts, workers. Thread-safe.

    ``redis`` and ``config`` name a Redis of its own; by default it is the process's. What is published is stored and on
    its way when the verb returns. Raises `BackendError` when Redis could not be reached for 5 s, `RunEndedError` when
    the run is over, `InvalidEventError` for what no event can carry.
    """

    def __init__(
        self,
        channel_id: str,
        *,
        redis: str | QueueRedisConfig | None = None,
        config: ChannelConfig | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        super().__init__(channel_id, redis=redis, config=config, streaming=streaming)
        self._lock = threading.Lock()

    def publish(self, data: Any, event: str | None = None) -> str:
        """Publish a `StreamEvent`, or *data* under the name *event*; return its id. An ending's name ends the run."""
        return self.publish_many([data if isinstance(data, StreamEvent) else StreamEvent(data, event)])[0]

    def publish_many(self, items: Iterable[Any]) -> list[str]:
        """Publish several at once, in order and without others between them; return their ids."""
        made = [item if isinstance(item, StreamEvent) else StreamEvent(item) for item in items]
        return self._append([self._outgoing.frame(event) for event in made], ending_of(made[-1] if made else None))

    def history(self, *, after: str | Position | None = None, limit: int | None = None) -> list[Record]:
        """Return what is kept after an id, or all of it; at most *limit* events."""
        cursor = _Cursor(self.channel_id, after)
        records: list[Record] = []
        while limit is None or len(records) < limit:
            page = self._streaming.broker.run(cursor.next_read(None if limit is None else limit - len(records)))
            records += [record for record in cursor.feed(page) if record.event != "reset"]
            if not page.more:
                break
        return records

    def subscribe(self, *, after: str | Position | None = None) -> Iterator[Record]:
        """Yield what is kept after an id, or all of it, then what comes, to the run's end.

        A gap that cannot be filled is a `reset` record. Redis away for a while is waited for.
        """
        cursor = _Cursor(self.channel_id, after)
        broker = self._streaming.broker
        while not cursor.over:
            page = broker.run(cursor.next_read())
            yield from cursor.feed(page)
            if not page.records and not cursor.over:
                assert cursor.after is not None
                broker.wait(self.channel_id, cursor.after, self._streaming.channel_settings.subscribe_timeout)

    def close(self, ending: Ending = "complete", **data: Any) -> str:
        """End the run: nothing can be published after it. Return the ending's id."""
        if ending == "complete":
            data.setdefault("success", True)
        return self._append([self._outgoing.frame(self._ending(ending, data))], ending)[0]

    def info(self) -> ChannelInfo:
        """Return the state of the channel's log."""
        return self._streaming.broker.run(Read(self.channel_id, max_events=1, max_bytes=1)).info

    def _append(self, frames: list[bytes], ending: str | None) -> list[str]:
        if not frames:
            return []
        with self._lock:  # a producer's commands go one after the other, or a retry could not be told from a new one
            if self._outgoing.pid != os.getpid():
                self._outgoing.renew()
            try:
                appended = self._streaming.broker.run(self._outgoing.append(frames, ending=ending))
            except BaseException:
                self._outgoing.renew()
                raise
            self._outgoing.done(appended)
        return _ids(appended, ending, len(frames))


class AsyncStreamChannel(_Channel):
    """A channel for async code, with the verbs of `SyncStreamChannel`. For one event loop.

    What several tasks publish while a command is under way leaves together with the next one.
    """

    def __init__(
        self,
        channel_id: str,
        *,
        redis: str | QueueRedisConfig | None = None,
        config: ChannelConfig | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        super().__init__(channel_id, redis=redis, config=config, streaming=streaming)
        self._sender = AsyncSender(self._streaming, self._outgoing)

    async def publish(self, data: Any, event: str | None = None) -> str:
        """Publish a `StreamEvent`, or *data* under the name *event*; return its id. An ending's name ends the run."""
        return (await self.publish_many([data if isinstance(data, StreamEvent) else StreamEvent(data, event)]))[0]

    async def publish_many(self, items: Iterable[Any]) -> list[str]:
        """Publish several at once, in order and without others between them; return their ids."""
        made = [item if isinstance(item, StreamEvent) else StreamEvent(item) for item in items]
        frames = [self._outgoing.frame(event) for event in made]
        return await self._append(frames, ending_of(made[-1] if made else None))

    async def history(self, *, after: str | Position | None = None, limit: int | None = None) -> list[Record]:
        """Return what is kept after an id, or all of it; at most *limit* events."""
        cursor = _Cursor(self.channel_id, after)
        records: list[Record] = []
        while limit is None or len(records) < limit:
            read = cursor.next_read(None if limit is None else limit - len(records))
            page = await self._streaming.broker.run_async(read)
            records += [record for record in cursor.feed(page) if record.event != "reset"]
            if not page.more:
                break
        return records

    async def subscribe(self, *, after: str | Position | None = None) -> AsyncIterator[Record]:
        """Yield what is kept after an id, or all of it, then what comes, to the run's end.

        A gap that cannot be filled is a `reset` record. Redis away for a while is waited for.
        """
        cursor = _Cursor(self.channel_id, after)
        follower = _Follower()
        hub = self._streaming.hub()
        leg = hub.join(follower, self.channel_id, cursor.after)
        hub.at(follower, hub.loop.time() + 10.0)
        try:
            while not cursor.over:
                channel = leg.channel
                if channel.epoch is not None and (
                    cursor.after is None
                    or str(cursor.after.epoch) != channel.epoch
                    or cursor.after.offset != channel.top
                ):
                    page = await hub.read(self.channel_id, cursor.after)
                    for record in cursor.feed(page):
                        yield record
                    if page.records or page.reset or cursor.over:
                        continue
                elif channel.epoch is not None and channel.ended:
                    return
                channel.waiting.add(leg)
                await follower.woken.wait()
                follower.woken.clear()
        finally:
            follower.over = True
            hub.leave(leg)

    async def close(self, ending: Ending = "complete", **data: Any) -> str:
        """End the run: nothing can be published after it. Return the ending's id."""
        if ending == "complete":
            data.setdefault("success", True)
        return (await self._append([self._outgoing.frame(self._ending(ending, data))], ending))[0]

    async def info(self) -> ChannelInfo:
        """Return the state of the channel's log."""
        return (await self._streaming.broker.run_async(Read(self.channel_id, max_events=1, max_bytes=1))).info

    async def _append(self, frames: list[bytes], ending: str | None) -> list[str]:
        return _ids(await self._sender.send(frames, ending=ending), ending, len(frames)) if frames else []


class AsyncSender:
    """One producer's commands from one event loop, one at a time. What comes meanwhile leaves with the next."""

    def __init__(self, streaming: Streaming, outgoing: Outgoing) -> None:
        self._streaming = streaming
        self._outgoing = outgoing
        self._queue: deque[tuple[list[bytes], str | None, str, int, asyncio.Future[Appended]]] = deque()
        self._busy = False
        self._task: asyncio.Task[None] | None = None  # kept: a task that nothing refers to may be collected

    async def send(
        self, frames: list[bytes], *, ending: str | None = None, state: str = "running", attempt: int = 0
    ) -> Appended:
        """Append *frames*; return where they are when that is acknowledged."""
        if not self._busy:
            self._busy = True
            try:
                command = self._outgoing.append(frames, ending=ending, state=state, attempt=attempt)
                try:
                    appended = await self._streaming.broker.run_async(command)
                except BaseException:
                    self._outgoing.renew()
                    raise
                self._outgoing.done(appended)
                return appended
            finally:
                self._busy = bool(self._queue)
                if self._busy:
                    self._task = asyncio.get_running_loop().create_task(self._run())
        future: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        self._queue.append((frames, ending, state, attempt, future))
        return await future

    async def _run(self) -> None:
        try:
            while self._queue:
                batch = [self._queue.popleft()]
                # An ending is the last of its command; a command is of one state and attempt.
                while self._queue and batch[-1][1] is None and self._queue[0][2:4] == batch[-1][2:4]:
                    batch.append(self._queue.popleft())
                await self._send(batch)
        finally:
            self._busy = False

    async def _send(self, batch: list[tuple[list[bytes], str | None, str, int, asyncio.Future[Appended]]]) -> None:
        frames = [frame for part, *_ in batch for frame in part]
        _, ending, state, attempt, _ = batch[-1]
        command = self._outgoing.append(frames, ending=ending, state=state, attempt=attempt)
        try:
            appended = await self._streaming.broker.run_async(command)
        except BaseException as exc:
            self._outgoing.renew()
            for *_, future in batch:
                if not future.done():
                    future.set_exception(exc) if isinstance(exc, Exception) else future.cancel()
            if not isinstance(exc, Exception):
                raise
            return
        self._outgoing.done(appended)
        first = appended.first
        for part, *_, future in batch:
            last = first + len(part) - 1
            if not future.done():
                future.set_result(Appended(appended.epoch, first, last, appended.repeated, appended.cancelling))
            first = last + 1


class _Follower:
    """A viewer that is woken and reads for itself."""

    def __init__(self) -> None:
        self.woken = asyncio.Event()
        self.over = False

    def push(self, body: bytes) -> bool:
        return False

    def wake(self) -> None:
        self.woken.set()

    def idle(self) -> None:
        pass

    def revoke(self, channel: str | None, user: str | None) -> None:
        pass

    def tick(self, now: float) -> float:
        return float("inf") if self.over else now + 10.0


def _ids(appended: Appended, ending: str | None, count: int) -> list[str]:
    positions = [Position(appended.epoch, appended.first + n) for n in range(count)]
    if ending is not None:
        positions[-1] = Position(appended.epoch, appended.last, ending=True)
    return [str(position) for position in positions]
