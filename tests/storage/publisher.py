"""Publishes so many log events to one channel, in a process of its own, and keeps a record of them.

``python -m tests.storage.publisher CHANNEL COUNT PER_SECOND``; settings come from the environment. Prints
``published``, then waits for the end of its standard input before it ends in order.
"""

from __future__ import annotations

import asyncio
import sys
import time

from asgi_stream import SyncStreamChannel
from asgi_stream.runtime import current_streaming, shutdown_streaming


def main() -> None:
    name, count, per_second = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    channel = SyncStreamChannel(name)
    begun = time.monotonic()
    for n in range(count):
        channel.publish({"message": str(n)}, "log")
        time.sleep(max(begun + (n + 1) / per_second - time.monotonic(), 0.0))
    print("published", flush=True)
    sys.stdin.read()
    stats = current_streaming().storage.stats() if current_streaming().storage_config else None
    print(stats, flush=True)
    asyncio.run(shutdown_streaming())


if __name__ == "__main__":
    main()
