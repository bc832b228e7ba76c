"""`QueueManager`: orders jobs, from sync code and async."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from asgi_stream import events
from asgi_stream.channels.commands import Append
from asgi_stream.config import QueueRedisConfig
from asgi_stream.context import StreamContext, cancel_run, find_context
from asgi_stream.errors import (
    BackendError,
    ConfigurationError,
    EnqueueError,
    InvalidEntityError,
    InvalidEventError,
    RunEndedError,
    StreamError,
    UnknownProcessorError,
)
from asgi_stream.events import json_bytes
from asgi_stream.job_queue import engine
from asgi_stream.job_queue.config import Operation, QueueConfig, name_of
from asgi_stream.job_queue.engine import Docket, Limits, Order
from asgi_stream.job_queue.job import Job, JobStatus, QueueStats
from asgi_stream.loop_thread import LoopThread
from asgi_stream.sse.encode import encode_block

if TYPE_CHECKING:
    from asgi_stream.runtime import Streaming

logger = logging.getLogger("asgi_stream")

T = TypeVar("T")

CALL_TIMEOUT = 5.0
MAX_BATCH = 500
WORKERS_FRESH = 2.0
"""Seconds for which what is known about the workers is good enough for a warning."""
PROBE_EVERY = 0.25
"""Seconds between looks for a Redis that was away."""


class QueueManager:
    """Orders jobs of one queue: ``QueueManager(url).enqueue(entity={…}, processor=task)``.

    Takes a `QueueConfig`, a `QueueRedisConfig` or a URL; without one ``REDIS_URL``. Opens no connection until it is
    used, then keeps them in a thread of its own, for any number of threads and event loops. A forked process makes its
    own. ``streaming`` is where the runs of its jobs are; by default the process's, or where that has no Redis, the
    queue's. Raises `MissingExtraError` without the extra ``queue``.
    """

    def __init__(
        self,
        config: QueueConfig | QueueRedisConfig | str | None = None,
        *,
        streaming: Streaming | None = None,
    ) -> None:
        self.config = QueueConfig.of(config)
        self._streaming = streaming
        self._thread = LoopThread("asgi_stream queue")
        self._fresh()

    def enqueue(
        self,
        entity: Any,
        processor: str | Operation,
        *,
        job_id: str | None = None,
        timeout: float | None = None,
        retries: int | None = None,
        redeliveries: int | None = None,
    ) -> Job:
        """Order a job: *processor* is called with *entity* by a worker. Return it as soon as Redis has it.

        *entity* is anything JSON; the `StreamContext.to_dict()` in it, or in its top level, is the run that the job
        belongs to. *processor* is the name of an operation, or the function. *job_id* makes it the same job however
        often it is ordered. The limits replace those of the `QueueConfig`.

        Takes at most ``enqueue_timeout``, and no time while Redis is known to be away. Raises `EnqueueError` then,
        whose ``job`` may be cancelled, since it is not known whether Redis took it; `InvalidEntityError` for what has
        no JSON form or is too large; `UnknownProcessorError` for a name that is not registered; `ConfigurationError`
        for a context that no other process could publish to; `RunEndedError` when its run is over.
        """
        job, payload, limits = self._prepare(entity, processor, job_id, timeout, retries, redeliveries)
        try:
            self._check_fork()
            self._wait(self._thread.submit(self._enqueue(job, payload, limits, entity)), self.config.enqueue_timeout)
        except TimeoutError as exc:
            raise self._unknown(job) from exc
        return job

    async def enqueue_async(
        self,
        entity: Any,
        processor: str | Operation,
        *,
        job_id: str | None = None,
        timeout: float | None = None,
        retries: int | None = None,
        redeliveries: int | None = None,
    ) -> Job:
        """Like `enqueue`, for async code: other requests go on while Redis answers."""
        job, payload, limits = self._prepare(entity, processor, job_id, timeout, retries, redeliveries)
        self._check_fork()
        future = self._thread.submit(self._enqueue(job, payload, limits, entity))
        try:
            async with asyncio.timeout(self.config.enqueue_timeout):
                await asyncio.wrap_future(future)
        except TimeoutError as exc:
            future.cancel()
            raise self._unknown(job) from exc
        return job

    def job(self, job_id: str) -> Job:
        """Return the job with this id, to ask or to cancel it."""
        return Job(self, job_id)

    def stats(self) -> QueueStats:
        """Count what waits and what runs, and name the workers. Raises `BackendError`."""
        return self._call(self._stats())

    async def stats_async(self) -> QueueStats:
        return await self._call_async(self._stats())

    def close(self) -> None:
        """Close the connections. The next call opens others."""
        if self._stack is not None and not self._thread.in_parent:
            try:
                self._thread.submit(self._disconnect()).result(CALL_TIMEOUT)
            except Exception as exc:
                logger.warning("the queue's connections did not close in order: %r", exc)
        self._thread.stop()

    async def aclose(self) -> None:
        await asyncio.to_thread(self.close)

    # From calls to the thread

    def _fresh(self) -> None:
        self._docket: Docket | None = None
        self._stack: AsyncExitStack | None = None
        self._connecting: asyncio.Lock | None = None
        self._away: str | None = None  # why Redis is known to be away
        self._probe: asyncio.Task[None] | None = None
        self._workers: dict[str, frozenset[str]] | None = None
        self._workers_at = 0.0
        self._looking: asyncio.Task[None] | None = None
        self._warned = 0.0
        self._orders: list[tuple[Order, asyncio.Future[None]]] = []
        self._ordering: asyncio.Task[None] | None = None

    def _check_fork(self) -> None:
        if self._thread.in_parent:
            self._fresh()
        if self._thread.is_current:
            raise ConfigurationError("this is the queue's own thread: use the async form from your own event loop")

    def _wait(self, future: concurrent.futures.Future[T], seconds: float) -> T:
        try:
            return future.result(seconds)
        except TimeoutError:
            future.cancel()
            raise

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        self._check_fork()
        try:
            return self._wait(self._thread.submit(coroutine), CALL_TIMEOUT)
        except TimeoutError as exc:
            raise BackendError(f"the queue's Redis did not answer within {CALL_TIMEOUT:.0f} s") from exc

    async def _call_async(self, coroutine: Coroutine[Any, Any, T]) -> T:
        self._check_fork()
        future = self._thread.submit(coroutine)
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                return await asyncio.wrap_future(future)
        except TimeoutError as exc:
            raise BackendError(f"the queue's Redis did not answer within {CALL_TIMEOUT:.0f} s") from exc

    def _prepare(
        self,
        entity: Any,
        processor: str | Operation,
        job_id: str | None,
        timeout: float | None,
        retries: int | None,
        redeliveries: int | None,
    ) -> tuple[Job, bytes, Limits]:
        name = name_of(processor)
        known = self.config.operations_registry
        if known and name not in known:
            raise UnknownProcessorError(name, known)
        try:
            payload = json_bytes(entity)
        except InvalidEventError as exc:
            raise InvalidEntityError(f"entity: {str(exc).removeprefix('data: ')}") from exc
        if len(payload) > self.config.max_entity_bytes:
            raise InvalidEntityError(
                f"entity: weighs {len(payload)} bytes of JSON; a job may have {self.config.max_entity_bytes} "
                "(max_entity_bytes of QueueConfig). Store it, and send the job where it is"
            )
        made = find_context(entity)
        if made is not None and "memory" in made:
            raise ConfigurationError(
                "this run's channel is in this process's memory, where no worker can publish: set REDIS_URL, or call "
                "init_streaming(redis), here and in the workers"
            )
        config = self.config
        limits = Limits(
            timeout=config.timeout if timeout is None else timeout,
            retries=config.retries if retries is None else retries,
            retry_delay=config.retry_delay,
            redeliveries=config.redeliveries if redeliveries is None else redeliveries,
        )
        channel_id = None if made is None else made["channel_id"]
        return Job(self, job_id or os.urandom(16).hex(), processor=name, channel_id=channel_id), payload, limits

    def _unknown(self, job: Job) -> EnqueueError:
        return EnqueueError(
            f"Redis did not answer within {self.config.enqueue_timeout:g} s (enqueue_timeout): whether job {job.id} is "
            "in the queue is not known. It can be cancelled, or ordered again with the same job_id",
            job,
        )

    # In the thread

    async def _enqueue(self, job: Job, payload: bytes, limits: Limits, entity: Any) -> None:
        if self._away is not None:
            raise EnqueueError(f"the queue's Redis is away ({self._away}); job {job.id} was not ordered", job)
        asked = False
        try:
            docket = await self._connected()
            job.warning = await self._warning(job)
            await self._say_queued(job, entity)
            asked = True
            assert job.processor is not None
            await self._add(docket, Order(job.id, job.processor, payload, limits))
        except StreamError as exc:
            if isinstance(exc, BackendError):
                self._watch(str(exc))
            raise
        except asyncio.CancelledError:
            self._watch("it did not answer in time")
            raise
        except Exception as exc:
            if not _is_of_redis(exc):
                raise
            self._watch(f"{type(exc).__name__}: {exc}")
            outcome = "whether it is in the queue is not known" if asked else "it was not ordered"
            raise EnqueueError(f"the queue's Redis: {type(exc).__name__}: {exc}; job {job.id}: {outcome}", job) from exc

    async def _add(self, docket: Docket, order: Order) -> None:
        """What is ordered while a command is under way leaves together with the next one."""
        added: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._orders.append((order, added))
        if self._ordering is None:
            self._ordering = asyncio.get_running_loop().create_task(self._order(docket))
        await added

    async def _order(self, docket: Docket) -> None:
        try:
            while self._orders:
                batch, self._orders = self._orders[:MAX_BATCH], self._orders[MAX_BATCH:]
                error: Exception | None = None
                try:
                    add = functools.partial(engine.add, docket, [order for order, _ in batch])
                    await _insist(add, self.config.enqueue_timeout)
                except Exception as exc:
                    error = exc
                for _, added in batch:
                    if added.done():
                        continue  # its caller waits no more
                    if error is None:
                        added.set_result(None)
                    else:
                        added.set_exception(error)
        finally:
            self._ordering = None

    async def _say_queued(self, job: Job, entity: Any) -> None:
        """Tell the viewers before a worker can: `queued` comes first."""
        made = find_context(entity)
        if made is None:
            return
        context = StreamContext.from_dict(made, streaming=self._channels())
        said = [events.StreamEvent({"ts": events.now_ms()}, "queued")]
        if job.warning:
            said.append(
                events.StreamEvent(
                    {"message": job.warning, "level": "warning", "logger": "asgi_stream.queue", "ts": events.now_ms()},
                    "log",
                )
            )
        frames = tuple(encode_block(event) for event in said)
        await context.streaming.broker.run_async(
            Append(context.channel_id, frames, state="queued", about=context.about)
        )

    def _channels(self) -> Streaming:
        """Where the runs are that the jobs belong to. The workers follow the same rule."""
        from asgi_stream.runtime import current_streaming, streaming_for

        if self._streaming is not None:
            return self._streaming
        default = current_streaming()
        return default if default.channel_redis is not None else streaming_for(self.config.redis, None)

    async def _connected(self) -> Docket:
        if self._docket is None:
            if self._connecting is None:
                self._connecting = asyncio.Lock()
            async with self._connecting:
                if self._docket is None:
                    async with AsyncExitStack() as stack:
                        docket = await stack.enter_async_context(engine.open_docket(self.config))
                        self._stack = stack.pop_all()
                    self._docket = docket
        return self._docket

    async def _disconnect(self) -> None:
        stack, self._stack, self._docket = self._stack, None, None
        for task in (self._probe, self._looking):
            if task is not None:
                task.cancel()
        if stack is not None:
            await stack.aclose()

    async def _warning(self, job: Job) -> str | None:
        """Why the job may have to wait, as far as is known."""
        age = time.monotonic() - self._workers_at
        if age > (WORKERS_FRESH if self._workers else 0.2) and self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look())
        if self._looking is not None and (not self._workers or age > 5 * WORKERS_FRESH):
            await asyncio.wait({self._looking})
        workers = self._workers
        if workers is None:
            return None  # it could not be asked
        if not workers:
            warning = "no worker is running; the job waits for one"
        elif not any(job.processor in operations for operations in workers.values()):
            warning = f"no running worker knows {job.processor!r}; the job fails unless one that does comes soon"
        else:
            return None
        if time.monotonic() - self._warned > 10:
            self._warned = time.monotonic()
            logger.warning("queue %r: %s", self.config.queue, warning)
        return warning

    async def _look(self) -> None:
        try:
            docket = await self._connected()
            self._workers = {worker.name: frozenset(worker.tasks) for worker in await docket.workers()}
            self._workers_at = time.monotonic()
        except Exception as exc:
            if not _is_of_redis(exc):
                raise
        finally:
            self._looking = None

    def _watch(self, why: str) -> None:
        """Redis is away: fail at once until it is back."""
        self._away = why
        if self._probe is None:
            self._probe = asyncio.get_running_loop().create_task(self._until_back())

    async def _until_back(self) -> None:
        try:
            while True:
                try:
                    async with asyncio.timeout(1):
                        docket = await self._connected()
                        async with docket.redis() as redis:
                            await redis.exists(docket.stream_key)
                    break
                except Exception as exc:
                    if not _is_of_redis(exc):
                        raise
                await asyncio.sleep(PROBE_EVERY)
        finally:
            self._away = None
            self._probe = None

    async def _status(self, job: Job) -> JobStatus:
        try:
            docket = await self._connected()
            return (await _insist(lambda: engine.status(docket, job.id)))[0]
        except Exception as exc:
            raise _backend(exc) from exc

    async def _cancel(self, job: Job, reason: str) -> None:
        try:
            docket = await self._connected()
            if job.channel_id is None:
                _, execution = await _insist(lambda: engine.status(docket, job.id))
                job.channel_id = engine.channel_of(execution)
            if job.channel_id is not None:
                await self._cancel_run(job.channel_id, reason)
            await _insist(lambda: docket.cancel(job.id))
        except Exception as exc:
            raise _backend(exc) from exc

    async def _cancel_run(self, channel_id: str, reason: str) -> None:
        try:
            await cancel_run(self._channels(), channel_id, reason)
        except RunEndedError:
            pass

    async def _stats(self) -> QueueStats:
        try:
            docket = await self._connected()
            return await _insist(lambda: engine.stats(docket))
        except Exception as exc:
            raise _backend(exc) from exc

    def __repr__(self) -> str:
        return f"<QueueManager {self.config.queue!r}>"


async def _insist(call: Callable[[], Awaitable[T]], seconds: float = CALL_TIMEOUT) -> T:
    """Do what may be repeated again while Redis is away: a restart leaves broken connections behind."""
    deadline = time.monotonic() + seconds
    pause = 0.02
    while True:
        try:
            return await call()
        except Exception as exc:
            if not _is_of_redis(exc) or time.monotonic() + pause > deadline:
                raise
        await asyncio.sleep(pause)
        pause = min(pause * 2, 0.25)


def _is_of_redis(exc: Exception) -> bool:
    from redis.exceptions import RedisError

    if isinstance(exc, ExceptionGroup):
        return all(isinstance(inner, Exception) and _is_of_redis(inner) for inner in exc.exceptions)
    return isinstance(exc, RedisError | OSError | TimeoutError | BackendError)


def _backend(exc: Exception) -> Exception:
    if isinstance(exc, StreamError) or not _is_of_redis(exc):
        return exc
    return BackendError(f"the queue's Redis: {type(exc).__name__}: {exc}")
