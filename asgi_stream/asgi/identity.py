"""Whose streams are counted [L7]."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

from asgi_stream.leases.policy import address_key, user_key

logger = logging.getLogger("asgi_stream")

Identify = Callable[[Scope], str | None]
"""From a scope to the user's id; None means: count by address."""

_FORWARDING = frozenset({b"forwarded", b"x-forwarded-for", b"x-real-ip"})

# Where proxies stand: RFC 1918, loopback, link-local, shared address space (RFC 6598), unique local. Not `is_private`,
# which also counts networks that are only reserved.
_PROXY_NETWORKS = [
    ipaddress.ip_network(network)
    for network in (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "100.64.0.0/10",
        "::1/128",
        "fe80::/10",
        "fc00::/7",
    )
]


@dataclass(frozen=True, slots=True)
class Identity:
    """A key to count under. ``proxied``: an address that stands for everybody behind a proxy."""

    key: str
    by_user: bool
    proxied: bool = False


def identify(scope: Scope, custom: Identify | None = None) -> Identity:
    """Return who this request counts for: *custom*'s answer, else the authenticated user, else the address."""
    if custom is not None:
        user_id = custom(scope)
        if user_id is not None:
            return Identity(user_key(user_id), by_user=True)
    else:
        name = authenticated_name(scope)
        if name is not None:
            return Identity(user_key(name), by_user=True)
    return _by_address(scope)


def authenticated_name(scope: Scope) -> str | None:
    """The id of ``scope["user"]`` if it is authenticated: ``identity``, else ``username``, else ``display_name``."""
    user = scope.get("user")
    if user is None or not getattr(user, "is_authenticated", False):
        return None
    for attribute in ("identity", "username", "display_name"):
        try:
            value: Any = getattr(user, attribute, None)
        except NotImplementedError:  # Starlette's SimpleUser has an `identity` that only raises
            continue
        if value is not None and str(value):
            return str(value)
    return None


def authenticated_owner(scope: Scope) -> str | None:
    """The id of ``scope["user"]`` as an owner [S1]: ``identity`` or ``username``, never a name that is only shown."""
    user = scope.get("user")
    if user is None or not getattr(user, "is_authenticated", False):
        return None
    for attribute in ("identity", "username"):
        try:
            value: Any = getattr(user, attribute, None)
        except NotImplementedError:
            continue
        if value is not None and str(value):
            return str(value)
    return None


def _by_address(scope: Scope) -> Identity:
    client = scope.get("client")
    host = str(client[0]) if client else "unknown"
    try:
        address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return Identity(address_key(host), by_user=False)  # a Unix socket, a test client
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif not address.is_loopback:
            # One subscriber has a whole /64 to choose addresses from.
            host = str(ipaddress.ip_network((address, 64), strict=False))
    if isinstance(address, ipaddress.IPv4Address):
        host = str(address)
    proxied = any(address in network for network in _PROXY_NETWORKS) and any(
        name in _FORWARDING for name, _ in scope.get("headers", ())
    )
    if proxied:
        _warn_proxied(host)
    return Identity(address_key(host), by_user=False, proxied=proxied)


def warn_refused_by_address(key: str) -> None:
    """Say, once, what to set when somebody was refused because of an address."""
    _warn_once(
        "refused",
        "a stream was refused because of its client's address (%s). Users behind one address share a limit: set "
        "identify=… of Streaming or StreamLeaseMiddleware, or put an AuthenticationMiddleware around the application",
        key,
    )


def _warn_proxied(host: str) -> None:
    _warn_once(
        "proxied",
        "streams come through a proxy at %s and are counted together, under proxied_limit. Let the server trust the "
        "proxy's headers (uvicorn: --proxy-headers --forwarded-allow-ips), or set identify=…",
        host,
    )


_said: set[str] = set()


def _warn_once(topic: str, message: str, *args: object) -> None:
    if topic not in _said:
        _said.add(topic)
        logger.warning(message, *args)
