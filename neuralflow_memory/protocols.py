"""What users may supply in place of our parts. Any object with these methods fits; nothing is inherited."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

from .types import TYPE_NUMBER, Entry, Extraction, Life, MemoryType, Message, Scope, SessionInfo, Summary, microseconds

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.floating[Any]]

Clock = Callable[[], datetime]
"""Returns the current time, aware, in UTC."""


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into vectors. LangChain's method names, so any LangChain `Embeddings` fits as it is.

    A `model_id` attribute names the model, so that vectors of two models never mix; without one, the attributes
    `model_name` or `model` are tried, then the class's name is taken.
    """

    def embed_documents(self, texts: list[str]) -> Sequence[Sequence[float]] | Vectors:
        """One vector per text, all of one length. Called from worker threads, one call at a time."""
        ...

    def embed_query(self, text: str) -> Sequence[float] | Vectors:
        """The vector of a question, comparable by cosine. May run beside `embed_documents`."""
        ...


@runtime_checkable
class Reranker(Protocol):
    """Says how well texts answer a question by reading both together; `search` asks it about its best candidates."""

    def rerank(self, query: str, texts: Sequence[str]) -> Sequence[float] | npt.NDArray[np.floating[Any]]:
        """The relevance of each of *texts* in their order: higher is better, on any scale.

        Thread-safe: called from worker threads, by several searches at a time.
        """
        ...


@runtime_checkable
class TokenCounter(Protocol):
    """Counts tokens of plain text; the overhead of messages is added by `rules.budget`."""

    name: str
    """Identifies the tokenizer; stored counts are only reused under the same name."""
    exact: bool
    """False when `count` is an estimate."""

    def count(self, text: str) -> int:
        """Tokens in *text*; special-token text counts as ordinary text. Thread-safe."""
        ...


@runtime_checkable
class Summarizer(Protocol):
    """Writes the running summary of a conversation."""

    name: str

    def summarize(self, messages: Sequence[Message], *, previous: str, max_tokens: int) -> str | Summary:
        """Return a summary of *previous* (the summary so far, may be empty) and of *messages*, which followed it.

        Messages may be summaries of parts themselves: of role "system", with metadata `{"kind": "segment"}`.

        At most *max_tokens* long, in the language of the chat. Raises `SummarizerError` rather than return
        something empty or cut off. Called in the background, off the storage workers.
        """
        ...


@runtime_checkable
class Extractor(Protocol):
    """Finds knowledge in a conversation that is worth keeping beyond it.

    With `knowledge.supersede` it also has `supersede(new: Sequence[Entry], known: Sequence[Entry]) -> Superseding`, which says which
    of the facts *known* don't hold any more because of *new* ones; it raises `ExtractionError` rather than say none because it
    failed.
    """

    name: str

    def extract(self, messages: Sequence[Message]) -> Extraction:
        """Return what *messages* say that is worth knowing later; no facts if there is nothing.

        Raises `ExtractionError` rather than return nothing because it failed. Called in the background, off the storage workers.
        """
        ...


@runtime_checkable
class Cache(Protocol):
    """What several processes keep together of what was found: bytes under names, by partition. It may lose anything at any time.

    Every call names the `partition` (a stable, opaque text per tenant and user, or per userless session), and the `head`: the
    state of the partition that values were made from. No call raises, nor waits for long: what can't be asked has nothing.
    """

    def get(self, partition: str, names: Sequence[str], *, head: str) -> list[bytes | None]:
        """The values that were set under *head*, in the order of *names*; None for those that are not there."""
        ...

    def set(self, partition: str, values: Mapping[str, bytes], *, head: str, ttl: float) -> None:
        """Keep *values* by name for *ttl* seconds at most. What was set under another head may go."""
        ...

    def delete(self, partition: str) -> None:
        """Remove everything of a partition: at once, or as soon as that can be done."""
        ...

    def stats(self) -> Mapping[str, Any]:
        """Hits, misses, evictions, errors, and `open`: whether it is left alone because it failed. For people."""
        ...

    def close(self) -> None: ...


class LocalCache(Protocol):
    """What one process keeps in RAM: objects by owner (its number) and key. Thread-safe."""

    max_entries: int

    def get(self, owner: int, keys: Iterable[Hashable], *, now: int) -> dict[Any, Any]:
        """The values of *owner* that are kept, by key; a use of each. *now*: microseconds since 1970."""
        ...

    def put(self, owner: int, values: Mapping[Any, tuple[Any, int]], *, now: int) -> None:
        """Keep values (with their sizes in bytes, about) of *owner*, by key."""
        ...

    def drop(self, owner: int, keys: Iterable[Hashable] | None = None) -> None:
        """Let go of values of *owner*: those under *keys*, or all."""
        ...

    def clear(self) -> None:
        """Let go of everything."""
        ...

    def expire(self, *, now: int) -> None:
        """Let go of what was not used for too long."""
        ...

    def stats(self) -> dict[str, int]:
        """How many values are kept and in how many bytes, about; hits, misses and evictions so far."""
        ...


class Floor(Protocol):
    """The summarizer that needs no model, never fails, and never exceeds *max_tokens*."""

    name: str

    def summarize(self, messages: Sequence[Message], *, previous: str, max_tokens: int) -> str: ...


