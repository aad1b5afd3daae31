"""What was read and found, kept for as long as it holds: entries, what search found, whole contexts.

Each value was made from a **head**: the owner's last change, by id and origin, from the table `changes`, which notes every
write of every process. Whoever asks first looks whether anybody has written, which costs next to nothing; if the owner's head
is another one now, the value is none. What also depends on the clock carries until when it holds.

In RAM, objects are kept; together with other processes (`protocols.Cache`) only which entries were found and their scores: no
text leaves the ledger.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from .._json import copied
from ..protocols import Cache, Ledger, LocalCache, Noted
from ..types import Entry, Hit, Scope, changed, microseconds, utc

if TYPE_CHECKING:
    from .parts import Parts
    from .search import Conditions

_OWNERS = 10_000  # whose heads are kept in RAM
_MOST_SHARED = 256  # hits; more of them are found again sooner than they are sent
_FORMAT = 1  # of shared values; those of another are none
_MAC = 16  # bytes
_FOREVER = sys.maxsize
_ENTRY, HIT = 1200, 1000  # bytes that they take beside texts, about
_LOW = (1 << 32) - 1


@dataclass(slots=True)
class Holds:
    """How long what is being found will hold: up to *until* (microseconds since 1970), or not at all, if not *sure*."""

    until: int = _FOREVER
    sure: bool = True

    def end(self, when: datetime | None) -> None:
        """It ends then, at the latest."""
        if when is not None:
            self.until = min(self.until, microseconds(when))

    def end_with(self, day: datetime) -> None:
        """It ends with that day (UTC), at the latest."""
        start = day.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        self.end(start + timedelta(days=1))


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found: number, score and signals of each hit; and the turns that stand before some of them."""

    hits: tuple[tuple[int, float, Mapping[str, float]], ...]
    before: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the answer to a question is kept, or is to be: under this key of the owner, as long as its head is this one."""

    owner: int
    head: tuple[int, int]
    key: str
    now: int


@dataclass(frozen=True, slots=True)
class Kept:
    """A value that was made from *head* at *made*, and holds until then."""

    head: tuple[int, int]
    made: int
    until: int
    value: Any


class Hot:
    """The caches of an open folder, and the heads of owners as of the last look at what was changed.

    Attributes:
        entries: Entries by number.
        results: What was found, by what was asked for.
        shared: What other processes see of that, too.
        fingerprint: Names everything else that decides what is found: options, the reranker, versions.
        ttl: Seconds for which shared values are kept, at most.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        entries: LocalCache,
        results: LocalCache,
        shared: Cache | None = None,
        fingerprint: str = "",
        ttl: float = 0.0,
        seen: int,
    ) -> None:
        self.entries = entries
        self.results = results
        self.shared = shared
        self.fingerprint = fingerprint
        self.ttl = ttl
        self.keeps_results = results.max_entries > 0 or shared is not None
        self._ledger = ledger
        self._seen = seen
        self._heads: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def head(self, owner: int) -> tuple[int, int] | None:
        """The owner's last change as of the last look; None where it can't be told."""
        with self._lock:
            known = self._heads.get(owner)
            if known is None:
                known = self._ledger.head(owner, seen=self._seen)
                if known is not None:
                    self._note(owner, known)
            return known

    def moved(self, rows: Sequence[Noted] | None, newest: int) -> None:
        """Take in what was changed, and let go of what that made stale."""
        with self._lock:
            if rows is None:
                self._heads.clear()
                self.entries.clear()
                self.results.clear()
            changed: dict[int, set[int]] = {}
            last: dict[int, tuple[int, int]] = {}
            for row in rows or ():
                numbers = changed.setdefault(row.number >> 32, set())
                if row.session is not None or not row.number & _LOW:  # else it has a vector now, and is as it was
                    numbers.add(row.number)
                last[row.number >> 32] = row.id, row.origin
            for owner, numbers in changed.items():
                self._note(owner, last[owner])
                whole = owner << 32 in numbers  # a window, or all
                self.entries.drop(owner, None if whole else numbers)
                self.results.drop(owner)
            self._seen = newest

    def _note(self, owner: int, head: tuple[int, int]) -> None:
        self._heads[owner] = max(head, self._heads.get(owner, head))
        self._heads.move_to_end(owner)
        if len(self._heads) > _OWNERS:
            self._heads.popitem(last=False)

    def keep_entries(self, owner: int, entries: Mapping[int, Entry], *, head: tuple[int, int], now: int) -> None:
        """Keep entries that were read after *head* was told, unless something was changed since."""
        with self._lock:
            if self._heads.get(owner) == head:
                self.entries.put(owner, {n: (e, _size_of(e)) for n, e in entries.items()}, now=now)

    def kept(self, place: Place) -> Kept | None:
        """What is kept there, None for nothing."""
        kept: Kept | None = self.results.get(place.owner, [place.key], now=place.now).get(place.key)
        if kept is not None and (kept.head != place.head or not kept.made <= place.now < kept.until):
            self.results.drop(place.owner, [place.key])
            return None
        return kept

    def keep(self, place: Place, value: Any, *, size: int, until: int) -> None:
        """Keep a value that was made from the place's head, unless something was changed since."""
        with self._lock:
            if self._heads.get(place.owner) == place.head:
                kept = Kept(place.head, place.now, until, value)
                self.results.put(place.owner, {place.key: (kept, size + len(place.key))}, now=place.now)

    def forget(self, owner: int) -> None:
        """Let go of everything in RAM that is of the owner."""
        with self._lock:
            self.entries.drop(owner)
            self.results.drop(owner)


