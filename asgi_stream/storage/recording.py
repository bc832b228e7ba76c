"""A broker that hands what it appended over for the record."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from asgi_stream.channels.broker import Broker, Listener, Subscriber
from asgi_stream.channels.commands import Append, Appended, Command
from asgi_stream.channels.model import Position
from asgi_stream.events import now_ms
from asgi_stream.storage.sink import Entry

T = TypeVar("T")

REMEMBERED = 4096
"""Channels of which it is known whose they are, for events that others write there: a worker that was lost."""


class RecordingBroker:
    """Does what *broker* does. What that has acknowledged is handed over, by the process that published it."""

    def __init__(self, broker: Broker, offer: Callable[[Entry], None]) -> None:
        self._broker = broker
        self._offer = offer
        self._about: OrderedDict[str, bytes] = OrderedDict()

    def run(self, command: Command[T]) -> T:
        result = self._broker.run(command)
        if type(command) is Append:
            self._hand_over(command, result)
        return result

    async def run_async(self, command: Command[T]) -> T:
        result = await self._broker.run_async(command)
        if type(command) is Append:
            self._hand_over(command, result)
        return result

    def _hand_over(self, command: Append, result: Any) -> None:
        appended: Appended = result
        if not appended.last:
            return  # nothing was to be done
        about = command.about
        if about:
            if command.channel not in self._about:
                self._about[command.channel] = about
                if len(self._about) > REMEMBERED:
                    self._about.popitem(last=False)
        else:
            about = self._about.get(command.channel, b"")
        self._offer(Entry(command.channel, about, appended.epoch, appended.first, command.frames, now_ms()))

    def wait(self, channel: str, after: Position, seconds: float) -> None:
        self._broker.wait(channel, after, seconds)

    async def announce(self, message: bytes) -> None:
        await self._broker.announce(message)

    def subscriber(self, listener: Listener) -> Subscriber:
        return self._broker.subscriber(listener)

    def close(self) -> None:
        self._broker.close()

    async def aclose(self) -> None:
        await self._broker.aclose()


if TYPE_CHECKING:
    _conforms: type[Broker] = RecordingBroker
