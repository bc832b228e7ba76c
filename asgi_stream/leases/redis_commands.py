"""Leases as calls of scripts: every key and argument of Redis is known here. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any
from urllib.parse import quote, unquote

from asgi_stream.config import LeasePolicy, StreamLeaseConfig
from asgi_stream.leases.store import Answer, Holder, Slot
from asgi_stream.redis.scripts import Call, Script, load

SCRIPTS: dict[str, Script] = {
    name: load("asgi_stream.leases", "common", name) for name in ("acquire", "release", "refresh", "revoke", "holders")
}

BATCH = 200
"""Leases that one script renews: it blocks Redis while it runs, some 3 us for each."""
WAITER_SECONDS = 25.0
"""For how long one who waits is believed to be there; it says so again sooner."""
GRACE_SECONDS = 10.0
"""For how long a slot that was given to one who waits is kept until its process has taken it."""


class Commands:
    """The calls for one setting."""

    def __init__(self, config: StreamLeaseConfig) -> None:
        self._namespace = config.key_namespace
        self.ttl = round(config.ttl_seconds * 1000)
        self._grace = round(min(GRACE_SECONDS * 1000, self.ttl))
        self.channels = f"{config.key_namespace}:to:"

    def keys(self, key: str) -> tuple[str, str, str, str]:
        """The keys of one user. Braces in the user's own name are ours to escape: they would move the slot."""
        name = f"{self._namespace}:{{{escape(key)}}}"
        return name, name + ":waiting", name + ":waiters", name + ":refused"

    def acquire(self, slot: Slot, policy: LeasePolicy) -> Call[Answer]:
        waiter = round(WAITER_SECONDS * 1000)
        arguments = (slot.id, slot.weight, slot.limit, self.ttl, policy, waiter, self._grace, self.channels)
        return Call(SCRIPTS["acquire"], self.keys(slot.key), arguments, _answer)

    def release(self, key: str, slots: Iterable[Slot]) -> Call[int]:
        arguments = [word for slot in slots for word in (slot.id, slot.weight)]
        return Call(SCRIPTS["release"], self.keys(key)[:3], (self._grace, self.channels, *arguments), int)

    def refresh(self, slots: Sequence[Slot], *, one_key: bool) -> list[tuple[list[Slot], Call[list[int]]]]:
        """The calls that renew *slots*, with the slots of each, in the order of its results.

        Of one user the oldest come first, so that those live on where not all can. ``one_key``: for a cluster.
        """
        groups = [
            list(group) for _, group in groupby(sorted(slots, key=lambda slot: (slot.key, age(slot))), lambda s: s.key)
        ]
        calls = []
        batch: list[list[Slot]] = []
        for group in groups:
            batch.append(group)
            if one_key or sum(map(len, batch)) >= BATCH:
                calls.append(self._refresh(batch))
                batch = []
        if batch:
            calls.append(self._refresh(batch))
        return calls

    def _refresh(self, groups: list[list[Slot]]) -> tuple[list[Slot], Call[list[int]]]:
        keys: list[str] = []
        arguments: list[Any] = [self.ttl]
        for group in groups:
            held, _, _, refused = self.keys(group[0].key)
            keys += [held, refused]
            arguments.append(len(group))
            for slot in group:
                arguments += [slot.id, slot.weight, slot.limit]
        call = Call[list[int]](SCRIPTS["refresh"], tuple(keys), tuple(arguments), list)
        return [slot for group in groups for slot in group], call

    def revoke(self, key: str, lease: str | None) -> Call[int]:
        return Call(SCRIPTS["revoke"], self.keys(key), (lease or "", self.ttl, self._grace, self.channels), int)

    def holders(self, key: str) -> Call[list[Holder]]:
        def read(reply: Any) -> list[Holder]:
            rows, waiting = reply
            weights: dict[str, int] = {}
            expires: dict[str, float] = {}
            for name, left in zip(rows[::2], rows[1::2], strict=True):
                lease = name.decode().partition("#")[0]
                weights[lease] = weights.get(lease, 0) + 1
                expires[lease] = int(left) / 1000
            held = [Holder.of(lease, key, weight=weights[lease], expires_in=expires[lease]) for lease in weights]
            held.sort(key=lambda holder: (holder.since, holder.lease))
            return held + [Holder.of(lease.decode(), key, waiting=True) for lease in waiting]

        return Call(SCRIPTS["holders"], self.keys(key)[:2], (), read)

    def pattern(self) -> str:
        """What all users' held leases match."""
        return f"{self._namespace}:{{*}}"


_SAFE = "".join(chr(c) for c in range(32, 127) if chr(c) not in "{}%")


def _answer(reply: Any) -> Answer:
    return Answer(bool(reply[0]), *reply[1:])


def age(slot: Slot) -> tuple[int, int]:
    """What sorts slots by when they were taken."""
    _, number, since, _ = slot.id.split(":", 3)
    return int(since), int(number)


def escape(key: str) -> str:
    """A user's key without what has a meaning in keys of Redis, or in a terminal."""
    if key.isascii() and key.isprintable() and not set(key) & set("{}%"):
        return key
    return quote(key, safe=_SAFE, errors="surrogatepass")


def unescape(name: str) -> str:
    """The user's key that `escape` was given."""
    return unquote(name, errors="surrogatepass")
