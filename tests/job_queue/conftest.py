"""Real worker processes for the tests of jobs."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from asgi_stream import StreamContext, init_streaming, shutdown_streaming
from asgi_stream.channels.model import Record
from asgi_stream.job_queue import QueueManager
from tests.job_queue import operations
from tests.support import need_module

HANG = 60.0
_numbers = itertools.count(1)


class WorkerProcess:
    """``python -m tests.job_queue.operations``, or another command line."""

    def __init__(self, url: str, queue: str, command: list[str] | None = None, **settings: Any) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self.process = subprocess.Popen(
            command or [sys.executable, "-m", "tests.job_queue.operations", queue, json.dumps(settings)],
            env={**os.environ, "REDIS_URL": url},
            stdout=self._log,
            stderr=self._log,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self) -> int:
        """Wait for its end, and return its exit code."""
        return self.process.wait(HANG)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()


class Jobs:
    """A queue of the test's own: its manager, and workers."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.queue = f"test-{os.getpid()}-{next(_numbers)}"
        self.manager = QueueManager(operations.config(url, self.queue))
        self.workers: list[WorkerProcess] = []

    def worker(self, **settings: Any) -> WorkerProcess:
        worker = WorkerProcess(self.url, self.queue, **settings)
        self.workers.append(worker)
        deadline = time.monotonic() + HANG
        while len(self.manager.stats().workers) < sum(w.process.poll() is None for w in self.workers):
            assert worker.process.poll() is None, worker.log()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return worker

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.manager.close()


class Viewer:
    """Reads a run from its beginning, as its viewers do."""

    def __init__(self, ctx: StreamContext) -> None:
        self.records: list[Record] = []
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._read(ctx))

    async def _read(self, ctx: StreamContext) -> None:
        from asgi_stream import AsyncStreamChannel

        async for record in AsyncStreamChannel(ctx.channel_id).subscribe():
            self.records.append(record)
            self._changed.set()

    async def until(self, event: str, count: int = 1) -> Record:
        async with asyncio.timeout(HANG):
            while len(found := [record for record in self.records if record.event == event]) < count:
                self._changed.clear()
                waiting = asyncio.create_task(self._changed.wait())
                await asyncio.wait({waiting, self._task}, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                if self._task.done() and len([r for r in self.records if r.event == event]) < count:
                    raise AssertionError(f"the run ended without {event}: {self.told}")
        return found[count - 1]

    async def end(self) -> list[str]:
        async with asyncio.timeout(HANG):
            await self._task
        return self.told

    @property
    def told(self) -> list[str]:
        return [str(record.event) for record in self.records]

    def data(self, event: str) -> list[Any]:
        return [record.data for record in self.records if record.event == event]


@pytest.fixture
async def jobs(redis_url: str) -> AsyncIterator[Jobs]:
    need_module("docket")
    init_streaming(redis_url)
    made = Jobs(redis_url)
    yield made
    await asyncio.to_thread(made.close)
    await shutdown_streaming()
