"""``asgi-stream archiver`` and ``asgi-stream storage``."""

from __future__ import annotations

import logging
import signal
from datetime import UTC, datetime

from asgi_stream.config import ChannelConfig, QueueRedisConfig
from asgi_stream.storage.archiver import Archiver, waiting
from asgi_stream.storage.client import where
from asgi_stream.storage.opensearch import OpenSearchEventStorage


def archive(redis_url: str) -> None:
    """Write until Ctrl-C or SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("opensearch").setLevel(logging.CRITICAL)  # what it met is told by the archiver
    archiver = Archiver(redis_url)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: archiver.stop())
    print(f"writes what comes by {archiver.location} to {where(archiver.config)}", flush=True)
    archiver.run()
    print(f"{archiver.written} written ({archiver.repeated} had been before), {archiver.refused} refused", flush=True)


def setup() -> None:
    with OpenSearchEventStorage() as storage:
        for done in storage.setup():
            print(f"installed: {done}")


def prune(days: int | None) -> None:
    with OpenSearchEventStorage() as storage:
        for deleted in storage.prune(days) or ["nothing"]:
            print(f"deleted: {deleted}")


def status(redis_url: str | None) -> None:
    with OpenSearchEventStorage() as storage:
        told = storage.status()
        print(f"OpenSearch {told['version']} at {where(storage.config)}")
        installed = "installed" if told["template"] else "not installed: asgi-stream storage setup"
        print(f"template {storage.config.index_prefix}: {installed}")
        print(f"events: {told['events']:,}" + _span(told["oldest"], told["newest"]))
        print(f"indices: {', '.join(told['indices']) or 'none'}")
    if redis_url is not None:
        found = waiting(QueueRedisConfig(redis_url), ChannelConfig.from_env())
        print(f"waiting for an archiver: {found['events']:,} appends, {found['logs']:,} log records")


def _span(oldest: float | None, newest: float | None) -> str:
    if oldest is None or newest is None:
        return ""
    first, last = (datetime.fromtimestamp(moment, UTC).isoformat(" ", "seconds") for moment in (oldest, newest))
    return f", from {first} to {last}"