def place(parts: Parts, scope: Scope, *asked: Any) -> Place | None:
    """Where the answer to *asked* is kept; None where none is. Call it before reading anything that the answer is made of."""
    hot = parts.hot
    if not hot.keeps_results:
        return None
    try:
        key = json.dumps([parts.model_id, *asked], sort_keys=True, default=_plain)
    except (TypeError, ValueError, RecursionError):  # something that only this caller has
        return None
    parts.residents.look()
    owner = parts.residents.unused(scope).number
    head = None if owner is None else hot.head(owner)
    return None if owner is None or head is None else Place(owner, head, key, microseconds(parts.clock()))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return {"datetime": utc(value).isoformat()}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError


def as_asked(conditions: Conditions, scope: Scope) -> dict[str, Any]:
    """*conditions* of a search, with what they mean in *scope*."""
    asked = {f.name: getattr(conditions, f.name) for f in fields(conditions)}
    within = conditions.within
    return asked | {"own": (within == "session" and scope.session_id, within == "agent" and scope.agent_id)}


# -- what search found


def hits(
    parts: Parts,
    scope: Scope,
    place: Place | None,
    find: Callable[[], tuple[list[Hit], Mapping[int, Entry]]],
    *,
    holds: Holds,
) -> tuple[list[Hit], Mapping[int, Entry]]:
    """What *find* finds, hits and the turns that stand before some of them; from a cache, if it is there and holds.

    *holds*, which *find* tells how long that holds, is told so in any case.
    """
    hot = parts.hot
    if place is None:
        return find()
    kept = hot.kept(place) or (_from_shared(parts, scope, place, hot.shared) if hot.shared is not None else None)
    if kept is not None:
        found: Found = kept.value
        numbers = list({*(number for number, *_ in found.hits), *found.before.values()})
        read = entries(parts, scope, numbers)
        if len(read) == len(numbers):
            holds.until = min(holds.until, kept.until)
            again = [Hit(read[number], score, dict(signals)) for number, score, signals in found.hits]
            return again, {number: read[other] for number, other in found.before.items()}
    made, before = find()
    if holds.sure and holds.until > place.now:
        found = Found(
            tuple((h.entry.number, h.score, dict(h.signals)) for h in made),
            {number: entry.number for number, entry in before.items()},
        )
        hot.keep(place, found, size=HIT * (1 + len(made)), until=holds.until)
        names = {tuple(h.signals) for h in made}
        if hot.shared is not None and len(made) <= _MOST_SHARED and len(names) <= 1:
            _share(parts, scope, place, hot.shared, found, until=holds.until)
    return made, before


def entries(parts: Parts, scope: Scope, numbers: Sequence[int]) -> dict[int, Entry]:
    """Entries of the owner by number, from RAM where they are there. They may be others' too: for reading only.

    What can't be read, because its block of the archive is damaged, is left out.
    """
    hot = parts.hot
    owner = parts.residents.unused(scope).number if hot.entries.max_entries > 0 else None
    head = None if owner is None else hot.head(owner)
    if owner is None or head is None:
        return parts.ledger.by_numbers(scope, numbers, texts="skip")
    now = microseconds(parts.clock())
    found: dict[int, Entry] = hot.entries.get(owner, numbers, now=now)
    missing = [number for number in numbers if number not in found]
    if missing:
        read = parts.ledger.by_numbers(scope, missing, texts="skip")
        hot.keep_entries(owner, read, head=head, now=now)
        found |= read
    return found


