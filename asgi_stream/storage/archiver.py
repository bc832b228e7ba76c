"""``asgi-stream archiver``: writes the record in a process of its own.

With ``writer="archiver"`` every append to a channel leaves an entry in a Redis stream, in the same step; log records of
`EventLogHandler` come by another one. Archivers read both as one consumer group: any number of them share the work,
what one has taken and not written when it dies is taken over, and nothing is acknowledged before OpenSearch has it. The
streams themselves wait while OpenSearch is away.
"""

from __future__ import annotations

import logging
import os
import platform
import random
import threading
from time import monotonic
from typing import Any

import msgspec
from redis import exceptions

from asgi_stream.channels.redis_commands import archive_key, channel_of, logs_key
from asgi_stream.config import ChannelConfig, QueueRedisConfig, StorageConfig
from asgi_stream.errors import BackendError, ConfigurationError
from asgi_stream.redis.callers import may_pass
from asgi_stream.redis.locate import Location
from asgi_stream.storage.bulk import BulkWriter
from asgi_stream.storage.document import Document, documents, log_document
from asgi_stream.storage.sink import RETRY_SECONDS
from asgi_stream.storage.spool import refuse, spool_root

logger = logging.getLogger("asgi_stream")

GROUP = "archiver"
BATCH = 200
WAIT_SECONDS = 1.0
TAKE_OVER_SECONDS = 15.0
"""What an archiver took and did not acknowledge for so long is taken over by another one."""

Entries = list[tuple[bytes, dict[bytes, bytes]]]

_frames = msgspec.msgpack.Decoder(list[str])


