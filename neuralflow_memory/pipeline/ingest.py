"""`add` and `remember`: authorize, count, write down, and only then return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any, TypeVar

from .._ids import new_id
from .._json import copied
from ..errors import ConflictError, InputError, MessageError, NotFound, brief
from ..protocols import Appended, OnConflict, Record, StateRecord
from ..rules.analysis import LATER, recorded, recorded_first, worth
from ..rules.duplicates import strengthened, union
from ..types import ROLES, Entry, MemoryType, Message, Scope, ToolCall, microseconds, utc
from .cached import forget
from .parts import Parts
from .resident import Window, again
from .summarize import plain, summarizer_ready

Messages = str | Message | Iterable[str | Message]
INJECTED = ("neuralflow", "context")
"""Marks messages that `context` made up. They are never written down, so that no recall is remembered again."""
BATCH = 500  # messages, or pieces of knowledge, that are written at once where many are given
_ARGUMENTS = frozenset(
    {
        "text",
        "type",
        "importance",
        "tags",
        "category",
        "source",
        "metadata",
        "created_at",
        "expires_at",
        "valid_from",
        "supersedes",
    }
)
T = TypeVar("T")
_HEX = frozenset("0123456789abcdef")
_CONFLICTS = ("raise", "replace", "ignore")


def add(
    parts: Parts, scope: Scope, messages: Messages, *, principal: str | None, on_conflict: OnConflict = "raise"
) -> list[str]:
    """Append messages to a session, all or none; their ids, without those of messages that `context` made up."""
    done = append(parts, scope, messages, principal=principal, on_conflict=on_conflict)
    return [] if done is None else done.ids


def append(
    parts: Parts,
    scope: Scope,
    messages: Messages,
    *,
    principal: str | None,
    on_conflict: OnConflict,
    state: StateRecord | None = None,
) -> Appended | None:
    """As `add`, and with the messages a version of the session's state; None where there are none."""
    parts.authorize(principal, "write", scope)
    if on_conflict not in _CONFLICTS:
        raise InputError(f"on_conflict must be one of {', '.join(_CONFLICTS)}, not {brief(on_conflict)}")
    now = parts.clock()
    records = [turn(parts, scope, m, now=now) for m in listed(messages)]
    if not records:
        return None
    resident = parts.resident(scope, look=False)  # whoever reads will look, and the ledger knows what comes next
    with resident.lock:
        window = parts.window(scope, resident)
        try:
            done = parts.ledger.append(scope, records, on_conflict=on_conflict, now=microseconds(now), state=state)
            window.session, window.erase_epoch = done.session, done.erase_epoch
            if window.summed and any(r.entry.version > 1 for r in done.written):
                resident.forget()  # a summary of what was replaced is gone
                window = parts.window(scope, resident)
            else:
                last = window.entries[-1].written_at if window.entries else now
                take(parts, scope, done.written, session=done.session)
                window = parts.window(scope, resident)  # read anew, where turns in it were replaced
                window.due |= (now - last).total_seconds() > parts.settings.context.expiry_time
        except ConflictError:
            raise  # nothing was written
        except BaseException as error:
            resident.forget()  # whatever was written, RAM is read anew
            parts.tally["failed_writes"] += 1
            parts.trouble = f"adding: {type(error).__name__}: {error}"
            raise
        work = to_compact(parts, window)
    if done.written:
        if any(r.entry.version > 1 for r in done.written):
            forget(parts, scope)
        parts.tally["added"] += len(done.written)
        parts.changed()
    if work:
        parts.full(scope)
    return done


def remember(parts: Parts, scope: Scope, items: Sequence[Mapping[str, Any]], *, principal: str | None) -> list[str]:
    """Write down knowledge that belongs to the user, or to the session where no user is known, all or none; the ids.

    Each item has the arguments of `Session.remember` by name. What is known already is strengthened.
    """
    parts.authorize(principal, "write", scope)
    told = [_told(parts, scope, **item) for item in items]
    resident = parts.resident(scope)
    with resident.lock:
        ids, written = again(resident, lambda: remembered(parts, scope, told))
        try:
            resident.put(record.feature(session=session) for record, session in written)
        except BaseException:
            resident.forget()
            raise
    if written:
        parts.changed()
    return ids


