"""`QueueWorker`: does a queue's jobs, in a process of its own or beside other things in an event loop."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import os
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from asgi_stream.config import QueueRedisConfig, StorageConfig, check_whole
from asgi_stream.errors import StreamError
from asgi_stream.job_queue import engine
from asgi_stream.job_queue.attempt import Attempt, Stop
from asgi_stream.job_queue.config import QueueConfig
from asgi_stream.job_queue.engine import JOB_RETRY, CurrentExecution, Docket, Execution, Limits
from asgi_stream.job_queue.threads import JobThread

logger = logging.getLogger("asgi_stream")

_numbers = itertools.count(1)

GOODBYE_SECONDS = 5.0
"""How long a worker that stops waits for Redis to take back its jobs."""


class QueueWorker:
    """Takes jobs of one queue and runs up to ``max_workers`` of them at once: ``asyncio.run(worker.start())``.

    ``config`` is a `QueueConfig`, a `QueueRedisConfig` or a URL; ``worker.config.operations_registry`` is what the
    worker can do. Async functions run in the event loop, sync ones in a thread each.

    ``archive``: do `asgi-stream archiver`'s work as well, with these settings or those of the environment.

    The worker publishes through the queue's Redis, unless streaming was initialised otherwise.
    Raises `MissingExtraError` without the extra ``queue``.
    """

    def __init__(
        self,
        config: QueueConfig | QueueRedisConfig | str | None = None,
        max_workers: int = 4,
        *,
        name: str | None = None,
        archive: bool | StorageConfig = False,
    ) -> None:
        check_whole("max_workers", max_workers, least=1)
        self.config = QueueConfig.of(config)
        self.max_workers = max_workers
        number = next(_numbers)
        self.name = name or f"{platform.node()}:{os.getpid()}{f'-{number}' if number > 1 else ''}"
        self._archive = (StorageConfig.from_env() if archive else None) if isinstance(archive, bool) else archive
        self.attempts: set[Attempt] = set()
        self._left: list[JobThread] = []
        self._stopping: asyncio.Event | None = None
        self._at_once: asyncio.Event | None = None

    async def start(self) -> None:
        """Work until told to stop: by SIGTERM or SIGINT, by `stop`, or by the cancellation of this call.

        Then it takes nothing new, waits for its jobs for up to ``shutdown_timeout``, hands back those that are not
        done, and returns. A second signal hands them back at once. A Redis that is away is waited for. Signals are
        taken only in the main thread, and only where nobody else has taken them.
        Raises `StreamError` when no slot is left because jobs that were given up cannot be stopped.
        """
        from asgi_stream.runtime import adopt_redis

        if self._stopping is not None:
            raise StreamError("this worker is running already; make another one")
        if not self.config.operations_registry:
            logger.warning("this worker knows no operation; add some to config.operations_registry")
        adopt_redis(self.config.redis)
        self._stopping, self._at_once = asyncio.Event(), asyncio.Event()
        try:
            with self._signals(), self._archiver():
                await self._work(self._stopping)
        finally:
            self._stopping = None
        if self._stuck:
            raise StreamError(
                f"{len(self._left)} jobs were given up but do not stop, and no slot is left: start this worker anew"
            )

    def stop(self) -> None:
        """Make `start` return, as SIGTERM does; called again, at once. Safe from the loop's own thread and signals."""
        if self._stopping is None or self._at_once is None:
            return
        (self._at_once if self._stopping.is_set() else self._stopping).set()

    def left_behind(self, name: str, thread: JobThread | None) -> None:
        """Count a job that was given up and runs on."""
        logger.error("a job of %s was given up, but its function does not stop", name)
        if thread is None:
            return
        self._left = [known for known in self._left if known.is_alive] + [thread]
        if self._stuck:
            logger.critical("%d jobs that were given up hold all of this worker's slots: it stops", len(self._left))
            self.stop()

    @property
    def _stuck(self) -> bool:
        return len(self._left) >= self.max_workers

    async def _work(self, stopping: asyncio.Event) -> None:
        stopped = asyncio.create_task(stopping.wait())
        try:
            async with engine.open_docket(self.config) as docket:
                await engine.endure(docket)
                await self._compare(docket)
                self._register(docket)
                worker = engine.make_worker(
                    docket, self.config, name=self.name, slots=self.max_workers, unknown=self._job(docket)
                )
                async with worker:
                    working = asyncio.create_task(worker.run_forever())
                    logger.info(
                        "worker %s takes jobs of queue %r: %s",
                        self.name,
                        self.config.queue,
                        ", ".join(self.config.operations_registry),
                    )
                    try:
                        await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        await self._finish(working)
        finally:
            stopped.cancel()

    async def _finish(self, working: asyncio.Task[None]) -> None:
        """Take nothing new, wait for what runs, hand back the rest."""
        if working.done():
            working.result()
            return
        working.cancel()  # docket then waits for its jobs
        assert self._at_once is not None
        at_once = asyncio.create_task(self._at_once.wait())
        try:
            await asyncio.wait(
                {working, at_once}, timeout=self.config.shutdown_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            for attempt in list(self.attempts):
                attempt.stop(Stop("shutdown"))
            await asyncio.wait({working}, timeout=GOODBYE_SECONDS)
        finally:
            at_once.cancel()
        if not working.done():
            logger.error("Redis is away: what this worker has goes on elsewhere when it is taken for dead")
            while not working.done():
                working.cancel()
                await asyncio.wait({working}, timeout=1.0)
        if not working.cancelled():
            working.result()

    async def _compare(self, docket: Docket) -> None:
        mine = self.config.redelivery_timeout
        other = await engine.other_patience(docket, self.name, mine)
        if other is not None:
            logger.warning(
                "worker %s has redelivery_timeout=%g, another one of queue %r has %g: a job may be taken from a worker "
                "that is alive; give all the same",
                self.name,
                mine,
                self.config.queue,
                other,
            )

    def _register(self, docket: Docket) -> None:
        job = self._job(docket)
        if self.config.operations_registry:
            docket.register(job, names=list(self.config.operations_registry))

    def _job(self, docket: Docket) -> Any:
        async def job(
            entity: bytes,
            limits: dict[str, Any],
            execution: Execution = CurrentExecution(),  # noqa: B008 - how docket asks for it
            retry: Any = JOB_RETRY,
        ) -> Any:
            return await Attempt(self, docket, execution, entity, Limits.from_dict(limits)).run()

        return job

    @contextmanager
    def _archiver(self) -> Iterator[None]:
        """The record's writer, in a thread beside the jobs."""
        if self._archive is None:
            yield
            return
        from asgi_stream.storage.archiver import Archiver

        archiver = Archiver(self.config.redis, self._archive)
        thread = threading.Thread(target=archiver.run, name="asgi_stream archiver", daemon=True)
        thread.start()
        try:
            yield
        finally:
            archiver.stop()
            thread.join(self._archive.shutdown_seconds)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        taken = []
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if _is_free(number):
                    try:
                        loop.add_signal_handler(number, self.stop)
                    except NotImplementedError:
                        continue  # Windows: the cancellation by asyncio.run() stops us
                    taken.append(number)
        try:
            yield
        finally:
            for number in taken:
                loop.remove_signal_handler(number)

    def __repr__(self) -> str:
        return f"<QueueWorker {self.name} of {self.config.queue!r}>"


def _is_free(number: int) -> bool:
    """Whether nobody but Python itself, and asyncio.run(), has a handler for the signal."""
    handler = signal.getsignal(number)
    if handler in (signal.SIG_DFL, signal.default_int_handler):
        return True
    return isinstance(handler, functools.partial) and isinstance(
        getattr(handler.func, "__self__", None), asyncio.Runner
    )
