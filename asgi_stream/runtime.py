"""`Streaming` builds, owns and closes the parts; `init_*()` set up the process default.

Nothing here opens a connection or makes an event-loop object before it is used [O3].
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

from asgi_stream.asgi.identity import Identify
from asgi_stream.asgi.refusal import HTTPStreamLimitExceeded
from asgi_stream.asgi.shutdown import OpenStreams, ShutdownWatch, default_streams
from asgi_stream.asgi.tickets import Verb, check_secrets, issue
from asgi_stream.channels.broker import Broker
from asgi_stream.channels.commands import Revoke
from asgi_stream.channels.courier import Courier
from asgi_stream.channels.hub import Hub
from asgi_stream.channels.memory import MemoryBroker
from asgi_stream.channels.model import check_channel
from asgi_stream.config import (
    ChannelConfig,
    QueueRedisConfig,
    StorageConfig,
    StreamLeaseConfig,
    secret_from_env,
    storage_enabled,
)
from asgi_stream.errors import ConfigurationError, require
from asgi_stream.events import json_bytes
from asgi_stream.leases.handover import LeaseBlock
from asgi_stream.leases.limiter import StreamLeaseLimiter
from asgi_stream.leases.policy import user_key

if TYPE_CHECKING:
    from asgi_stream.storage.opensearch import OpenSearchEventStorage

_CHANNEL_DEFAULTS = ChannelConfig()

logger = logging.getLogger("asgi_stream")


class Streaming:
    """The parts of one application.

    ``redis``: a URL or `QueueRedisConfig`; ``leases``, ``channels``, ``storage``: their settings (``enable_storage``:
    with those of the environment); ``identify(scope)``: the user's id of a request. ``workspaces``, ``authorize``,
    ``secret`` and ``events_url`` are settings of queued streaming.
    Use it with ``async with``, or call `aclose()`.
    """

    def __init__(
        self,
        redis: str | QueueRedisConfig | None = None,
        *,
        enable_storage: bool = False,
        storage: StorageConfig | None = None,
        leases: StreamLeaseConfig | None = None,
        channels: ChannelConfig | None = None,
        identify: Identify | None = None,
        workspaces: Callable[..., Any] | None = None,
        authorize: Callable[..., Any] | None = None,
        secret: str | list[str] | None = None,
        events_url: str | None = None,
        _streams: OpenStreams | None = None,
    ) -> None:
        self.redis = _redis(redis)
        self.lease_config = _typed("leases", leases, StreamLeaseConfig)
        self.channel_config = _typed("channels", channels, ChannelConfig)
        if identify is not None and not callable(identify):
            raise ConfigurationError("identify must be a function that takes a scope and returns the user's id")
        self.storage_config = _storage(storage, enable_storage)
        self.identify = identify
        self.workspaces = workspaces
        self.authorize = authorize
        self.secrets = check_secrets(secret)
        self.events_url = events_url
        self.streams = OpenStreams() if _streams is None else _streams
        self.token = os.urandom(8).hex()  # tells this object's memory from that of another process
        self.channel_redis = self.lease_redis = self.redis
        self._limiter: StreamLeaseLimiter | None = None
        self._use_memory = False
        self._broker: Broker | None = None
        self._courier: Courier | None = None
        self._storage: OpenSearchEventStorage | None = None
        self._hubs: WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._watch: ShutdownWatch | None = None

    @property
    def leases(self) -> StreamLeaseLimiter:
        """The limiter, made on first use."""
        if self._limiter is None:
            with self._lock:
                if self._limiter is None:
                    redis = None if self._use_memory else self.lease_redis
                    self._limiter = StreamLeaseLimiter(self.lease_config, redis=redis, refusal=HTTPStreamLimitExceeded)
        return self._limiter

    @property
    def channel_settings(self) -> ChannelConfig:
        """The settings of queued streaming."""
        return self.channel_config or _CHANNEL_DEFAULTS

    @property
    def broker(self) -> Broker:
        """Where channels are kept, made on first use: Redis, or without one this process's memory."""
        if self._broker is None:
            with self._lock:
                if self._broker is None:
                    self._broker = self._make_broker()
        return self._broker

    def _make_broker(self) -> Broker:
        config = self.storage_config
        archived = config is not None and config.writer == "archiver"
        if self.channel_redis is None:
            if archived:
                raise ConfigurationError("writer='archiver' needs a Redis: the archiver is another process")
            broker: Broker = MemoryBroker(self.channel_settings)
        else:
            from asgi_stream.channels.redis import RedisBroker

            broker = RedisBroker(self.channel_redis, self.channel_settings, archived=archived)
        if config is None or archived:
            return broker
        from asgi_stream.storage.recording import RecordingBroker

        return RecordingBroker(broker, self._made_storage(config).offer)

    @property
    def storage(self) -> OpenSearchEventStorage:
        """The record of events, made on first use. Raises `ConfigurationError` where it is not enabled."""
        if self.storage_config is None:
            raise ConfigurationError(
                "there is no record of events: init_streaming(…, enable_storage=True), or init_event_storage(…)"
            )
        with self._lock:
            return self._made_storage(self.storage_config)

    def _made_storage(self, config: StorageConfig) -> OpenSearchEventStorage:
        if self._storage is None:
            require("opensearchpy", extra="opensearch")
            from asgi_stream.storage.opensearch import OpenSearchEventStorage

            self._storage = OpenSearchEventStorage(config)
        return self._storage

    @property
    def courier(self) -> Courier:
        """What sends for sync code, made on first use."""
        if self._courier is None:
            broker = self.broker
            with self._lock:
                if self._courier is None:
                    self._courier = Courier(broker, 5.0)
        return self._courier

    def hub(self) -> Hub:
        """The running event loop's hub, made on first use."""
        loop = asyncio.get_running_loop()
        hub = self._hubs.get(loop)
        if hub is None:
            hub = self._hubs[loop] = Hub(self.broker, self.channel_settings)
        return hub

    def ticket(
        self, channel: str, *, verbs: Iterable[Verb] = ("read",), seconds: float = 300.0, user: str | None = None
    ) -> str:
        """Return a signed right to *channel* for `StreamApp`: ``?ticket=…`` of its URL [S3].

        Its stream ends when *seconds* (at most a day) are over. Raises `ConfigurationError` without a secret.
        """
        return issue(self.secrets, check_channel(channel), verbs=verbs, seconds=seconds, user=user)

    async def revoke_tickets(self, channel: str) -> None:
        """Make the tickets for *channel* that were issued so far worthless, and end its streams in every process."""
        await self.broker.run_async(Revoke(check_channel(channel)))
        await self.close(channel=channel)

    async def close(self, *, user: str | None = None, channel: str | None = None) -> None:
        """End the streams of *user*, or of *channel*, in every process, with `close` (`revoked`) [S3].

        It does not keep anybody from coming back who has the right to.
        """
        if (user is None) == (channel is None):
            raise ConfigurationError("close() takes either user= or channel=")
        await self.broker.announce(json_bytes({"close_user": user, "close_channel": channel}))

    def begin_shutdown(self) -> None:
        """End every open stream with `close` (`shutdown`). For servers that run in a thread; safe from any thread."""
        self.streams.begin_shutdown()

    async def __aenter__(self) -> Self:
        self._watch = ShutdownWatch(self.streams)
        self._watch.__enter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End what is open and give back what was taken. Calling it again does nothing."""
        self.streams.end_all()
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.__exit__()
        hub = self._hubs.pop(asyncio.get_running_loop(), None)
        if hub is not None:
            await hub.aclose()
        limiter, self._limiter = self._limiter, None
        if limiter is not None:
            await limiter.aclose()
        courier, self._courier = self._courier, None
        if courier is not None:
            await asyncio.to_thread(courier.close)
        broker, self._broker = self._broker, None
        if broker is not None:
            await broker.aclose()
        storage, self._storage = self._storage, None
        if storage is not None:
            await storage.aclose()


def stream_lease(
    user_id: str,
    *,
    limit: int | None = None,
    weight: int = 1,
    tenant: str | None = None,
    limiter: StreamLeaseLimiter | None = None,
) -> LeaseBlock:
    """Hold one of *user_id*'s stream slots: ``async with stream_lease(str(user.id)) as lease:`` (or ``with``).

    ``limit`` replaces the configured one, ``limiter`` the process default; ``weight``: it takes so many slots;
    ``tenant``: whose user it is, for ``tenant_limit``. Raises `StreamLimitExceeded`, which is a
    429 response as well. In an endpoint the slot lasts as long as the response: see `leases.handover` for who
    releases it. In a generator, a WebSocket handler or a worker it is held to the end of the block.
    """
    made = _default_leases if limiter is None else lambda: limiter
    return LeaseBlock(made, user_key(user_id), limit, weight=weight, tenant=tenant)


def current_streaming() -> Streaming:
    """The process default; without any `init_*()` call it is built from the environment."""
    default = _default.streaming
    if default is None:
        with _default.lock:
            if _default.streaming is None:
                _default.streaming = _from_environment()
            default = _default.streaming
    return default


def init_streaming(
    redis_config: QueueRedisConfig | str | None = None,
    *,
    enable_storage: bool = False,
    leases: StreamLeaseConfig | None = None,
    channels: ChannelConfig | None = None,
    identify: Identify | None = None,
    workspaces: Callable[..., Any] | None = None,
    authorize: Callable[..., Any] | None = None,
    secret: str | list[str] | None = None,
    events_url: str | None = None,
) -> Streaming:
    """Set up the process default. Opens no connection, so it may be called anywhere, at import too.

    What is not given comes from the environment. The same call again is nothing; a different one raises
    `ConfigurationError` until `shutdown_streaming()`.
    """
    asked = (redis_config, enable_storage, leases, channels, identify, workspaces, authorize, secret, events_url)
    with _default.lock:
        if _default.asked is not None:
            if _default.asked != asked:
                raise ConfigurationError(
                    "init_streaming() was called before with other settings; call it once, or `await "
                    "shutdown_streaming()` in between"
                )
            assert _default.streaming is not None
            return _default.streaming
        if _default.streaming is not None and _default.streaming._limiter is not None:
            raise ConfigurationError(
                "init_streaming() comes too late: streaming is in use with settings from the environment; call it at "
                "start-up, or `await shutdown_streaming()` first"
            )
        _default.streaming = Streaming(
            redis_config if redis_config is not None else QueueRedisConfig.from_env(),
            enable_storage=enable_storage or storage_enabled(),
            leases=leases or StreamLeaseConfig.from_env(),
            channels=channels or ChannelConfig.from_env(),
            identify=identify,
            workspaces=workspaces,
            authorize=authorize,
            secret=secret if secret is not None else secret_from_env(),
            events_url=events_url,
            _streams=default_streams,
        )
        _default.asked = asked
        return _default.streaming


def adopt_redis(redis: QueueRedisConfig) -> None:
    """Make *redis* the process default's, unless streaming was initialised: a worker's is its queue's."""
    with _default.lock:
        if _default.asked is not None or _default.streaming is not None:
            return
        named = QueueRedisConfig.from_env()
        if named is not None and named != redis:
            logger.warning(
                "REDIS_URL names another Redis than the queue's. This process publishes to the queue's: call "
                "init_streaming() before if that is not where your web processes listen"
            )
        init_streaming(redis)


