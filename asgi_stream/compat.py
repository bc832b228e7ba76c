"""The emitters of an earlier system, thin over `StreamContext`, so that code written for it runs here.

New code uses `StreamContext`, which can do more.
"""

from __future__ import annotations

from typing import Any

from asgi_stream.context import StreamContext
from asgi_stream.runtime import stream_lease

__all__ = ["DeploymentEmitter", "SSEEmitter", "stream_lease"]


class SSEEmitter:
    """Publishes events of any name to a channel.

    Without *channel_id* it makes a channel that belongs to *workspace_id*. `close` ends the run with `complete`, and
    does nothing if it has ended. Raises what `StreamContext` does.
    """

    def __init__(self, channel_id: str | None = None, *, workspace_id: str = "") -> None:
        if channel_id is None:
            self.context = StreamContext.create(workspace_id)
        else:
            self.context = StreamContext(channel_id, workspace_id)

    @property
    def channel_id(self) -> str:
        """The channel to which viewers subscribe."""
        return self.context.channel_id

    def emit(self, event: str, data: Any) -> None:
        """Publish an event. An ending's name (`complete`, `failed`, `cancelled`) ends the run."""
        self.context.emit(event, data)

    async def emit_async(self, event: str, data: Any) -> None:
        await self.context.emit_async(event, data)

    def close(self) -> None:
        """End the run, if it is not over."""
        if self.context.ended is None:
            self.context.complete()

    async def close_async(self) -> None:
        if self.context.ended is None:
            await self.context.complete_async()


class DeploymentEmitter(SSEEmitter):
    """Tells how a deployment goes."""

    def __init__(
        self, workspace_id: str, project: str | None = None, env: str | None = None, service: str | None = None
    ) -> None:
        self.context = StreamContext.create(workspace_id, project, env, service)

    def log(self, message: str, level: str = "info") -> None:
        """Publish a line of log."""
        self.context.log(message, level)

    async def log_async(self, message: str, level: str = "info") -> None:
        await self.context.log_async(message, level)

    def progress(self, percent: float, step: str | None = None) -> None:
        """Publish how far it is, from 0 to 100 percent."""
        self.context.progress(percent, step)

    async def progress_async(self, percent: float, step: str | None = None) -> None:
        await self.context.progress_async(percent, step)

    def success(self, **result: Any) -> None:
        """End it well, with its result."""
        self.context.complete(True, **result)

    async def success_async(self, **result: Any) -> None:
        await self.context.complete_async(True, **result)

    def failure(self, message: str) -> None:
        """End it as failed. *message* is for the client's eyes."""
        self.context.fail("deployment_failed", message)

    async def failure_async(self, message: str) -> None:
        await self.context.fail_async("deployment_failed", message)
