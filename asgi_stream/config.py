"""Every setting, checked where it is made; `from_env()` reads the environment, and errors name the variable."""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, TypeVar, get_args
from urllib.parse import urlsplit

from asgi_stream.errors import ConfigurationError

REDIS_SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")

T = TypeVar("T")

LeaseLimit = int | Callable[[str], int | Awaitable[int]]
LeasePolicy = Literal["reject", "wait", "evict_oldest"]
LeaseFallback = Literal["memory", "open", "closed"]
StorageAuth = Literal["none", "basic", "aws"]
StorageWriter = Literal["publisher", "archiver"]

_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class QueueRedisConfig:
    """Where a Redis is. Leases, channels and the queue may each have their own.

    ``url``: ``redis://``, ``rediss://`` (TLS), ``redis+sentinel://host1,host2/name/0`` or
    ``redis+cluster://host1,host2``; ``rediss+sentinel://`` and ``rediss+cluster://`` over TLS. What TLS needs is in the
    query: ``?ssl_ca_certs=/path&ssl_certfile=/path&ssl_keyfile=/path``, and ``ssl_cert_reqs=none`` or
    ``ssl_check_hostname=false`` where they must be. Environment: ``REDIS_URL``.
    """

    url: str = "redis://localhost:6379/0"

    def __post_init__(self) -> None:
        if not isinstance(self.url, str):
            raise ConfigurationError(f"url must be text such as redis://localhost:6379/0, not {self.url!r}")
        scheme = urlsplit(self.url).scheme
        if scheme not in REDIS_SCHEMES:
            raise ConfigurationError(
                f"a Redis URL begins with one of {', '.join(s + '://' for s in REDIS_SCHEMES)}; got scheme {scheme!r}"
            )
        if not urlsplit(self.url).netloc:
            raise ConfigurationError("the Redis URL names no host, such as redis://localhost:6379/0")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self | None:
        """Return the Redis that ``REDIS_URL`` names, or None if it is not set."""
        url = (os.environ if environ is None else environ).get("REDIS_URL")
        if not url:
            return None
        try:
            return cls(url)
        except ConfigurationError as exc:
            raise ConfigurationError(f"REDIS_URL: {exc}") from exc


@dataclass(frozen=True, slots=True)
class StreamLeaseConfig:
    """How many streams one user may hold open.

    ``limit``: at most so many at once for each user; or a function from the user's id to that number, sync or async
    (tiers). ``tenant_limit`` and ``global_limit``: at most so many for each tenant, and for all together.
    ``ttl_seconds``: how long a lease outlives a process that died. ``key_namespace``: how the keys in Redis begin.
    ``proxied_limit``: the limit of an address that is a proxy's and stands for many users.

    ``policy``: what becomes of a stream for which there is no room. ``"reject"``: a refusal. ``"wait"``: it waits its
    turn, for at most ``wait_timeout`` seconds. ``"evict_oldest"``: the user's oldest stream ends with `close`
    (`superseded`); the tenant's and the global limit must have room for both for a moment.

    ``fallback``: what becomes of new streams while Redis is away. ``"memory"``: each process counts its own;
    ``"open"``: they are let in; ``"closed"``: they are refused with 503.

    ``rate_limit_headers``: refusals have `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers).
    ``eventsource_refusals``: requests that ask for an event stream are refused by one: 200, a `failed` event and a long
    ``retry:``, since for a browser's `EventSource` any other status is final.

    Environment: ``ASGI_STREAM_LEASE_`` and the name in capitals.
    """

    limit: LeaseLimit = 5
    ttl_seconds: float = 180.0
    key_namespace: str = "stream_leases"
    proxied_limit: int = 1000
    tenant_limit: int | None = None
    global_limit: int | None = None
    policy: LeasePolicy = "reject"
    wait_timeout: float = 30.0
    fallback: LeaseFallback = "memory"
    rate_limit_headers: bool = False
    eventsource_refusals: bool = False

    def __post_init__(self) -> None:
        if not callable(self.limit):
            check_whole("limit", self.limit, least=1)
        check_whole("proxied_limit", self.proxied_limit, least=1)
        for name in ("tenant_limit", "global_limit"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least=1)
        check_seconds("ttl_seconds", self.ttl_seconds)
        check_seconds("wait_timeout", self.wait_timeout)
        check_key_part("key_namespace", self.key_namespace)
        _one_of("policy", self.policy, get_args(LeasePolicy))
        _one_of("fallback", self.fallback, get_args(LeaseFallback))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        return _from_env(cls, "ASGI_STREAM_LEASE_", environ)


