"""What we use of the job engine, pydocket, in one place.

A job is one message of docket's stream: the processor is the task's name, so docket's metrics, traces and lists of
workers have it; its arguments are the entity, as JSON, and the job's own limits. docket pickles them: whoever may write
to the queue's Redis may run code in its workers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from asgi_stream.context import find_context
from asgi_stream.errors import require
from asgi_stream.job_queue.config import QueueConfig
from asgi_stream.job_queue.job import JobStatus, QueueStats, State

require("docket", extra="queue")

from docket import CurrentExecution, Docket, Execution, Worker  # noqa: E402
from docket.dependencies import AdmissionBlocked, Retry, TaskOutcome, current_execution  # noqa: E402
from docket.execution import ExecutionState  # noqa: E402
from redis.asyncio import Redis  # noqa: E402
from redis.asyncio.retry import Retry as AsyncRetry  # noqa: E402
from redis.backoff import ExponentialBackoff  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["CurrentExecution", "Docket", "Execution"]

FULL_CHECK = timedelta(milliseconds=5)
"""How often a worker whose slots are full looks for a free one."""
IDLE_CHECK = timedelta(milliseconds=250)
"""How long one blocking read waits for a job; one that comes meanwhile is read at once."""
MAX_RETRY_DELAY = 300.0
PATIENCE_KEPT = 7 * 24 * 3600
"""Seconds for which the setting of the last worker that came is compared."""
OUTAGE_TRIES = 90
"""How often a command is tried while Redis is away: for about so many seconds."""

_STATES: dict[ExecutionState, State] = {
    ExecutionState.SCHEDULED: "queued",
    ExecutionState.QUEUED: "queued",
    ExecutionState.RUNNING: "running",
    ExecutionState.COMPLETED: "completed",
    ExecutionState.FAILED: "failed",
    ExecutionState.CANCELLED: "cancelled",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How one job runs: the queue's settings, or what `enqueue` was given instead."""

    timeout: float
    retries: int
    retry_delay: float
    redeliveries: int

    def to_dict(self) -> dict[str, float]:
        return {
            "timeout": self.timeout,
            "retries": self.retries,
            "retry_delay": self.retry_delay,
            "redeliveries": self.redeliveries,
        }

    @classmethod
    def from_dict(cls, made: Mapping[str, Any]) -> Limits:
        return cls(made["timeout"], made["retries"], made["retry_delay"], made["redeliveries"])


