"""The broker of one process: the same rules as the scripts of `redis`, on Python's own data."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from asgi_stream.channels.broker import Broker, Listener
from asgi_stream.channels.commands import (
    Append,
    Appended,
    BeginAttempt,
    Cancel,
    Command,
    Page,
    Read,
    Revoke,
    RevokedAt,
    Status,
    Touch,
)
from asgi_stream.channels.model import ChannelInfo, Position, Record, base36, new_epoch
from asgi_stream.config import ChannelConfig
from asgi_stream.errors import AttemptSupersededError, RunEndedError

logger = logging.getLogger("asgi_stream")

T = TypeVar("T")

_SWEEP_EVERY = 1000  # commands between two looks for logs that have expired


class _Log:
    """One channel's log and state."""

    def __init__(self, now: float) -> None:
        self.epoch = new_epoch()
        self.records: deque[Record] = deque()
        self.top = 0
        self.bytes = 0
        self.state = "waiting"
        self.ending: str | None = None
        self.attempt = 0
        self.cancelling: str | None = None
        self.seen = now
        self.alive_until: float | None = None
        self.producers: dict[str, tuple[int, int, int]] = {}
        self.expires = 0.0
        self.revoked_at = 0.0

    @property
    def first(self) -> int:
        return self.top - len(self.records) + 1

    def info(self, now: float) -> ChannelInfo:
        lost = self.ending is None and self.alive_until is not None and self.alive_until < now
        return ChannelInfo(
            self.epoch,
            self.top,
            self.first,
            self.bytes,
            self.state,
            self.attempt,
            now - self.seen,
            self.cancelling is not None,
            lost,
        )

    def status(self) -> Status:
        return Status(self.state, self.attempt, self.cancelling, self.epoch)


class MemoryBroker:
    """Channels in the memory of this process, for any number of its threads and event loops."""

    def __init__(self, config: ChannelConfig | None = None, *, clock: Callable[[], float] = monotonic) -> None:
        self.config = config or ChannelConfig()
        self._clock = clock
        self._lock = threading.Lock()
        self._appended = threading.Condition(self._lock)
        self._logs: dict[str, _Log] = {}
        self._subscribers: dict[str, set[MemorySubscriber]] = {}
        self._all: set[MemorySubscriber] = set()
        self._commands = itertools.count(1).__next__

    def run(self, command: Command[T]) -> T:
        with self._lock:
            now = self._clock()
            if self._commands() % _SWEEP_EVERY == 0:
                self._sweep(now)
            done: Any = self._do(command, now)
        return done  # type: ignore[no-any-return]

    async def run_async(self, command: Command[T]) -> T:
        return self.run(command)

    def wait(self, channel: str, after: Position, seconds: float) -> None:
        def something() -> bool:
            log = self._logs.get(channel)
            return log is None or log.epoch != after.epoch or log.top > after.offset

        with self._appended:
            self._appended.wait_for(something, seconds)

    async def announce(self, message: bytes) -> None:
        with self._lock:
            for subscriber in self._all:
                subscriber._push("", message)

    def subscriber(self, listener: Listener) -> MemorySubscriber:
        subscriber = MemorySubscriber(self, listener)
        with self._lock:
            self._all.add(subscriber)
        return subscriber

    def close(self) -> None:
        pass

    async def aclose(self) -> None:
        pass

    def _do(self, command: Any, now: float) -> Any:
        log = self._open(command, now)
        match command:
            case Append():
                return self._append(log, command, now)
            case Read():
                return self._read(log, command, now)
            case Touch():
                if 0 < command.attempt < log.attempt:
                    raise AttemptSupersededError(command.channel, command.attempt, log.attempt)
                if log.ending is None:
                    log.seen, log.alive_until = now, now + command.seconds
            case BeginAttempt():
                if log.ending is None:
                    log.attempt += 1
                    log.seen = now
            case Cancel():
                if log.ending is None and log.cancelling is None:
                    log.cancelling = command.reason
            case Revoke():
                log.revoked_at = time.time()
            case RevokedAt():
                return log.revoked_at
        self._keep(log, now)
        return log.status()

    def _open(self, command: Any, now: float) -> _Log:
        log = self._logs.get(command.channel)
        if log is not None and log.expires <= now:
            log = None
        known: Position | None = getattr(command, "known", None)
        lost = log is not None and known is not None and known.epoch == log.epoch and log.top < known.offset
        if log is None or lost:
            old, log = log, _Log(now)
            if old is not None:
                log.attempt, log.cancelling, log.revoked_at = old.attempt, old.cancelling, old.revoked_at
            self._logs[command.channel] = log
            self._keep(log, now)
        return log

    def _keep(self, log: _Log, now: float) -> None:
        log.expires = now + self.config.history_seconds

    def _append(self, log: _Log, command: Append, now: float) -> Appended:
        if command.producer and command.producer in log.producers:
            sequence, first, last = log.producers[command.producer]
            if command.sequence <= sequence:
                return Appended(log.epoch, first, last, True, log.cancelling)
        if log.ending is not None:
            raise RunEndedError(command.channel, log.ending)
        if 0 < command.attempt < log.attempt:
            raise AttemptSupersededError(command.channel, command.attempt, log.attempt)
        if command.only_if_lost and not log.info(now).lost:
            return Appended("", 0, 0)
        first = log.top + 1
        for n, block in enumerate(command.frames, 1):
            log.top += 1
            ending = command.ending is not None and n == len(command.frames)
            frame = b"%bid: %b.%b%b\n\n" % (
                block,
                log.epoch.encode(),
                base36(log.top).encode(),
                b".e" if ending else b"",
            )
            log.records.append(Record(Position(log.epoch, log.top, ending), frame))
            log.bytes += len(frame)
            for subscriber in self._subscribers.get(command.channel, ()):
                subscriber._push(command.channel, frame)
        while len(log.records) > 1 and (len(log.records) > self.config.max_events or log.bytes > self.config.max_bytes):
            log.bytes -= len(log.records.popleft().frame)
        log.seen = now
        if command.ending is not None:
            log.state = log.ending = command.ending
        elif command.state:
            log.state = command.state
        if command.producer:
            log.producers[command.producer] = (command.sequence, first, log.top)
        self._keep(log, now)
        self._appended.notify_all()
        return Appended(log.epoch, first, log.top, False, log.cancelling)

    def _read(self, log: _Log, command: Read, now: float) -> Page:
        after, start = command.after, log.first - 1
        reset, missed = None, None
        if after is not None:
            if after.epoch != log.epoch or after.offset > log.top:
                reset = "epoch"
            elif after.offset < start:
                reset, missed = "trimmed", start - after.offset
            else:
                start = after.offset
        records: list[Record] = []
        weight = 0
        for record in itertools.islice(log.records, start - log.first + 1, None):
            if len(records) == command.max_events or (records and weight + len(record.frame) > command.max_bytes):
                break
            records.append(record)
            weight += len(record.frame)
        return Page(log.info(now), start, tuple(records), start + len(records) < log.top, reset, missed)

    def _sweep(self, now: float) -> None:
        for channel in [channel for channel, log in self._logs.items() if log.expires <= now]:
            del self._logs[channel]