@dataclass(frozen=True, slots=True)
class ChannelConfig:
    """How queued streams are kept and delivered. Times are in seconds.

    ``subscribe_timeout`` is the longest wait for a subscription's acknowledgement, and of one blocking read of a sync
    channel. ``max_idle_time`` counts from the last event or sign of life of the producer; a producer that shows no
    sign of life for ``producer_timeout`` is lost. History is bounded by
    ``max_events``, ``max_bytes`` and ``history_seconds`` after the last write.
    Environment: ``ASGI_STREAM_CHANNEL_`` and the name in capitals.
    """

    key_prefix: str = "stream:"
    subscribe_timeout: float = 1.0
    ping_interval: float = 15.0
    max_idle_time: float = 300.0
    producer_timeout: float = 30.0
    max_events: int = 10_000
    max_bytes: int = 8 * 1024 * 1024
    history_seconds: float = 3600.0
    max_event_bytes: int = 1024 * 1024
    viewer_backlog_bytes: int = 256 * 1024
    max_channels_per_stream: int = 8

    def __post_init__(self) -> None:
        check_key_part("key_prefix", self.key_prefix)
        for name in ("subscribe_timeout", "ping_interval", "max_idle_time", "producer_timeout", "history_seconds"):
            check_seconds(name, getattr(self, name))
        for name in ("max_events", "max_bytes", "max_event_bytes", "viewer_backlog_bytes", "max_channels_per_stream"):
            check_whole(name, getattr(self, name), least=1)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        return _from_env(cls, "ASGI_STREAM_CHANNEL_", environ)


@dataclass(frozen=True, slots=True)
class StorageConfig:
    """Where the OpenSearch record of events is, and how it is written. Times are in seconds.

    ``host`` may name several, separated by commas. ``index_prefix``: what the names of its indices begin with.
    ``auth_type``: ``"none"``, ``"basic"`` (``username``, ``password``; use TLS) or ``"aws"`` (SigV4 with the default
    credentials, ``aws_region``, and ``aws_service`` ``"es"`` or ``"aoss"``). ``ca_file``: whom to trust besides the
    system's authorities.

    ``data_stream``: one data stream instead of an index for each day. ``retention_days``: for how long events are kept:
    by a policy that ``asgi-stream storage setup`` installs (data stream), and by ``asgi-stream storage prune``.

    ``writer``: which process writes an event. ``"publisher"``: the one that publishes it; ``"archiver"``: a process of
    its own, ``asgi-stream archiver``, which needs one Redis (no cluster).

    What is published waits in memory for ``flush_seconds``, at most ``queue_bytes``; while OpenSearch is away, in files
    in ``spool_dir``, at most ``spool_bytes``. Beyond that the oldest is dropped, and counted.

    Environment: ``OPENSEARCH_`` and the name in capitals.
    """

    host: str = "localhost"
    port: int = 9200
    index_prefix: str = "stream_events"
    use_ssl: bool = False
    auth_type: StorageAuth = "none"
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: str = ""
    verify_certs: bool = True
    aws_region: str = ""
    aws_service: str = "es"
    data_stream: bool = False
    retention_days: int | None = None
    writer: StorageWriter = "publisher"
    flush_seconds: float = 1.0
    queue_bytes: int = 16 * 1024 * 1024
    spool_dir: str = ""
    spool_bytes: int = 256 * 1024 * 1024
    request_timeout: float = 10.0
    shutdown_seconds: float = 2.0

    def __post_init__(self) -> None:
        if not self.host.strip(", ") or "/" in self.host:
            raise ConfigurationError(f"host must be a name such as localhost, without http://, not {self.host!r}")
        check_whole("port", self.port, least=1)
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,99}", self.index_prefix):
            raise ConfigurationError(
                f"index_prefix must be 1 to 100 of a-z 0-9 _ . -, first a letter or digit; got {self.index_prefix!r}"
            )
        _one_of("auth_type", self.auth_type, get_args(StorageAuth))
        _one_of("writer", self.writer, get_args(StorageWriter))
        _one_of("aws_service", self.aws_service, ("es", "aoss"))
        if self.retention_days is not None:
            check_whole("retention_days", self.retention_days, least=1)
        for name in ("flush_seconds", "request_timeout", "shutdown_seconds"):
            check_seconds(name, getattr(self, name))
        for name in ("queue_bytes", "spool_bytes"):
            check_whole(name, getattr(self, name), least=1)

    def check(self) -> None:
        """Raise `ConfigurationError` if settings that belong together are not all there."""
        if self.auth_type == "basic" and not (self.username and self.password):
            raise ConfigurationError(
                "auth_type='basic' needs username= and password= (OPENSEARCH_USERNAME, …_PASSWORD)"
            )
        if self.auth_type == "aws" and not self.aws_region:
            raise ConfigurationError("auth_type='aws' needs aws_region= (OPENSEARCH_AWS_REGION)")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        return _from_env(cls, "OPENSEARCH_", environ)


