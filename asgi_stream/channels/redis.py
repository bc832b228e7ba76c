"""Channels in Redis: sync code over redis-py, async code over one pipelined connection and one subscription [C4]."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import hiredis
from redis import exceptions  # here, not at first use: a process that is about to end can import nothing more

from asgi_stream.channels.broker import Broker, Listener
from asgi_stream.channels.commands import Command
from asgi_stream.channels.model import Position
from asgi_stream.channels.redis_commands import SCRIPTS, announcements, encode, log_key
from asgi_stream.config import ChannelConfig, QueueRedisConfig
from asgi_stream.errors import BackendError, StreamError
from asgi_stream.redis.locate import COMMAND_TIMEOUT, Location, OpenConnection, connect
from asgi_stream.redis.pipe import RETRYABLE, Pipe, ReplyError, UnavailableError, pack
from asgi_stream.redis.scripts import Call

logger = logging.getLogger("asgi_stream")

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds for which a command is sent again before it fails."""

PROBE_AFTER = 5.0
"""Seconds of silence after which a subscription is asked for a message to itself, and which that may take."""


class RedisBroker:
    """Channels of all processes that share a Redis."""

    def __init__(
        self, redis: QueueRedisConfig, config: ChannelConfig | None = None, *, patience: float = PATIENCE
    ) -> None:
        self.config = config or ChannelConfig()
        self.patience = patience
        self.location = Location(redis)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._sync: Any = None
        self._pipes: WeakKeyDictionary[asyncio.AbstractEventLoop, Pipe] = WeakKeyDictionary()

    def run(self, command: Command[T]) -> T:
        call = encode(command, self.config)
        deadline = time.monotonic() + self.patience
        pause = 0.02
        while True:
            try:
                return call.read(self._evaluate(call))
            except StreamError:
                raise
            except Exception as exc:
                if not _may_pass(exc) or time.monotonic() + pause > deadline:
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
            if not _may_pass(exc):
                raise BackendError(f"Redis at {self.location}: {type(exc).__name__}: {exc}") from exc
            time.sleep(min(seconds, 0.1))  # the read that follows says it if Redis stays away

    async def run_async(self, command: Command[T]) -> T:
        call = encode(command, self.config)
        deadline = time.monotonic() + self.patience
        pause = 0.02
        while True:
            try:
                return call.read(await self._evaluate_async(call))
            except (UnavailableError, ReplyError) as exc:
                if not _may_pass(exc) or time.monotonic() + pause > deadline:
                    raise BackendError(f"Redis at {self.location}: {exc}") from exc
            await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(pause * 2, 0.5)

    async def _evaluate_async(self, call: Call[Any]) -> Any:
        pipe = self.pipe()
        try:
            return await pipe.call(*call.words())
        except ReplyError as exc:
            if not str(exc).startswith("NOSCRIPT"):
                raise
            return await pipe.call(*call.words(whole=True))

    def pipe(self) -> Pipe:
        """The command connection of the running event loop."""
        loop = asyncio.get_running_loop()
        pipe = self._pipes.get(loop)
        if pipe is None:
            client = self.location.async_client()

            async def open_connection() -> OpenConnection:
                connection = await connect(client)
                await _load_scripts(connection)
                return connection

            pipe = self._pipes[loop] = Pipe(open_connection)
        return pipe

    async def announce(self, message: bytes) -> None:
        try:
            await self.pipe().call("PUBLISH", announcements(self.config), message)
        except (UnavailableError, ReplyError) as exc:
            raise BackendError(f"Redis at {self.location}: {exc}") from exc

    def subscriber(self, listener: Listener) -> RedisSubscriber:
        client = self.location.async_client()
        return RedisSubscriber(self, lambda: connect(client), listener)

    def close(self) -> None:
        client, self._sync = self._sync, None
        if client is not None and self._pid == os.getpid():
            client.close()

    async def aclose(self) -> None:
        self.close()
        pipe = self._pipes.pop(asyncio.get_running_loop(), None)
        if pipe is not None:
            await pipe.aclose()