def init_lease_limiter(
    redis_config: QueueRedisConfig | str | None = None,
    config: StreamLeaseConfig | None = None,
    *,
    use_memory: bool = False,
) -> StreamLeaseLimiter:
    """Refine how the process default counts leases, until the first lease is taken.

    ``use_memory`` counts per process even where Redis is configured.
    """
    streaming = current_streaming()
    wanted = _typed("config", config, StreamLeaseConfig) or streaming.lease_config
    redis = _redis(redis_config) or streaming.lease_redis
    with _default.lock:
        if streaming._limiter is not None:
            asked = (wanted or StreamLeaseConfig(), redis, use_memory)
            if asked != (streaming._limiter.config, streaming.lease_redis, streaming._use_memory):
                raise ConfigurationError(
                    "init_lease_limiter() comes too late: leases are in use with other settings; call it at start-up, "
                    "or `await shutdown_streaming()` first"
                )
            return streaming._limiter
        streaming.lease_config = wanted
        streaming.lease_redis = redis
        streaming._use_memory = use_memory
    return streaming.leases


def init_channels(
    redis_config: QueueRedisConfig | str | None = None, config: ChannelConfig | None = None
) -> ChannelConfig:
    """Refine the process default's settings of queued streaming."""
    streaming = current_streaming()
    with _default.lock:
        streaming.channel_config = _typed("config", config, ChannelConfig) or streaming.channel_config
        streaming.channel_redis = _redis(redis_config) or streaming.channel_redis
    return streaming.channel_settings


