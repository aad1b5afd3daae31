"""The values that cross every border of the package: immutable, slotted, free of I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, cast

from .errors import MessageError, ScopeError, brief

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool")
Block = Mapping[str, Any]
"""A part of a message that is more than text: a mapping with a `type`, e.g. `{"type": "image", "url": ...}`."""


class MemoryType(StrEnum):
    """What kind of memory an entry is."""

    SHORT_TERM = "short_term"
    """A turn of a conversation."""
    WORKING = "working"
    """A task or a note."""
    LONG_TERM = "long_term"
    """Knowledge about the user, kept across conversations."""
    EPISODIC = "episodic"
    """A summary or an episode."""


TYPES: tuple[MemoryType, ...] = tuple(MemoryType)
TYPE_NUMBER = {t: n for n, t in enumerate(TYPES)}
"""The types as small numbers, in the ledger and in arrays. Their order is stored: add new ones at the end."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose memory is meant. Every read and write carries one.

    A session's key is (tenant, user or none, session). `agent_id` marks who wrote; it is not part of the key. Without a
    user and a session it is the tenant's own, which no session shares.
    """

    tenant: str = "default"
    user_id: str | None = None
    session_id: str | None = None
    agent_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("tenant", "user_id", "session_id", "agent_id"):
            value = getattr(self, name)
            if value is None and name != "tenant":
                continue
            if not isinstance(value, str) or not value or "\0" in value or len(value) > 512:
                raise ScopeError(
                    f"{name} must be a non-empty string of at most 512 characters without NUL, not {brief(value)}"
                )
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ScopeError(f"{name} holds half of a surrogate pair, which no encoding can carry") from None

    @property
    def owner(self) -> tuple[str, str | None, str | None]:
        """The widest scope this one may read: its user, or its session where no user is known, or the tenant's own."""
        return (self.tenant, self.user_id, None if self.user_id is not None else self.session_id)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A model's request to call a tool. `args` are the arguments as JSON values."""

    id: str
    name: str
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    `content` is text, or a sequence of blocks (mappings with a `type`) for multimodal messages; it may be
    empty only beside tool calls, in a tool's result, or with a `payload`. `payload` is the host's own JSON of the message,
    kept for a lossless round trip. `created_at` may be backdated; a naive time is taken as UTC.
    """

    role: Role
    content: str | Sequence[Block] = ""
    _: KW_ONLY
    id: str | None = None
    name: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None
    created_at: datetime | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    payload: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise MessageError(f"unknown role {brief(self.role)}; use one of {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            object.__setattr__(self, "content", _blocks(self.content))
        for name in ("id", "name", "tool_call_id"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise MessageError(f"a message's {name} must be a non-empty string or None, not {brief(value)}")
        if self.tool_calls != ():
            if not isinstance(self.tool_calls, Iterable) or isinstance(self.tool_calls, str | Mapping):
                raise MessageError(f"tool_calls is a list of ToolCall, not {brief(self.tool_calls)}")
            object.__setattr__(self, "tool_calls", tuple(_tool_call(c) for c in self.tool_calls))
        if self.role == "tool" and self.tool_call_id is None:
            raise MessageError("a tool message needs the tool_call_id of the call it answers")
        if self.created_at is not None:
            if not isinstance(self.created_at, datetime):
                raise MessageError(f"created_at is a datetime, not {brief(self.created_at)}")
            object.__setattr__(self, "created_at", utc(self.created_at))
        if not isinstance(self.metadata, Mapping) or not (self.payload is None or isinstance(self.payload, Mapping)):
            raise MessageError("a message's metadata and payload must be mappings of JSON values")
        has_more = self.tool_calls or self.role == "tool" or self.payload is not None
        if not has_more and not (self.content.strip() if isinstance(self.content, str) else self.content):
            raise MessageError("the message is empty: give it text, or leave it out")

    @property
    def text(self) -> str:
        """The text of the message, without its other parts."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(str(b["text"]) for b in self.content if b["type"] == "text" and b.get("text"))