class MemorySubscriber:
    """Hears what is appended by any thread, in the event loop that it was made in."""

    def __init__(self, broker: MemoryBroker, listener: Listener) -> None:
        self._broker = broker
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._frames: deque[tuple[str, bytes]] = deque()
        self._arrived = asyncio.Event()
        self._told = False
        self._task = self._loop.create_task(self._run())

    def subscribe(self, channel: str) -> None:
        with self._broker._lock:
            self._broker._subscribers.setdefault(channel, set()).add(self)
        self._loop.call_soon(self._listener.on_subscribed, channel)

    def unsubscribe(self, channel: str) -> None:
        with self._broker._lock:
            subscribers = self._broker._subscribers.get(channel, set())
            subscribers.discard(self)
            if not subscribers:
                self._broker._subscribers.pop(channel, None)

    async def aclose(self) -> None:
        with self._broker._lock:
            self._broker._all.discard(self)
            for channel, subscribers in list(self._broker._subscribers.items()):
                subscribers.discard(self)
                if not subscribers:
                    del self._broker._subscribers[channel]
        self._task.cancel()
        await asyncio.wait([self._task])

    def _push(self, channel: str, frame: bytes) -> None:
        """Called by any thread, with the broker's lock held, so in order."""
        self._frames.append((channel, frame))
        if not self._told:
            self._told = True
            try:
                self._loop.call_soon_threadsafe(self._arrived.set)
            except RuntimeError:
                self._frames.clear()  # that loop is closed

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            with self._broker._lock:
                frames = list(self._frames)
                self._frames.clear()
                self._told = False
            try:
                for announcement in [frame for name, frame in frames if not name]:
                    self._listener.on_announcement(announcement)
                frames = [(name, frame) for name, frame in frames if name]
                if frames:
                    await self._listener.on_frames(frames)
            except Exception:
                logger.exception("a listener failed; it may have missed %d events", len(frames))


if TYPE_CHECKING:
    _conforms: type[Broker] = MemoryBroker
