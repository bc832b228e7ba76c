"""`StreamContext`: what a worker holds, to tell everybody who looks on how its work goes."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import threading
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from asgi_stream import events
from asgi_stream.channels.client import AsyncSender, Outgoing, SyncStreamChannel
from asgi_stream.channels.commands import Append, BeginAttempt, Cancel, Status
from asgi_stream.channels.courier import Outbox
from asgi_stream.channels.model import check_channel, new_channel_id
from asgi_stream.errors import (
    BackendError,
    ConfigurationError,
    InvalidEventError,
    RunCancelledError,
    RunEndedError,
)
from asgi_stream.events import StreamEvent
from asgi_stream.sse.encode import encode_block

if TYPE_CHECKING:
    from asgi_stream.runtime import Streaming

logger = logging.getLogger("asgi_stream")

T = TypeVar("T")

MARK = "asgi_stream_context"
"""The key by which `StreamContext.find` knows what `to_dict()` has made; its value is the version."""
VERSION = 1

LEVELS = ("debug", "info", "warning", "error", "critical")
SIGNS = 4
"""Signs of life in the time after which a producer is taken for lost."""
FLUSH_SECONDS = 6.0


class StreamContext:
    """One run, as its producer sees it: a channel, and verbs that publish to it.

    Make it with `create()` where the work is ordered, send `to_dict()` to the worker, and rebuild it there with
    `from_dict()`. A rebuilt context shows signs of life from its first verb until it is dropped: when they stop, the
    run is ended as lost [C7].

    Plain verbs return at once: what they say leaves within about a millisecond, in order, from a thread of its own,
    and what Redis has not acknowledged dies with the process. The endings (`complete`, `fail`, and leaving a ``with``
    block) wait for it. The ``…_async`` forms wait for Redis without blocking the event loop. A Redis that is away for
    less than 5 s is waited for; after that plain verbs log what was lost, and endings raise `BackendError`.

    Every verb raises `RunEndedError` once the run is over, `AttemptSupersededError` when another attempt took over, and
    `InvalidEventError` for what no event can carry.
    """

    def __init__(
        self,
        channel_id: str,
        workspace_id: str,
        *,
        project: str | None = None,
        env: str | None = None,
        service: str | None = None,
        labels: Mapping[str, str] | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        self.channel_id = check_channel(channel_id)
        self.workspace_id = workspace_id
        self.project = project
        self.env = env
        self.service = service
        self.labels = dict(labels or {})
        self.attempt = 0
        self.ended: str | None = None
        self._given = streaming
        self._rebuilt = False
        self._outbox_made: Outbox | None = None
        self._senders: dict[asyncio.AbstractEventLoop, AsyncSender] = {}
        self._pid = os.getpid()
        self._lock = threading.Lock()

    @classmethod
    def create(
        cls,
        workspace_id: str,
        project: str | None = None,
        env: str | None = None,
        service: str | None = None,
        *,
        streaming: Streaming | None = None,
        **labels: str,
    ) -> Self:
        """Make the context of a new run that belongs to *workspace_id*. Does no I/O."""
        channel_id = new_channel_id(workspace_id)
        return cls(
            channel_id, workspace_id, project=project, env=env, service=service, labels=labels, streaming=streaming
        )

    # From one process to another

    def to_dict(self) -> dict[str, Any]:
        """Return what a worker needs, as JSON. It holds no secrets."""
        made = {
            MARK: VERSION,
            "channel_id": self.channel_id,
            "workspace_id": self.workspace_id,
            "project": self.project,
            "env": self.env,
            "service": self.service,
            "labels": self.labels,
        }
        if self.attempt:
            made["attempt"] = self.attempt
        streaming = self.streaming
        if streaming.channel_redis is None:
            made["memory"] = streaming.token
        return made

    @classmethod
    def from_dict(cls, made: Any, *, streaming: Streaming | None = None) -> Self:
        """Rebuild the context that `to_dict()` described.

        Unknown keys are ignored, so that newer versions may add some.
        """
        if not isinstance(made, Mapping) or MARK not in made:
            raise ConfigurationError("this is not what StreamContext.to_dict() returns")
        if not isinstance(made[MARK], int) or made[MARK] > VERSION:
            raise ConfigurationError(
                f"the context was made by a newer version of asgi_stream (format {made[MARK]!r}); update this process"
            )
        try:
            context = cls(
                made["channel_id"],
                made["workspace_id"],
                project=made.get("project"),
                env=made.get("env"),
                service=made.get("service"),
                labels=made.get("labels"),
                streaming=streaming,
            )
        except KeyError as exc:
            raise ConfigurationError(f"the context lacks {exc}") from None
        context._rebuilt = True
        context.attempt = made.get("attempt", 0)
        memory = made.get("memory")
        if memory is not None and context.streaming.token != memory:
            raise ConfigurationError(
                "this run's channel is in the memory of another process, where nothing can be published from here: "
                "set REDIS_URL, or call init_streaming(redis), in both"
            )
        return context

    @classmethod
    def find(cls, entity: Any, *, streaming: Streaming | None = None) -> Self | None:
        """Rebuild the context that is somewhere in the top level of *entity*, under any key; None without one."""
        made = find_context(entity)
        return None if made is None else cls.from_dict(made, streaming=streaming)

    # Verbs

    def log(
        self, message: str, level: str = "info", *, logger: str | None = None, fields: Mapping[str, Any] | None = None
    ) -> None:
        """Publish a line of log; *level* is debug, info, warning, error or critical."""
        self._put(_log(message, level, logger, fields))

    async def log_async(
        self, message: str, level: str = "info", *, logger: str | None = None, fields: Mapping[str, Any] | None = None
    ) -> None:
        await self._put_async(_log(message, level, logger, fields))

    def progress(self, percent: float, step: str | None = None) -> None:
        """Publish how far the run is, from 0 to 100 percent, and what it is doing."""
        self._put(_progress(percent, step))

    async def progress_async(self, percent: float, step: str | None = None) -> None:
        await self._put_async(_progress(percent, step))

    def data(self, name: str, value: Any) -> None:
        """Publish a named value: anything that has a JSON form."""
        self._put(_event("data", {"name": name, "value": value}))

    async def data_async(self, name: str, value: Any) -> None:
        await self._put_async(_event("data", {"name": name, "value": value}))

    def token(self, text: str) -> None:
        """Publish a piece of a text that grows."""
        self._put(_event("token", {"text": text}))

    async def token_async(self, text: str) -> None:
        await self._put_async(_event("token", {"text": text}))

    def emit(self, event: str, data: Any) -> None:
        """Publish an event with a name of your own. An ending's name ends the run."""
        made = StreamEvent(data, event)
        if event in events.ENDINGS:
            self._end(made)
        else:
            self._put(made)

    async def emit_async(self, event: str, data: Any) -> None:
        made = StreamEvent(data, event)
        if event in events.ENDINGS:
            await self.end_async(made)
        else:
            await self._put_async(made)

    # Endings

    def complete(self, success: bool = True, **result: Any) -> None:
        """End the run in order; *success* may be false. Waits until Redis has it."""
        self._end(events.complete(result, success=success))

    async def complete_async(self, success: bool = True, **result: Any) -> None:
        await self.end_async(events.complete(result, success=success))

    def fail(self, code: str, message: str, *, retryable: bool = False) -> None:
        """End the run as failed. *message* is for the client's eyes. Waits until Redis has it."""
        self._end(events.failed(code, message, retryable=retryable, id=failure_id()))

    async def fail_async(self, code: str, message: str, *, retryable: bool = False) -> None:
        await self.end_async(events.failed(code, message, retryable=retryable, id=failure_id()))

    def end_cancelled(self, reason: str = "cancelled") -> None:
        """End the run as stopped. Waits until Redis has it."""
        self._end(events.cancelled(reason))

    async def end_cancelled_async(self, reason: str = "cancelled") -> None:
        await self.end_async(events.cancelled(reason))

    def flush(self, seconds: float = FLUSH_SECONDS) -> bool:
        """Wait until Redis has what was said; False if that takes longer."""
        return self._outbox().flush(seconds)

    # Being stopped

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked for the run to stop: known with the answers to verbs and signs of life."""
        outbox = self._outbox()
        self._show_life(outbox)
        return outbox.cancelling is not None

    def raise_if_cancelled(self) -> None:
        """Raise `RunCancelledError` if somebody asked for the run to stop."""
        outbox = self._outbox()
        self._show_life(outbox)
        if outbox.cancelling is not None:
            raise RunCancelledError(self.channel_id, outbox.cancelling)

    @property
    def cancelling(self) -> str | None:
        """Why the run is to stop, as far as is known here; None while it is not."""
        return self._outbox().cancelling

    def cancel(self, reason: str = "cancelled") -> Status:
        """Ask the run to stop, from wherever. One that no worker has begun is over at once."""
        broker = self.streaming.broker
        status = broker.run(Cancel(self.channel_id, reason))
        if status.state in ("waiting", "queued"):
            try:
                broker.run(_cancelled(self.channel_id, reason))
            except RunEndedError:
                pass
        return status

    async def cancel_async(self, reason: str = "cancelled") -> Status:
        return await cancel_run(self.streaming, self.channel_id, reason)

    # Attempts

    def begin_attempt(self, worker: str | None = None) -> int:
        """Number this attempt: verbs of earlier ones are refused from now on [C7]. Return its number, from 1.

        For job runners that deliver a job again when its worker died; the queue of this package calls it itself.
        """
        status = self.streaming.broker.run(BeginAttempt(self.channel_id))
        for event in self._attempt_begun(status, worker):
            self._put(event)
        return self.attempt

    async def begin_attempt_async(self, worker: str | None = None) -> int:
        status = await self.streaming.broker.run_async(BeginAttempt(self.channel_id))
        for event in self._attempt_begun(status, worker):
            await self._put_async(event)
        return self.attempt

    def _attempt_begun(self, status: Status, worker: str | None) -> list[StreamEvent]:
        if status.state in events.ENDINGS:
            raise RunEndedError(self.channel_id, status.state)
        outbox = self._outbox()
        self.attempt = outbox.attempt = status.attempt
        outbox.cancelling = outbox.cancelling or status.cancelling
        begun = [_event("started", {"attempt": self.attempt, "worker": worker or f"{platform.node()}:{os.getpid()}"})]
        if self.attempt > 1:
            begun.insert(0, _event("attempt_lost", {"attempt": self.attempt - 1}))
        return begun

    def queued(self) -> None:
        """Say that the run waits for a worker. Waits until Redis has it."""
        frame = encode_block(_event("queued", {}))
        self.streaming.broker.run(Append(self.channel_id, (frame,), state="queued", about=self.about))

    async def queued_async(self) -> None:
        frame = encode_block(_event("queued", {}))
        await self.streaming.broker.run_async(Append(self.channel_id, (frame,), state="queued", about=self.about))

    # As a block, and around an iterable

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        """End the run if it is not over: complete, cancelled, or failed without the exception's text [W5]."""
        ending = self._ending_for(exc)
        try:
            if ending is not None:
                self._end(ending)
        except (BackendError, RunEndedError) as failure:
            if exc is None:
                raise
            logger.error("channel %s: its ending could not be published: %s", self.channel_id, failure)
        return isinstance(exc, RunCancelledError)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        ending = self._ending_for(exc)
        try:
            if ending is not None:
                await self.end_async(ending)
        except (BackendError, RunEndedError) as failure:
            if exc is None:
                raise
            logger.error("channel %s: its ending could not be published: %s", self.channel_id, failure)
        return isinstance(exc, RunCancelledError)

    def _ending_for(self, exc: BaseException | None) -> StreamEvent | None:
        if self.ended is not None or isinstance(exc, RunEndedError):
            return None
        if exc is None:
            return events.complete()
        if isinstance(exc, RunCancelledError):
            return events.cancelled(exc.reason)
        if isinstance(exc, asyncio.CancelledError | KeyboardInterrupt | SystemExit):
            outbox = self._outbox_made
            return events.cancelled((outbox.cancelling if outbox else None) or "interrupted")
        told = failure_id()
        logger.error("run of channel %s failed (id %s)", self.channel_id, told, exc_info=exc)
        return events.failed(type(exc).__name__, "the task failed", retryable=False, id=told)

    def track(self, items: Iterable[T], *, total: int | None = None, step: str | None = None) -> Iterator[T]:
        """Yield *items*, and publish the progress: once per percent. A bar of tqdm's is an iterable, too.

        Raises `RunCancelledError` when somebody asked for the run to stop.
        """
        if total is None:
            total = getattr(items, "total", None)
        if total is None:
            try:
                total = len(items)  # type: ignore[arg-type]
            except TypeError:
                raise ConfigurationError("these items have no length: give total=") from None
        shown = -1
        for done, item in enumerate(items):
            percent = 100 if total <= 0 else min(done * 100 // total, 100)
            if percent != shown:
                shown = percent
                self.progress(percent, step)
            self.raise_if_cancelled()
            yield item
        if shown != 100:
            self.progress(100, step)

    def channel(self) -> SyncStreamChannel:
        """The run's channel, for reading it."""
        return SyncStreamChannel(self.channel_id, streaming=self.streaming)

    def __repr__(self) -> str:
        return f"<StreamContext {self.channel_id} of {self.workspace_id!r}{', ' + self.ended if self.ended else ''}>"

    def __del__(self) -> None:
        outbox = getattr(self, "_outbox_made", None)
        if outbox is not None and outbox.alive_every is not None:
            outbox.alive_every = None  # without the lock: this may run anywhere

    # Inside

    @property
    def streaming(self) -> Streaming:
        """What it publishes through: the given one, or the process default."""
        if self._given is None:
            from asgi_stream.runtime import current_streaming

            self._given = current_streaming()
        return self._given

    @property
    def about(self) -> bytes:
        """Whose run it is, as the record of events has it: JSON."""
        made: dict[str, Any] = {"workspace": self.workspace_id, "project": self.project, "env": self.env}
        made |= {"service": self.service, "labels": [f"{name}={value}" for name, value in self.labels.items()]}
        return events.json_bytes({name: value for name, value in made.items() if value})

    def _outbox(self) -> Outbox:
        outbox = self._outbox_made
        if outbox is None or self._pid != os.getpid():  # after a fork this is another producer
            with self._lock:
                outbox = self._outbox_made
                if outbox is None or self._pid != os.getpid():
                    streaming = self.streaming
                    outbox = streaming.courier.outbox(Outgoing(self.channel_id, streaming.channel_settings, self.about))
                    outbox.attempt = self.attempt
                    self._outbox_made, self._pid = outbox, os.getpid()
        return outbox

    def _show_life(self, outbox: Outbox) -> None:
        if self._rebuilt and outbox.alive_every is None and self.ended is None:
            outbox.live(self.streaming.channel_settings.producer_timeout / SIGNS)

    def _put(self, event: StreamEvent) -> None:
        if self.ended is not None:
            raise RunEndedError(self.channel_id, self.ended)
        outbox = self._outbox()
        outbox.put(outbox.outgoing.frame(event))
        self._show_life(outbox)

    async def _put_async(self, event: StreamEvent) -> None:
        if self.ended is not None:
            raise RunEndedError(self.channel_id, self.ended)
        outbox = self._outbox()
        await self._sent_before(outbox)
        appended = await self._sender(outbox).send([outbox.outgoing.frame(event)], attempt=self.attempt)
        outbox.cancelling = outbox.cancelling or appended.cancelling
        self._show_life(outbox)

    def _end(self, event: StreamEvent) -> None:
        if self.ended is not None:
            raise RunEndedError(self.channel_id, self.ended)
        outbox = self._outbox()
        frame = outbox.outgoing.frame(event)
        if not outbox.flush(FLUSH_SECONDS):
            raise BackendError(f"channel {self.channel_id}: Redis did not take what was said before the ending")
        streaming = self.streaming
        outbox.outgoing.done(
            streaming.broker.run(outbox.outgoing.append([frame], ending=event.event, attempt=self.attempt))
        )
        self.ended = event.event
        outbox.stop()

    async def end_async(self, event: StreamEvent) -> None:
        """End the run with *event*, one of the endings."""
        if self.ended is not None:
            raise RunEndedError(self.channel_id, self.ended)
        outbox = self._outbox()
        frame = outbox.outgoing.frame(event)
        await self._sent_before(outbox)
        await self._sender(outbox).send([frame], ending=event.event, attempt=self.attempt)
        self.ended = event.event
        outbox.stop()

    async def _sent_before(self, outbox: Outbox) -> None:
        """What the plain verbs have said comes first."""
        if outbox.failure is not None:
            raise outbox.failure
        if not outbox._is_empty() and not await asyncio.to_thread(outbox.flush, FLUSH_SECONDS):
            raise BackendError(f"channel {self.channel_id}: Redis did not take what was said before")

    def _sender(self, outbox: Outbox) -> AsyncSender:
        loop = asyncio.get_running_loop()
        sender = self._senders.get(loop)
        if sender is None:
            self._senders = {known: made for known, made in self._senders.items() if not known.is_closed()}
            outgoing = Outgoing(self.channel_id, self.streaming.channel_settings, self.about)
            sender = self._senders[loop] = AsyncSender(self.streaming, outgoing)
        return sender


def find_context(entity: Any) -> Any:
    """Return the part of *entity* that `StreamContext.to_dict()` made: itself, or one of its values; or None."""
    values = entity.values() if isinstance(entity, Mapping) else ()
    for value in (entity, *values):
        if isinstance(value, Mapping) and MARK in value:
            return value
    return None


async def cancel_run(streaming: Streaming, channel_id: str, reason: str) -> Status:
    """Ask a run to stop. One that no worker has begun is over at once."""
    status = await streaming.broker.run_async(Cancel(channel_id, reason))
    if status.state in ("waiting", "queued"):
        try:
            await streaming.broker.run_async(_cancelled(channel_id, reason))
        except RunEndedError:
            pass
    return status


def _cancelled(channel_id: str, reason: str) -> Append:
    return Append(channel_id, (encode_block(events.cancelled(reason)),), ending="cancelled")


def _event(name: str, data: dict[str, Any]) -> StreamEvent:
    return StreamEvent({**data, "ts": events.now_ms()}, name)


def _log(message: str, level: str, logger: str | None, fields: Mapping[str, Any] | None) -> StreamEvent:
    if level not in LEVELS:
        raise InvalidEventError("level", f"must be one of {', '.join(LEVELS)}, not {level!r}")
    data: dict[str, Any] = {"message": str(message), "level": level}
    if logger is not None:
        data["logger"] = logger
    if fields:
        data["fields"] = dict(fields)
    return _event("log", data)


def _progress(percent: Any, step: str | None) -> StreamEvent:
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= 100:
        raise InvalidEventError("percent", f"must be a number from 0 to 100, not {percent!r}")
    return _event("progress", {"percent": percent, "step": step})


def failure_id() -> str:
    """Return an id by which a failure that a client is told of is found in the log."""
    return os.urandom(6).hex()