def init_event_storage(
    host: str = "localhost",
    port: int = 9200,
    index_prefix: str = "stream_events",
    *,
    use_ssl: bool = False,
    auth_type: str = "none",
    **options: Any,
) -> StorageConfig:
    """Keep a record of the process default's events in OpenSearch, until the first channel is used.

    ``options`` are the other fields of `StorageConfig`. What is left at its default comes from the environment.
    """
    given = {"host": host, "port": port, "index_prefix": index_prefix, "use_ssl": use_ssl, "auth_type": auth_type}
    given |= options
    try:
        defaults = StorageConfig()
        asked = {name: value for name, value in given.items() if value != getattr(defaults, name)}
        wanted = replace(StorageConfig.from_env(), **asked)  # type: ignore[arg-type]
    except (TypeError, AttributeError):
        known = {field.name for field in fields(StorageConfig)}
        wrong = ", ".join(sorted(set(given) - known))
        raise ConfigurationError(f"init_event_storage() has no {wrong}; it takes {', '.join(sorted(known))}") from None
    wanted.check()
    streaming = current_streaming()
    with _default.lock:
        if streaming._broker is not None and streaming.storage_config != wanted:
            raise ConfigurationError(
                "init_event_storage() comes too late: channels are in use; call it at start-up, or `await "
                "shutdown_streaming()` first"
            )
        streaming.storage_config = wanted
    return wanted