class JobError(Exception):
    """What docket is told when a job did not succeed. ``again``: it is to be run another time."""

    def __init__(self, message: str, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


class _JobRetry(Retry):
    """Retries by the job's own limits, and only what is to be run again."""

    async def __aenter__(self) -> _JobRetry:
        execution = current_execution.get()
        limits = Limits.from_dict(execution.kwargs["limits"])
        delay = min(limits.retry_delay * 2 ** min(execution.attempt - 1, 20), MAX_RETRY_DELAY)
        return _JobRetry(attempts=limits.retries + 1, delay=timedelta(seconds=delay))

    async def handle_failure(self, execution: Execution, outcome: TaskOutcome) -> bool:
        if not isinstance(outcome.exception, JobError) or not outcome.exception.again:
            return False
        return await super().handle_failure(execution, outcome)


JOB_RETRY: Any = _JobRetry()


class JobWorker(Worker):
    """docket's worker. A job that comes is read at once, and a slot that became free is used soon after.

    docket has one setting for both waits, and sleeps that long while its slots are full.
    """

    @property
    def minimum_check_interval(self) -> timedelta:
        return FULL_CHECK if len(self._tasks_by_key) >= self.concurrency else IDLE_CHECK

    @minimum_check_interval.setter
    def minimum_check_interval(self, value: timedelta) -> None:
        pass


def open_docket(config: QueueConfig) -> Docket:
    """Return the docket of *config*'s queue, to be entered."""
    docket = Docket(
        name=f"stream_jobs:{config.queue}",
        url=_url(config),
        execution_ttl=timedelta(seconds=config.result_seconds),
    )
    docket.tasks.clear()  # its own samples are not our users' operations
    return docket


async def endure(docket: Docket) -> None:
    """Let the worker wait for a Redis that is away for a while.

    docket's worker stops to take jobs, and to keep those it has, at the first error; then it waits for those to end.
    """
    async with docket.redis() as entered:
        client: Any = entered
        if isinstance(client, Redis):  # a cluster's client has its own way
            client.set_retry(AsyncRetry(ExponentialBackoff(cap=1.0, base=0.02), OUTAGE_TRIES))


def make_worker(
    docket: Docket, config: QueueConfig, *, name: str, slots: int, unknown: Callable[..., Awaitable[Any]]
) -> JobWorker:
    """Return a worker; *unknown* runs for operations that it does not know."""
    return JobWorker(
        docket,
        name=name,
        concurrency=slots,
        redelivery_timeout=timedelta(seconds=config.redelivery_timeout),
        reconnection_delay=timedelta(seconds=1),
        scheduling_resolution=timedelta(milliseconds=100),
        schedule_automatic_tasks=False,
        fallback_task=unknown,
    )


@dataclass(frozen=True, slots=True)
class Order:
    """A job on its way into the queue."""

    key: str
    processor: str
    entity: bytes
    limits: Limits


async def add(docket: Docket, orders: Sequence[Order]) -> None:
    """Put jobs into the queue, in one round trip. A key that is there already stays as it is, so it may be repeated."""
    for order in orders:
        if order.processor not in docket.tasks:
            docket.register(_placeholder, names=[order.processor])
    if len(orders) == 1:
        order = orders[0]
        await docket.add(order.processor, key=order.key)(entity=order.entity, limits=order.limits.to_dict())
        return
    calls = [
        docket.call(order.processor, key=order.key)(entity=order.entity, limits=order.limits.to_dict())
        for order in orders
    ]
    for execution in await docket.add_many(calls):
        if execution.schedule_exception is not None:
            raise execution.schedule_exception


async def status(docket: Docket, key: str) -> tuple[JobStatus, Execution | None]:
    """Return how the job stands, and what docket knows of it."""
    execution = await docket.get_execution(key)
    if execution is None:
        return JobStatus("unknown"), None
    state = _STATES[execution.state]
    result = await execution.get_result() if state == "completed" else None
    error = execution.error and execution.error.removeprefix(f"{JobError.__name__}: ")
    return JobStatus(state, execution.attempt, execution.worker, result, error), execution


async def stats(docket: Docket) -> QueueStats:
    """Count without reading the jobs: a queue may be long."""
    async with docket.redis() as redis:
        async with redis.pipeline() as pipeline:
            pipeline.xlen(docket.stream_key)
            pipeline.zcard(docket.queue_key)
            length, later = await pipeline.execute()
        running, now = 0, time.time()
        oldest = now
        after = "-"
        if length:
            for group in await redis.xinfo_groups(docket.stream_key):
                running += int(group["pending"])
                after = "(" + group["last-delivered-id"].decode()
            for entry_id, _ in await redis.xrange(docket.stream_key, min=after, count=1):
                oldest = int(entry_id.split(b"-")[0]) / 1000
    return QueueStats(
        depth=max(int(length) - running, 0) + int(later),
        oldest_seconds=max(now - oldest, 0.0),
        running=running,
        workers={worker.name: frozenset(worker.tasks) for worker in await docket.workers()},
    )


async def deliveries(docket: Docket, execution: Execution) -> int:
    """Return how often Redis has given this job to a worker: more than once after one died with it."""
    if not execution.redelivered or execution.message_id is None:
        return 1
    async with docket.redis() as redis:
        pending = await redis.xpending_range(
            docket.stream_key,
            docket.worker_group_name,
            min=execution.message_id,
            max=execution.message_id,
            count=1,
        )
    return int(pending[0]["times_delivered"]) if pending else 1


async def other_patience(docket: Docket, worker: str, seconds: float) -> float | None:
    """Note this worker's ``redelivery_timeout``; return the one that was there, if it is another and a worker is alive.

    A job is renewed as often as its own worker's setting asks for, and taken away by what the others' say.
    """
    async with docket.redis() as redis:
        before = await redis.set(docket.key("redelivery_timeout"), repr(seconds), ex=PATIENCE_KEPT, get=True)
    if before is None or float(before) == seconds:
        return None
    return float(before) if any(other.name != worker for other in await docket.workers()) else None


def leave(execution: Execution) -> AdmissionBlocked:
    """What to raise for a job that is no longer ours: docket writes nothing, and its message stays for others."""
    return AdmissionBlocked(execution, "another attempt", handled=True)


def later(execution: Execution, seconds: float) -> AdmissionBlocked:
    """What to raise for a job that another worker may run: it goes back into the queue."""
    return AdmissionBlocked(execution, "another worker", retry_delay=timedelta(seconds=seconds))


async def _placeholder(entity: bytes, limits: dict[str, Any]) -> None:
    """Stands for an operation where it is only ordered."""


def _url(config: QueueConfig) -> str:
    url = config.redis.url
    parts = urlsplit(url)
    if parts.scheme.endswith("+cluster") and "," in parts.netloc:
        # docket begins with one node of a cluster and learns the others from it.
        user, at, hosts = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}{hosts.split(',')[0]}").geturl()
    return url


def channel_of(execution: Execution | None) -> str | None:
    """Return the channel of the run that the job belongs to, if it belongs to one."""
    if execution is None:
        return None
    made = find_context(msgspec.json.decode(execution.kwargs["entity"]))
    return None if made is None else made["channel_id"]
