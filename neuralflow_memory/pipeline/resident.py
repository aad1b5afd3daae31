"""What is kept in RAM of an owner: the windows of its sessions, and what search reads. Loaded on first use, kept up
to date by writes, bounded by bytes.

Each resident has a lock that covers its owner's writes from the ledger's transaction to the change in RAM, so that
the two never disagree. It is never held while embedding or calling an LLM.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

from ..protocols import Ledger
from ..rules.budget import pauses
from ..types import Entry, Message, Scope
from .scope_index import ScopeIndex

if TYPE_CHECKING:
    from .blocks import Quote

_WINDOWS = 256  # windows kept of one owner
_WEIGH_EVERY = 64  # uses of a resident between two looks at what it holds


@dataclass(slots=True)
class Sent:
    """What is known of the prompt that was built last for a session; in RAM only."""

    tokens: int = 0
    """Its tokens, with what the caller reserved; 0 when none was built."""
    turn: int = 0
    """Number of the user turn that it is to answer."""
    room: int = 0
    """Tokens that it had room for, of what may be folded."""
    short: int = 0
    """For how many user turns in a row that was less than the window's limit."""
    hits: tuple[tuple[int, int], Sequence[Quote]] | None = None
    """What search found for a user turn (its number and version) that waits for its answer."""


@dataclass(slots=True)
class Window:
    """A session's verbatim turns with their token counts, and the summary of what came before them."""

    entries: list[Entry] = field(default_factory=list)
    summary: Entry | None = None
    session: int = 0
    erase_epoch: int = 0
    tasks: list[Entry] = field(default_factory=list)
    summed: bool = False
    """Segments were made of turns that have left it, so that a change of one may take summaries with it."""
    due: bool = False
    """A fold is due whatever the window's size: its session was idle, or the summary is to be made anew."""
    model: str | None = None
    """The model that the session's prompts go to, as the host reported it."""
    sent: Sent = field(default_factory=Sent)
    tokens: int = 0
    """Of what may be folded: neither the host's own instructions at the front nor pinned turns."""
    turns: int = 0
    """Items that may be folded: user turns, and what stands before the first."""

    @property
    def cramped(self) -> bool:
        """Whether prompts, and not just one, have no room for all of it."""
        return self.sent.short > 1 and self.tokens > self.sent.room

    def append(self, entry: Entry) -> None:
        front = entry.role in ("system", "developer") and not self.tokens and not self.turns
        if not entry.pinned and not front:
            self.turns += int(entry.role == "user" or not self.turns)
            self.tokens += entry.tokens
        self.entries.append(entry)

    def take(self, entries: Iterable[Entry]) -> None:
        """Hold *entries* instead of what was held."""
        self.entries, self.tokens, self.turns = [], 0, 0
        for entry in entries:
            self.append(entry)


