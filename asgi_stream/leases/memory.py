"""Leases of one process. They need no expiry: what holds them dies with the process, too."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from asgi_stream.leases.store import LeaseStore


class MemoryLeaseStore:
    """A set of lease ids for each key that has any. Safe to use from several threads and event loops."""

    def __init__(self) -> None:
        self._held: dict[str, set[int]] = {}
        self._lock = threading.Lock()

    def acquire(self, key: str, lease_id: int, limit: int) -> int | None:
        with self._lock:
            held = self._held.get(key)
            if held is None:
                self._held[key] = {lease_id}
                return None
            if len(held) >= limit:
                return len(held)
            held.add(lease_id)
            return None

    def refresh(self, key: str, lease_id: int) -> bool:
        return lease_id in self._held.get(key, ())

    def release(self, key: str, lease_id: int) -> bool:
        with self._lock:
            held = self._held.get(key)
            if held is None or lease_id not in held:
                return False
            held.discard(lease_id)
            if not held:
                del self._held[key]  # a key without leases takes no memory
            return True

    def in_use(self, key: str) -> int:
        return len(self._held.get(key, ()))


if TYPE_CHECKING:
    _conforms: type[LeaseStore] = MemoryLeaseStore