class RedisSubscriber:
    """One subscription connection: reconnects, resubscribes, and probes itself when it hears nothing.

    A connection can answer PING and never deliver again, after a failover for one: so what is probed is delivery, by a
    message to itself.
    """

    def __init__(
        self, broker: RedisBroker, connect: Callable[[], Awaitable[OpenConnection]], listener: Listener
    ) -> None:
        self._broker = broker
        self._connect = connect
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._channels: dict[bytes, str] = {}
        self._acknowledged: set[bytes] = set()
        self._changes: dict[bytes, bool] = {}  # what the next write asks for: True subscribe, False unsubscribe
        self._connection: OpenConnection | None = None
        self._probe = f"{broker.config.key_prefix}probe:{os.urandom(8).hex()}".encode()
        self._announcements = announcements(broker.config).encode()
        self._heard = 0.0
        self._told = False  # that the connection is lost
        self._replies = hiredis.Reader()
        self._handing: asyncio.Task[None] | None = None
        self._probing: asyncio.TimerHandle | None = None
        self._task = self._loop.create_task(self._run())

    def subscribe(self, channel: str) -> None:
        key = log_key(self._broker.config, channel).encode()
        self._channels[key] = channel
        self._change(key, True)

    def unsubscribe(self, channel: str) -> None:
        key = log_key(self._broker.config, channel).encode()
        self._channels.pop(key, None)
        self._acknowledged.discard(key)
        self._change(key, False)

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    def _change(self, key: bytes, wanted: bool) -> None:
        if self._connection is None:
            return  # the next connection begins with all that is wanted
        if not self._changes:
            self._loop.call_soon(self._send_changes)
        self._changes[key] = wanted

    def _send_changes(self) -> None:
        changes, self._changes = self._changes, {}
        if self._connection is None:
            return
        for verb, wanted in (("UNSUBSCRIBE", False), ("SUBSCRIBE", True)):
            keys = [key for key, want in changes.items() if want is wanted]
            if keys:
                self._connection.write(pack(verb, *keys))

    async def _run(self) -> None:
        pause = 0.05
        while True:
            try:
                self._connection = connection = await self._connect()
                pause = 0.05
                keys = [self._probe, self._announcements, *self._channels]
                connection.write(pack("SUBSCRIBE", *keys))
                self._changes.clear()
                self._listen_for_probe()
                if self._told:
                    logger.info("the subscription to Redis is back")
                    self._told = False
                self._replies = hiredis.Reader()
                connection.listen(self._receive)
                await connection.lost
                self._tell("Redis closed the connection")
            except asyncio.CancelledError:
                self._drop()
                raise
            except Exception as exc:
                self._tell(f"{type(exc).__name__}: {exc}")
            self._drop()
            self._listener.on_lost()
            # Jitter, so that the processes of an application do not come back together.
            await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(pause * 2, 0.5)

    def _tell(self, reason: str) -> None:
        """Once for each time that Redis is away."""
        if not self._told:
            self._told = True
            logger.warning(
                "the subscription to Redis at %s was lost; connecting again: %s", self._broker.location, reason
            )

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        self._acknowledged.clear()
        if self._probing is not None:
            self._probing.cancel()
            self._probing = None
        if self._handing is not None:
            self._handing.cancel()
            self._handing = None
        if connection is not None:
            connection.abort()

    def _receive(self, data: bytes) -> None:
        """Hand on what came. While a large audience is written to, nothing more is read."""
        self._replies.feed(data)
        self._heard = self._loop.time()
        handing = self._hand_on()
        try:
            held = handing.send(None)
        except StopIteration:
            return
        assert self._connection is not None
        self._connection.pause()
        self._handing = self._loop.create_task(self._finish(handing, held, self._connection))

    async def _finish(self, handing: Coroutine[Any, Any, None], held: Any, connection: OpenConnection) -> None:
        try:
            await _rest(handing, held)
            connection.resume()
        except Exception:
            logger.exception("events could not be handed on; the connection is dropped")
            connection.abort()

    async def _hand_on(self) -> None:
        channels = self._channels
        frames: list[tuple[str, bytes]] = []
        replies = self._replies
        while (reply := replies.gets()) is not False:
            kind = reply[0]
            if kind == b"message":
                channel = channels.get(reply[1])
                if channel is not None:
                    frames.append((channel, reply[2]))
                elif reply[1] == self._announcements:
                    self._listener.on_announcement(reply[2])
            elif kind == b"subscribe" and reply[1] in channels:
                # In the order of the connection: frames before it were heard before it.
                if frames:
                    await self._listener.on_frames(frames)
                    frames = []
                if reply[1] not in self._acknowledged:
                    self._acknowledged.add(reply[1])
                    self._listener.on_subscribed(channels[reply[1]])
            elif kind == b"unsubscribe":
                self._acknowledged.discard(reply[1])  # of a channel that is wanted again, the next answer counts
        if frames:
            await self._listener.on_frames(frames)

    def _listen_for_probe(self) -> None:
        self._heard = self._loop.time()
        self._probing = self._loop.call_later(PROBE_AFTER, self._send_probe)

    def _send_probe(self) -> None:
        silence = self._loop.time() - self._heard
        if silence < PROBE_AFTER:
            self._probing = self._loop.call_later(PROBE_AFTER - silence, self._send_probe)
            return
        self._broker.pipe().call("PUBLISH", self._probe, b"").add_done_callback(_forget)
        self._probing = self._loop.call_later(PROBE_AFTER, self._judge_probe, self._heard)

    def _judge_probe(self, heard: float) -> None:
        if self._heard == heard and self._connection is not None:
            logger.warning("the subscription to Redis delivers nothing; connecting again")
            self._connection.abort()
            return
        self._send_probe()