class Resident:
    """One owner's share of the RAM. Hold `lock` around any use of `index` and `window()`."""

    def __init__(self, scope: Scope, ledger: Ledger, *, max_bytes: int) -> None:
        self.lock = threading.RLock()
        self._max_bytes = max_bytes
        self._scope = scope
        self._ledger = ledger
        self._index: ScopeIndex | None = None
        self._windows: OrderedDict[str, Window] = OrderedDict()
        self._sent: dict[str, Sent] = {}
        """Of the sessions whose windows were used lately, also while a window is to be read anew."""
        self.owner = scope.owner
        self.uses = self.weight = 0  # kept by `Residents`

    @property
    def index(self) -> ScopeIndex | None:
        """What search reads, if it has been loaded."""
        return self._index

    def load(self, model: tuple[int, int] | None) -> ScopeIndex:
        """What search reads; *model* is (number, dimensions) of the embedding model, if there is one."""
        if self._index is None or self._index.too_large:
            owner = self._ledger.owner(self._scope)
            features = [] if owner is None else self._ledger.features(owner)
            index = ScopeIndex(features, dimensions=model[1] if model else 0, max_bytes=self._max_bytes)
            if model is not None and owner is not None and index.holds_vectors:
                index.embed((n, np.frombuffer(v, np.float32)) for n, v in self._ledger.vectors(owner, model[0]))
            self._index = index
        return self._index

    def window(self, scope: Scope, *, count: Callable[[Message], int], expiry: float) -> Window:
        """The window of *scope*'s session; *expiry*: seconds of silence after which a fold is due."""
        assert scope.session_id is not None
        window = self._windows.get(scope.session_id)
        if window is None:
            stored = self._ledger.window(scope)
            window = Window(sent=self._sent.setdefault(scope.session_id, Sent()))
            if stored is not None:
                window.summary = stored.summary and _counted(stored.summary, count)
                window.session, window.erase_epoch = stored.session, stored.erase_epoch
                window.tasks, window.model = stored.tasks, stored.model
                window.take(_counted(e, count) for e in stored.entries)
                window.summed = stored.summary is not None or stored.unsummed
                window.due = stored.unsummed or bool(pauses(window.entries, seconds=expiry))
            self._windows[scope.session_id] = window
            if len(self._windows) > _WINDOWS:
                old, _ = self._windows.popitem(last=False)
                self._sent.pop(old, None)
        self._windows.move_to_end(scope.session_id)
        return window

    def forget(self) -> None:
        """Drop everything: it is read anew from the ledger."""
        self._index = None
        self._windows.clear()

    def forget_window(self, session_id: str) -> None:
        self._windows.pop(session_id, None)

    @property
    def nbytes(self) -> int:
        turns = sum(len(w.entries) for w in list(self._windows.values()))
        index = self._index
        return (index.nbytes if index is not None else 0) + 2000 * turns + 500


class Residents:
    """The residents of all owners: least recently used out first, when they hold more than *max_bytes*.

    An owner has one resident as long as anybody holds it, so that its lock stays the only one. What a resident weighs is
    looked at now and then, not at each use; the sum is kept, not counted.
    """

    def __init__(self, ledger: Ledger, *, max_bytes: int) -> None:
        self._ledger = ledger
        self._max_bytes = max_bytes
        self._all: WeakValueDictionary[tuple[str, str | None, str | None], Resident] = WeakValueDictionary()
        self._recent: OrderedDict[tuple[str, str | None, str | None], Resident] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def of(self, scope: Scope) -> Resident:
        """The resident of the owner of *scope*, as one that is in use."""
        with self._lock:
            resident = self._found(scope)
            self._recent[scope.owner] = resident
            self._recent.move_to_end(scope.owner)
            resident.uses += 1
            due = resident.weight == 0 or resident.uses % _WEIGH_EVERY == 0
        if due:
            self.weigh(resident)
        return resident

    def unused(self, scope: Scope) -> Resident:
        """The resident of the owner of *scope*, for its lock: asking does not count as use."""
        with self._lock:
            return self._found(scope)

    def _found(self, scope: Scope) -> Resident:
        resident = self._all.get(scope.owner)
        if resident is None:
            tenant, user, session = scope.owner
            resident = self._all[scope.owner] = Resident(
                Scope(tenant, user, session), self._ledger, max_bytes=self._max_bytes
            )
        return resident

    def weigh(self, resident: Resident) -> None:
        """Look at what *resident* holds now, and make room if all of them hold too much."""
        nbytes = resident.nbytes
        with self._lock:
            if self._recent.get(resident.owner) is resident:  # one that was let go meanwhile counts no more
                self._total += nbytes - resident.weight
                resident.weight = nbytes
        self.trim()

    def trim(self) -> None:
        """Let go of what was not used lately until the rest fits; the newest stays."""
        with self._lock:
            while self._total > self._max_bytes and len(self._recent) > 1:
                _, old = self._recent.popitem(last=False)
                self._total -= old.weight
                old.weight = 0

    def forget(self) -> None:
        """Drop everything of every owner."""
        with self._lock:
            residents = list(self._all.values())
        for resident in residents:
            with resident.lock:
                resident.forget()


def _counted(entry: Entry, count: Callable[[Message], int]) -> Entry:
    return replace(entry, tokens=count(entry.message)) if entry.tokens < 0 else entry


__all__ = ["Resident", "Residents", "Window"]
