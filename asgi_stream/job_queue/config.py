"""The settings of a queue, the same for those who order and those who work."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from asgi_stream.config import QueueRedisConfig, check_key_part, check_seconds, check_whole
from asgi_stream.errors import ConfigurationError

Operation = Callable[[Any], Any]
"""What a job runs: from the entity to anything; sync or async."""

F = TypeVar("F", bound=Operation)


@dataclass(slots=True)
class QueueConfig:
    """A queue in Redis, and how its jobs run. Times are in seconds.

    ``redis_url``: default ``REDIS_URL``. ``queue``: its name; workers of one queue should know the same operations.
    ``operations_registry``: what workers can do, by name; `operation` adds a function.

    A job is given up after ``timeout``. One that raises is run again up to ``retries`` times, ``retry_delay`` later
    and twice as late each time, at most 5 minutes. One whose worker died is run again up to ``redeliveries`` times, by
    any worker, once the dead one has been silent for ``redelivery_timeout``: the same for all workers of a queue, and
    the longest time for which an async job may block its event loop.

    ``enqueue_timeout`` bounds `QueueManager.enqueue`. A worker that is told to stop waits ``shutdown_timeout`` for its
    jobs, then hands them back. A job that is to stop has ``cancel_timeout`` to do so by itself. Outcomes are kept for
    ``result_seconds``. ``max_entity_bytes`` bounds what is sent to a job.
    """

    redis_url: str | None = None
    queue: str = "default"
    operations_registry: dict[str, Operation] = field(default_factory=dict)
    timeout: float = 3600.0
    retries: int = 0
    retry_delay: float = 1.0
    redeliveries: int = 3
    redelivery_timeout: float = 15.0
    enqueue_timeout: float = 1.0
    shutdown_timeout: float = 30.0
    cancel_timeout: float = 10.0
    result_seconds: float = 900.0
    max_entity_bytes: int = 1024 * 1024

    def __post_init__(self) -> None:
        if self.redis_url is None:
            self.redis_url = os.environ.get("REDIS_URL") or None
        if self.redis_url is None:
            raise ConfigurationError(
                "a queue needs a Redis that web and worker processes share: set REDIS_URL, or give redis_url="
            )
        QueueRedisConfig(self.redis_url)
        check_key_part("queue", self.queue)
        for name in ("timeout", "retry_delay", "redelivery_timeout", "enqueue_timeout", "shutdown_timeout"):
            check_seconds(name, getattr(self, name))
        for name in ("cancel_timeout", "result_seconds"):
            check_seconds(name, getattr(self, name))
        check_whole("retries", self.retries, least=0)
        check_whole("redeliveries", self.redeliveries, least=0)
        check_whole("max_entity_bytes", self.max_entity_bytes, least=1)

    @property
    def redis(self) -> QueueRedisConfig:
        """Where the queue is."""
        assert self.redis_url is not None
        return QueueRedisConfig(self.redis_url)

    def operation(self, function: F) -> F:
        """Register *function* under its own name, ``module.qualname``: as a decorator, or called."""
        self.operations_registry[name_of(function)] = function
        return function

    @classmethod
    def of(cls, given: QueueConfig | QueueRedisConfig | str | None) -> QueueConfig:
        """Return *given* as a `QueueConfig`."""
        if isinstance(given, QueueConfig):
            return given
        if isinstance(given, QueueRedisConfig):
            return cls(given.url)
        if given is None or isinstance(given, str):
            return cls(given)
        raise ConfigurationError(
            f"a queue takes a QueueConfig, a QueueRedisConfig or a URL, not {type(given).__name__}"
        )


def name_of(processor: str | Operation) -> str:
    """Return the name under which workers know *processor*: itself, or ``module.qualname`` of a function."""
    if isinstance(processor, str):
        if not processor or len(processor) > 256 or not processor.isprintable():
            raise ConfigurationError(f"processor must be a printable name of 1 to 256 characters, not {processor!r}")
        return processor
    if not callable(processor):
        raise ConfigurationError(
            f"processor must be the name of an operation or a function, not {type(processor).__name__}"
        )
    name = f"{getattr(processor, '__module__', None)}.{getattr(processor, '__qualname__', None)}"
    if "<" in name or not inspect.isroutine(processor):
        raise ConfigurationError(
            f"{processor!r} has no name by which a worker could find it; register it under one, and give that name"
        )
    if name.startswith("__main__."):
        raise ConfigurationError(
            f"{name} is defined in the program that was started, which has another name elsewhere: put it in a module, "
            "or register it under a name, and give that name"
        )
    return name
