"""What publishers hand over for the record: a bounded queue in memory, one thread that writes it, a spool on disk.

Handing over costs a publisher an append to a deque. The thread makes documents of it, sends them in batches, and while
OpenSearch is away puts them into the spool. Beyond the bounds the oldest is dropped: counted, and said in the log.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple
from weakref import WeakSet

from asgi_stream.config import StorageConfig
from asgi_stream.storage.bulk import CHUNK_BYTES, CHUNK_DOCUMENTS, BulkWriter, Written
from asgi_stream.storage.document import YIELD_EVERY, Document, documents
from asgi_stream.storage.spool import Spool, refuse, spool_root

logger = logging.getLogger("asgi_stream")

RETRY_SECONDS = (0.5, 15.0)
"""The first pause after OpenSearch did not take something, and the longest."""


class Entry(NamedTuple):
    """One append to a channel, as it is handed over."""

    channel: str
    about: bytes
    epoch: str
    first: int
    frames: tuple[bytes, ...]
    at: int

    @property
    def weight(self) -> int:
        return 256 + sum(map(len, self.frames))


@dataclass(frozen=True, slots=True)
class SinkStats:
    """What became of events so far in this process. All but ``waiting`` and ``spooled`` only grow."""

    waiting: int
    """Appends in memory."""
    spooled: int
    """Events in the spool."""
    spool_bytes: int
    written: int
    repeated: int
    """Of those: OpenSearch had them already."""
    refused: int
    """Never taken: they are in ``refused.jsonl`` of the spool's folder."""
    dropped: int
    """Lost, since a bound was reached."""
    reachable: bool
    error: str
    """What was wrong the last time."""


class _AbandonedError(Exception):
    """Nobody waits for this thread any more: what it had is in the spool."""


