"""Jobs: work that a web process orders and worker processes do, each job with its own event stream.

`QueueManager` is for those who order, `QueueWorker` for those who work; between them is Redis, and pydocket (extra
``queue``). The settings load without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asgi_stream.config import QueueRedisConfig
    from asgi_stream.job_queue.config import QueueConfig
    from asgi_stream.job_queue.job import Job, JobStatus, QueueStats
    from asgi_stream.job_queue.manager import QueueManager
    from asgi_stream.job_queue.worker import QueueWorker

_HOMES = {
    "Job": "job_queue.job",
    "JobStatus": "job_queue.job",
    "QueueConfig": "job_queue.config",
    "QueueManager": "job_queue.manager",
    "QueueRedisConfig": "config",
    "QueueStats": "job_queue.job",
    "QueueWorker": "job_queue.worker",
}

__all__ = ["Job", "JobStatus", "QueueConfig", "QueueManager", "QueueRedisConfig", "QueueStats", "QueueWorker"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"asgi_stream.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
