"""Log records on their way to the record of events: a bounded queue, and a thread that puts them into a Redis stream.

Fire and forget: who logs pays an append to a deque. While Redis is away records wait, and beyond the bound the oldest
are dropped and counted; a record can be lost, an application cannot be slowed.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from time import monotonic
from typing import Any
from weakref import WeakSet

from redis import exceptions  # here, not at first use: a process that is about to end can import nothing more

from asgi_stream.channels.redis_commands import ARCHIVE_ENTRIES, logs_key
from asgi_stream.config import ChannelConfig, QueueRedisConfig
from asgi_stream.redis.locate import Location

logger = logging.getLogger("asgi_stream")

MAX_RECORDS = 10_000
BATCH = 500
GATHER = 0.05
RETRY = 1.0
EXIT_PATIENCE = 2.0


class Shipper:
    """Puts records into the stream that `asgi-stream archiver` reads. Safe to use from every thread."""

    def __init__(self, redis: QueueRedisConfig, channels: ChannelConfig) -> None:
        self._location = Location(redis)
        self._stream = logs_key(channels)
        self._changed = threading.Condition()
        self._fresh()
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        _shippers.add(self)

    def _fresh(self) -> None:
        self._pid = os.getpid()
        self._queue: deque[bytes] = deque()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._sending = 0
        self._told = False
        self.dropped = 0

    def send(self, record: bytes) -> None:
        """Hand over one record, as JSON. Never blocks, never raises."""
        if self._pid != os.getpid():
            self._fresh()  # the thread stayed in the parent [O3]
        self._queue.append(record)
        if len(self._queue) > MAX_RECORDS:
            try:
                self._queue.popleft()
                self.dropped += 1
            except IndexError:
                pass
        if not self._wake.is_set():
            self._wake.set()
            if self._thread is None:
                self._start()

    def flush(self, seconds: float) -> bool:
        """Wait until Redis has all that was handed over; False if that takes longer."""
        self._wake.set()
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._sending, seconds)

    def close(self, seconds: float = EXIT_PATIENCE) -> None:
        """Send what waits, for at most so many seconds."""
        thread = self._thread
        if thread is None or self._pid != os.getpid():
            return
        self.flush(seconds)
        self._closing = True
        self._wake.set()
        if thread is not threading.current_thread():
            thread.join(seconds)

    def _start(self) -> None:
        with self._changed:
            if self._thread is None:
                self._closing = False
                self._thread = threading.Thread(target=self._run, name="asgi_stream logs", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        client = self._location.sync_client()
        try:
            while True:
                self._wake.wait()
                if self._closing:
                    return
                self._changed_wait(GATHER)
                self._wake.clear()
                while self._queue and not self._closing:
                    if not self._send(client):
                        self._changed_wait(RETRY)
                with self._changed:
                    self._changed.notify_all()
        finally:
            client.close()
            with self._changed:
                self._thread = None

    def _changed_wait(self, seconds: float) -> None:
        """Pause; a `close` ends it."""
        ends = monotonic() + seconds
        with self._changed:
            self._changed.wait_for(lambda: self._closing, max(ends - monotonic(), 0.0))

    def _send(self, client: Any) -> bool:
        taken: list[bytes] = []
        while self._queue and len(taken) < BATCH:
            taken.append(self._queue.popleft())
        self._sending = len(taken)
        try:
            with client.pipeline(transaction=False) as pipe:
                for record in taken:
                    pipe.xadd(self._stream, {"record": record}, maxlen=ARCHIVE_ENTRIES, approximate=True)
                pipe.execute()
        except (exceptions.RedisError, OSError) as exc:
            if not self._told:
                logger.warning("log records wait for Redis at %s: %s", self._location, exc)
                self._told = True
            room = MAX_RECORDS - len(self._queue)
            self.dropped += max(len(taken) - room, 0)
            self._queue.extendleft(reversed(taken[max(len(taken) - room, 0) :]))
            return False
        finally:
            self._sending = 0
        if self._told:
            logger.warning("log records go to Redis again; %d were dropped so far", self.dropped)
            self._told = False
        return True


_shippers: WeakSet[Shipper] = WeakSet()


def _close_all() -> None:
    for shipper in list(_shippers):
        shipper.close()
