"""A worker process of the demo: ``python -m asgi_stream.demo.worker REDIS_URL``.

It ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import logging
import sys

from asgi_stream.demo.deploy import deploy
from asgi_stream.job_queue.config import QueueConfig
from asgi_stream.job_queue.worker import QueueWorker

REDELIVERY = 4.0
"""Seconds until the job of a worker that was killed is taken by the other one: short, since somebody looks on."""


def queue_config(redis_url: str) -> QueueConfig:
    """The demo's queue, for its web processes and its workers."""
    return QueueConfig(redis_url, queue="demo", redelivery_timeout=REDELIVERY, shutdown_timeout=0.5)


async def work(redis_url: str) -> None:
    config = queue_config(redis_url)
    config.operations_registry["demo.deploy"] = deploy
    worker = QueueWorker(config, max_workers=2)
    working = asyncio.create_task(worker.start())
    parent = asyncio.create_task(asyncio.to_thread(sys.stdin.buffer.read))
    await asyncio.wait({working, parent}, return_when=asyncio.FIRST_COMPLETED)
    worker.stop()
    await working


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    asyncio.run(work(sys.argv[1]))
