"""Takes what sync code publishes to the broker, in a thread of its own, so that no verb waits for Redis.

What comes within about a millisecond leaves as one command, in order. The buffer is bounded: when it is full a verb
waits for room. What was not acknowledged when the process dies is lost.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections import deque
from time import monotonic

from asgi_stream.channels.broker import Broker
from asgi_stream.channels.client import Outgoing
from asgi_stream.channels.commands import Touch
from asgi_stream.errors import BackendError, StreamError

logger = logging.getLogger("asgi_stream")

GATHER = 0.001
"""Seconds for which the first of several waits for the others."""
MAX_WAITING_BYTES = 8 * 1024 * 1024
"""Bytes of one outbox that may wait before its verbs do."""
BATCH_BYTES = 256 * 1024
EXIT_PATIENCE = 2.0
"""Seconds that a process which ends in order waits for what is still on its way."""


class Outbox:
    """What one producer has said and the broker has not acknowledged yet."""

    def __init__(self, courier: Courier, outgoing: Outgoing) -> None:
        self.outgoing = outgoing
        self.attempt = 0
        self.cancelling: str | None = None
        self.failure: StreamError | None = None  # why nothing more can be said: the run is over, or another's
        self.alive_every: float | None = None  # seconds between signs of life
        self._courier = courier
        self._waiting: deque[tuple[bytes, str]] = deque()
        self._bytes = 0
        self._sending = False
        self._next_sign = 0.0
        self._since = 0.0  # when the oldest that waits came

    def put(self, frame: bytes, state: str = "running") -> None:
        """Send *frame* soon. Raises what an earlier one came back with."""
        courier = self._courier
        with courier.changed:
            if self.failure is not None:
                raise self.failure
            if self._bytes > MAX_WAITING_BYTES:
                patience = courier.patience
                if not courier.changed.wait_for(lambda: self._bytes <= MAX_WAITING_BYTES, patience):
                    logger.error(
                        "channel %s: %d bytes wait for Redis and an event was dropped",
                        self.outgoing.channel,
                        self._bytes,
                    )
                    return
            if not self._waiting:
                self._since = monotonic()
            self._waiting.append((frame, state))
            self._bytes += len(frame)
            courier.wake(self)

    def flush(self, seconds: float) -> bool:
        """Wait until all was acknowledged or given up; False if that takes longer. Raises like `put`."""
        with self._courier.changed:
            done = self._courier.changed.wait_for(self._is_empty, seconds)
            if self.failure is not None:
                raise self.failure
        return done

    def live(self, every: float) -> None:
        """Show signs of life from now on."""
        with self._courier.changed:
            if self.alive_every is None:
                self.alive_every = every
                self._courier.wake(self)

    def stop(self) -> None:
        """Show no more signs of life."""
        with self._courier.changed:
            self.alive_every = None

    def _is_empty(self) -> bool:
        return not self._waiting and not self._sending


class Courier:
    """One thread for all outboxes of a broker."""

    def __init__(self, broker: Broker, patience: float) -> None:
        self.patience = patience
        self._broker = broker
        self._start_anew()
        if not _couriers:
            atexit.unregister(_close_all)
            atexit.register(_close_all)
        _couriers.add(self)

    def _start_anew(self) -> None:
        self.changed = threading.Condition()
        self._pid = os.getpid()
        self._ready: deque[Outbox] = deque()
        self._queued: set[int] = set()
        self._living: weakref.WeakSet[Outbox] = weakref.WeakSet()
        self._outboxes: weakref.WeakSet[Outbox] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._signs_at = 0.0

    def outbox(self, outgoing: Outgoing) -> Outbox:
        """Make the outbox of one producer."""
        if self._pid != os.getpid():
            self._start_anew()  # the thread stayed in the parent [O3]
        outbox = Outbox(self, outgoing)
        with self.changed:
            self._outboxes.add(outbox)
        return outbox

    def flush_channel(self, channel: str, seconds: float) -> bool:
        """Wait until what everybody in this process said on *channel* was acknowledged; False if that takes longer."""
        with self.changed:
            return self.changed.wait_for(lambda: all(outbox._is_empty() for outbox in self._of(channel)), seconds)

    def refuse(self, channel: str, failure: StreamError) -> None:
        """Let nobody in this process say more on *channel*: its verbs raise *failure* from now on."""
        with self.changed:
            for outbox in self._of(channel):
                outbox.failure = failure
                outbox.alive_every = None
                outbox._waiting.clear()
                outbox._bytes = 0
            self.changed.notify_all()

    def ask_to_stop(self, channel: str, reason: str) -> None:
        """Tell everybody in this process who works for *channel* that its run is to stop."""
        with self.changed:
            for outbox in self._of(channel):
                outbox.cancelling = outbox.cancelling or reason

    def _of(self, channel: str) -> list[Outbox]:
        return [outbox for outbox in self._outboxes if outbox.outgoing.channel == channel]

    def wake(self, outbox: Outbox) -> None:
        """Look at *outbox*. With the lock held."""
        if outbox.alive_every is not None:
            self._living.add(outbox)
        if id(outbox) not in self._queued:
            self._queued.add(id(outbox))
            self._ready.append(outbox)
            self.changed.notify_all()
        if self._thread is None:
            self._closing = False
            self._thread = threading.Thread(target=self._run, name="asgi_stream courier", daemon=True)
            self._thread.start()

    def close(self, patience: float = EXIT_PATIENCE) -> None:
        """Send what waits, for at most so many seconds, and end the thread."""
        if self._pid != os.getpid():
            return
        with self.changed:
            thread = self._thread
            if thread is None:
                return
            self.changed.wait_for(lambda: not self._ready, patience)
            if self._ready:
                logger.error("%d channels have events that Redis did not take before the end", len(self._ready))
            self._closing = True
            self.changed.notify_all()
        if thread is not threading.current_thread():
            thread.join(patience)

    def _run(self) -> None:
        while True:
            with self.changed:
                self._queue_signs()
                while not self._ready and not self._closing:
                    self.changed.wait(self._until_next_sign())
                    self._queue_signs()
                if self._closing:
                    self._thread = None
                    return
                outbox = self._ready[0]
                gathering = outbox._since + GATHER - monotonic()
                if gathering > 0 and outbox._bytes < BATCH_BYTES:
                    self.changed.wait(gathering)
                    continue
                frames, state = self._take(outbox)
            try:
                if frames:
                    self._send(outbox, frames, state)
                if outbox.alive_every is not None and monotonic() >= outbox._next_sign:
                    self._show_life(outbox)
            except StreamError as exc:
                with self.changed:
                    outbox.failure = exc
                    outbox.alive_every = None
                    outbox._waiting.clear()
                    outbox._bytes = 0
            except Exception:
                logger.exception("channel %s: %d events were lost", outbox.outgoing.channel, len(frames))
            finally:
                with self.changed:
                    outbox._sending = False
                    self._ready.popleft()
                    if outbox._waiting:
                        self._ready.append(outbox)
                    else:
                        self._queued.discard(id(outbox))
                    self.changed.notify_all()
            del outbox  # a context that is dropped ends its signs of life

    def _take(self, outbox: Outbox) -> tuple[list[bytes], str]:
        frames: list[bytes] = []
        size = 0
        state = "running"
        while outbox._waiting and size <= BATCH_BYTES:
            frame, state = outbox._waiting.popleft()
            frames.append(frame)
            size += len(frame)
        outbox._bytes -= size
        outbox._sending = True
        return frames, state

    def _send(self, outbox: Outbox, frames: list[bytes], state: str) -> None:
        outgoing = outbox.outgoing
        try:
            appended = self._broker.run(outgoing.append(frames, state=state, attempt=outbox.attempt))
        except BackendError as exc:
            outgoing.renew()  # whether they arrived is unknown; they are not sent again
            logger.error("channel %s: Redis did not take %d events: %s", outgoing.channel, len(frames), exc)
            return
        outgoing.done(appended)
        outbox.cancelling = outbox.cancelling or appended.cancelling

    def _show_life(self, outbox: Outbox) -> None:
        every = outbox.alive_every
        if every is None:
            return
        outbox._next_sign = monotonic() + every
        try:
            status = self._broker.run(Touch(outbox.outgoing.channel, every * 4, outbox.attempt))
        except BackendError as exc:
            logger.warning("channel %s: no sign of life could be given: %s", outbox.outgoing.channel, exc)
            return
        outbox.cancelling = outbox.cancelling or status.cancelling

    def _until_next_sign(self) -> float | None:
        due = [outbox._next_sign for outbox in self._living if outbox.alive_every is not None]
        return max(min(due) - monotonic(), 0.05) if due else None

    def _queue_signs(self) -> None:
        now = monotonic()
        if now < self._signs_at:
            return
        self._signs_at = now + 0.05
        for outbox in list(self._living):
            if outbox.alive_every is not None and now >= outbox._next_sign and id(outbox) not in self._queued:
                self._queued.add(id(outbox))
                self._ready.append(outbox)


_couriers: weakref.WeakSet[Courier] = weakref.WeakSet()


def _close_all() -> None:
    for courier in list(_couriers):
        courier.close()