@types.coroutine
def _rest(begun: Coroutine[Any, Any, None], held: Any) -> Generator[Any, Any, None]:
    """Run a coroutine to its end that was begun by hand, and waits for *held*."""
    while True:
        if held is not None:
            held._asyncio_future_blocking = True
        try:
            yield held
            held = begun.send(None)
        except StopIteration:
            return


async def _load_scripts(connection: OpenConnection) -> None:
    """Now, not at the first use: a script that is not there yet would run after those sent behind it."""
    replies = hiredis.Reader()
    loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    missing = len(SCRIPTS)

    def receive(data: bytes) -> None:
        nonlocal missing
        replies.feed(data)
        while (reply := replies.gets()) is not False:
            missing -= 1
            if isinstance(reply, hiredis.ReplyError) and not loaded.done():
                loaded.set_exception(ReplyError(str(reply)))
        if not missing and not loaded.done():
            loaded.set_result(None)

    connection.listen(receive)
    for script in SCRIPTS.values():
        connection.write(pack("SCRIPT", "LOAD", script.source))
    await asyncio.wait([loaded, connection.lost], return_when=asyncio.FIRST_COMPLETED)
    if not loaded.done():
        raise UnavailableError("Redis closed the connection")
    loaded.result()


def _forget(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def _may_pass(error: Exception) -> bool:
    """Whether the same command may succeed if it is sent again."""
    if isinstance(error, UnavailableError):
        cause = error.__cause__
        return cause is None or _may_pass_of_driver(cause)
    if isinstance(error, ReplyError):
        return str(error).startswith(RETRYABLE)
    return _may_pass_of_driver(error)


def _may_pass_of_driver(error: BaseException) -> bool:
    if isinstance(error, exceptions.AuthenticationError | exceptions.AuthorizationError):
        return False
    if isinstance(error, exceptions.ResponseError):
        return isinstance(error, exceptions.ReadOnlyError | exceptions.ClusterError) or str(error).startswith(RETRYABLE)
    return isinstance(error, exceptions.RedisError | OSError | TimeoutError | EOFError)


if TYPE_CHECKING:
    _conforms: type[Broker] = RedisBroker
