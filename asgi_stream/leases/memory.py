"""Leases of one process. They need no expiry: what holds them dies with the process, too."""

from __future__ import annotations

import threading
from collections import deque

from asgi_stream.config import LeasePolicy
from asgi_stream.leases.store import Answer, Holder, Listener, Loss, Slot

_GRANTED = Answer(True, 0)


class _Key:
    """The slots of one user: who holds them, in the order of coming, and who waits."""

    __slots__ = ("held", "used", "waiting")

    def __init__(self) -> None:
        self.held: dict[Slot, None] = {}
        self.used = 0
        self.waiting: deque[Slot] = deque()


class MemoryLeaseStore:
    """Safe to use from several threads and event loops."""

    def __init__(self, listener: Listener | None = None) -> None:
        self._keys: dict[str, _Key] = {}
        self._lock = threading.Lock()
        self._listener = listener

    def acquire(self, slot: Slot, policy: LeasePolicy = "reject") -> Answer:
        """Take *slot*, if there is room or *policy* makes some; with ``"wait"`` it is in the queue otherwise."""
        evicted: list[Slot] = []
        with self._lock:
            key = self._keys.get(slot.key)
            if key is None:
                key = self._keys[slot.key] = _Key()
            elif slot in key.held:
                return _GRANTED  # given meanwhile
            weight = slot.weight
            if key.used + weight <= slot.limit and not key.waiting:
                key.held[slot] = None
                key.used += weight
                return _GRANTED
            if policy == "wait":
                if slot not in key.waiting:
                    key.waiting.append(slot)
                return Answer(False, key.used, key.waiting.index(slot))
            if policy == "evict_oldest" and weight <= slot.limit:
                while key.used + weight > slot.limit:
                    oldest = next(iter(key.held))
                    self._drop(key, oldest)
                    evicted.append(oldest)
                key.held[slot] = None
                key.used += weight
            else:
                answer = Answer(False, key.used, len(key.waiting))
                if not key.used and not key.waiting:
                    del self._keys[slot.key]
                return answer
        self._tell_lost(evicted, "superseded")
        return _GRANTED

    def force(self, slot: Slot) -> None:
        """Count *slot*, whether there is room or not: it was given elsewhere."""
        with self._lock:
            key = self._keys.setdefault(slot.key, _Key())
            if slot not in key.held:
                key.held[slot] = None
                key.used += slot.weight

    def release(self, slot: Slot) -> bool:
        """Give *slot* back, or wait for it no more; False if it was not held. May be called twice."""
        with self._lock:
            key = self._keys.get(slot.key)
            if key is None:
                return False
            held = slot in key.held
            if held:
                self._drop(key, slot)
            elif key.waiting:
                try:
                    key.waiting.remove(slot)
                except ValueError:
                    pass
            given = self._give(key) if key.waiting else []
            if not key.held and not key.waiting:
                del self._keys[slot.key]  # a key without leases takes no memory
        for one in given:
            if self._listener is not None:
                self._listener.on_granted(one)
        return held

    def revoke(self, name: str, lease_id: str | None = None) -> int:
        """Take away one lease, or all under a key; return how many."""
        with self._lock:
            key = self._keys.get(name)
            if key is None:
                return 0
            taken = [slot for slot in key.held if lease_id in (None, slot.id)]
            for slot in taken:
                self._drop(key, slot)
            given = self._give(key)
            if not key.held and not key.waiting:
                del self._keys[name]
        self._tell_lost(taken, "revoked")
        for one in given:
            if self._listener is not None:
                self._listener.on_granted(one)
        return len(taken)

    def in_use(self, name: str) -> int:
        """How many slots are held under a key."""
        key = self._keys.get(name)
        return 0 if key is None else key.used

    def holders(self, name: str) -> list[Holder]:
        """Who holds a key's slots, the oldest first, then who waits."""
        with self._lock:
            key = self._keys.get(name)
            if key is None:
                return []
            held = [Holder.of(slot.id, name, weight=slot.weight) for slot in key.held]
            return held + [Holder.of(slot.id, name, weight=slot.weight, waiting=True) for slot in key.waiting]

    def keys(self) -> list[str]:
        """The keys that have any."""
        return list(self._keys)

    @staticmethod
    def _drop(key: _Key, slot: Slot) -> None:
        del key.held[slot]
        key.used -= slot.weight

    def _give(self, key: _Key) -> list[Slot]:
        given = []
        while key.waiting and key.used + key.waiting[0].weight <= key.waiting[0].limit:
            slot = key.waiting.popleft()
            key.held[slot] = None
            key.used += slot.weight
            given.append(slot)
        return given

    def _tell_lost(self, slots: list[Slot], reason: Loss) -> None:
        if self._listener is not None:
            for slot in slots:
                self._listener.on_lost(slot, reason)