def own(entry: Entry) -> Entry:
    """*entry* for a caller to keep: nothing in it that may be changed is anybody else's."""
    changes: dict[str, Any] = {"metadata": copied(entry.metadata, what="metadata") if entry.metadata else {}}
    if entry.payload is not None:
        changes["payload"] = copied(entry.payload, what="payload")
    if entry.blocks is not None:
        changes["blocks"] = tuple(copied(entry.blocks, what="blocks"))
    if entry.tool_calls:
        changes["tool_calls"] = tuple(replace(c, args=copied(c.args, what="args")) for c in entry.tool_calls)
    return changed(entry, **changes)


def forget(parts: Parts, scope: Scope) -> None:
    """Remove what is cached of the owner of *scope*, since something of it was deleted or changed."""
    parts.residents.look()
    owner = parts.residents.unused(scope).number
    if owner is not None:
        parts.hot.forget(owner)
    if parts.hot.shared is not None:
        parts.hot.shared.delete(parts.ledger.partition(scope))


def stats(parts: Parts) -> dict[str, Any]:
    """What the caches hold, and how often they had what was asked for."""
    hot = parts.hot
    hot.entries.expire(now=microseconds(parts.clock()))
    shared = None if hot.shared is None else dict(hot.shared.stats())
    return {"entries": hot.entries.stats(), "results": hot.results.stats(), "shared": shared}


# -- what other processes see


def _name(parts: Parts, scope: Scope, place: Place) -> str:
    asked = hashlib.blake2b(f"{_FORMAT}\0{parts.hot.fingerprint}\0{place.key}".encode(), digest_size=16).hexdigest()
    return parts.ledger.content_hash(scope, text=asked, model_id="\0cache").hex()


def _head(place: Place) -> str:
    return f"{place.head[0]}.{place.head[1]}"


def _mac(parts: Parts, scope: Scope, name: str, text: str) -> bytes:
    """Proves that a value was made with this folder's secret, for this owner and name."""
    return parts.ledger.content_hash(scope, text=text, model_id=f"\0cached {name}")


def _share(parts: Parts, scope: Scope, place: Place, cache: Cache, found: Found, *, until: int) -> None:
    name, head = _name(parts, scope, place), _head(place)
    until = min(until, place.now + int(parts.hot.ttl * 1_000_000))
    names = list(found.hits[0][2]) if found.hits else []
    rows = [[number, score, [signals[n] for n in names]] for number, score, signals in found.hits]
    text = json.dumps([_FORMAT, head, place.now, until, names, rows, list(found.before.items())])
    value = _mac(parts, scope, name, text) + text.encode()
    cache.set(parts.ledger.partition(scope), {name: value}, head=head, ttl=parts.hot.ttl)


def _from_shared(parts: Parts, scope: Scope, place: Place, cache: Cache) -> Kept | None:
    name, head = _name(parts, scope, place), _head(place)
    (value,) = cache.get(parts.ledger.partition(scope), [name], head=head)
    if value is None:
        return None
    try:
        text = value[_MAC:].decode()
        if value[:_MAC] != _mac(parts, scope, name, text):
            return None
        form, made_from, made, until, names, rows, before = json.loads(text)
        if form != _FORMAT or made_from != head or not made <= place.now < until:
            return None
        hits = tuple((number, score, dict(zip(names, signals, strict=True))) for number, score, signals in rows)
        found = Found(hits, dict(before))
    except (ValueError, TypeError, RecursionError):  # it is nothing of ours
        return None
    parts.hot.keep(place, found, size=HIT * (1 + len(found.hits)), until=until)
    return Kept(place.head, made, until, found)


def _size_of(entry: Entry) -> int:
    more = (entry.payload, entry.metadata, entry.blocks, entry.tool_calls)
    return _ENTRY + sys.getsizeof(entry.content) + sum(len(str(m)) * 2 for m in more if m)


__all__ = [
    "HIT",
    "Found",
    "Holds",
    "Hot",
    "Place",
    "as_asked",
    "entries",
    "forget",
    "hits",
    "own",
    "place",
    "stats",
]