def _blocks(content: Any) -> tuple[Block, ...]:
    if isinstance(content, Sequence) and not isinstance(content, bytes | bytearray):
        blocks = tuple({"type": "text", "text": b} if isinstance(b, str) else b for b in content)
        if all(isinstance(b, Mapping) and isinstance(b.get("type"), str) for b in blocks):
            return cast("tuple[Block, ...]", blocks)
    raise MessageError(
        f"a message's content must be text or a list of blocks such as {{'type': 'text', 'text': ...}}, "
        f"not {type(content).__name__}; convert it first"
    )


def _tool_call(call: Any) -> ToolCall:
    if isinstance(call, Mapping):
        call = ToolCall(call.get("id") or "", call.get("name") or "", call.get("args") or {})
    if not isinstance(call, ToolCall) or not isinstance(call.args, Mapping) or not call.id or not call.name:
        raise MessageError("a tool call is a ToolCall, or a mapping with id, name and args")
    return call


def utc(when: datetime) -> datetime:
    """Return *when* as an aware UTC time; a naive one is taken as UTC. What UTC can't hold is its first or last instant."""
    if when.tzinfo is None:
        return when.replace(tzinfo=UTC)
    try:
        return when.astimezone(UTC)
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC) if when.year == 1 else datetime.max.replace(tzinfo=UTC)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def microseconds(when: datetime) -> int:
    """Aware time as microseconds since 1970, exactly."""
    return (when - _EPOCH) // _MICROSECOND


