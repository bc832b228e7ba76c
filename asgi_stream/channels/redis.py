"""Channels in Redis: sync code over redis-py, async code over one pipelined connection and one subscription [C4]."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from redis import exceptions  # here, not at first use: a process that is about to end can import nothing more

from asgi_stream.channels.broker import Broker, Listener, Subscriber
from asgi_stream.channels.commands import Command
from asgi_stream.channels.model import Position
from asgi_stream.channels.redis_commands import SCRIPTS, announcements, encode, log_key
from asgi_stream.channels.redis_subscriber import ClusterSubscriber, RedisSubscriber
from asgi_stream.config import ChannelConfig, QueueRedisConfig
from asgi_stream.errors import BackendError, ConfigurationError, StreamError
from asgi_stream.redis.callers import ClusterCaller, PipeCaller, may_pass
from asgi_stream.redis.locate import COMMAND_TIMEOUT, Location, connect
from asgi_stream.redis.pipe import Pipe, ReplyError, UnavailableError
from asgi_stream.redis.scripts import Call

logger = logging.getLogger("asgi_stream")

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds for which a command is sent again before it fails."""


class RedisBroker:
    """Channels of all processes that share a Redis."""

    def __init__(
        self,
        redis: QueueRedisConfig,
        config: ChannelConfig | None = None,
        *,
        patience: float = PATIENCE,
        archived: bool = False,
    ) -> None:
        self.config = config or ChannelConfig()
        self.patience = patience
        self.location = Location(redis)
        if archived and self.location.kind == "cluster":
            raise ConfigurationError("writer='archiver' needs one Redis, no cluster: let publishers write the record")
        self._archived = archived
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._sync: Any = None
        # In a cluster what is appended is published where the log is, not to every node.
        self._verb = "SPUBLISH" if self.location.kind == "cluster" else "PUBLISH"
        self._callers: WeakKeyDictionary[asyncio.AbstractEventLoop, PipeCaller | ClusterCaller] = WeakKeyDictionary()

    def run(self, command: Command[T]) -> T:
        call = encode(command, self.config, self._verb, archived=self._archived)
        deadline = time.monotonic() + self.patience
        pause = 0.02
        while True:
            try:
                return call.read(self._evaluate(call))
            except StreamError:
                raise
            except Exception as exc:
                if not may_pass(exc) or time.monotonic() + pause > deadline:
                    raise BackendError(f"Redis at {self.location}: {type(exc).__name__}: {exc}") from exc
            time.sleep(random.uniform(pause / 2, pause))
            pause = min(pause * 2, 0.5)

    def _evaluate(self, call: Call[Any]) -> Any:
        client = self._client()
        try:
            return client.execute_command(*call.words())
        except exceptions.NoScriptError:
            return client.execute_command(*call.words(whole=True))

    def _client(self) -> Any:
        if self._sync is None or self._pid != os.getpid():
            with self._lock:
                if self._sync is None or self._pid != os.getpid():  # after a fork connections are made anew [O3]
                    self._sync, self._pid = self.location.sync_client(), os.getpid()
        return self._sync

    def wait(self, channel: str, after: Position, seconds: float) -> None:
        seconds = min(seconds, COMMAND_TIMEOUT - 1.0)  # a reply that comes later is taken for a dead connection
        key = log_key(self.config, channel)
        try:
            self._client().xread({key: f"{after.offset}-0"}, count=1, block=max(round(seconds * 1000), 1))
        except Exception as exc:
            if not may_pass(exc):
                raise BackendError(f"Redis at {self.location}: {type(exc).__name__}: {exc}") from exc
            time.sleep(min(seconds, 0.1))  # the read that follows says it if Redis stays away

    async def run_async(self, command: Command[T]) -> T:
        call = encode(command, self.config, self._verb, archived=self._archived)
        deadline = time.monotonic() + self.patience
        pause = 0.02
        while True:
            try:
                return call.read(await self._caller().evaluate(call))
            except (UnavailableError, ReplyError, exceptions.RedisError, OSError) as exc:
                if not may_pass(exc) or time.monotonic() + pause > deadline:
                    raise BackendError(f"Redis at {self.location}: {exc}") from exc
            await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(pause * 2, 0.5)

    async def announce(self, message: bytes) -> None:
        await self.publish(announcements(self.config), message)

    async def publish(self, name: str, message: bytes) -> None:
        """A bare PUBLISH. Raises `BackendError`."""
        try:
            await self._caller().publish(name, message)
        except (UnavailableError, ReplyError, exceptions.RedisError, OSError) as exc:
            raise BackendError(f"Redis at {self.location}: {exc}") from exc

    def pipe(self) -> Pipe:
        """The command connection of the running event loop; a cluster has none."""
        caller = self._caller()
        assert isinstance(caller, PipeCaller)
        return caller.pipe

    def _caller(self) -> PipeCaller | ClusterCaller:
        loop = asyncio.get_running_loop()
        caller = self._callers.get(loop)
        if caller is None:
            client = self.location.async_client()
            caller = ClusterCaller(client) if self.location.kind == "cluster" else PipeCaller(client, SCRIPTS.values())
            self._callers[loop] = caller
        return caller

    def subscriber(self, listener: Listener) -> Subscriber:
        client = self.location.async_client()
        if self.location.kind == "cluster":
            return ClusterSubscriber(self.config, self.location, client, self.publish, listener)
        return RedisSubscriber(
            self.config, self.location, lambda: connect(client), self.publish, listener, client=client
        )

    def close(self) -> None:
        client, self._sync = self._sync, None
        if client is not None and self._pid == os.getpid():
            client.close()

    async def aclose(self) -> None:
        self.close()
        caller = self._callers.pop(asyncio.get_running_loop(), None)
        if caller is not None:
            await caller.aclose()


if TYPE_CHECKING:
    _conforms: type[Broker] = RedisBroker
