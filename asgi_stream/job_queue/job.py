"""A job as those who ordered it see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from asgi_stream.job_queue.manager import QueueManager

State = Literal["queued", "running", "completed", "failed", "cancelled", "unknown"]


@dataclass(frozen=True, slots=True)
class JobStatus:
    """How a job stands.

    ``unknown``: it never reached the queue, or its outcome is no longer kept. ``result`` is what it returned, ``error``
    why it failed. ``attempt`` counts its runs after failures, ``worker`` is who has or had it. A job whose run has been
    cancelled or has failed stands so, whatever its function returned.
    """

    state: State
    attempt: int = 0
    worker: str | None = None
    result: Any = None
    error: str | None = None

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self.state in ("completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class QueueStats:
    """A queue at one moment.

    ``depth``: jobs that wait, ``oldest_seconds``: for how long the first of them has; ``running``: those that workers
    have; ``workers``: the names of those alive, each with the operations it knows.
    """

    depth: int
    oldest_seconds: float
    running: int
    workers: dict[str, frozenset[str]]


class Job:
    """A job that was ordered. ``id`` finds it again, from any process: `QueueManager.job()`.

    ``warning`` says what may keep it from running, such as that no worker is alive.
    """

    def __init__(
        self,
        manager: QueueManager,
        job_id: str,
        *,
        processor: str | None = None,
        channel_id: str | None = None,
    ) -> None:
        self.id = job_id
        self.processor = processor
        self.channel_id = channel_id
        self.warning: str | None = None
        self._manager = manager

    def status(self) -> JobStatus:
        """Ask how it stands. Raises `BackendError`."""
        return self._manager._call(self._manager._status(self))

    async def status_async(self) -> JobStatus:
        return await self._manager._call_async(self._manager._status(self))

    def cancel(self, reason: str = "cancelled") -> None:
        """Ask it to stop: at once if it still waits, else as its worker can. Raises `BackendError`."""
        self._manager._call(self._manager._cancel(self, reason))

    async def cancel_async(self, reason: str = "cancelled") -> None:
        await self._manager._call_async(self._manager._cancel(self, reason))

    def __repr__(self) -> str:
        return f"<Job {self.id}{f' of {self.processor}' if self.processor else ''}>"
