"""Every exception of this package.

StreamError
├── InvalidEventError (ValueError)      an event that cannot be put on the wire
├── InvalidEntityError (ValueError)     what a job cannot be given
├── ConfigurationError (ValueError)     a setting, a key or a combination that cannot work
│   └── UnknownProcessorError           an operation that nobody has registered
├── StreamLimitExceeded                 no lease was free
├── RunEndedError                       a verb for a run that is over
├── RunCancelledError                   somebody asked for the run to stop
├── AttemptSupersededError              a verb of an attempt that another one has replaced
├── BackendError                        Redis or OpenSearch did not do what was asked
│   └── EnqueueError                    a job that may not be in the queue
└── MissingExtraError (ImportError)     an optional package is not installed

StreamLeaseWarning (UserWarning) marks uses of leases that do not limit what they seem to limit.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asgi_stream.job_queue.job import Job


class StreamError(Exception):
    """The root of every exception of this package."""


class InvalidEventError(StreamError, ValueError):
    """An event that the event-stream format cannot carry. ``field`` names the part that is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class InvalidEntityError(StreamError, ValueError):
    """What a job was to be given has no JSON form, or is too large."""


class ConfigurationError(StreamError, ValueError):
    """A setting that cannot work; the text names the setting and what it takes."""


class UnknownProcessorError(ConfigurationError):
    """A job for an operation that is not registered. ``name`` is its name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        names = ", ".join(sorted(known)[:20]) or "none"
        super().__init__(f"no operation {name!r} is registered; known: {names}")
        self.name = name


class StreamLimitExceeded(StreamError):  # noqa: N818 - a public name of the design
    """No lease was free for ``key``.

    ``limit`` and ``in_use`` count leases, ``scope`` says whose limit it is, and ``retry_after`` is in seconds: an
    estimate from the lengths of recent streams, jittered so that refused clients do not come back together.
    """

    def __init__(
        self, key: str, *, limit: int, in_use: int | None = None, retry_after: float = 1.0, scope: str = "user"
    ) -> None:
        # Not super().__init__(): in a subclass that is an HTTPException as well, that would be HTTPException's.
        Exception.__init__(
            self, f"all {limit} streams of this {scope} are in use; close one, or retry in about {retry_after:.0f} s"
        )
        self.key = key
        self.limit = limit
        self.in_use = limit if in_use is None else in_use
        self.retry_after = retry_after
        self.scope = scope


class RunEndedError(StreamError):
    """The run has its ending already, and nothing can follow it. ``ending`` is its name."""

    def __init__(self, channel: str, ending: str) -> None:
        super().__init__(f"the run of channel {channel} is over ({ending}); begin another one with a new context")
        self.channel = channel
        self.ending = ending


class RunCancelledError(StreamError):
    """The run is to stop: raised by `StreamContext.raise_if_cancelled()`. ``reason`` says why."""

    def __init__(self, channel: str, reason: str) -> None:
        super().__init__(f"the run of channel {channel} was cancelled: {reason}")
        self.channel = channel
        self.reason = reason


class AttemptSupersededError(StreamError):
    """A later attempt of the same job has begun: this one must stop, and may publish nothing any more [C7]."""

    def __init__(self, channel: str, attempt: int, current: int) -> None:
        super().__init__(f"attempt {attempt} of channel {channel} was given up; attempt {current} is running")
        self.channel = channel
        self.attempt = attempt
        self.current = current


class BackendError(StreamError):
    """Redis or OpenSearch refused or did not answer. The driver's own exception is the ``__cause__``."""


class EnqueueError(BackendError):
    """Redis did not take a job, or did not say whether it did. ``job`` can be cancelled in either case."""

    def __init__(self, message: str, job: Job) -> None:
        super().__init__(message)
        self.job = job


class MissingExtraError(StreamError, ImportError):
    """An optional package is needed; the text holds the ``pip install`` line."""


class StreamLeaseWarning(UserWarning):
    """A lease that does not limit what it seems to limit."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import the optional *module*, or say which extra brings it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name != module.partition(".")[0]:
            raise  # the package is there but broken: show its own error
        raise MissingExtraError(f"{module} is needed here: pip install 'asgi-stream[{extra}]'") from exc
