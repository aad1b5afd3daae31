"""What is kept in RAM of an owner: the windows of its sessions, and what search reads. Loaded on first use, kept up
to date by writes, bounded by bytes.

Each resident has a lock that covers its owner's writes from the ledger's transaction to the change in RAM, so that
the two never disagree. It is never held while embedding or calling an LLM.

Other processes write to the same ledger. What they have changed is looked up, and RAM follows, each time that a resident is
asked for by somebody who does not hold its lock yet: so nothing moves under the feet of who holds it, and whoever reads begins
with what was there at that moment. Only `add` does not look: of several who write, each takes the next numbers, and who asks
next learns what came between.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeVar, cast
from weakref import WeakValueDictionary

import numpy as np

from ..errors import ConflictError, NotFound
from ..protocols import WORDS, Change, Clock, Feature, Ledger, Noted
from ..rules.budget import pauses
from ..types import Entry, Message, Scope
from .scope_index import ScopeIndex

if TYPE_CHECKING:
    from .blocks import Quote

_WINDOWS = 256  # windows kept of one owner
_IDLE = timedelta(minutes=15)  # since its last use, after which a resident is let go
_WEIGH_EVERY = 64  # uses of a resident between two looks at what it holds
_MOST_NEWS = 2000  # changes by others that wait for a resident's next use; more, and it is read anew
_NEVER = datetime.min.replace(tzinfo=UTC)
_MOST_UNREAD = 512  # written entries that wait for search to ask for them
_FEW = 256  # changed entries that are taken in one by one, whatever share of all they are
_TRIES = 5  # a change that was overtaken by another process's starts again
T = TypeVar("T")
_SHARE = 4  # and if they are not so many that one in four has changed


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
    """Segments or episodes were made of turns, so that a change of one may take them, and the summary, with it."""
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

    def __init__(
        self,
        scope: Scope,
        ledger: Ledger,
        *,
        max_bytes: int,
        model_id: Callable[[], str | None] = lambda: None,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """*look* puts into `news` what others have changed since it was called last."""
        self.lock = threading.RLock()
        self._max_bytes = max_bytes
        self._scope = scope
        self._ledger = ledger
        self._model_id = model_id
        self._look = look
        self.news: deque[Change | None] = deque()
        """What others have changed and RAM does not show yet; None stands for anything."""
        self._number: int | None = None
        self._index: ScopeIndex | None = None
        self._unread: list[Feature] = []
        """Of entries that were written since the index was last asked for."""
        self._windows: OrderedDict[str, Window] = OrderedDict()
        self._sent: dict[str, Sent] = {}
        """Of the sessions whose windows were used lately, also while a window is to be read anew."""
        self.owner = scope.owner
        self.uses = self.weight = 0  # kept by `Residents`, as is
        self.used = _NEVER

    @property
    def number(self) -> int | None:
        """The owner's number in the ledger; None until something is stored for it."""
        if self._number is None:
            self._number = self._ledger.owner(self._scope)
        return self._number

    def number_again(self) -> None:
        """Ask for the owner's number anew, since anything may have changed."""
        self._number = None

    @property
    def index(self) -> ScopeIndex | None:
        """What search reads, if it has been loaded."""
        if self._unread:
            self._read()
        return self._index

    def load(self, model: tuple[int, int] | None) -> ScopeIndex:
        """What search reads; *model* is (number, dimensions) of the embedding model, if there is one.

        With vectors of a later model, if that was taken up meanwhile: who has a question of *model* looks at `index.model`.
        """
        old = self.index is not None and model is not None and 0 < self.index.model < model[0]
        if self.index is None or self.index.too_large or old:
            owner = self._ledger.owner(self._scope)
            features = [] if owner is None else self._ledger.features(owner)
            index = ScopeIndex(features, dimensions=model[1] if model else 0, max_bytes=self._max_bytes)
            index.model = model[0] if model else 0
            if model is not None and owner is not None and index.holds_vectors:
                index.embed((n, np.frombuffer(v, np.float32)) for n, v in self._ledger.vectors(owner, model[0]))
            self._index = index
            return index
        return self.index

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
                window.summed = stored.summary is not None or stored.unsummed or stored.episodes
                window.due = stored.unsummed or bool(pauses(window.entries, seconds=expiry))
            self._windows[scope.session_id] = window
            if len(self._windows) > _WINDOWS:
                old, _ = self._windows.popitem(last=False)
                self._sent.pop(old, None)
        self._windows.move_to_end(scope.session_id)
        return window

    def put(self, features: Iterable[Feature]) -> None:
        """Take entries that were just written. They are read when search asks for them: not each turn is followed by one."""
        if self._index is not None:
            self._unread += features
            if len(self._unread) > _MOST_UNREAD:
                self._read()

    def _read(self) -> None:
        """Bring what search reads up to date with entries that were written, and with what others wrote before them."""
        own, self._unread = {feature[0]: feature for feature in self._unread}, []
        if self._index is None:
            return
        last, newest = self._index.last, max(own, default=0)
        try:
            if newest > last:
                self._look()
                between = {c.number for c in self._waiting() if c is not None and last < c.number < newest}
                own = {f[0]: f for f in self._features(between - own.keys())} | own
            unanalysed = [number for number, feature in own.items() if feature[WORDS] < 0]
            own |= {f[0]: f for f in self._features(unanalysed)}
            for number in unanalysed:  # what is there no more goes at once, by whoever deleted it
                if own[number][WORDS] < 0:
                    own[number] = cast("Feature", (*own[number][:WORDS], 0, *own[number][WORDS + 1 :]))
            for number in sorted(own):
                self._index.put(own[number])
        except ValueError:  # it is not the newest: it is read anew, in its place
            self._index = None
        except BaseException:
            self._index = None
            raise

    def catch_up(self) -> None:
        """Bring RAM up to date with what others have changed."""
        waiting = self._waiting()
        try:
            if None in waiting or len(waiting) >= _MOST_NEWS:
                self.forget()
            else:
                changes = [c for c in waiting if c is not None]
                self._forget_windows({c.session for c in changes if c.session is not None or not c.number})
                self._take_in(changes)
        except BaseException:
            self.forget()
            raise
        for _ in waiting:  # at last, so that none is lost if this is interrupted
            self.news.popleft()

    def _waiting(self) -> list[Change | None]:
        return [self.news[n] for n in range(len(self.news))]  # others may add to it meanwhile

    def _forget_windows(self, sessions: set[int | None]) -> None:
        for name, window in list(self._windows.items()):
            if None in sessions or window.session in sessions or (sessions and not window.session):
                del self._windows[name]

    def _take_in(self, changes: Sequence[Change]) -> None:
        written = {c.number for c in changes if c.number and c.session is not None}
        named = written | {c.number for c in changes if c.number}
        index = self.index
        if index is None or not named:
            return
        if len(named) > max(_FEW, index.rows // _SHARE):
            self._index = None
            return
        now_there = {f[0]: f for f in self._features(written)}
        try:
            for number in sorted(written):
                if number in now_there:
                    index.put(now_there[number])
                else:
                    index.drop(number)
        except ValueError:  # as above
            self._index = None
            return
        owner = self._ledger.owner(self._scope)
        model_id = self._model_id()
        if not index.model and model_id is not None:
            known = self._ledger.known_model(model_id)
            index.model = 0 if known is None else known[0]
        if owner is not None and index.model:
            vectors = self._ledger.vectors(owner, index.model, sorted(named))
            index.embed((n, np.frombuffer(v, np.float32)) for n, v in vectors)

    def _features(self, numbers: Iterable[int]) -> list[Feature]:
        wanted = sorted(numbers)
        owner = self._ledger.owner(self._scope) if wanted else None
        return [] if owner is None else self._ledger.features(owner, wanted)

    def forget(self) -> None:
        """Drop everything: it is read anew from the ledger."""
        self._index = None
        self._unread.clear()
        self._windows.clear()

    def forget_window(self, session_id: str) -> None:
        self._windows.pop(session_id, None)

    @property
    def nbytes(self) -> int:
        turns = sum(len(w.entries) for w in list(self._windows.values()))
        index = self._index
        return (index.nbytes if index is not None else 0) + 2000 * turns + 500


class Residents:
    """The residents of all owners: least recently used out first, when they hold more than *max_bytes*, or when idle.

    An owner has one resident as long as anybody holds it, so that its lock stays the only one. What a resident weighs is
    looked at now and then, not at each use; the sum is kept, not counted.

    Attributes:
        seen: The newest change that was looked at.
        whole: Vectors are held however many they are, since this process has no vector index to ask.
        model_id: The embedding model whose vectors are held.
        models: Counts how often others may have changed what is known of models, which are in use and what they charge.
        moved: Told what anybody has changed, this process included, and the newest number; None: anything may have changed.
    """

    def __init__(self, ledger: Ledger, *, max_bytes: int, clock: Clock, model_id: str | None = None) -> None:
        self._ledger = ledger
        self._clock = clock
        self._max_bytes = max_bytes
        self.model_id = model_id
        self.whole = False
        self.models = 0
        _, _, self.seen = ledger.changes(None)
        self.moved: Callable[[Sequence[Noted] | None, int], None] = lambda _rows, _newest: None
        self._looking = threading.Lock()
        self._all: WeakValueDictionary[tuple[str, str | None, str | None], Resident] = WeakValueDictionary()
        self._recent: OrderedDict[tuple[str, str | None, str | None], Resident] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def of(self, scope: Scope, *, look: bool = True) -> Resident:
        """The resident of the owner of *scope*, as one that is in use; *look*: with what others have changed until now."""
        with self._lock:
            resident = self._found(scope)
            resident.used = self._clock()
            self._recent[scope.owner] = resident
            self._recent.move_to_end(scope.owner)
            while resident.used - next(iter(self._recent.values())).used > _IDLE:
                self._let_go()
            resident.uses += 1
            due = resident.weight == 0 or resident.uses % _WEIGH_EVERY == 0
        if not resident.lock._is_owned():  # type: ignore[attr-defined]
            if look:
                self.look()
            if resident.news:
                with resident.lock:
                    resident.catch_up()
        if due:
            self.weigh(resident)
        return resident

    def look(self) -> None:
        """Tell the residents what others have changed since the last time."""
        with self._looking:
            changes, noted, seen = self._ledger.changes(self.seen)
            if seen == self.seen:
                return
            if changes is None:
                with self._lock:
                    residents = list(self._all.values())
                for resident in residents:
                    resident.number_again()
                    resident.news.append(None)
                self.models += 1
            for change in changes or ():
                self._tell(change)
            self.moved(
                None if changes is None else noted, seen
            )  # after residents: who sees a new head finds their news
            # At last, so that nothing is missed if this is interrupted; to be told twice does no harm.
            self.seen = seen

    def _tell(self, change: Change) -> None:
        if change.owner is None:
            self.models += 1
            return
        with self._lock:
            resident = self._all.get(change.owner)
        if resident is not None and len(resident.news) < _MOST_NEWS:
            resident.news.append(change)

    def unused(self, scope: Scope) -> Resident:
        """The resident of the owner of *scope*, for its lock: asking does not count as use."""
        with self._lock:
            return self._found(scope)

    def _found(self, scope: Scope) -> Resident:
        resident = self._all.get(scope.owner)
        if resident is None:
            tenant, user, session = scope.owner
            resident = self._all[scope.owner] = Resident(
                Scope(tenant, user, session),
                self._ledger,
                max_bytes=sys.maxsize if self.whole else self._max_bytes,
                model_id=lambda: self.model_id,
                look=self.look,
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
                self._let_go()

    def _let_go(self) -> None:
        """Let go of what was not used the longest; hold the lock."""
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


def again(resident: Resident, change: Callable[[], T]) -> T:
    """Do *change*, which reads what it changes, once more if another process was faster; hold the resident's lock."""
    for left in reversed(range(_TRIES)):
        try:
            return change()
        except (ConflictError, NotFound):
            resident.forget()
            if not left:
                raise
        except BaseException:
            resident.forget()
            raise
    raise AssertionError


def _counted(entry: Entry, count: Callable[[Message], int]) -> Entry:
    return replace(entry, tokens=count(entry.message)) if entry.tokens < 0 else entry


__all__ = ["Resident", "Residents", "Window", "again"]