class Archiver:
    """Follows the channels of one Redis. `run()` blocks until `stop()`, which any thread or signal handler may call."""

    def __init__(
        self,
        redis: QueueRedisConfig | str,
        storage: StorageConfig | None = None,
        channels: ChannelConfig | None = None,
    ) -> None:
        self.location = Location(QueueRedisConfig(redis) if isinstance(redis, str) else redis)
        if self.location.kind == "cluster":
            raise ConfigurationError("the archiver needs one Redis, no cluster: let publishers write the record")
        self.config = storage or StorageConfig.from_env()
        self.channels = channels or ChannelConfig.from_env()
        self.written = self.repeated = self.refused = 0
        self._root = spool_root(self.config.spool_dir)
        self._streams = (archive_key(self.channels), logs_key(self.channels))
        self._name = f"{platform.node()}:{os.getpid()}:{os.urandom(3).hex()}"
        self._writer = BulkWriter(self.config)
        self._stopping = threading.Event()
        self._claim_at = 0.0
        self._told = ""

    def stop(self) -> None:
        """End after what is being written."""
        self._stopping.set()

    def run(self) -> None:
        """Follow until `stop()`. Redis and OpenSearch may be away for as long as they like."""
        client = self.location.sync_client()
        pause = RETRY_SECONDS[0]
        grouped = False
        try:
            while not self._stopping.is_set():
                try:
                    if not grouped:
                        self._make_groups(client)
                        grouped = True
                    for stream, entries in self._left_behind(client):
                        self._archive(client, stream, entries, again=True)
                    for stream, entries in self._next(client):
                        self._archive(client, stream, entries, again=False)
                    pause = RETRY_SECONDS[0]
                except (exceptions.RedisError, OSError) as exc:
                    if isinstance(exc, exceptions.ResponseError) and str(exc).startswith("NOGROUP"):
                        grouped = False  # Redis lost its data
                        continue
                    if not may_pass(exc):
                        raise BackendError(f"Redis at {self.location}: {exc}") from exc
                    self._tell(f"Redis at {self.location} is away: {exc}")
                    self._stopping.wait(random.uniform(pause / 2, pause))
                    pause = min(pause * 2, RETRY_SECONDS[1])
        finally:
            client.close()
            self._writer.close()

    def _make_groups(self, client: Any) -> None:
        for stream in self._streams:
            try:
                client.xgroup_create(stream, GROUP, id="0", mkstream=True)
            except exceptions.ResponseError as exc:
                if not str(exc).startswith("BUSYGROUP"):
                    raise

    def _left_behind(self, client: Any) -> list[tuple[str, Entries]]:
        """What another archiver took and did not write."""
        if monotonic() < self._claim_at:
            return []
        claimed = []
        for stream in self._streams:
            idle = round(TAKE_OVER_SECONDS * 1000)
            _, entries, *_ = client.xautoclaim(stream, GROUP, self._name, idle, count=BATCH)
            if entries:
                claimed.append((stream, entries))
        if not claimed:
            self._claim_at = monotonic() + TAKE_OVER_SECONDS / 3
        return claimed

    def _next(self, client: Any) -> list[tuple[str, Entries]]:
        """What is new; waits a moment for something."""
        found = client.xreadgroup(
            GROUP, self._name, dict.fromkeys(self._streams, ">"), count=BATCH, block=round(WAIT_SECONDS * 1000)
        )
        return [(name.decode(), entries) for name, entries in _pairs(found)]

    def _archive(self, client: Any, stream: str, entries: Entries, *, again: bool) -> None:
        """Write them, however long that takes, then acknowledge them. *again*: some may be written."""
        waiting: list[Document] = []
        for entry, words in entries:
            try:
                waiting += self._documents(stream, entry.decode(), words)
            except (msgspec.DecodeError, KeyError, ValueError, TypeError) as exc:
                logger.error("archiver: entry %s of %s makes no sense: %r", entry.decode(), stream, exc)
        pause = RETRY_SECONDS[0]
        while waiting:
            result = self._writer.write(waiting, again=again)
            self.written += result.done
            self.repeated += result.repeated
            if result.refused:
                self.refused += len(result.refused)
                path = refuse(self._root, result.refused)
                why = result.refused[0][1]
                logger.error("archiver: OpenSearch refused %d events, kept in %s: %s", len(result.refused), path, why)
            waiting, again = result.later, True
            if waiting:
                self._tell(result.reason)
                if self._stopping.is_set():
                    return  # not acknowledged: the next archiver writes them
                self._stopping.wait(random.uniform(pause / 2, pause))
                pause = min(pause * 2, RETRY_SECONDS[1])
                # They are not taken over meanwhile.
                client.xclaim(stream, GROUP, self._name, 0, [entry for entry, _ in entries], justid=True)
        self._tell("")
        ids = [entry for entry, _ in entries]
        # Both or none: what is acknowledged and not deleted would stay for ever.
        with client.pipeline(transaction=True) as both:
            both.xack(stream, GROUP, *ids)
            both.xdel(stream, *ids)
            both.execute()

    def _documents(self, stream: str, entry: str, words: dict[bytes, bytes]) -> list[Document]:
        if stream == self._streams[1]:
            return [log_document(self.config, entry, words[b"record"])]
        frames = tuple(frame.encode() for frame in _frames.decode(words[b"frames"]))
        channel = channel_of(self.channels, words[b"log"].decode())
        epoch, first = words[b"epoch"].decode(), int(words[b"first"])
        at = int(entry.partition("-")[0])
        return list(documents(self.config, channel, words[b"about"], epoch, first, frames, at))

    def _tell(self, wrong: str) -> None:
        if wrong and not self._told:
            logger.warning("archiver: it waits: %s", wrong)
        elif self._told and not wrong:
            logger.warning("archiver: it goes on")
        self._told = wrong


def _pairs(found: Any) -> list[tuple[bytes, Entries]]:
    """What XREADGROUP answered, in RESP2 or RESP3."""
    if not isinstance(found, dict):
        return [(name, entries) for name, entries in found or ()]
    return [(name, [entry for part in parts for entry in part]) for name, parts in found.items()]


def waiting(redis: QueueRedisConfig, channels: ChannelConfig) -> dict[str, int]:
    """How much waits for an archiver: entries of channels, and log records."""
    client = Location(redis).sync_client()
    try:
        return {"events": client.xlen(archive_key(channels)), "logs": client.xlen(logs_key(channels))}
    except (exceptions.RedisError, OSError) as exc:
        raise BackendError(f"Redis: {exc}") from exc
    finally:
        client.close()
