"""Where a Redis is: from the settings to redis-py's own clients and connections."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from asgi_stream.config import QueueRedisConfig
from asgi_stream.errors import ConfigurationError

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
            if name not in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "sentinel_password"):
                raise ConfigurationError(f"the Redis URL has an option that is not known here: {name}")
            options[name] = value
        return parts, options

    def _sentinel(self) -> tuple[str, list[tuple[str, int]], dict[str, Any], dict[str, Any]]:
        parts, options = self._parts()
        sentinel = {"protocol": 2, "socket_connect_timeout": 0.5, "socket_timeout": 0.5}
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


@dataclass
class OpenConnection:
    """A connection that redis-py has opened and greeted; ours to read and write from now on."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    owner: Any  # redis-py's own object; it must live as long

    def abort(self) -> None:
        """Drop it."""
        self.writer.transport.abort()


async def connect(client: Any) -> OpenConnection:
    """Open a connection to where *client*, a redis-py one that is no cluster's, connects."""
    connection = client.connection_pool.make_connection()
    await connection.connect()
    reader, writer = connection._reader, connection._writer
    # From now on redis-py's object only holds the socket: it closes nothing when it is collected.
    connection._reader = connection._writer = None
    return OpenConnection(reader, writer, connection)