def moment(us: int) -> datetime:
    """The inverse of `microseconds`."""
    return _EPOCH + timedelta(microseconds=us)


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing remembered: a turn, a piece of knowledge, a summary.

    Attributes:
        id: Unique within its session (a turn: its message's id) or among its user's knowledge.
        key: Opaque, bound to its scope; addresses this entry from any session of the same user.
        seq: Order within the session, from 1, without gaps.
        created_at: When it was said (may be backdated). `written_at`: when it was stored.
        importance: 0..1, what it is worth keeping: by its text when it was written, or as it was set.
        version: From 1, one more with every change.
        provenance: Where it came from: "said" (a turn), "told" (`remember`), "derived" (made from other entries).
        trust: 0..1, inherited from the sources of a derived entry.
        sources: Ids of the entries it was derived from.
        valid_from: Since when it holds, where that was said; otherwise since `created_at`. `valid_to`: until when, None while
            it does.
        supersedes: Ids of the knowledge that it stands for. `superseded_by`: the id of what stands for it.
        tokens: Its message's size by the configured counter.
    """

    id: str
    key: str
    type: MemoryType
    content: str
    scope: Scope
    seq: int
    created_at: datetime
    written_at: datetime
    updated_at: datetime
    role: Role | None = None
    name: str | None = None
    blocks: tuple[Block, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    payload: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    category: str | None = None
    source: str | None = None
    importance: float = 0.5
    provenance: str = "said"
    trust: float = 1.0
    sources: tuple[str, ...] = ()
    expires_at: datetime | None = None
    version: int = 1
    tokens: int = 0
    position: int | None = None
    """Order within the window; None once folded or replaced."""
    number: int = 0
    """The ledger's own number of the entry, unique in its folder."""
    pinned: bool = False
    """Stays in the window, whatever is folded."""
    valid_from: datetime | None = None
    valid_to: datetime | None = None
    supersedes: tuple[str, ...] = ()
    superseded_by: str | None = None

    def held(self, when: datetime) -> bool:
        """Whether it held, or had been said, at that time."""
        return (self.valid_from or self.created_at) <= when and (self.valid_to is None or when < self.valid_to)

    tier: Literal["warm", "cold"] = "warm"
    """Where its text is: "cold" is the archive, from where it is read as any other."""
    archive_label: str | None = None
    """What `entries.archive` was told to archive it under."""

    @property
    def message(self) -> Message:
        """The entry as a message; knowledge and summaries read as system messages."""
        made = object.__new__(Message)  # not checked again: it was when it came, and prompts are made of many
        put = object.__setattr__
        put(made, "role", self.role or "system")
        put(made, "content", self.content if self.blocks is None else self.blocks)
        put(made, "id", self.id)
        put(made, "name", self.name)
        put(made, "tool_calls", self.tool_calls)
        put(made, "tool_call_id", self.tool_call_id)
        put(made, "created_at", self.created_at)
        put(made, "metadata", self.metadata or {})  # an empty one is the caller's own
        # A summary may be empty, where there is no room for one.
        put(made, "payload", {} if self.role is None and not self.content else self.payload)
        return made


_FIELDS = tuple(field.name for field in fields(Entry))
_values_of = attrgetter(*_FIELDS)
_SETTERS = tuple(getattr(Entry, name).__set__ for name in _FIELDS)


def changed(entry: Entry, **new: Any) -> Entry:
    """A copy of *entry* with other values for some fields: as `dataclasses.replace`, in a third of the time."""
    made = object.__new__(Entry)
    for put, value in zip(_SETTERS, _values_of(entry), strict=True):
        put(made, value)
    for name, value in new.items():
        object.__setattr__(made, name, value)
    return made


def same_content(one: Entry, other: Entry) -> bool:
    """Whether two entries say the same; time, metadata and payload aside."""
    return (
        one.role == other.role
        and one.content == other.content
        and one.type == other.type
        and one.name == other.name
        and one.blocks == other.blocks
        and one.tool_calls == other.tool_calls
        and one.tool_call_id == other.tool_call_id
    )


@dataclass(frozen=True, slots=True)
class Hit:
    """A search result. `score` is 0..1, higher is better; `signals` are its parts, which add up to it."""

    entry: Entry
    score: float
    signals: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Value:
    """A JSON object that was kept under a key, as `Memory.values` gives it back.

    Attributes:
        namespace: The labels of where it is kept, from the root.
        value: The caller's own copy.
        created_at: When the key was first put, `updated_at` last.
        expires_at: When it goes unless it is read or put before; None for never.
        score: 0..1, higher is better; None where nothing was asked for, or it has no text to be found by.
    """

    namespace: tuple[str, ...]
    key: str
    value: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One line of a context report: what was considered for the prompt, and what became of it."""

    part: Literal["system", "task", "note", "summary", "turn", "hit"]
    id: str
    tokens: int
    included: bool
    reason: str
    score: float | None = None
    signals: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Context:
    """What the model is to see.

    Attributes:
        messages: At most `budget` tokens by the configured counter, in order.
        tokens: What they cost, everything counted.
        budget: `max_tokens` divided by `margin`, less `reserve_tokens`.
        report: Every candidate: in or out, and why. `print(context)` shows it as a table, a notebook as HTML.
        estimated: True when the counter is an approximation of the tokenizer that was asked for.
        margin: By how much the tokens that `report_usage` told exceed ours, at most; 1.0 while nothing was told.
        cacheable: Tokens at the front with which the next prompt of this session will begin, byte for byte, unless a fold
            or a change of the task comes between, or the oldest turns yield to a budget that does not hold all of the
            window: what a provider's prompt cache can reuse.
    """

    messages: tuple[Message, ...]
    tokens: int
    budget: int
    report: tuple[Candidate, ...]
    estimated: bool = False
    margin: float = 1.0
    cacheable: int = 0

    def __str__(self) -> str:
        from ._report import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from ._report import as_html

        return as_html(self)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a summarizer wrote, and what it took: tokens as the service counts them, thoughts as output; US dollars."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Finding:
    """A fact that an extractor found: its text, the ids of the messages that say it (none: all of them), a category."""

    text: str
    sources: tuple[str, ...] = ()
    category: str | None = None


@dataclass(frozen=True, slots=True)
class Extraction:
    """What an extractor found, which may be nothing, and what it took, as in `Summary`."""

    facts: tuple[Finding, ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Superseding:
    """Which known facts new ones take the place of, and what it took to say so, as in `Summary`.

    `pairs`: the row of a new fact and that of a known one, as they were given; none if nothing is replaced.
    """

    pairs: tuple[tuple[int, int], ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class CompactionReport:
    """What a call of `compact` did.

    The facts of the folded turns (numbers, dates, names, negations, open questions, commitments) are counted by what
    became of them, each in the first of these that holds.

    Attributes:
        needed: Whether the window was over its limits.
        before: Tokens of the window before; `after`: after, the summary not counted.
        folded: Ids of the turns that left the window (they stay in the transcript and in search).
        covered: How many turns the summary covers now, those of earlier folds included.
        kept: Facts that stand in the summary.
        pinned: Facts whose sentence is kept word for word beside it.
        reachable: Facts that a search for the rest of their sentence brings back.
        lost: Facts that neither holds; their turns are still in the transcript.
        by: Who wrote the summary: the summarizer's name, or "extractive" where it failed.
    """

    needed: bool
    before: int
    after: int
    folded: tuple[str, ...] = ()
    covered: int = 0
    kept: int = 0
    pinned: int = 0
    reachable: int = 0
    lost: int = 0
    by: str = ""

    def __str__(self) -> str:
        from ._report import compaction

        return compaction(self)


Life = Literal["active", "idle", "expired", "closed"]
"""How a session stands: "idle" after a time without a write, "expired" after twice that, "closed" when it is told so."""


@dataclass(frozen=True, slots=True)
class StateVersion:
    """A version of a session's state.

    Attributes:
        version: From 1, one more with every change; 0 before the first.
        fields: JSON values, the caller's own copy.
        life: How the session stands: of the newest version now, of an older one then.
        status: Where it is in the transition table; None without one.
        at: When it was written, None for version 0.
        act: What wrote it: "update", "transition", "rollback", "restore" (of a snapshot) or "clear".
        principal: On whose behalf, `agent_id` by which agent, `why` for which reason, as far as it was said.
        turn: The id of the last of the turns that it was written with, None if with none.
    """

    scope: Scope
    version: int
    fields: dict[str, Any]
    life: Life = "active"
    status: str | None = None
    at: datetime | None = None
    act: str | None = None
    principal: str | None = None
    agent_id: str | None = None
    why: str | None = None
    turn: str | None = None


@dataclass(frozen=True, slots=True)
class StateDiff:
    """What differs between the fields of two versions: those that came, those that went, old and new of those changed."""

    added: dict[str, Any]
    removed: dict[str, Any]
    changed: dict[str, tuple[Any, Any]]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What `Memory.export` wrote: how many sessions, entries and values, and how many bytes the file has.

    `unread`: entries that are not in it, since their blocks of the archive can't be read; `stats()` names those.
    """

    sessions: int
    entries: int
    values: int
    bytes: int
    unread: int = 0


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What `Memory.import_` did.

    Attributes:
        sessions: How many sessions are new here; `entries`, `values` and `vectors` likewise.
        present: Entries and values that were here already. They stay as they are here, also where the file has others.
        left_out: What was deleted here, what was made from that or from a text that reads otherwise here, and values that
            have expired.
    """

    sessions: int
    entries: int
    values: int
    vectors: int
    present: int
    left_out: int


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What `Memory.backup` made: the folder, as of when, how many sessions and entries, and the bytes of its files.

    `damaged`: blocks of the archive that can't be read, with the reason. They are not in it.
    """

    path: Path
    created_at: datetime
    sessions: int
    entries: int
    bytes: int
    damaged: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What `Memory.restore` did: as of when it is now, with how many sessions and entries.

    `left_out`: entries and values of the backup that were deleted since then, and stay deleted. `damaged`: blocks of the
    archive that were not in the backup and can't be read here, with the reason.
    """

    created_at: datetime
    sessions: int
    entries: int
    left_out: int
    damaged: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReindexReport:
    """What `Memory.reindex` did, and how the hits of two embedding models compare.

    Attributes:
        model: The embedding model that the index is for; `previous`: the one before, None if it is the same.
        entries: How many entries have words, and so a vector.
        embedded: How many texts were embedded in this call; the others were known.
        failed: How many could not be embedded by themselves. They are found by words, and tried again by the indexer.
        samples: The questions that were asked with both models, and which share of the first ten hits both have, 0..1.
        overlap: The mean of these shares; None where nothing was compared.
        answered_before: Of sample turns taken from the chats, the share whose next turn, which mostly answers it, is among the
            first ten hits with the previous model; `answered_after`, with the new one. None without such samples.
        switched: Whether the new model is in use now.
    """

    model: str | None
    previous: str | None
    entries: int
    embedded: int = 0
    failed: int = 0
    samples: tuple[tuple[str, float], ...] = ()
    overlap: float | None = None
    answered_before: float | None = None
    answered_after: float | None = None
    switched: bool = False

    def __str__(self) -> str:
        from ._report import reindexing

        return reindexing(self)


@dataclass(frozen=True, slots=True)
class Merged:
    """Knowledge that was merged, or is to be: the ids of what is kept and of what went into it.

    Attributes:
        score: How alike they are, 0..1; of several, the least.
        reason: Why they say the same.
    """

    kept: str
    merged: tuple[str, ...]
    score: float
    reason: str


@dataclass(frozen=True, slots=True)
class Move:
    """What a sweep does, or would do, with one entry, and why.

    Attributes:
        what: "merge" (it goes into other knowledge, which says the same), "archive" (it becomes cold), "warm" (it comes back
            from the archive) or "delete".
        rule: The option that decided, or "duplicates".
        reason: The same in words, for this entry.
    """

    what: Literal["merge", "archive", "warm", "delete"]
    id: str
    type: MemoryType
    user_id: str | None
    session_id: str | None
    rule: str
    reason: str
    number: int = 0
    """The ledger's own number of the entry, unique in its folder."""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep did or, if `dry_run`, would do. `print(report)` shows every move with its reason, a notebook as HTML.

    Attributes:
        run: Names this run for `Memory.undo`.
        moves: Every entry that is moved.
        done: How many of them were; fewer where an entry was used or changed meanwhile, or the sweep was cut short.
        expired: Keyed values that had expired, and were deleted.
        refused: Why nothing was deleted although retention selected something; None if that was not so.
        complete: False when the memory was closed on the way; the next sweep goes on.
        rewritten: Blocks of the archive from which something had gone, written anew without it.
        damaged: Blocks of the archive that can't be read, with the reason.
    """

    run: str
    at: datetime
    dry_run: bool
    moves: tuple[Move, ...]
    done: int = 0
    expired: int = 0
    refused: str | None = None
    complete: bool = True
    rewritten: int = 0
    damaged: Mapping[str, str] = field(default_factory=dict)

    def count(self, what: str) -> int:
        """How many entries are merged, archived, warmed or deleted: `report.count("archive")`."""
        return sum(m.what == what for m in self.moves)

    def __str__(self) -> str:
        from ._report import sweep_text

        return sweep_text(self)

    def _repr_html_(self) -> str:
        from ._report import sweep_html

        return sweep_html(self)


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as `Memory.sessions` lists it.

    `model_tokens`, `cost`: what its summaries took, input and output tokens together, and US dollars.
    """

    session_id: str
    user_id: str | None
    tenant: str
    messages: int
    created_at: datetime
    active_at: datetime
    model_tokens: int = 0
    cost: float = 0.0


__all__ = [
    "ROLES",
    "TYPES",
    "TYPE_NUMBER",
    "BackupReport",
    "Block",
    "Candidate",
    "CompactionReport",
    "Context",
    "Entry",
    "ExportReport",
    "Extraction",
    "Finding",
    "Hit",
    "ImportReport",
    "Life",
    "MemoryType",
    "Merged",
    "Message",
    "Move",
    "ReindexReport",
    "RestoreReport",
    "Role",
    "Scope",
    "SessionInfo",
    "StateDiff",
    "StateVersion",
    "Summary",
    "Superseding",
    "SweepReport",
    "ToolCall",
    "Value",
    "changed",
    "microseconds",
    "moment",
    "same_content",
    "utc",
]