@runtime_checkable
class AccessPolicy(Protocol):
    """Says who may do what."""

    def allows(self, principal: str | None, action: str, scope: Scope) -> bool:
        """Whether *principal* (None: the embedding application itself) may do *action* in *scope*.

        Actions: `read`, `write`, `delete`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Record:
    """An entry as it is to stand in the ledger, with what search needs of it.

    `words` counts its whitespace-separated words; `traits` are those of its text (`rules.traits`); `terms` are the bytes of
    its uint32 term ids, in order (`rules.lexical.term_ids`); `called`: names that it gives, "Jo" to the one spoken to and
    "=Max" to the speaker, one a line. `fresh`: its id was made for it just now, so that nothing else can have it.

    Where the text is still to be analysed, `words` is -1, and so is the entry's importance if it is by its text; traits, names
    and terms are left out.
    """

    entry: Entry
    words: int
    traits: int
    called: str | None
    terms: bytes
    fresh: bool = False

    def feature(self, *, session: int) -> Feature:
        """The row that search reads."""
        entry = self.entry
        return (
            entry.number,
            session,
            entry.seq,
            TYPE_NUMBER[entry.type],
            entry.name or entry.role,
            entry.scope.agent_id,
            microseconds(entry.created_at),
            None if entry.expires_at is None else microseconds(entry.expires_at),
            None if entry.valid_from is None else microseconds(entry.valid_from),
            None if entry.valid_to is None else microseconds(entry.valid_to),
            entry.importance,
            self.words,
            self.traits,
            self.called,
            0,
            self.terms,
        )


Feature = tuple[
    int,
    int,
    int,
    int,
    str | None,
    str | None,
    int,
    int | None,
    int | None,
    int | None,
    float,
    int,
    int,
    str | None,
    int,
    bytes,
]
"""Number, session, seq, type, speaker, agent, created_at, expires_at, valid_from, valid_to (microseconds), importance, words,
traits, called, whether it is cold, terms."""
WORDS: Final = 11
"""Where a feature has its words: less than none if its text is still to be analysed, which only what was just written shows."""

OnConflict = Literal["raise", "replace", "ignore"]


@dataclass(frozen=True, slots=True)
class Appended:
    """What an append did: the ids of all given records, and the records that were new or changed."""

    ids: list[str]
    written: list[Record]
    session: int
    erase_epoch: int
    stated: bool = False
    """The state that was given was written, too."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that was embedded: a hash of it, the vector (float32 bytes), and the owner's epoch before that."""

    scope: Scope
    digest: bytes
    model: str
    vector: bytes
    epoch: int


@dataclass(frozen=True, slots=True)
class StoredWindow:
    """A session's window as stored: its entries in order, its summary, and what a fold compares against.

    An entry's `tokens` are -1 when they were counted by another counter than today's.
    """

    entries: list[Entry]
    summary: Entry | None
    session: int
    erase_epoch: int
    tasks: list[Entry] = field(default_factory=list)
    _: KW_ONLY
    unsummed: bool = False
    """There are segments and no summary of them: it was made from something that has changed, and is to be made anew."""
    episodes: bool = False
    """Episodes were made of its turns, as far as this was looked for: not where there is a summary."""
    model: str | None = None
    """The model that the session's prompts went to, as the host reported it."""


@dataclass(frozen=True, slots=True)
class StateRecord:
    """A version of a session's state. `fields`: their JSON, None for those that a state begins with; `at`: microseconds.

    `turn`: the id of the last turn that it is written with.
    """

    version: int
    fields: str | None
    life: Life
    at: int
    act: str
    principal: str | None = None
    agent_id: str | None = None
    why: str | None = None
    turn: str | None = None


@dataclass(frozen=True, slots=True)
class StoredState:
    """A session's state as stored: its newest version, None before the first, and what tells how the session stands.

    `life` is what was recorded of it last, and `resumed`, whether something was written to the session since; `active_at`:
    when something was written to it last, in microseconds.
    """

    record: StateRecord | None
    life: Life
    resumed: bool
    active_at: int


@dataclass(frozen=True, slots=True)
class Restored:
    """What a session is to become: its window in order, the ids of pinned turns, a summary with its segment, tasks, state.

    Entries are those that are there; records are new ones, or new versions. The summary is for a session that has none.
    """

    window: Sequence[Entry | Record]
    pinned: frozenset[str]
    segment: Record | None
    summary: Record | None
    tasks: Sequence[Record]
    state: StateRecord | None


class Change(NamedTuple):
    """Something that another process has changed.

    *number*: an entry that was written or deleted, or that has a vector now (then *session* is None); 0 where only the window
    or summary of a *session* was changed, or all of those of the owner if it is None. *owner*: as `Scope.owner`; None where
    something was changed that is of no owner: what models charge, or which one is in use.
    """

    owner: tuple[str, str | None, str | None] | None
    number: int
    session: int | None


class Noted(NamedTuple):
    """A change as it is noted, by whichever process: *number* and *session* as of `Change`, but for owners' own bits.

    An owner's number is *number* without its lower 32 bits; where only these are 0, it is no entry that was changed.
    """

    id: int
    number: int
    session: int | None
    origin: int


@dataclass(frozen=True, slots=True)
class Dirty:
    """An entry whose state at `version` the vector index has not seen; negative where it changed its tier. `attempts`: failures
    so far.
    """

    number: int
    key: str
    version: int
    attempts: int


Namespace = tuple[str, ...]
"""Where a keyed value is kept: labels from the root, none of them empty."""


