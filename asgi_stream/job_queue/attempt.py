"""One attempt of one job: runs the function, and sees to it that the run ends once and truly.

Whatever ends an attempt (it returns, raises, takes too long, is cancelled, is replaced by another one, or its worker
must stop), what the function said comes first and the run's ending last. The run of a job that goes on elsewhere is
left open.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from asgi_stream import events
from asgi_stream.channels.commands import Append, Touch
from asgi_stream.context import StreamContext, failure_id, find_context
from asgi_stream.errors import (
    AttemptSupersededError,
    BackendError,
    ConfigurationError,
    InvalidEventError,
    RunCancelledError,
    RunEndedError,
    StreamError,
)
from asgi_stream.events import ENDINGS, StreamEvent, json_bytes
from asgi_stream.job_queue import engine
from asgi_stream.job_queue.config import Operation, QueueConfig
from asgi_stream.job_queue.engine import Docket, Execution, JobError, Limits
from asgi_stream.job_queue.threads import JobThread, guarded
from asgi_stream.sse.encode import encode_block

if TYPE_CHECKING:
    from asgi_stream.job_queue.worker import QueueWorker

logger = logging.getLogger("asgi_stream")

WATCH_EVERY = 1.0
"""Seconds between an attempt's signs of life, with which it learns that it is to stop."""
FLUSH_SECONDS = 6.0
HAND_BACK_PATIENCE = 1.0
HAND_BACK_DELAY = 0.05
ELSEWHERE_DELAY = 0.5


@dataclass(frozen=True, slots=True)
class Stop:
    """Why an attempt ends before its function does."""

    why: Literal["cancelled", "timeout", "superseded", "shutdown"]
    reason: str = ""
    cause: StreamError | None = None


