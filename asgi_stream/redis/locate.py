"""Where a Redis is: from the settings to redis-py's own clients and connections."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from asgi_stream.config import QueueRedisConfig
from asgi_stream.errors import ConfigurationError

logger = logging.getLogger("asgi_stream")

CONNECT_TIMEOUT = 2.0
COMMAND_TIMEOUT = 5.0

_COMMON: dict[str, Any] = {"protocol": 2, "socket_connect_timeout": CONNECT_TIMEOUT, "socket_timeout": COMMAND_TIMEOUT}


@dataclass
class Location:
    """One Redis: a server, a Sentinel's primary, or a cluster."""

    config: QueueRedisConfig
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        scheme = urlsplit(self.config.url).scheme
        self.kind = scheme.partition("+")[2] or "server"

    def __str__(self) -> str:
        """The URL without what is secret in it."""
        parts = urlsplit(self.config.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def sync_client(self) -> Any:
        """redis-py's client for sync code: thread-safe, and waiting for a free connection instead of raising."""
        import redis

        if self.kind == "cluster":
            from redis.cluster import ClusterNode, RedisCluster

            parts, options = self._parts()
            make_node: Any = ClusterNode
            nodes = [make_node(host, port) for host, port in _hosts(parts, 6379)]
            return RedisCluster(startup_nodes=nodes, **options, **_COMMON)
        if self.kind == "sentinel":
            from redis.sentinel import Sentinel

            name, hosts, options, sentinel = self._sentinel()
            make_sentinel: Any = Sentinel
            return make_sentinel(hosts, sentinel_kwargs=sentinel, **options, **_COMMON).master_for(name)
        pool = redis.BlockingConnectionPool.from_url(
            self.config.url, max_connections=16, timeout=COMMAND_TIMEOUT, **_COMMON
        )
        return redis.Redis(connection_pool=pool)

    def async_client(self) -> Any:
        """redis-py's client for async code of the running event loop. In a cluster it needs `initialize()`."""
        import redis.asyncio as redis

        if self.kind == "cluster":
            from redis.asyncio.cluster import ClusterNode, RedisCluster

            parts, options = self._parts()
            nodes = [ClusterNode(host, port) for host, port in _hosts(parts, 6379)]
            return RedisCluster(startup_nodes=nodes, **options, **_COMMON)
        if self.kind == "sentinel":
            from redis.asyncio.sentinel import Sentinel

            name, hosts, options, sentinel = self._sentinel()
            make_sentinel: Any = Sentinel
            return make_sentinel(hosts, sentinel_kwargs=sentinel, **options, **_COMMON).master_for(name)
        return redis.Redis.from_url(self.config.url, **_COMMON)

    def _parts(self) -> tuple[SplitResult, dict[str, Any]]:
        parts = urlsplit(self.config.url)
        options: dict[str, Any] = {}
        userinfo, _, _ = parts.netloc.rpartition("@")
        if userinfo:
            username, _, password = userinfo.partition(":")
            options["username"] = unquote(username) or None
            options["password"] = unquote(password) or None
        if parts.scheme.startswith("rediss"):
            options["ssl"] = True
        for name, value in parse_qsl(parts.query):
            if name == "ssl_check_hostname":
                options[name] = value.lower() not in ("false", "no", "0")
            elif name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "sentinel_password"):
                options[name] = value
            else:
                raise ConfigurationError(f"the Redis URL has an option that is not known here: {name}")
        return parts, options

    def _sentinel(self) -> tuple[str, list[tuple[str, int]], dict[str, Any], dict[str, Any]]:
        parts, options = self._parts()
        sentinel: dict[str, Any] = {"protocol": 2, "socket_connect_timeout": 0.5, "socket_timeout": 0.5}
        # Who speaks TLS with the primary does with the Sentinels: they are asked for no other reason.
        sentinel |= {name: value for name, value in options.items() if name.startswith("ssl")}
        if "sentinel_password" in options:
            sentinel["password"] = options.pop("sentinel_password")
        name, _, db = parts.path.strip("/").partition("/")
        if not name:
            raise ConfigurationError("the Redis URL names no service, such as redis+sentinel://host1,host2/mymaster/0")
        options["db"] = int(db or 0)
        return name, _hosts(parts, 26379), options, sentinel


def _hosts(parts: SplitResult, port: int) -> list[tuple[str, int]]:
    hosts = []
    for place in parts.netloc.rpartition("@")[2].split(","):
        host, _, given = place.rpartition(":") if ":" in place.rpartition("]")[2] else (place, "", "")
        try:
            hosts.append((host.strip("[]"), int(given or port)))
        except ValueError:
            raise ConfigurationError(f"the Redis URL has a port that is no number: {place!r}") from None
    return hosts


class OpenConnection(asyncio.Protocol):
    """A connection that redis-py has opened and greeted; ours to read and write from now on.

    What comes is given to a callback as it is read: a reader task in between would cost every message a wake-up.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, owner: Any) -> None:
        self._transport: asyncio.Transport = writer.transport  # type: ignore[assignment]
        self._owner = owner, reader, writer  # redis-py's own object, and the streams: they must live as long
        self._on_data: Callable[[bytes], None] | None = None
        self._early: list[bytes] = []
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the connection is."""
        self.write: Callable[[bytes], None] = self._transport.write
        self._transport.set_protocol(self)

    def listen(self, on_data: Callable[[bytes], None]) -> None:
        """Call *on_data* with everything that comes, and has come. An exception of it drops the connection."""
        self._on_data = on_data
        early, self._early = self._early, []
        for data in early:
            self.data_received(data)

    def pause(self) -> None:
        """Read no more for now."""
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        """Drop it."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._on_data is None:
            self._early.append(data)
            return
        try:
            self._on_data(data)
        except Exception:
            logger.exception("what Redis sent could not be handled; the connection is dropped")
            self._transport.abort()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)


async def connect(client: Any) -> OpenConnection:
    """Open a connection to where *client*, a redis-py one that is no cluster's, connects."""
    return await _open(client.connection_pool.make_connection())


async def close(client: Any) -> None:
    """Close an async redis-py client, and the Sentinels that it asks."""
    await client.aclose()
    manager = getattr(getattr(client, "connection_pool", None), "sentinel_manager", None)
    for sentinel in getattr(manager, "sentinels", ()):
        await sentinel.aclose()


async def connect_to_node(node: Any) -> OpenConnection:
    """Open a connection to *node* of a cluster, a redis-py `ClusterNode`."""
    return await _open(node.connection_class(**node.connection_kwargs))


async def _open(connection: Any) -> OpenConnection:
    try:
        await connection.connect()
    except BaseException:
        await connection.disconnect(nowait=True)  # a cancellation between the socket and the greeting leaves it open
        raise
    reader, writer = connection._reader, connection._writer
    # From now on redis-py's object only holds the socket: it closes nothing when it is collected.
    connection._reader = connection._writer = None
    return OpenConnection(reader, writer, connection)
