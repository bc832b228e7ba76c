"""What leases are to a store: slots, and what becomes of asking for one. Pure.

Two stores keep them: this process's memory (`memory`), and Redis (`redis`).
"""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

Scope = Literal["user", "tenant", "global"]
Loss = Literal["lease_lost", "superseded", "revoked"]
"""Why a lease was taken away: somebody else has its slot, a newer stream of its user took it, an operator did."""


class Slot:
    """One lease under one key: what a store knows of it.

    ``id`` is made by the process that asks, so that giving it back is right whatever became of the asking:
    ``<process>:<number>:<Unix ms>:<host>:<pid>``; memory alone never needs it. ``good_until`` is the monotonic time
    after which it may be somebody else's, as far as this process knows. ``owner`` is a weak reference to the lease.
    """

    __slots__ = ("_id", "good_until", "key", "limit", "owner", "scope", "since", "weight")

    def __init__(self, key: str, weight: int, limit: int, scope: Scope = "user") -> None:
        self.key = key
        self.weight = weight
        self.limit = limit
        self.scope = scope
        self.since = time.time()
        self.good_until = float("inf")
        self.owner: Callable[[], object] | None = None
        self._id = ""

    @property
    def id(self) -> str:
        """Its name, made when it is asked for."""
        if not self._id:
            self._id = f"{boot_id()}:{_process.next()}:{int(self.since * 1000)}:{_process.tail}"
        return self._id

    def abandon(self) -> Slot:
        """Return what this was until now, and become another one: nobody knows what became of asking for it."""
        old = Slot(self.key, self.weight, self.limit, self.scope)
        old.since, old._id = self.since, self.id
        self._id = ""
        return old


class Answer(NamedTuple):
    """What became of asking: it is held, or ``position`` others wait before it, or there is no room."""

    granted: bool
    in_use: int
    position: int = 0


class Listener(Protocol):
    """Who is told what becomes of leases, in whichever thread learns it."""

    def on_granted(self, slot: Slot) -> None:
        """One who waited has its slot now."""

    def on_lost(self, slot: Slot, reason: Loss) -> None:
        """A slot was taken away."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A lease as a listing shows it. ``expires_in`` is in seconds, unless it is renewed; None in memory."""

    lease: str
    key: str
    since: float  # Unix seconds, by its process's clock
    host: str
    pid: int
    weight: int = 1
    expires_in: float | None = None
    waiting: bool = False

    @classmethod
    def of(cls, lease: str, key: str, **more: object) -> Holder:
        """Read what the id says."""
        _, _, since, host, pid = lease.split(":", 4)
        return cls(lease, key, int(since) / 1000, host, int(pid), **more)  # type: ignore[arg-type]


class _Process:
    """What the ids of this process begin and end with."""

    def __init__(self) -> None:
        self.pid = 0
        self.boot = ""
        self.tail = ""
        self.next = itertools.count(1).__next__

    def renew(self) -> None:
        self.boot = os.urandom(5).hex()
        self.tail = f"{platform.node().replace(':', '-').replace('#', '-')[:64] or 'host'}:{os.getpid()}"
        self.pid = os.getpid()


_process = _Process()


def boot_id() -> str:
    """What this process's lease ids begin with, and its messages are published under."""
    if _process.pid != os.getpid():  # a forked process is another one [O3]
        _process.renew()
    return _process.boot
