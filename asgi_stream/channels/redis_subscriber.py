"""Hearing what is appended, from a Redis or a cluster: the subscription connections [C4] [C6]."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

import hiredis

from asgi_stream.channels.broker import Listener
from asgi_stream.channels.redis_commands import announcements, log_key
from asgi_stream.config import ChannelConfig
from asgi_stream.errors import BackendError
from asgi_stream.redis.locate import OpenConnection, close, connect_to_node
from asgi_stream.redis.pipe import UnavailableError, pack

logger = logging.getLogger("asgi_stream")

PROBE_AFTER = 5.0
"""Seconds of silence after which a subscription is asked for a message to itself, and which that may take."""


class RedisSubscriber:
    """One subscription connection: reconnects, resubscribes, and probes itself when it hears nothing.

    A connection can answer PING and never deliver again, after a failover for one: so what is probed is delivery, by a
    message to itself.
    """

    def __init__(
        self,
        config: ChannelConfig,
        place: object,
        connect: Callable[[], Awaitable[OpenConnection]],
        publish: Callable[[str, bytes], Awaitable[None]],
        listener: Listener,
        *,
        sharded: bool = False,
        client: Any = None,
    ) -> None:
        self._config = config
        self._place = place  # for the log
        self._connect = connect
        self._publish = publish
        self._listener = listener
        self._client = client  # to be closed at the end
        self._subscribe, self._unsubscribe = ("SSUBSCRIBE", "SUNSUBSCRIBE") if sharded else ("SUBSCRIBE", "UNSUBSCRIBE")
        self._subscribed, self._unsubscribed = self._subscribe.lower().encode(), self._unsubscribe.lower().encode()
        self._sharded = sharded
        self._message = b"smessage" if sharded else b"message"
        self._loop = asyncio.get_running_loop()
        self._channels: dict[bytes, str] = {}
        self._acknowledged: set[bytes] = set()
        self._changes: dict[bytes, bool] = {}  # what the next write asks for: True subscribe, False unsubscribe
        self._connection: OpenConnection | None = None
        self._probe = f"{config.key_prefix}probe:{os.urandom(8).hex()}".encode()
        self._announcements = announcements(config).encode()
        self._heard = 0.0
        self._told = False  # that the connection is lost
        self._replies = hiredis.Reader()
        self._handing: asyncio.Task[None] | None = None
        self._probing: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._task = self._loop.create_task(self._run())

    def subscribe(self, channel: str) -> None:
        key = log_key(self._config, channel).encode()
        self._channels[key] = channel
        self._change(key, True)

    def unsubscribe(self, channel: str) -> None:
        key = log_key(self._config, channel).encode()
        self._channels.pop(key, None)
        self._acknowledged.discard(key)
        self._change(key, False)

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._client is not None:
            await close(self._client)

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
        for verb, wanted in ((self._unsubscribe, False), (self._subscribe, True)):
            keys = [key for key, want in changes.items() if want is wanted]
            if keys:
                self._write(self._connection, verb, keys)

    def _write(self, connection: OpenConnection, verb: str, keys: list[bytes]) -> None:
        if self._sharded:
            for key in keys:  # the channels of one command would have to share a slot
                connection.write(pack(verb, key))
        else:
            connection.write(pack(verb, *keys))

    async def _run(self) -> None:
        pause = 0.05
        while True:
            try:
                self._connection = connection = await self._connect()
                pause = 0.05
                connection.write(pack("SUBSCRIBE", self._probe, self._announcements))
                if self._channels:
                    self._write(connection, self._subscribe, list(self._channels))
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
            self._listener.on_lost(list(self._channels.values()))
            # Jitter, so that the processes of an application do not come back together.
            await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(pause * 2, 0.5)

    def _tell(self, reason: str) -> None:
        """Once for each time that Redis is away."""
        if not self._told:
            self._told = True
            logger.warning("the subscription to Redis at %s was lost; connecting again: %s", self._place, reason)

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
        except UnavailableError as exc:
            self._tell(str(exc))
            if self._connection is not None:
                self._connection.abort()
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
            if isinstance(reply, hiredis.ReplyError):
                raise UnavailableError(str(reply))  # MOVED, for one: the channels are looked for anew
            kind = reply[0]
            if kind == self._message and (channel := channels.get(reply[1])) is not None:
                frames.append((channel, reply[2]))
            elif kind == b"message" and reply[1] == self._announcements:
                self._listener.on_announcement(reply[2])
            elif kind == self._subscribed and reply[1] in channels:
                # In the order of the connection: frames before it were heard before it.
                if frames:
                    await self._listener.on_frames(frames)
                    frames = []
                if reply[1] not in self._acknowledged:
                    self._acknowledged.add(reply[1])
                    self._listener.on_subscribed(channels[reply[1]])
            elif kind == self._unsubscribed and reply[1] in self._acknowledged:
                if self._sharded:  # not asked for: its slot has moved to another node
                    raise UnavailableError("a subscription was taken away")
                self._acknowledged.discard(reply[1])  # it is wanted again, and the next answer counts
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
        probing = self._loop.create_task(self._send_to_self())
        self._tasks.add(probing)
        probing.add_done_callback(self._tasks.discard)
        self._probing = self._loop.call_later(PROBE_AFTER, self._judge_probe, self._heard)

    async def _send_to_self(self) -> None:
        try:
            await self._publish(self._probe.decode(), b"")
        except BackendError as exc:
            logger.debug("the subscription could not be probed: %s", exc)

    def _judge_probe(self, heard: float) -> None:
        if self._heard == heard and self._connection is not None:
            logger.warning("the subscription to Redis delivers nothing; connecting again")
            self._connection.abort()
            return
        self._send_probe()


class ClusterSubscriber:
    """Sharded pub/sub: a subscription connection per primary that has a channel of ours [C6]."""

    def __init__(
        self,
        config: ChannelConfig,
        place: object,
        client: Any,
        publish: Callable[[str, bytes], Awaitable[None]],
        listener: Listener,
    ) -> None:
        self._config = config
        self._place = place
        self._client = client
        self._publish = publish
        self._listener = listener
        self._nodes: dict[str, RedisSubscriber] = {}
        self._where: dict[str, str] = {}  # from a channel to its node
        self._loop = asyncio.get_running_loop()
        self._wanted: set[str] = set()
        self._changed = asyncio.Event()
        self._stale = True  # the map of the cluster may be out of date
        self._task = self._loop.create_task(self._run())

    def subscribe(self, channel: str) -> None:
        self._wanted.add(channel)
        self._changed.set()

    def unsubscribe(self, channel: str) -> None:
        self._wanted.discard(channel)
        self._changed.set()

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        for node in self._nodes.values():
            await node.aclose()
        await close(self._client)

    # The listener of the nodes' connections

    async def on_frames(self, frames: list[tuple[str, bytes]]) -> None:
        await self._listener.on_frames(frames)

    def on_subscribed(self, channel: str) -> None:
        self._listener.on_subscribed(channel)

    def on_announcement(self, message: bytes) -> None:
        self._listener.on_announcement(message)

    def on_lost(self, channels: list[str]) -> None:
        self._listener.on_lost(channels)
        self._stale = True
        self._changed.set()

    async def _run(self) -> None:
        """Keep every channel at the node that has its slot."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                if self._stale:
                    # redis-py reads the map anew only when a command of its own fails.
                    await self._client.aclose()
                    await self._client.initialize()
                    self._stale = False
                await self._place_channels()
            except Exception as exc:
                logger.debug("the cluster's map could not be read: %s", exc)
                await asyncio.sleep(random.uniform(0.1, 0.3))
                self._stale = True
                self._changed.set()

    async def _place_channels(self) -> None:
        for channel in [channel for channel in self._where if channel not in self._wanted]:
            self._nodes[self._where.pop(channel)].unsubscribe(channel)
        for channel in sorted(self._wanted):
            node = self._client.get_node_from_key(log_key(self._config, channel))
            before = self._where.get(channel)
            if node.name == before:
                continue
            if before is not None:
                self._nodes[before].unsubscribe(channel)
            if node.name not in self._nodes:
                self._nodes[node.name] = RedisSubscriber(
                    self._config,
                    f"{self._place}, node {node.name}",
                    lambda node=node: connect_to_node(node),  # type: ignore[misc]
                    self._publish,
                    self,
                    sharded=True,
                )
            self._where[channel] = node.name
            self._nodes[node.name].subscribe(channel)
        used = set(self._where.values())
        for name in [name for name in self._nodes if name not in used]:
            await self._nodes.pop(name).aclose()


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
