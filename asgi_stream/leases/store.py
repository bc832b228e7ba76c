"""Where leases are kept: the seam between the limiter and memory or Redis."""

from __future__ import annotations

from typing import Protocol


class LeaseStore(Protocol):
    """At most ``limit`` lease ids under a key, decided and counted in one step.

    A lease id is made by the caller, so that a release is right whatever became of the acquire before it.
    """

    def acquire(self, key: str, lease_id: int, limit: int) -> int | None:
        """Add *lease_id* if fewer than *limit* are held; return None, or the number held if there was no room."""

    def refresh(self, key: str, lease_id: int) -> bool:
        """Keep a lease alive; False if it is no longer held."""

    def release(self, key: str, lease_id: int) -> bool:
        """Give a lease back; False if it was not held. Never fails because of being called twice."""

    def in_use(self, key: str) -> int:
        """How many leases are held under *key*."""
