"""The seam between channels and where they are kept.

A broker runs commands and carries what was appended to whoever subscribed: ordered per channel, live, and without a
promise that nothing is lost on the way. What makes delivery whole is above it, in the hub: it notices gaps by the
offsets and reads what is missing.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from asgi_stream.channels.commands import Command
from asgi_stream.channels.model import Position

T = TypeVar("T")


class Listener(Protocol):
    """Who is told what a subscriber hears. Called in the subscriber's event loop."""

    async def on_frames(self, frames: list[tuple[str, bytes]]) -> None:
        """These were appended: channel and frame, in order, as many as came at once."""

    def on_subscribed(self, channel: str) -> None:
        """From now on everything appended to *channel* comes; also after every reconnection."""

    def on_announcement(self, message: bytes) -> None:
        """Some process told all of them this, with `Broker.announce`."""

    def on_lost(self, channels: list[str]) -> None:
        """A connection is gone: what is appended to these now does not come, until `on_subscribed` again."""


class Subscriber(Protocol):
    """One subscription connection of one event loop, for any number of channels [C4]. It reconnects by itself."""

    def subscribe(self, channel: str) -> None:
        """Ask for *channel*; the listener's `on_subscribed` says when it has begun."""

    def unsubscribe(self, channel: str) -> None:
        """Let *channel* go."""

    async def aclose(self) -> None:
        """End the connection. Nothing is told any more."""


class Broker(Protocol):
    """Where channels are kept. One object serves every thread and every event loop of its process."""

    def run(self, command: Command[T]) -> T:
        """Do it and wait. Raises `BackendError` when it could not be done in time."""

    async def run_async(self, command: Command[T]) -> T:
        """`run()` without blocking the event loop."""

    def wait(self, channel: str, after: Position, seconds: float) -> None:
        """Block until something comes after a position, or for so long. May return early."""

    async def announce(self, message: bytes) -> None:
        """Tell all processes that listen at the moment. Raises `BackendError`."""

    def subscriber(self, listener: Listener) -> Subscriber:
        """Make the running event loop's subscription connection."""

    def close(self) -> None:
        """Let go of what sync code used."""

    async def aclose(self) -> None:
        """Let go of what the running event loop used, too."""
