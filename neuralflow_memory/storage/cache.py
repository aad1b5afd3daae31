"""`LRU`: objects kept in RAM, by owner and key; bounded in number, bytes and age. Thread-safe."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_OVERHEAD = 250  # bytes that keeping a value takes beside the value


@dataclass(slots=True)
class _Slot:
    value: Any
    size: int
    uses: float
    used_at: int


class LRU:
    """Keeps what was used last. What was used often stays longer, if there is a *max_age*.

    A value that was not used for longer than *max_age* (microseconds) leaves, unless it was used *min_uses* times; with each
    *max_age* that goes by, earlier uses count half.
    """

    def __init__(
        self, *, max_entries: int, max_bytes: int, max_age: float | None = None, min_uses: float = 0.0
    ) -> None:
        self.max_entries = max_entries
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._min_uses = min_uses
        self._slots: OrderedDict[tuple[int, Hashable], _Slot] = OrderedDict()
        self._owners: dict[int, set[Hashable]] = {}
        self._lock = threading.Lock()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def get(self, owner: int, keys: Iterable[Hashable], *, now: int) -> dict[Any, Any]:
        """The values of *owner* that are kept, by key; a use of each."""
        found = {}
        with self._lock:
            for key in keys:
                slot = self._slots.get((owner, key))
                if slot is not None and self._overdue(slot, now):
                    self._remove((owner, key), evicted=True)
                    slot = None
                if slot is None:
                    self._misses += 1
                    continue
                self._hits += 1
                slot.uses, slot.used_at = self._faded(slot, now) + 1.0, now
                self._slots.move_to_end((owner, key))
                found[key] = slot.value
        return found

    def put(self, owner: int, values: Mapping[Any, tuple[Any, int]], *, now: int) -> None:
        """Keep values (with their sizes in bytes, about) of *owner*, by key; what was not used the longest makes room."""
        with self._lock:
            for key, (value, size) in values.items():
                if (owner, key) in self._slots:
                    self._remove((owner, key))
                slot = _Slot(value, size + _OVERHEAD, 1.0, now)
                if slot.size > self._max_bytes or self.max_entries < 1:
                    continue
                self._slots[owner, key] = slot
                self._owners.setdefault(owner, set()).add(key)
                self._bytes += slot.size
            while len(self._slots) > self.max_entries or self._bytes > self._max_bytes:
                self._remove(next(iter(self._slots)), evicted=True)

    def drop(self, owner: int, keys: Iterable[Hashable] | None = None) -> None:
        """Let go of values of *owner*: those under *keys*, or all."""
        with self._lock:
            held = self._owners.get(owner, set())
            for key in list(held) if keys is None else held.intersection(keys):
                self._remove((owner, key))

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._slots.clear()
            self._owners.clear()
            self._bytes = 0

    def expire(self, *, now: int) -> None:
        """Let go of what was not used for too long."""
        with self._lock:
            for place in [place for place, slot in self._slots.items() if self._overdue(slot, now)]:
                self._remove(place, evicted=True)

    def stats(self) -> dict[str, int]:
        """How many values are kept and in how many bytes, about; hits, misses and evictions so far."""
        with self._lock:
            return {
                "entries": len(self._slots),
                "bytes": self._bytes,
                "hits": self._hits,
                "misses": self._misses,
                "evictions": self._evictions,
            }

    def _overdue(self, slot: _Slot, now: int) -> bool:
        late = self._max_age is not None and now - slot.used_at > self._max_age
        return late and self._faded(slot, now) < self._min_uses

    def _faded(self, slot: _Slot, now: int) -> float:
        if self._max_age is None:
            return slot.uses
        return float(slot.uses * 0.5 ** (max(0, now - slot.used_at) / self._max_age))

    def _remove(self, place: tuple[int, Hashable], *, evicted: bool = False) -> None:
        slot = self._slots.pop(place)
        self._bytes -= slot.size
        self._evictions += evicted
        held = self._owners.get(place[0], set())
        held.discard(place[1])
        if not held:
            self._owners.pop(place[0], None)


__all__ = ["LRU"]