def storage_enabled(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``ASGI_STREAM_ENABLE_STORAGE`` asks for a record of events: for workers, which call no `init_*`."""
    text = (os.environ if environ is None else environ).get("ASGI_STREAM_ENABLE_STORAGE")
    try:
        return parse_bool(text) if text else False
    except ConfigurationError as exc:
        raise ConfigurationError(f"ASGI_STREAM_ENABLE_STORAGE: {exc}") from exc


def secret_from_env(environ: Mapping[str, str] | None = None) -> list[str] | None:
    """Return the secrets of ``ASGI_STREAM_SECRET``, separated by commas: the first signs, all are accepted."""
    text = (os.environ if environ is None else environ).get("ASGI_STREAM_SECRET")
    return [part.strip() for part in text.split(",") if part.strip()] if text else None


def _from_env(cls: type[T], prefix: str, environ: Mapping[str, str] | None) -> T:
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for setting in fields(cls):  # type: ignore[arg-type]
        variable = prefix + setting.name.upper()
        text = environ.get(variable)
        if text is None or text == "":
            continue
        try:
            values[setting.name] = _PARSERS[str(setting.type)](text)
            cls(**{setting.name: values[setting.name]})
        except ValueError as exc:
            raise ConfigurationError(f"{variable}={text!r}: {exc}") from exc
    return cls(**values)


def parse_bool(text: str) -> bool:
    """Read a switch of the environment: 1/true/yes/on or 0/false/no/off."""
    word = text.strip().lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ConfigurationError(f"{text!r} is neither true nor false; write 1 or 0")


_PARSERS: dict[str, Any] = {
    "int": int,
    "int | None": int,
    "float": float,
    "str": str,
    "bool": parse_bool,
    "LeaseLimit": int,
    "LeasePolicy": str,
    "LeaseFallback": str,
    "StorageAuth": str,
    "StorageWriter": str,
}


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def check_whole(name: str, value: object, *, least: int) -> None:
    if type(value) is not int or value < least:
        raise ConfigurationError(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigurationError(f"{name} must be a number of seconds above 0, not {value!r}")


def check_key_part(name: str, value: object) -> None:
    if not isinstance(value, str) or not value or len(value) > 128:
        raise ConfigurationError(f"{name} must be text of 1 to 128 characters, not {value!r}")
    if not value.isascii() or not value.isprintable() or set(value) & set("{}*?[] "):
        raise ConfigurationError(f"{name} must be printable ASCII without spaces and {{}}*?[]: {value!r}")