@dataclass(frozen=True, slots=True)
class ValueRecord:
    """A keyed value as it is to stand. `value`: its JSON, None to delete it; `ttl`: how long it lives, in microseconds.

    `texts` are what it is found by: entries whose numbers, versions and expiry are still open, no two of one content.
    """

    namespace: Namespace
    key: str
    value: str | None
    ttl: int | None = None
    texts: Sequence[Record] = ()


@dataclass(frozen=True, slots=True)
class StoredValue:
    """A keyed value as stored. `value`: its JSON, empty where it was not asked for; `texts`: how many it is found by."""

    namespace: Namespace
    key: str
    created_at: int
    updated_at: int
    expires_at: int | None
    texts: int
    value: str = ""


@dataclass(frozen=True, slots=True)
class ValuesWritten:
    """What became of the entries of values: those written, numbers of those deleted, new times of expiry by number.

    `expired`: how many values were deleted because their time was over. `session`: the number of their session.
    """

    session: int = 0
    written: list[Record] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    moved: dict[int, int | None] = field(default_factory=dict)
    expired: int = 0


@dataclass(frozen=True, slots=True)
class MovedSession:
    """A session on its way out of a ledger or into one. `spent`: day, calls, input tokens, output tokens and cost."""

    scope: Scope
    knowledge: bool
    created_at: int
    active_at: int
    last_seq: int
    last_position: int
    model: str | None = None
    spent: tuple[tuple[int, int, int, int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class MovedEntry:
    """An entry on its way.

    Attributes:
        counter: What its tokens were counted with.
        summary: It is its session's current summary.
        value: Namespace and key of the value that is found by it.
        extraction: Of a segment whose turns were looked through: how much was found, None if that has only failed, and how often
            it has.
        vector: Its float32 bytes. `hash`: what they are to be kept under, by whom they are for.
    """

    record: Record
    knowledge: bool
    counter: str = ""
    summary: bool = False
    value: tuple[Namespace, str] | None = None
    vector: bytes | None = None
    hash: bytes = b""
    extraction: tuple[int | None, int] | None = None


@dataclass(frozen=True, slots=True)
class MovedValue:
    """A keyed value on its way. `texts`: ids of the entries that it is found by."""

    scope: Scope
    stored: StoredValue
    ttl: int | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MovedMargin:
    """What is known of a model's token counts: as `Ledger.calibration` gives it."""

    tenant: str
    model: str
    n: int
    mean: float
    m2: float


@dataclass(frozen=True, slots=True)
class MovedState:
    """A version of a session's state on its way. `stands`, of the newest: its life, as of when and at which last place."""

    scope: Scope
    record: StateRecord
    stands: tuple[Life, int, int] | None = None


@dataclass(frozen=True, slots=True)
class MovedVersion:
    """What an entry was before it was changed: it has that version's number. It follows the entry."""

    entry: Entry
    knowledge: bool
    counter: str = ""


@dataclass(frozen=True, slots=True)
class MovedDerivation:
    """That knowledge (an id) was found in a turn (an id) of the scope's session, and in which it says so itself."""

    scope: Scope
    turn: str
    known: str


Moved = MovedSession | MovedState | MovedEntry | MovedVersion | MovedValue | MovedDerivation | MovedMargin


@dataclass(slots=True)
class Loaded:
    """What a ledger did with what was moved into it.

    Attributes:
        sessions, entries, values, vectors: How many are new here.
        present: How many entries and values were here already, and stay as they are here.
        left_out: How many were deleted here, or made from what was deleted or reads otherwise here.
        tainted: Keys of entries that are not here, or not as they were moved: nothing that was made from them is taken.
    """

    sessions: int = 0
    entries: int = 0
    values: int = 0
    vectors: int = 0
    present: int = 0
    left_out: int = 0
    tainted: set[str] = field(default_factory=set)
    uncovered: dict[int, list[int]] = field(default_factory=dict)
    """Turns, by session, that a segment stood for which is left out."""


class Became(NamedTuple):
    """What a ledger holds after it was made what another was, and how much of that is left out, as it was deleted since."""

    entries: int
    sessions: int
    left_out: int


Texts = Literal["read", "skip", "bare"]
"""How cold entries are read: with their texts, or an `ArchiveError` where a block can't be read; without those that can't; or
all of them with nothing in place of text, blocks, calls, payload and metadata, and no block is opened."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What decides where an entry belongs, without its text. Times in microseconds.

    Attributes:
        exempt: Why it stays where it is, whatever its age; None where nothing speaks for that.
        used_at: Its last use, or when it was written if that came later. `uses`: how often it was used, as of then; of what is cold, since it became so.
        ended_at: Until when it holds: since then it is superseded, or merged into another; None where nothing ends it.
        archived_at: Since when it is cold; None while it is warm.
    """

    number: int
    id: str
    session_id: str | None
    type: MemoryType
    exempt: str | None
    importance: float
    tags: tuple[str, ...]
    used_at: int
    uses: float
    expires_at: int | None
    ended_at: int | None
    archived_at: int | None
    version: int


@dataclass(frozen=True, slots=True)
class Block:
    """A block of the archive, as the ledger knows it: how many entries it was written with, and their size unpacked.

    `live`: those of them that still stand in it.
    """

    id: int
    owner: int
    name: str
    label: str | None
    entries: int
    size: int
    live: tuple[int, ...]


class Archive(Protocol):
    """Keeps texts of cold entries in blocks, which never change. What stands where is the ledger's to say.

    Errors are `ArchiveError`, naming the block, and otherwise `StorageError`.
    """

    @property
    def damaged(self) -> Mapping[str, str]:
        """Blocks that could not be read when they were last asked for, and why."""
        ...

    def write(self, records: Mapping[int, bytes]) -> str:
        """Store *records*, by the numbers of their entries, as a new block; its name.

        When this returns, the block survives a power cut, and was read back and found equal.
        """
        ...

    def read(self, name: str) -> Mapping[int, bytes]:
        """All records of a block. Those of blocks read lately are kept in RAM."""
        ...

    def check(self, name: str) -> None:
        """Read a block from where it is stored; raises `ArchiveError` if it is not as it was written."""
        ...

    def packed(self, name: str) -> bytes:
        """A block as it is stored, for a backup; it was checked."""
        ...

    def put(self, name: str, packed: bytes) -> bool:
        """Store what `packed` gave under the name that it had, unless that is here and sound; whether it was stored.

        When this returns, the block survives a power cut.
        """
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Remove blocks; unknown names are no error."""
        ...

    def names(self) -> list[str]:
        """Every block there is, also what was left of one that did not come into being."""
        ...

    def nbytes(self) -> int:
        """What all blocks take."""
        ...


class Lock(Protocol):
    """A lock among processes, which the system gives back however a process ends."""

    @property
    def held(self) -> bool: ...

    @property
    def pid(self) -> int | None:
        """The process that has it for itself; None if nobody has, or that can't be told."""
        ...

    def take(self, *, shared: bool = False) -> bool:
        """Take it unless somebody else has it, without waiting; whether it is held now."""
        ...

    def release(self) -> None:
        """Give it back; no error if it is not held."""
        ...


class Ledger(Protocol):
    """The ordered record and the source of truth. Each method is one transaction or one read; times in microseconds.

    Numbers of owners, sessions and entries are the ledger's own. Every read of entries carries a scope, and nothing of
    another owner can come back from it.
    """

    def close(self) -> None: ...
    @property
    def id(self) -> str:
        """Names this ledger among others, and copies of its file; says nothing about what is in it."""
        ...

    @property
    def lineage(self) -> str:
        """The same for all ledgers that were made of one by backup and restore."""
        ...

    def settled(self) -> None:
        """From now on, other processes may have it open."""
        ...

    def data_version(self) -> int:
        """A number that is another one once anybody has written, also in another process. Asking costs next to nothing."""
        ...

    def changes(self, after: int | None) -> tuple[list[Change] | None, list[Noted], int]:
        """What other processes have changed since *after*, everything that was noted since then, and the newest number.

        None: that was so long ago that anything may have changed. With *after* None only the newest number.
        """
        ...

    def head(self, owner: int, *, seen: int) -> tuple[int, int] | None:
        """The last change of an owner, of those up to *seen*: its id and origin. None where it can't be told.

        As long as it is the same, so is everything that is stored of the owner; also over restarts, and in a copy of the ledger.
        """
        ...

    @property
    def collection(self) -> str | None:
        """The collection of the vector index that the dirty marks are about, None before the first."""
        ...

    @collection.setter
    def collection(self, id: str) -> None: ...

    def key(self, scope: Scope, *, id: str, knowledge: bool = False) -> str:
        """The key of an entry: opaque, bound to its scope, the same wherever it is computed in this folder."""
        ...

    def partition(self, scope: Scope) -> str:
        """The owner of *scope* as an opaque text, for the vector index."""
        ...

    def content_hash(self, scope: Scope, *, text: str, model_id: str) -> bytes:
        """What a vector is cached under: owner, model and text."""
        ...

    def owner(self, scope: Scope) -> int | None:
        """The number of the owner of *scope*, None when nothing was ever stored for it."""
        ...

    def owner_scope(self, number: int) -> Scope | None:
        """The widest scope of the owner of an entry's number, None when it is gone."""
        ...

    def append(
        self,
        scope: Scope,
        records: Sequence[Record],
        *,
        on_conflict: OnConflict,
        now: int,
        knowledge: bool = False,
        state: StateRecord | None = None,
    ) -> Appended:
        """Write *records* (numbers, seq and versions still open) at the end of a session, and *state* with them, all or none.

        A state that was written with these turns before is left as it is.

        Raises `ConflictError` when an id stands for other content and *on_conflict* is "raise", or the state is at another
        version than the one before that of *state*.
        """
        ...

    def revise(
        self,
        scope: Scope,
        *,
        changed: Sequence[Record] = (),
        added: Sequence[Record] = (),
        read: Sequence[Entry] = (),
        knowledge: bool = True,
        extracted: Entry | None = None,
        made_from: Sequence[tuple[str, int]] = (),
    ) -> list[tuple[Record, int]]:
        """Write new versions of *changed* and then *added*, all or none; each with the number of its session.

        *added* is knowledge, or was made from the session's turns (*knowledge* is False). *read*: what all this was made from.
        *extracted*: the segment whose turns were looked through for it. *made_from*: ids of knowledge with numbers of turns that
        say it, which it goes with when the last of them does, unless it was told as well.
        Raises `ConflictError` when one of *changed* or *read* is not as it was read, or somebody else has added the same
        knowledge; `NotFound` when one is gone.
        """
        ...

    def known(self, scope: Scope, texts: Sequence[str]) -> dict[str, Entry]:
        """The owner's knowledge (of the scope's agent) that says one of *texts*, word for word, and was not superseded."""
        ...

    def buried(self, scope: Scope, ids: Sequence[str]) -> dict[str, int]:
        """When the owner's knowledge with these ids was deleted, by id; what was not is left out."""
        ...

    def unextracted(self, scope: Scope, *, attempts: int | None) -> list[Entry]:
        """The session's segments whose turns were not looked through for knowledge yet, oldest first.

        Without those for which that failed so often.
        """
        ...

    def to_extract(self, *, attempts: int) -> list[Scope]:
        """The sessions that have such segments."""
        ...

    def extraction_failed(self, segment: Entry) -> None:
        """Count a failure to look through the turns of a segment."""
        ...

    def history(self, scope: Scope, number: int) -> list[Entry]:
        """What the owner's entry with this number was and is, oldest version first; empty when it is gone."""
        ...

    def drop(self, scope: Scope, doomed: Sequence[Entry], *, now: int, cleared: StateRecord | None = None) -> int:
        """Delete entries for good, leaving a tombstone each, also what `discard` has kept of them; how many there were.

        With *cleared*, the session's state and its history go, too, if it has any; that stands in their place, at the next
        version.
        """
        ...

    def window(self, scope: Scope) -> StoredWindow | None:
        """The session's window and summary; reads nothing of what was folded. None for a session without a row."""
        ...

    def set_window(self, scope: Scope, kept: Sequence[Entry | Record], *, now: int) -> list[Record]:
        """Make *kept* the window, in this order. Records among them are new, or new versions of entries.

        Entries that are not in it leave the window and stay in the transcript.
        """
        ...

    def fold(
        self,
        scope: Scope,
        *,
        folded: Sequence[Entry],
        before: StoredWindow,
        segments: Sequence[Record],
        summary: Record,
        read: Sequence[Entry] = (),
    ) -> list[Record] | None:
        """Take *folded* out of the window, store *segments* and make *summary* the session's summary, in one transaction.

        *read*: segments of before that the summary was made from, beside *before*'s. Segments and summary are new, or new versions of those that were read. They come back as stored, the summary last.
        None, and nothing is done, when they are stale: an entry changed, left the window or was deleted, another fold
        came first, the subject was erased.
        """
        ...

    def segments(self, scope: Scope, *, last: int | None = None) -> list[Entry]:
        """The segments of a session's summary, or those made last, in the order of the turns that they cover."""
        ...

    def pin(self, scope: Scope, pinned: Sequence[Entry], *, to: bool) -> None:
        """Mark turns as pinned, and put those that had left the window back into it; or take the mark away."""
        ...

    def work(
        self, scope: Scope, *, tasks: Sequence[Record], over: Sequence[Entry], outcome: Record | None, now: int
    ) -> tuple[list[Record], int]:
        """Write tasks (new, or new versions of those that were read), delete *over* and append *outcome*, all or none.

        What was written, the outcome last, and the number of the session. Raises `ConflictError` when a task has changed
        since it was read, `NotFound` when it is gone.
        """
        ...

    def spend(self, session: int, *, day: int, summary: Summary) -> None:
        """Count a call of the summarizer, and what it took, for a session and a day (since 1970, UTC)."""
        ...

    def spent(self, *, day: int | None = None, session: int | None = None) -> dict[str, float]:
        """Sums of calls, input_tokens, output_tokens and cost: of all, of a day, of a session."""
        ...

    def calibrate(self, scope: Scope, *, model: str, ratio: float) -> tuple[int, float, float]:
        """Take in that *model* was charged *ratio* times our tokens for this session; count, mean, squared deviations."""
        ...

    def calibration(self, tenant: str | None = None) -> list[tuple[str, str, int, float, float]]:
        """Tenant, model, count, mean and squared deviations of what was taken in, of all tenants or of one."""
        ...

    def by_keys(self, scope: Scope, keys: Sequence[str], *, texts: Texts = "read") -> dict[str, Entry]:
        """Entries of the owner by key; unknown keys, and other owners', are left out."""
        ...

    def by_numbers(self, scope: Scope, numbers: Sequence[int], *, texts: Texts = "read") -> dict[int, Entry]:
        """Entries of the owner by number; unknown numbers, and other owners', are left out."""
        ...

    def select(
        self,
        scope: Scope,
        *,
        session_only: bool,
        types: Iterable[MemoryType] | None = None,
        since: int | None = None,
        after: int = 0,
        last: int | None = None,
        limit: int | None = None,
        texts: Texts = "read",
    ) -> Iterator[Entry]:
        """Entries of a session in the order of `seq`, or of the whole owner in the order they were written.

        *after*: only those after the entry with this number. *last*: only the newest so many, still in order. *limit*: only
        the first so many.
        """
        ...

    def count(self, scope: Scope, *, session_only: bool) -> int:
        """How many entries a session, or its whole owner, has."""
        ...

    def features(self, owner: int, numbers: Sequence[int] | None = None) -> list[Feature]:
        """What search reads of all of an owner's entries, or of those with *numbers*, in the order of numbers."""
        ...

    def unanalysed(self, *, limit: int) -> list[Entry]:
        """Entries of any owner, up to *limit*, whose texts were not analysed yet: see `rules.analysis`."""
        ...

    def analysed(self, records: Sequence[Record]) -> None:
        """Put what was found in the texts of entries, but of those that were changed meanwhile."""
        ...

    def session_number(self, scope: Scope) -> int | None:
        """The number that features show for a session."""
        ...

    def sessions(self, *, tenant: str, user_id: str | None) -> list[SessionInfo]:
        """Sessions of a user, or of the userless ones, latest first."""
        ...

    def values(
        self, scope: Scope, names: Sequence[tuple[Namespace, str]], *, now: int
    ) -> dict[tuple[Namespace, str], StoredValue]:
        """Values of the owner by namespace and key; those that are not there, or have expired, are left out."""
        ...

    def values_below(self, scope: Scope, prefix: Namespace, *, now: int, limit: int | None = None) -> list[StoredValue]:
        """The owner's values, without their JSON, whose namespace begins with the labels of *prefix*, latest change first."""
        ...

    def value_texts(self, scope: Scope, prefix: Namespace) -> list[int]:
        """Numbers of the entries that the owner's values below *prefix* are found by; some may be gone."""
        ...

    def values_of(self, scope: Scope, numbers: Sequence[int]) -> dict[int, tuple[Namespace, str]]:
        """Namespace and key of the owner's values that are found by entries, by the numbers of those."""
        ...

    def namespaces(self, scope: Scope, prefix: Namespace, *, now: int) -> list[Namespace]:
        """The namespaces that begin with the labels of *prefix* and hold a value of the owner."""
        ...

    def write_values(
        self, scope: Scope, records: Sequence[ValueRecord], *, read: Sequence[tuple[Namespace, str]] = (), now: int
    ) -> ValuesWritten:
        """Write values with the entries that they are found by, all or none; the values *read* begin to live anew.

        Texts that a value had before keep their entries. Some of the owner's values that have expired are deleted with it.
        """
        ...

    def state(self, scope: Scope) -> StoredState | None:
        """The session's state; None for a session without a row."""
        ...

    def states(self, scope: Scope, *, last: int | None = None, version: int | None = None) -> list[StateRecord]:
        """The versions kept of the session's state, oldest first; only the newest *last*, or the one of this number."""
        ...

    def write_state(self, scope: Scope, record: StateRecord) -> None:
        """Make *record* the session's state; versions beyond those to be kept go.

        Raises `ConflictError` when the state is at another version than the one before.
        """
        ...

    def silent(self, *, idle: int, expired: int) -> list[tuple[Scope, StoredState]]:
        """Sessions with a state that have become idle (no write since *idle*, a time), expired, or active again."""
        ...

    def record_life(self, scope: Scope, stored: StoredState, life: Life) -> bool:
        """Note how a session stands, which is no new version; False if something has changed since *stored* was read."""
        ...

    def trim_states(self) -> None:
        """Drop the versions beyond those to be kept; in RAM, also the states of sessions that have expired."""
        ...

    def snapshot(self, scope: Scope) -> tuple[StoredWindow | None, StoredState | None]:
        """The session's window with summary and tasks, and its state, as of one moment."""
        ...

    def restore(self, scope: Scope, made: Restored, *, now: int) -> None:
        """Make the session what *made* says, all or nothing.

        Raises `ConflictError` or `NotFound` when something that it was made from has changed.
        """
        ...

    def dump(
        self, *, unread: list[int], tenant: str | None = None, user_id: str | None = None, model: int | None = None
    ) -> Generator[Moved, None, None]:
        """All that is stored, or what is of a tenant or a user, as of one moment; with the vectors of *model*.

        Owner after owner: its sessions, each with the versions of its state, its entries in the order in which they were
        written, each with its earlier versions, its values, what was found in which turns. Records have no terms.

        What can't be read from the archive is left out, and added to *unread* by its number. Blocks must not be replaced
        meanwhile.
        """
        ...

    def load(
        self,
        owner: Scope,
        moved: Sequence[Moved],
        *,
        source: str,
        tainted: Collection[str],
        model: int | None,
        restore_deleted: bool,
        now: int,
    ) -> Loaded:
        """Put what was dumped elsewhere in place, all or none, as far as it is not here; what is here stays as it is.

        A session that is new here becomes what it was; *source* names the dump, so that several calls can make it. In one
        that was here, turns come after those that are here. What was deleted here is left out unless *restore_deleted*,
        and what was made from it, or from one of *tainted*. Doing it again changes nothing. The versions of a state or an entry
        have to come with it, in one call.
        """
        ...

    def loaded(self, source: str, *, uncovered: Mapping[int, Sequence[int]]) -> None:
        """All that was dumped in *source* is in place; turns that nothing covers go back into the window."""
        ...

    def copy(
        self, target: Path, *, progress: Callable[[int, int], None] | None = None
    ) -> tuple[dict[str, int], list[str]]:
        """Copy all of it into a new file, as of one moment, and check the copy; how many rows each table has, and the names of
        the blocks of the archive that it reads.
        """
        ...

    def prepare(self, copy: Path, *, lineage: str, terms: Callable[[Entry], Record]) -> None:
        """Bring a copy of a ledger of *lineage*, perhaps of an older version, up to date.

        Raises `BackupError` where it can't be put in the place of this one: it is damaged, newer, or another ledger's, and
        this one is not empty.
        """
        ...

    def models_in(self, copy: Path) -> list[str]:
        """Names of the models whose vectors are in a copy."""
        ...

    def become(self, copy: Path, *, restore_deleted: bool, forget_vectors: bool, now: int) -> Became:
        """Become what was copied, all or nothing; but what was deleted since stays so, unless *restore_deleted*.

        Every entry is marked as changed, and the vector index is to be made anew. No other process has it open.
        """
        ...

    def retokenize(self, version: str, terms: Callable[[Entry], Record]) -> None:
        """Make the full text anew, with *terms*, if it was made by another version of the rules."""
        ...

    def known_model(self, name: str) -> tuple[int, int] | None:
        """Number and dimensions of an embedding model, None while nothing was embedded with it."""
        ...

    def model(self, name: str, *, dimensions: int) -> int:
        """The number of an embedding model; it is made known if it is new."""
        ...

    def models(self) -> list[tuple[str, int]]:
        """Name and dimensions of the model whose vectors are in use here; none before the first vector."""
        ...

    def forget_models(self, *, keep: str) -> None:
        """Drop all vectors and what is known of their models, and mark every entry as changed.

        But those of *keep*, if it was being taken up: then it is the one in use.
        """
        ...

    def next_model(self, name: str, *, dimensions: int | None = None) -> tuple[int, int] | None:
        """Number and dimensions of the model *name*, which is being taken up; None while it has no vectors.

        With *dimensions* it is made known; what another has left, which was not taken up after all, is to be cleared before.
        """
        ...

    def unembedded(self, model: int, *, after: int, limit: int) -> list[int]:
        """Numbers above *after*, in order, of entries of all owners that have words and no vector by a model."""
        ...

    def embedded(self, model: int) -> tuple[int, int]:
        """How many entries of all owners have a vector by a model, and how many have words, and so are to have one."""
        ...

    def switch_model(self, before: str, after: str) -> None:
        """Take up the model *after* in the place of *before*, and mark every entry as changed.

        What anybody has in RAM is read anew. The vectors of *before* stay until they are cleared; nobody asks for them any more.
        Raises `ModelMismatch` when *before* is not in use.
        """
        ...

    def clear_vectors(self, *, keep: str | None = None, limit: int = 500) -> bool:
        """Delete some of the vectors that are neither of the model in use nor of *keep*; whether none is left."""
        ...

    def largest_owners(self, limit: int) -> list[Scope]:
        """The owners with the most entries, ever; a userless one as the scope of its session."""
        ...

    def mark_all(self, *, again: bool = True) -> None:
        """Mark every entry as changed: the vector index is to be rebuilt, from the vectors that are kept here.

        With *again* False those that are marked stay as they are, also since when.
        """
        ...

    def vectors(self, owner: int, model: int, numbers: Sequence[int] | None = None) -> list[tuple[int, bytes]]:
        """An owner's vectors by a model, or those with *numbers*: (number, float32 bytes), in the order of their numbers."""
        ...

    def cached_vectors(self, hashes: Sequence[bytes]) -> dict[bytes, bytes]:
        """Vectors already known, by content hash."""
        ...

    def question(self, scope: Scope, digest: bytes) -> tuple[bytes | None, int]:
        """The vector kept of a question, by content hash, None where there is none; and the owner's epoch.

        It is another one once the owner's questions were forgotten.
        """
        ...

    def keep_questions(self, asked: Iterable[Asked]) -> None:
        """Keep the vectors of questions, of which an owner has a bounded number, until something of the owner is deleted.

        Not those that are none of their model's, or of an owner who has another epoch now. Raises `StorageError` rather than
        wait for somebody who has the file locked.
        """
        ...

    def put_vectors(self, model: int, rows: Sequence[tuple[int, int, bytes, bytes]]) -> list[int]:
        """Keep vectors (number, version, hash, float32 bytes); the numbers whose entry still is at that version."""
        ...

    def claim(self, *, now: int, limit: int, gone: bool = False) -> list[Dirty]:
        """Up to *limit* dirty marks that are due; with *gone* only those of deleted entries."""
        ...

    def clear_dirty(self, marks: Sequence[tuple[int, int]]) -> None:
        """Clear marks (number, version) unless the entry has changed since."""
        ...

    def postpone(self, mark: Dirty, *, retry_at: int, error: str) -> None:
        """Count a failure of a mark and let it wait until *retry_at*."""
        ...

    def hold(self, marks: Sequence[Dirty]) -> None:
        """Let marks wait until `release`, which is no failure of theirs."""
        ...

    def release(self) -> None:
        """Let the marks on hold be tried now."""
        ...

    def retry_parked(self) -> None:
        """Let every waiting mark be tried again now."""
        ...

    def next_retry(self, *, gone: bool = False) -> int | None:
        """When the earliest mark is due, None when nothing is marked; with *gone* only deleted entries' count."""
        ...

    def waiting(self, *, parked_at: int, marked_by: float | None = None) -> int:
        """How many marks are there, without those that are parked; or those made until a time (seconds since 1970)."""
        ...

    def expired_values(self, *, now: int) -> list[tuple[Scope, int]]:
        """How many keyed values have expired, by their owner's widest scope."""
        ...

    def owners(self) -> list[tuple[int, Scope]]:
        """Every owner that has entries: its number and its widest scope."""
        ...

    def standings(self, owner: int) -> list[Standing]:
        """What decides where an owner's entries belong, in the order of their numbers."""
        ...

    def use(self, uses: Mapping[int, tuple[int, int]], *, halving: int) -> None:
        """Count uses of entries: how often, and when last, by number. Earlier uses count half after *halving* microseconds."""
        ...

    def records(self, numbers: Sequence[int]) -> dict[int, tuple[int, bytes]]:
        """Versions and texts, as they are archived, of those entries that are warm and may become cold."""
        ...

    def open_block(self, owner: int, *, label: str | None, size: int, entries: int) -> Block | None:
        """The owner's newest block of this label that has less than *size* unpacked, and fewer than *entries*."""
        ...

    def worn_blocks(self) -> list[Block]:
        """Blocks that some entry has left, but not all, by owner."""
        ...

    def block_names(self) -> list[str]:
        """The names of all blocks in which something stands."""
        ...

    def pack(
        self,
        name: str,
        *,
        owner: int,
        label: str | None,
        size: int,
        versions: Mapping[int, int],
        moved: Block | None,
        now: int,
    ) -> list[int]:
        """Take over a block that was written, in place of texts here, and of the block *moved*; the numbers that became cold.

        *versions*: of the entries whose texts were read here. Those that were changed since, or are exempt now, stay warm. It
        survives a power cut when this returns: what it stands in place of may then be removed.
        """
        ...

    def thaw(self, numbers: Sequence[int]) -> list[int]:
        """Take texts of cold entries back from the archive and mark those for the index; the numbers of those that came."""
        ...

    def discard(self, numbers: Sequence[int], *, run: str, now: int, undo: bool) -> list[int]:
        """Delete entries of one owner that retention selected; their numbers. With *undo* they can be brought back."""
        ...

    def bring_back(self, run: str) -> list[int]:
        """Undo what `discard` did for *run*: the numbers of the entries that are there again."""
        ...

    def discarded(self, scope: Scope, keys: Sequence[str] | None = None) -> dict[str, Entry]:
        """What `discard` has kept under *keys* of the owner's, by these; without *keys*, what it has of the session."""
        ...

    def tidy(self, *, discarded_before: int) -> None:
        """Forget what was discarded before then, and counts of entries that are gone."""
        ...

    def vacuum(self) -> None:
        """Give the room that was freed back to the disk. Nobody can write meanwhile."""
        ...

    def note(self, name: str, text: str) -> None:
        """Keep a fact about the folder."""
        ...

    def noted(self, name: str) -> str | None:
        """The fact of that name, None if none was kept."""
        ...

    def totals(self, *, parked_at: int) -> dict[str, Any]:
        """Counts over the whole folder, for `stats()`."""
        ...

    def verify(self) -> str:
        """Check the stored data: "ok", or the first problem."""
        ...

    def twins(self) -> list[str]:
        """Session ids that stand both for a chat of a user and for a chat of nobody, in one tenant."""
        ...


class EntryStore(Protocol):
    """A vector index of entries: ids and distances only. What exists, and its text, is the ledger's to say.

    Every call names the `partition` (a stable, opaque text per tenant and user, or per userless session); no store is
    ever asked without one.
    """

    url: str | None
    """Where it is served, None if it is in this process."""
    down: str | None
    """Why it can't be asked at the moment: every call raises `StorageError` at once. None while it answers."""

    def check(self, *, create: bool = True) -> bool:
        """Ask whether it answers. True the first time, if it was down, and if it is another than before: it lost what it held.

        The only call that waits for a store that is down. Raises `StorageError` if it does not answer. Where there is
        nothing yet, it is made, and without *create* it stays `down`.
        """
        ...

    def upsert(
        self,
        keys: Sequence[str],
        vectors: Any,
        documents: Sequence[str],
        metadatas: Sequence[Mapping[str, str | int | float | bool]],
    ) -> None:
        """Write entries whole: a repeated key replaces vector, document and all of its metadata.

        *vectors* is a float32 array of shape (n, dimensions); each metadata holds `partition`.
        """
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove entries; unknown keys are no error."""
        ...

    def query(self, vector: Any, *, partition: str, k: int) -> list[tuple[str, float]]:
        """The *k* nearest keys of *partition* with their cosine similarity, best first."""
        ...

    def count(self, *, partition: str | None = None) -> int:
        """How many entries it holds."""
        ...

    def keys(self) -> list[str]:
        """Every key it holds."""
        ...

    @property
    def model_id(self) -> str | None:
        """The embedding model that it was made for, None while it is new, and if it is not the one that the marks are about."""
        ...

    def reset(self, *, model_id: str, dimensions: int) -> None:
        """Drop everything and start anew for vectors of this model."""
        ...

    def clear(self) -> bool:
        """Close, and remove all that is stored in this folder, if most of its room is wasted; whether that was done."""
        ...

    def close(self) -> None: ...


__all__ = [
    "AccessPolicy",
    "Appended",
    "Archive",
    "Became",
    "Block",
    "Cache",
    "Change",
    "Clock",
    "Dirty",
    "Embedder",
    "EntryStore",
    "Extractor",
    "Feature",
    "Floor",
    "Ledger",
    "Loaded",
    "LocalCache",
    "Lock",
    "Moved",
    "MovedDerivation",
    "MovedEntry",
    "MovedMargin",
    "MovedSession",
    "MovedState",
    "MovedValue",
    "MovedVersion",
    "Namespace",
    "Noted",
    "OnConflict",
    "Record",
    "Reranker",
    "Restored",
    "Standing",
    "StateRecord",
    "StoredState",
    "StoredValue",
    "StoredWindow",
    "Summarizer",
    "Texts",
    "TokenCounter",
    "ValueRecord",
    "ValuesWritten",
]