class Attempt:
    """Runs *function* with the job's entity; `run` returns what it returned, for the one who asks `Job.status()`."""

    def __init__(
        self, worker: QueueWorker, docket: Docket, execution: Execution, entity: bytes, limits: Limits
    ) -> None:
        self._worker = worker
        self._config: QueueConfig = worker.config
        self._docket = docket
        self._execution = execution
        self._name = execution.function_name
        self._limits = limits
        self._entity: Any = msgspec.json.decode(entity)
        self._context: StreamContext | None = None
        self._stop: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()
        self._thread: JobThread | None = None

    def stop(self, stop: Stop) -> None:
        """End it. The first reason counts."""
        if not self._stop.done():
            self._stop.set_result(stop)

    async def run(self) -> Any:
        function = self._config.operations_registry.get(self._name)
        made = find_context(self._entity)
        try:
            self._context = None if made is None else StreamContext.from_dict(made)
        except (ConfigurationError, InvalidEventError) as exc:
            raise JobError(f"its context cannot be used here: {exc}") from exc
        if function is None:
            await self._unknown()
        assert function is not None
        if await engine.deliveries(self._docket, self._execution) - 1 > self._limits.redeliveries:
            await self._end(events.failed("worker_lost", "its worker died", retryable=True, id=failure_id()))
            raise JobError("worker_lost: its worker died, and it may not be run again")
        if self._context is not None:
            try:
                made["attempt"] = await self._context.begin_attempt_async(self._worker.name)
            except RunEndedError as exc:
                logger.info("job %s of %s is not run: %s", self._execution.key, self._name, exc)
                raise asyncio.CancelledError from exc
        return await self._perform(function)

    async def _perform(self, function: Operation) -> Any:
        body = self._start(function)
        watch = None if self._context is None else asyncio.create_task(self._watch(self._context))
        try:
            try:
                await asyncio.wait(
                    {body, self._stop}, timeout=self._limits.timeout, return_when=asyncio.FIRST_COMPLETED
                )
            except asyncio.CancelledError:  # Job.cancel()
                if self._stop.done():
                    raise
                self._forget_cancellation()
                self.stop(Stop("cancelled", await self._why_cancelled()))
            if body.done():
                return await self._settle(body)
            if not self._stop.done():
                self.stop(Stop("timeout"))
            return await self._break_off(body, self._stop.result())
        finally:
            if watch is not None:
                watch.cancel()
            self._worker.attempts.discard(self)

    # The function

    def _start(self, function: Operation) -> asyncio.Future[Any]:
        self._worker.attempts.add(self)
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
            return asyncio.create_task(guarded(function, self._entity), name=f"job {self._name}")
        self._thread = JobThread(function, self._entity, f"job {self._name}")
        return self._thread.future

    async def _break_off(self, body: asyncio.Future[Any], stop: Stop) -> Any:
        """End the function, and the run where it is over with it."""
        if stop.why == "cancelled":
            return await self._break_off_cancelled(body, stop.reason)
        if stop.why == "timeout":
            logger.error("job %s of %s ran for longer than %g s", self._execution.key, self._name, self._limits.timeout)
            again = self._may_retry()
            if again:
                await self._say_again("it took too long")
            else:
                failure = events.failed("timeout", "the task took too long", retryable=True, id=failure_id())
                await self._end(failure)
            self._silence()
            await self._end_function(body, self._config.cancel_timeout)
            raise JobError(f"timeout: it ran for longer than {self._limits.timeout:g} s", again)
        if stop.why == "shutdown" and not self._limits.redeliveries:
            await self._end(events.failed("worker_lost", "its worker stopped", retryable=True, id=failure_id()))
        self._silence(stop.cause)
        if stop.why == "superseded":
            logger.warning("job %s of %s is run by another worker: %s", self._execution.key, self._name, stop.cause)
            await self._end_function(body, self._config.cancel_timeout)
            raise engine.leave(self._execution)
        await self._end_function(body, HAND_BACK_PATIENCE)
        if not self._limits.redeliveries:
            raise JobError("worker_lost: its worker stopped, and it may not be run again")
        logger.warning("job %s of %s goes back into the queue: its worker stops", self._execution.key, self._name)
        raise engine.later(self._execution, HAND_BACK_DELAY)

    async def _break_off_cancelled(self, body: asyncio.Future[Any], reason: str) -> Any:
        if self._context is not None:
            self._context.streaming.courier.ask_to_stop(self._context.channel_id, reason)
        if self._thread is None:
            body.cancel()
        elif self._context is None:
            self._thread.interrupt()  # it has nothing by which it could learn it
        await asyncio.wait({body}, timeout=self._config.cancel_timeout)
        await self._end(events.cancelled(reason))
        if not body.done():
            self._silence()
            await self._end_function(body, self._config.cancel_timeout)
        elif not body.cancelled():
            body.exception()  # the run is cancelled, whatever came of it
        raise asyncio.CancelledError

    async def _end_function(self, body: asyncio.Future[Any], patience: float) -> None:
        """Stop it by force; one that cannot be stopped is left behind, and the worker counts it."""
        if self._thread is None:
            body.cancel()
        else:
            self._thread.interrupt()
        await asyncio.wait({body}, timeout=patience)
        if not body.done():
            self._worker.left_behind(self._name, self._thread)
        elif not body.cancelled():
            body.exception()

    # What comes of it

    async def _settle(self, body: asyncio.Future[Any]) -> Any:
        if body.cancelled():
            # By its own hand: nobody cancelled us.
            failure: BaseException | None = asyncio.CancelledError()
        else:
            failure = body.exception()
        if failure is None:
            ending = await self._end(events.complete())
            if ending == "cancelled":
                raise asyncio.CancelledError  # its block ended the run and swallowed the request to stop
            if ending == "failed":
                raise JobError("failed: it ended its run as failed")
            return self._result(body.result())
        if isinstance(failure, RunCancelledError):
            await self._end(events.cancelled(failure.reason))
            raise asyncio.CancelledError from failure
        if isinstance(failure, AttemptSupersededError):
            logger.warning("job %s of %s is run by another worker: %s", self._execution.key, self._name, failure)
            raise engine.leave(self._execution) from failure
        text = f"{type(failure).__name__}: {failure}"
        if isinstance(failure, RunEndedError) and self._context is not None and self._context.cancelling:
            raise asyncio.CancelledError from failure
        if self._may_retry() and not isinstance(failure, RunEndedError):
            await self._say_again(type(failure).__name__)
            raise JobError(text, again=True) from failure
        told = failure_id()
        logger.error("job %s of %s failed (id %s)", self._execution.key, self._name, told)
        await self._end(events.failed(type(failure).__name__, "the task failed", retryable=False, id=told))
        raise JobError(text) from failure

    def _result(self, value: Any) -> Any:
        if value is None:
            return None
        try:
            return msgspec.json.decode(json_bytes(value))
        except InvalidEventError as exc:
            logger.warning(
                "job %s of %s is done, but what it returned is not kept: %s", self._execution.key, self._name, exc
            )
            return None

    def _may_retry(self) -> bool:
        return self._execution.attempt <= self._limits.retries

    async def _why_cancelled(self) -> str:
        context = self._context
        if context is None:
            return "cancelled"
        try:
            touch = Touch(context.channel_id, context.streaming.channel_settings.producer_timeout, context.attempt)
            status = await context.streaming.broker.run_async(touch)
        except StreamError:
            return context.cancelling or "cancelled"
        return status.cancelling or "cancelled"

    # What the viewers learn

    async def _end(self, ending: StreamEvent) -> str | None:
        """End the run, unless it has ended; what the function said before comes first. Return the ending it has."""
        context = self._context
        if context is None:
            return ending.event
        await self._flush(context)
        try:
            await context.end_async(ending)
        except RunEndedError as exc:
            return exc.ending
        except AttemptSupersededError as exc:
            logger.warning("job %s of %s: %s", self._execution.key, self._name, exc)
            raise engine.leave(self._execution) from exc
        return ending.event

    async def _say_again(self, why: str) -> None:
        context = self._context
        if context is None:
            return
        await self._flush(context)
        attempts = self._limits.retries + 1
        message = f"attempt {self._execution.attempt} of {attempts} failed ({why}); it is tried again"
        said = [
            {"message": message, "level": "warning", "logger": "asgi_stream.queue", "ts": events.now_ms()},
            {"ts": events.now_ms()},
        ]
        frames = tuple(
            encode_block(StreamEvent(data, name)) for data, name in zip(said, ("log", "queued"), strict=True)
        )
        append = Append(context.channel_id, frames, state="queued", attempt=context.attempt, about=context.about)
        try:
            await context.streaming.broker.run_async(append)
        except RunEndedError as exc:
            raise asyncio.CancelledError from exc  # it ended its own run, then raised
        except AttemptSupersededError as exc:
            raise engine.leave(self._execution) from exc

    async def _flush(self, context: StreamContext) -> None:
        courier = context.streaming.courier
        if not await asyncio.to_thread(courier.flush_channel, context.channel_id, FLUSH_SECONDS):
            logger.error("job %s of %s: Redis did not take all it said", self._execution.key, self._name)

    def _silence(self, cause: StreamError | None = None) -> None:
        """From now on the function's verbs raise: its attempt is over, whatever it still does."""
        context = self._context
        if context is not None:
            over = cause or AttemptSupersededError(context.channel_id, context.attempt, context.attempt)
            context.streaming.courier.refuse(context.channel_id, over)

    async def _watch(self, context: StreamContext) -> None:
        """Show signs of life, and learn whether to go on."""
        patience = context.streaming.channel_settings.producer_timeout
        while True:
            await asyncio.sleep(min(WATCH_EVERY, patience / 4))
            try:
                touch = Touch(context.channel_id, patience, context.attempt)
                status = await context.streaming.broker.run_async(touch)
            except AttemptSupersededError as exc:
                self.stop(Stop("superseded", cause=exc))
                return
            except BackendError as exc:
                logger.warning("job %s of %s: no sign of life could be given: %s", self._execution.key, self._name, exc)
                continue
            if status.cancelling is not None:
                self.stop(Stop("cancelled", status.cancelling))
                return
            if status.state in ENDINGS:
                return  # it has ended its run, and may go on

    async def _unknown(self) -> None:
        """Somebody else may know the operation; if not, the job fails."""
        known = self._config.operations_registry
        if any(worker.name != self._worker.name for worker in await self._docket.task_workers(self._name)):
            raise engine.later(self._execution, ELSEWHERE_DELAY)
        logger.error("job %s: no worker knows %r; this one knows %s", self._execution.key, self._name, ", ".join(known))
        await self._end(
            events.failed("unknown_processor", "no worker knows this task", retryable=False, id=failure_id())
        )
        raise JobError(f"unknown_processor: no worker knows {self._name!r}")

    @staticmethod
    def _forget_cancellation() -> None:
        """The cancellation was the job's, not its keeper's."""
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