def streaming_for(redis: str | QueueRedisConfig | None, channels: ChannelConfig | None) -> Streaming:
    """The process's `Streaming` for a Redis of its own: made once for each, closed by `shutdown_streaming()`."""
    storage = current_streaming().storage_config
    key = (_redis(redis) or current_streaming().channel_redis, channels)
    with _default.lock:
        found = _default.others.get(key)
        if found is None:
            found = _default.others[key] = Streaming(
                key[0], channels=channels, storage=storage, _streams=default_streams
            )
        return found


async def shutdown_streaming() -> None:
    """Close the process default. The next use builds a new one."""
    with _default.lock:
        streaming, _default.streaming, _default.asked = _default.streaming, None, None
        others, _default.others = list(_default.others.values()), {}
    for one in others if streaming is None else [streaming, *others]:
        await one.aclose()


class _Default:
    """The process default, and the call that made it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.streaming: Streaming | None = None
        self.asked: tuple[Any, ...] | None = None
        self.others: dict[Any, Streaming] = {}


_default = _Default()


def _from_environment() -> Streaming:
    return Streaming(
        QueueRedisConfig.from_env(),
        leases=StreamLeaseConfig.from_env(),
        channels=ChannelConfig.from_env(),
        secret=secret_from_env(),
        enable_storage=storage_enabled(),
        _streams=default_streams,
    )


def _default_leases() -> StreamLeaseLimiter:
    return current_streaming().leases


def _storage(given: StorageConfig | None, enabled: bool) -> StorageConfig | None:
    config: StorageConfig | None = _typed("storage", given, StorageConfig)
    if config is None and enabled:
        config = StorageConfig.from_env()
    if config is not None:
        config.check()
        if config.writer == "publisher":
            require("opensearchpy", extra="opensearch")
    return config


def _redis(given: str | QueueRedisConfig | None) -> QueueRedisConfig | None:
    return QueueRedisConfig(given) if isinstance(given, str) else _typed("redis", given, QueueRedisConfig)


def _typed(name: str, value: Any, kind: type[Any]) -> Any:
    if value is not None and not isinstance(value, kind):
        raise ConfigurationError(f"{name} must be a {kind.__name__}, not {type(value).__name__}")
    return value
