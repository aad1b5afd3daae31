"""`add` and `remember`: authorize, count, write down, and only then return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import uuid4

from ..errors import InputError, MessageError
from ..protocols import OnConflict, Record
from ..types import Entry, MemoryType, Message, Scope, microseconds, utc
from .parts import Parts, recorded

Messages = str | Message | Iterable[str | Message]
INJECTED = ("neuralflow", "context")
"""Marks messages that `context` made up. They are never written down, so that no recall is remembered again."""
_CONFLICTS = ("raise", "replace", "ignore")


def add(
    parts: Parts, scope: Scope, messages: Messages, *, principal: str | None, on_conflict: OnConflict = "raise"
) -> list[str]:
    """Append messages to a session, all or none; their ids, without those of messages that `context` made up."""
    parts.authorize(principal, "write", scope)
    if on_conflict not in _CONFLICTS:
        raise InputError(f"on_conflict must be one of {', '.join(_CONFLICTS)}, not {on_conflict!r:.80}")
    now = parts.clock()
    records = [turn(parts, scope, m, now=now) for m in listed(messages)]
    if not records:
        return []
    resident = parts.resident(scope)
    with resident.lock:
        window = parts.window(scope)
        try:
            done = parts.ledger.append(scope, records, on_conflict=on_conflict, now=microseconds(now))
            window.session, window.erase_epoch = done.session, done.erase_epoch
            take(parts, scope, done.written, session=done.session)
        except BaseException:
            resident.forget()  # whatever was written, RAM is read anew
            raise
        over = over_limits(parts, window.turns, window.tokens)
    if done.written:
        parts.tally["added"] += len(done.written)
        parts.changed()
    if over:
        parts.full(scope)
    return done.ids


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
    if type is MemoryType.SHORT_TERM:
        raise MessageError("turns of a chat are added with add(); remember() takes knowledge, notes and episodes")
    if importance is not None and not 0 <= importance <= 1:
        raise InputError(f"importance is between 0 and 1, not {importance!r}")
    now = parts.clock()
    own_id = uuid4().hex
    entry = Entry(
        id=own_id,
        key=parts.ledger.key(scope, id=own_id, knowledge=True),
        type=MemoryType(type),
        content=_encodable(text),
        scope=scope,
        seq=0,
        created_at=now,
        written_at=now,
        updated_at=now,
        metadata=dict(metadata or {}),
        tags=tuple(tags),
        category=category,
        importance=0.5 if importance is None else float(importance),
        provenance="told",
        expires_at=None if expires_at is None else utc(expires_at),
        tokens=parts.counter.count(text),
    )
    resident = parts.resident(scope)
    with resident.lock:
        try:
            done = parts.ledger.append(
                scope, [recorded(entry)], on_conflict="raise", now=microseconds(now), knowledge=True
            )
            take(parts, scope, done.written, session=done.session)
        except BaseException:
            resident.forget()
            raise
    parts.changed()
    return own_id


def listed(messages: Messages) -> list[Message]:
    """What callers may pass as messages, as messages; those that `context` made up are left out."""
    if isinstance(messages, str | Message):
        messages = [messages]
    if not isinstance(messages, Iterable):
        raise MessageError(f"give a text, a Message or a list of them, not {messages!r:.80}")
    found = [Message("user", m) if isinstance(m, str) else m for m in messages]
    for message in found:
        if not isinstance(message, Message):
            raise MessageError(f"give a text, a Message or a list of them, not {message!r:.80}")
    return [m for m in found if m.metadata.get(INJECTED[0]) != INJECTED[1]]


def turn(parts: Parts, scope: Scope, message: Message, *, now: datetime) -> Record:
    """A message as the record of a turn, whose number, seq and version the ledger will hand out."""
    own_id = message.id or uuid4().hex
    text = _encodable(message.text)
    entry = Entry(
        id=_encodable(own_id),
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
        metadata=message.metadata,
        tokens=parts.count(message),
    )
    return recorded(entry)


def take(parts: Parts, scope: Scope, written: Sequence[Record], *, session: int) -> None:
    """Bring what is in RAM up to date with records that were just written; hold the resident's lock."""
    resident = parts.resident(scope)
    index = resident.index
    if index is not None:
        for record in written:
            index.put(record.feature(session=session))
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


def over_limits(parts: Parts, turns: int, tokens: int) -> bool:
    """Whether a window of so many items and tokens is to be folded."""
    pruning = parts.settings.pruning
    return turns >= pruning.summarization_threshold or tokens > pruning.max_context_tokens


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MessageError(
            "the text holds half of a surrogate pair, which no encoding can carry; decode it with errors='replace' first"
        ) from None
    return text


__all__ = ["INJECTED", "Messages", "add", "listed", "over_limits", "remember", "take", "turn"]
