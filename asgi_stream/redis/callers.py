"""Calls of scripts: over one pipelined connection to a server, or by redis-py to a cluster's nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import hiredis
from redis import exceptions  # here, not at first use: a process that is about to end can import nothing more

from asgi_stream.redis.locate import OpenConnection, close, connect
from asgi_stream.redis.pipe import RETRYABLE, Pipe, ReplyError, UnavailableError, pack
from asgi_stream.redis.scripts import Call, Script


class PipeCaller:
    """Commands over one pipelined connection."""

    def __init__(
        self,
        client: Any,
        scripts: Iterable[Script],
        *,
        on_open: Callable[[OpenConnection], Awaitable[None]] | None = None,
    ) -> None:
        scripts = tuple(scripts)

        async def open_connection() -> OpenConnection:
            connection = await connect(client)
            try:
                # Now, not at the first use: a script that is not there yet would run after those sent behind it.
                await ask(connection, [("SCRIPT", "LOAD", script.source) for script in scripts])
                if on_open is not None:
                    await on_open(connection)
            except BaseException:
                connection.abort()
                raise
            return connection

        self.pipe = Pipe(open_connection)
        self._client = client

    async def evaluate(self, call: Call[Any]) -> Any:
        try:
            return await self.pipe.call(*call.words())
        except ReplyError as exc:
            if not str(exc).startswith("NOSCRIPT"):
                raise
            return await self.pipe.call(*call.words(whole=True))

    def post(self, call: Call[Any]) -> asyncio.Future[Any] | None:
        """Send *call* at once; None if that cannot be. Its future may fail with NOSCRIPT, as any call's."""
        return self.pipe.post(*call.words())

    def drop(self) -> None:
        """Ask over another connection from now on: this one is silent."""
        self.pipe.drop()

    async def publish(self, name: str, message: bytes) -> None:
        await self.pipe.call("PUBLISH", name, message)

    async def aclose(self) -> None:
        await self.pipe.aclose()
        await close(self._client)


class ClusterCaller:
    """Commands to a cluster: redis-py finds the node, and follows what moves."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._starting = asyncio.Lock()
        self._started = False

    async def _start(self) -> None:
        # Before the first command, and once: several first commands at a time would each begin to read the map.
        async with self._starting:
            if not self._started:
                await self._client.initialize()
                self._started = True

    async def evaluate(self, call: Call[Any]) -> Any:
        if not self._started:
            await self._start()
        try:
            return await self._client.execute_command(*call.words())
        except exceptions.NoScriptError:
            return await self._client.execute_command(*call.words(whole=True))

    def post(self, call: Call[Any]) -> asyncio.Future[Any] | None:
        return None  # which node it is for takes a look at the map

    def drop(self) -> None:
        """redis-py drops a connection whose answer did not come."""

    async def publish(self, name: str, message: bytes) -> None:
        if not self._started:
            await self._start()
        await self._client.execute_command("PUBLISH", name, message)

    async def aclose(self) -> None:
        await close(self._client)


async def ask(connection: OpenConnection, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Send commands over a connection that nobody uses yet, and return their replies. Raises `ReplyError`."""
    reader = hiredis.Reader()
    replies: list[Any] = []
    answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def receive(data: bytes) -> None:
        reader.feed(data)
        while (reply := reader.gets()) is not False:
            replies.append(reply)
            if isinstance(reply, hiredis.ReplyError) and not answered.done():
                answered.set_exception(ReplyError(str(reply)))
        if len(replies) == len(commands) and not answered.done():
            answered.set_result(None)

    connection.listen(receive)
    connection.write(b"".join(pack(*command) for command in commands))
    await asyncio.wait([answered, connection.lost], return_when=asyncio.FIRST_COMPLETED)
    if not answered.done():
        raise UnavailableError("Redis closed the connection")
    answered.result()
    return replies


def may_pass(error: BaseException) -> bool:
    """Whether the same command may succeed if it is sent again."""
    if isinstance(error, UnavailableError):
        cause = error.__cause__
        return cause is None or may_pass(cause)
    if isinstance(error, ReplyError):
        return str(error).startswith(RETRYABLE)
    return _may_pass_of_driver(error)


def _may_pass_of_driver(error: BaseException) -> bool:
    if isinstance(error, exceptions.AuthenticationError | exceptions.AuthorizationError):
        return False
    if isinstance(error, exceptions.ResponseError):
        named = exceptions.ReadOnlyError | exceptions.ClusterError | exceptions.OutOfMemoryError
        return isinstance(error, named) or str(error).startswith(RETRYABLE)
    return isinstance(error, exceptions.RedisError | OSError | TimeoutError | EOFError)
