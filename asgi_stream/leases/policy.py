"""Rules of leases that need neither a store nor a clock of their own. Pure."""

from __future__ import annotations

import hashlib
import random

from asgi_stream.errors import ConfigurationError

MAX_KEY_LENGTH = 200
"""Longer user ids are replaced by their hash: they go into keys of Redis and into memory."""


def user_key(user_id: str) -> str:
    """Return the key under which the streams of *user_id* are counted."""
    if not isinstance(user_id, str):
        raise ConfigurationError(
            f"a user id must be text, not {type(user_id).__name__}; write stream_lease(str(user.id))"
        )
    if not user_id:
        raise ConfigurationError("a user id must not be empty: all users without one would share one limit")
    return _bounded("user", user_id)


def address_key(address: str) -> str:
    """Return the key under which the streams of a client address are counted."""
    return _bounded("addr", address)


def tenant_key(tenant: str) -> str:
    """Return the key under which the streams of a tenant's users are counted."""
    if type(tenant) is not str or not tenant:
        raise ConfigurationError(f"a tenant must be text that is not empty, not {tenant!r}")
    return _bounded("tenant", tenant)


GLOBAL_KEY = "global:"
"""The key under which all streams are counted."""


def _bounded(kind: str, name: str) -> str:
    if len(name) > MAX_KEY_LENGTH:
        name = "sha256-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{kind}:{name}"


class RetryEstimate:
    """When a refused client may find a free slot: from the lengths of the streams that ended lately.

    With *limit* streams of a typical length under way, one ends about every ``length / limit``. "Time to the oldest
    expiry" would be wrong: renewed leases never reach it.
    """

    FIRST_GUESS = 5.0
    SHORTEST, LONGEST = 1.0, 60.0

    def __init__(self) -> None:
        self._typical: float | None = None

    def observe(self, seconds: float) -> None:
        """Learn from one stream that has ended."""
        self._typical = seconds if self._typical is None else self._typical + 0.1 * (seconds - self._typical)

    def retry_after(self, limit: int) -> float:
        """Seconds, with 25 % of jitter either way, so that refused clients do not come back together."""
        expected = self.FIRST_GUESS if self._typical is None else self._typical / limit
        return min(max(expected, self.SHORTEST), self.LONGEST) * random.uniform(0.75, 1.25)