def in_batches(
    things: Iterable[T], write: Callable[[list[T]], list[str]], *, progress: Callable[[int], object] | None
) -> list[str]:
    """*write* some of *things* at a time, in order, and tell *progress* how many; the ids of all."""
    ids: list[str] = []
    left = iter(things)
    while batch := list(islice(left, BATCH)):
        ids += write(batch)
        if progress is not None:
            progress(len(batch))
    return ids


def as_items(things: Iterable[Any], fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Texts, or mappings with a text, as arguments of `Session.remember`, those of *fields* where they have none of their own."""
    if isinstance(things, str | Mapping) or not isinstance(things, Iterable):
        raise MessageError(f"give an iterable of texts, or of mappings with a text, not {brief(things)}")
    for thing in things:
        item = {**fields, **(thing if isinstance(thing, Mapping) else {"text": thing})}
        unknown = item.keys() - _ARGUMENTS
        if unknown or "text" not in item:
            raise InputError(
                f"what is to be remembered has a text and, if need be, {', '.join(sorted(_ARGUMENTS - {'text'}))}; not "
                f"{brief(thing if 'text' not in item else sorted(unknown))}"
            )
        yield item


@dataclass(frozen=True, slots=True)
class Told:
    """Something to remember: its record, whether its importance was said, and the ids of what it supersedes."""

    record: Record
    weighty: bool = False
    supersedes: tuple[str, ...] = ()


def _told(
    parts: Parts,
    scope: Scope,
    *,
    text: str,
    type: MemoryType = MemoryType.LONG_TERM,
    importance: float | None = None,
    supersedes: str | Iterable[str] = (),
    created_at: datetime | None = None,
    metadata: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Told:
    if not isinstance(text, str) or not text.strip():
        raise MessageError("there is nothing to remember: give it a text")
    if type not in list(MemoryType):
        raise InputError(f"type is one of {', '.join(MemoryType)}, not {brief(type)}")
    if type == MemoryType.SHORT_TERM:
        raise MessageError("turns of a chat are added with add(); remember() takes knowledge, notes and episodes")
    older = [supersedes] if isinstance(supersedes, str) else supersedes
    older = tuple(older) if isinstance(older, Iterable) else (older,)
    if not all(isinstance(i, str) for i in older):
        raise InputError(f"supersedes is an id of knowledge or a list of them, not {brief(supersedes)}")
    now = parts.clock()
    given = checked(
        {
            **fields,
            "metadata": {} if metadata is None else metadata,
            "created_at": created_at,
            "importance": worth(text) if importance is None else importance,
        }
    )
    own_id = new_id()
    entry = Entry(
        id=own_id,
        key=parts.ledger.key(scope, id=own_id, knowledge=True),
        type=MemoryType(type),
        content=encodable(text),
        scope=scope,
        seq=0,
        written_at=now,
        updated_at=now,
        provenance="told",
        **{**given, "created_at": given["created_at"] or now},
        tokens=parts.counter.count(text),
    )
    record = recorded(entry, fresh=True)
    return Told(record, importance is not None, older)


def remembered(
    parts: Parts,
    scope: Scope,
    told: Sequence[Told],
    *,
    read: Sequence[Entry] = (),
    extracted: Entry | None = None,
    turns: Sequence[Sequence[int]] = (),
) -> tuple[list[str], list[tuple[Record, int]]]:
    """The ids of what was told, known before or new, and what was written.

    *read*, *extracted*: as for `Ledger.revise`; *turns*: the numbers of those that say each.
    """
    texts = [t.record.entry.content for t in told if t.record.entry.type is MemoryType.LONG_TERM]
    known = parts.ledger.known(scope, texts) if texts else {}
    parts.used(e.number for e in known.values())  # it is said again
    stored = {e.id: e for e in known.values()}
    older = {i for t in told for i in t.supersedes}
    stored |= {e.id: e for i in sorted(older) for e in [_superseded(parts, scope, i)]}
    now_is = dict(stored)
    said = {text: e.id for text, e in known.items()}
    records: dict[str, Record] = {}
    ids: list[str] = []
    for item in told:
        entry = item.record.entry
        own_id = said.get(entry.content) if entry.type is MemoryType.LONG_TERM else None
        if own_id is None:
            own_id, now_is[entry.id], records[entry.id] = entry.id, entry, item.record
            if entry.type is MemoryType.LONG_TERM:
                said[entry.content] = own_id
        else:
            now_is[own_id] = strengthened(now_is[own_id], entry, weigh=item.weighty)
        ids.append(own_id)
        for i in item.supersedes:
            if i != own_id:
                _supersede(now_is, i, by=own_id, at=entry.valid_from or entry.created_at)
    written_at = parts.clock()
    changed = [e for i, e in now_is.items() if i in stored and e != stored[i]]
    added = [replace(record, entry=now_is[i]) for i, record in records.items()]
    if not changed and not added and extracted is None:
        return ids, []
    return ids, parts.ledger.revise(
        scope,
        changed=[recorded(replace(e, updated_at=written_at)) for e in changed],
        added=added,
        read=read,
        extracted=extracted,
        made_from=[(own_id, number) for own_id, numbers in zip(ids, turns, strict=False) for number in numbers],
    )


def _superseded(parts: Parts, scope: Scope, id: str) -> Entry:
    """The knowledge that is to be superseded."""
    key = parts.ledger.key(scope, id=id, knowledge=True)
    found = parts.ledger.by_keys(scope, [key, id] if len(id) == len(key) and set(id) <= _HEX else [key])
    for entry in found.values():
        if entry.key == parts.ledger.key(scope, id=entry.id, knowledge=True):
            if parts.ledger.values_of(scope, [entry.number]):
                raise InputError(f"{brief(id)} is the text of a keyed value: put another value under its key")
            return entry
    raise NotFound(f"no knowledge {brief(id)} in this scope to be superseded; pass an id that remember() gave", id=id)


def _supersede(now_is: dict[str, Entry], id: str, *, by: str, at: datetime) -> None:
    """Let the entry *id* hold until *at*, and the entry *by* stand for it."""
    old, new = now_is[id], now_is[by]
    if old.superseded_by not in (None, by):
        raise ConflictError(
            f"knowledge {id!r} was superseded by {old.superseded_by!r} already; supersede that, or restore {id!r} first",
            id=id,
        )
    until = at if old.valid_to is None else min(at, old.valid_to)
    now_is[id] = replace(old, valid_to=until, superseded_by=by)
    now_is[by] = replace(new, supersedes=union(new.supersedes, [id]))


def listed(messages: Messages, *, injected: bool = False) -> list[Message]:
    """What callers may pass as messages, as messages; those that `context` made up only if *injected*."""
    if isinstance(messages, str | Message):
        messages = [messages]
    pair = isinstance(messages, tuple) and len(messages) == 2 and messages[0] in (*ROLES, "human", "ai")
    if not isinstance(messages, Iterable) or isinstance(messages, Mapping) or pair:
        raise MessageError(f"give a text, a Message or a list of them, not {brief(messages)}")
    found = [Message("user", m) if isinstance(m, str) else m for m in messages]
    for message in found:
        if not isinstance(message, Message):
            raise MessageError(f"give a text, a Message or a list of them, not {brief(message)}{_how(message)}")
    return [m for m in found if injected or m.metadata.get(INJECTED[0]) != INJECTED[1]]


def _how(message: object) -> str:
    """How a host's message becomes one of ours."""
    for host, convert in (("langchain", "from_langchain"), ("llama_index", "from_llama_index")):
        if type(message).__module__.startswith(host):
            return f"; convert it with neuralflow_memory.{host}.{convert}"
    return "; make it a Message(role, content)" if isinstance(message, Mapping) else ""


def turn(parts: Parts, scope: Scope, message: Message, *, now: datetime) -> Record:
    """A message as the record of a turn, whose number, seq and version the ledger will hand out."""
    message = own_copy(message)
    own_id = message.id or new_id()
    text = encodable(message.text)
    entry = Entry(
        id=encodable(own_id),
        key=parts.ledger.key(scope, id=own_id),
        type=MemoryType.SHORT_TERM,
        content=text,
        scope=scope,
        seq=0,
        created_at=message.created_at or now,
        written_at=now,
        updated_at=now,
        role=message.role,
        name=message.name,
        blocks=None if isinstance(message.content, str) else tuple(message.content),
        tool_calls=tuple(message.tool_calls),
        tool_call_id=message.tool_call_id,
        payload=message.payload,
        metadata=message.metadata or {},
        importance=LATER,
        tokens=parts.count(message),
    )
    return recorded_first(entry, fresh=message.id is None)


def take(parts: Parts, scope: Scope, written: Sequence[Record], *, session: int) -> None:
    """Bring what is in RAM up to date with records that were just written; hold the resident's lock."""
    resident = parts.residents.unused(scope)
    resident.put(record.feature(session=session) for record in written)
    turns = [r.entry for r in written if r.entry.position is not None]
    if not turns or scope.session_id is None:
        return
    window = parts.window(scope, resident)
    last = window.entries[-1].position if window.entries else None
    if all(e.position is not None and e.position > (last or 0) for e in turns):
        for entry in turns:
            window.append(entry)
    else:
        resident.forget_window(scope.session_id)


def over_limits(parts: Parts, window: Window) -> bool:
    """Whether a window is to be folded."""
    pruning = parts.settings.pruning
    full = window.turns >= pruning.summarization_threshold or window.tokens > pruning.max_context_tokens
    return full or window.due or window.cramped


def to_compact(parts: Parts, window: Window) -> bool:
    """Whether there is something to fold, or a summary to be written again by a model that is back."""
    return over_limits(parts, window) or (plain(window.summary) and summarizer_ready(parts))


def own_copy(message: Message) -> Message:
    """*message* with its JSON values copied, so that nobody's later change of them reaches another's."""
    new: dict[str, Any] = {}
    if message.metadata:
        new["metadata"] = copied(message.metadata, what="metadata")
    if not isinstance(message.content, str):
        new["content"] = [copied(b, what="content blocks") for b in message.content]
    if message.tool_calls:
        calls = message.tool_calls
        new["tool_calls"] = tuple(ToolCall(c.id, c.name, copied(c.args, what="a tool call's args")) for c in calls)
    if message.payload is not None:
        new["payload"] = copied(message.payload, what="payload")
    return replace(message, **new) if new else message


def checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an entry as callers give them, as they are stored; `InputError` names the first that can't be."""
    new = dict(fields)
    if "metadata" in new:
        if not isinstance(new["metadata"], Mapping):
            raise InputError(f"metadata is a mapping of JSON values, not {brief(new['metadata'])}")
        new["metadata"] = copied(new["metadata"], what="metadata")
    if "tags" in new:
        given = new["tags"]
        tags = [*given] if isinstance(given, Iterable) and not isinstance(given, str) else [None]
        if not all(isinstance(t, str) for t in tags):
            raise InputError(f"tags is a list of texts, not {brief(given)}")
        new["tags"] = tuple(tags)
    for name in ("category", "source"):
        if name in new and not isinstance(new[name], str | None):
            raise InputError(f"{name} is a text or None, not {brief(new[name])}")
    if "importance" in new:
        value = new["importance"]
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"importance is a number between 0 and 1, not {brief(value)}")
        new["importance"] = float(value)
    for name in ("expires_at", "valid_from", "valid_to", "created_at"):
        if new.get(name) is not None:
            if not isinstance(new[name], datetime):
                raise InputError(f"{name} is a datetime or None, not {brief(new[name])}")
            new[name] = utc(new[name])
    return new


def encodable(text: str) -> str:
    """*text*, if it can be stored; `MessageError` otherwise."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MessageError(
            "the text holds half of a surrogate pair, which no encoding can carry; decode it with errors='replace' first"
        ) from None
    return text


__all__ = [
    "INJECTED",
    "Messages",
    "Told",
    "add",
    "append",
    "as_items",
    "checked",
    "encodable",
    "in_batches",
    "listed",
    "over_limits",
    "own_copy",
    "remember",
    "remembered",
    "take",
    "to_compact",
    "turn",
]
