"""`add` and `remember`: authorize, count, write down, and only then return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from .._ids import new_id
from .._json import copied
from ..errors import ConflictError, InputError, MessageError, brief
from ..protocols import Appended, OnConflict, Record, StateRecord
from ..rules.importance import worth_keeping
from ..rules.traits import traits
from ..types import ROLES, Entry, MemoryType, Message, Scope, ToolCall, microseconds, utc
from .parts import Parts, recorded
from .resident import Window
from .summarize import plain, summarizer_ready

Messages = str | Message | Iterable[str | Message]
INJECTED = ("neuralflow", "context")
"""Marks messages that `context` made up. They are never written down, so that no recall is remembered again."""
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
    resident = parts.resident(scope)
    with resident.lock:
        window = parts.window(scope)
        try:
            done = parts.ledger.append(scope, records, on_conflict=on_conflict, now=microseconds(now), state=state)
            window.session, window.erase_epoch = done.session, done.erase_epoch
            if window.summed and any(r.entry.version > 1 for r in done.written):
                resident.forget()  # a summary of what was replaced is gone
                window = parts.window(scope)
            else:
                last = window.entries[-1].written_at if window.entries else now
                take(parts, scope, done.written, session=done.session)
                window = parts.window(scope)  # read anew, where turns in it were replaced
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
        parts.tally["added"] += len(done.written)
        parts.changed()
    if work:
        parts.full(scope)
    return done


def remember(
    parts: Parts,
    scope: Scope,
    text: str,
    *,
    principal: str | None,
    type: MemoryType = MemoryType.LONG_TERM,
    importance: float | None = None,
    tags: Sequence[str] = (),
    category: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    expires_at: datetime | None = None,
) -> str:
    """Write down knowledge that belongs to the user, or to the session where no user is known; its id."""
    parts.authorize(principal, "write", scope)
    if not isinstance(text, str) or not text.strip():
        raise MessageError("there is nothing to remember: give it a text")
    if type not in list(MemoryType):
        raise InputError(f"type is one of {', '.join(MemoryType)}, not {brief(type)}")
    if type == MemoryType.SHORT_TERM:
        raise MessageError("turns of a chat are added with add(); remember() takes knowledge, notes and episodes")
    given = checked(
        {
            "metadata": {} if metadata is None else metadata,
            "tags": tags,
            "category": category,
            "importance": worth(text) if importance is None else importance,
            "expires_at": expires_at,
        }
    )
    now = parts.clock()
    own_id = new_id()
    entry = Entry(
        id=own_id,
        key=parts.ledger.key(scope, id=own_id, knowledge=True),
        type=MemoryType(type),
        content=encodable(text),
        scope=scope,
        seq=0,
        created_at=now,
        written_at=now,
        updated_at=now,
        provenance="told",
        **given,
        tokens=parts.counter.count(text),
    )
    record = recorded(entry, fresh=True)
    resident = parts.resident(scope)
    with resident.lock:
        try:
            done = parts.ledger.append(scope, [record], on_conflict="raise", now=microseconds(now), knowledge=True)
            take(parts, scope, done.written, session=done.session)
        except BaseException:
            resident.forget()
            raise
    parts.changed()
    return own_id


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
        importance=worth(text, role=message.role, name=message.name),
        tokens=parts.count(message),
    )
    return recorded(entry, fresh=message.id is None)


def worth(text: str, *, role: str | None = None, name: str | None = None) -> float:
    """The importance that an entry's own text gives it."""
    return worth_keeping(text, traits=traits(text), role=role, name=name)


def take(parts: Parts, scope: Scope, written: Sequence[Record], *, session: int) -> None:
    """Bring what is in RAM up to date with records that were just written; hold the resident's lock."""
    resident = parts.resident(scope)
    resident.put(record.feature(session=session) for record in written)
    turns = [r.entry for r in written if r.entry.position is not None]
    if not turns or scope.session_id is None:
        return
    window = parts.window(scope)
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
    if new.get("expires_at") is not None:
        if not isinstance(new["expires_at"], datetime):
            raise InputError(f"expires_at is a datetime or None, not {brief(new['expires_at'])}")
        new["expires_at"] = utc(new["expires_at"])
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
    "add",
    "append",
    "checked",
    "encodable",
    "listed",
    "over_limits",
    "own_copy",
    "remember",
    "take",
    "to_compact",
    "turn",
    "worth",
]