class Sink:
    """Safe to use from every thread."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        self.root = spool_root(config.spool_dir)
        self._changed = threading.Condition()
        self._lock = threading.Lock()  # the queue's
        self._fresh()
        atexit.unregister(_close_all)
        atexit.register(_close_all)  # before the threads that it waits for are taken down
        _sinks.add(self)

    def _fresh(self) -> None:
        self._pid = os.getpid()
        self._queue: deque[Entry] = deque()
        self._bytes = 0
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._writer = BulkWriter(self.config)
        self._spool: Spool | None = None
        self._spool_size = self._spooled = 0
        self._stuck: list[Document] = []  # the spool did not take them
        self._deadline = float("inf")
        self._next_try = 0.0
        self._pause = RETRY_SECONDS[0]
        self._busy = False
        self._working = threading.Lock()  # the thread's, but for the time that it waits for OpenSearch
        self._abandoned = False
        self._sent: list[Document] = []  # what it waits for, unless that is in the spool
        self.written = self.repeated = self.refused = self.dropped = 0
        self._told_dropped = 0
        self.error = ""

    def offer(self, entry: Entry) -> None:
        """Hand over what was appended. Never blocks, never raises."""
        if self._pid != os.getpid():
            self._fresh()  # the thread stayed in the parent [O3]
        with self._lock:
            self._queue.append(entry)
            self._bytes += entry.weight
            while self._bytes > self.config.queue_bytes:
                oldest = self._queue.popleft()
                self._bytes -= oldest.weight
                self.dropped += len(oldest.frames)
        if not self._wake.is_set():
            self._wake.set()
            if self._thread is None:
                self._start()

    def stats(self) -> SinkStats:
        return SinkStats(
            waiting=len(self._queue),
            spooled=self._spooled + len(self._stuck),
            spool_bytes=self._spool_size,
            written=self.written,
            repeated=self.repeated,
            refused=self.refused,
            dropped=self.dropped,
            reachable=not self.error,
            error=self.error,
        )

    def flush(self, seconds: float) -> bool:
        """Wait until OpenSearch has everything that was handed over; False if that takes longer."""
        if self._pid != os.getpid():
            return True
        self._wake.set()
        with self._changed:
            return self._changed.wait_for(self._is_idle, seconds)

    def close(self, seconds: float | None = None) -> None:
        """Write what waits, for at most so many seconds; the rest goes to the spool, for the next process."""
        thread = self._thread
        if thread is None or self._pid != os.getpid():
            return
        self._deadline = monotonic() + (self.config.shutdown_seconds if seconds is None else seconds)
        self._closing.set()
        self._wake.set()
        if thread is threading.current_thread():
            return
        thread.join(self._deadline - monotonic() + 0.2)
        if thread.is_alive():
            # It waits for an answer. Whether that request is done is not known: it is sent again by the next process.
            with self._working:
                self._abandoned = True
                if self._thread is not None:
                    self._put_aside(self._sent)
                    self._end()

    def _is_idle(self) -> bool:
        return not (self._queue or self._busy or self._stuck or self._spooled)

    def _start(self) -> None:
        with self._changed:
            if self._thread is None:
                self._closing.clear()
                self._deadline = float("inf")
                self._thread = threading.Thread(target=self._run, name="asgi_stream storage", daemon=True)
                self._thread.start()

    # In the thread

    def _run(self) -> None:
        with self._working:
            self._open_spool()
        while True:
            waits = self._stuck or self._spooled
            self._wake.wait(max(self._next_try - monotonic(), 0.0) if waits else None)
            if not self._closing.wait(self.config.flush_seconds if self._wake.is_set() else 0.0):
                self._wake.clear()
            self._busy = True
            try:
                with self._working:
                    if self._abandoned:
                        return
                    self._cycle()
            except _AbandonedError:
                return
            except Exception:
                logger.exception("storage: it is tried again")
                self._next_try = monotonic() + RETRY_SECONDS[1]
            finally:
                self._busy = False
                with self._changed:
                    self._changed.notify_all()
            self._tell_dropped()
            if self._closing.is_set() and (not self._queue or monotonic() > self._deadline):
                break
        with self._working:
            if not self._abandoned:
                self._end()

    def _cycle(self) -> None:
        if self._stuck:
            stuck, self._stuck = self._stuck, []
            self._settle(stuck, again=True)
        while self._queue and not self._stuck:
            taken = list(self._take())
            # What is in the spool came before.
            if self._spooled or monotonic() < self._next_try:
                self._put_aside(taken)
            else:
                self._settle(taken)
        while self._spooled and self._spool is not None and monotonic() >= self._next_try and not self._stuck:
            if monotonic() > self._deadline:
                break
            found, position = self._spool.peek(CHUNK_DOCUMENTS, CHUNK_BYTES)
            if not found:
                self._measure_spool()
                break
            result = self._write(found, again=True, spooled=True)
            if len(result.later) < len(found):
                self._spool.discard(len(found), position)
                if result.later:
                    self._put_aside(result.later)
            self._measure_spool()

    def _take(self) -> Iterator[Document]:
        weight = count = 0
        while weight < CHUNK_BYTES and count < CHUNK_DOCUMENTS:
            with self._lock:
                if not self._queue:
                    return
                entry = self._queue.popleft()
                self._bytes -= entry.weight
            try:
                for document in documents(self.config, *entry):
                    weight += document.weight
                    count += 1
                    if count % YIELD_EVERY == 0:
                        time.sleep(0)
                    yield document
            except Exception:
                self.dropped += len(entry.frames)
                logger.exception("storage: events of channel %s have no form that could be stored", entry.channel)

    def _settle(self, found: list[Document], *, again: bool = False) -> None:
        if self._closing.is_set() and monotonic() > self._deadline:
            self._put_aside(found)
            return
        result = self._write(found, again=again)
        if result.later:
            self._put_aside(result.later)

    def _write(self, found: list[Document], *, again: bool, spooled: bool = False) -> Written:
        self._sent = [] if spooled else found
        self._working.release()
        try:
            result = self._writer.write(found, again=again)
        finally:
            self._working.acquire()
        self._sent = []
        if self._abandoned:
            raise _AbandonedError
        self.written += result.done
        self.repeated += result.repeated
        if result.refused:
            self.refused += len(result.refused)
            self._keep_refused(result)
        if result.reason:
            if not self.error:
                logger.warning("storage: events wait in %s: %s", self.root, result.reason)
            self.error = result.reason
            self._next_try = monotonic() + self._pause * random.uniform(0.5, 1.0)
            self._pause = min(self._pause * 2, RETRY_SECONDS[1])
        else:
            if self.error:
                logger.warning("storage: OpenSearch takes events again")
            self.error, self._next_try, self._pause = "", 0.0, RETRY_SECONDS[0]
        return result

    def _keep_refused(self, result: Written) -> None:
        why = result.refused[0][1]
        try:
            path = refuse(self.root, result.refused)
            logger.error("storage: OpenSearch refused %d events, kept in %s: %s", len(result.refused), path, why)
        except OSError as exc:
            self.dropped += len(result.refused)
            logger.error(
                "storage: %d events are lost: OpenSearch refused them (%s), and %s", len(result.refused), why, exc
            )

    def _put_aside(self, found: list[Document]) -> None:
        """Into the spool; where that cannot be, they are held until they can be sent, and the queue's bound counts."""
        try:
            if self._spool is None:
                raise OSError("there is no spool")
            self._spool.append(found)
        except OSError as exc:
            if not self._stuck:
                logger.error("storage: the spool in %s takes nothing: %s", self.root, exc)
            self._stuck += found
            if self._next_try < monotonic():
                self._next_try = monotonic() + RETRY_SECONDS[0]
        self._measure_spool()

    def _measure_spool(self) -> None:
        spool = self._spool
        if spool is not None:
            self._spool_size, self._spooled = spool.size, spool.count
            self.dropped += spool.dropped
            spool.dropped = 0

    def _open_spool(self) -> None:
        try:
            self._spool = Spool(self.root, self.config.spool_bytes)
        except OSError as exc:
            logger.error("storage: there can be no spool in %s: %s", self.root, exc)
            return
        if self._spool.adopted:
            logger.warning("storage: %d events of an earlier process wait in %s", self._spool.adopted, self.root)
        self._measure_spool()

    def _tell_dropped(self) -> None:
        if self.dropped > self._told_dropped:
            logger.error(
                "storage: %d events were dropped: the bounds of queue and spool", self.dropped - self._told_dropped
            )
            self._told_dropped = self.dropped

    def _end(self) -> None:
        stuck, self._stuck = self._stuck, []
        if stuck:
            self._put_aside(stuck)
        while self._queue:
            self._put_aside(list(self._take()))
        left = self._spooled + len(self._stuck)
        if left:
            logger.warning("storage: %d events were not written; %d wait in %s", left, self._spooled, self.root)
        if self._spool is not None:
            try:
                self._spool.close()
            except OSError as exc:
                logger.error("storage: %s", exc)
            self._spool = None
        if not self._abandoned:
            self._writer.close()
        with self._changed:
            self._thread = None
            self._changed.notify_all()


_sinks: WeakSet[Sink] = WeakSet()


def _close_all() -> None:
    for sink in list(_sinks):
        sink.close()
