"""A host's own list of messages and a session, brought together: what is new, edited, gone or back is written down.

A turn carries the list's id and a hash of what the host's message said. So an edit of the host is told from one in the
memory: the former replaces the turn, the latter stays, though the list still has the old words.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from .._json import dumped
from ..errors import InputError, brief
from ..rules.budget import prompt_tokens
from ..types import Entry, Message, Scope
from .compact import compact, summary
from .edit import set_window
from .ingest import INJECTED, Messages, add, encodable, listed
from .parts import Parts

THREAD = "thread_id"
"""The metadata of a turn that names the list it was written from."""
NOT_REPEATED = "(what was found in memory is not repeated here)"
_SAID = "thread_said"
_RECALLED = "recalled"
_MOST_NEW = 8  # messages at the end of a list without known ids that may be new


@dataclass(frozen=True, slots=True)
class _Branch:
    """How a window goes on: the turns that stay, and the list's messages after them.

    `forked`: turns are gone, or return from a branch that was left; else the messages are only to be added.
    """

    kept: Sequence[Entry]
    fresh: Sequence[Message]
    forked: bool


def update(
    parts: Parts, scope: Scope, thread: str | None, messages: Messages, *, principal: str | None, written: str | None
) -> str | None:
    """Bring the session's window up to the list; the id of the list's newest turn."""
    parts.authorize(principal, "write", scope)
    if not isinstance(written, str | None):
        raise InputError(f"written is what update() returned for the list before, or None, not {brief(written)}")
    turns = _checked(messages)
    given = {m.id: m for m in turns}
    resident = parts.resident(scope)
    with resident.lock:
        branch = _branch(parts, scope, thread, parts.window(scope).entries, turns, written=written)
        known = ((e, given[e.id]) for e in branch.kept if e.id in given)
        changed = {e.id: _stored(m, thread) for e, m in known if edited(e, m)}
        fresh = [_stored(m, thread) for m in branch.fresh]
        if branch.forked:
            kept = [changed.get(e.id) or e.message for e in branch.kept]
            set_window(parts, scope, [*kept, *fresh], principal=principal)
        elif fresh or changed:
            add(parts, scope, [*changed.values(), *fresh], principal=principal, on_conflict="replace")
        answered = turns and turns[-1].role == "assistant" and not turns[-1].tool_calls
        if branch.forked or answered:
            parts.window(scope).sent.hits = None
    return turns[-1].id if turns else None


def fold(parts: Parts, scope: Scope, thread: str | None, messages: Messages, *, principal: str | None) -> str:
    """Fold messages of the list into the session's summary, and return that; empty if there is none."""
    turns = _checked(messages)
    if any(m.id is None for m in turns):
        raise InputError("fold() takes messages that have ids, by which their turns are known")
    add(parts, scope, [_stored(m, thread) for m in turns], principal=principal, on_conflict="ignore")
    ids = {m.id for m in turns}
    resident = parts.resident(scope)
    with resident.lock:
        kept = [e.message for e in parts.window(scope).entries if e.id not in ids]
    compact(parts, scope, principal=principal, max_tokens=prompt_tokens(kept, parts.counter.count))
    return summary(parts, scope, principal=principal)


def _checked(messages: Messages) -> list[Message]:
    """The turns of a host's list; what is marked as made up is none."""
    turns = listed(messages)
    ids = [encodable(m.id) for m in turns if m.id is not None]
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise InputError(f"the id {twice!r} stands for two messages; give each its own")
    return turns


def checked_id(id: str | None) -> str | None:
    """The id of a list."""
    if id is not None and (not isinstance(id, str) or not id):
        raise InputError(f"a thread's id is a non-empty text or None, not {brief(id)}")
    return None if id is None else encodable(id)


def _branch(
    parts: Parts,
    scope: Scope,
    thread: str | None,
    window: Sequence[Entry],
    turns: Sequence[Message],
    *,
    written: str | None,
) -> _Branch:
    """What the list is to the window."""
    places = {m.id: place for place, m in enumerate(turns) if m.id is not None}
    end, last = _common(window, turns, places, thread)
    rest = turns[last + 1 :]
    known = _known(parts, scope, rest)
    cursor = -1 if written is None else places.get(written, -1)
    if last < 0 and cursor < 0 and not known:
        return _Branch(window, rest[resent(window, rest) :], forked=False)
    # What was written and is not known was deleted from memory.
    fresh = [m for place, m in enumerate(rest, last + 1) if place > cursor or m.id in known]
    after = [e for e in window[end:] if thread is not None and (e.id in places or _is_ours(e, thread))]
    # What was folded was folded before what is still there, but for what is pinned.
    if last < 0 or (known and window[end - 1].pinned):
        after = [e for e in after if not e.pinned]
        if after:
            front = takewhile(lambda m: m.id in known, fresh)
            fresh = fresh[max((n for n, m in enumerate(front) if m.role == "user"), default=0) :]
        else:
            fresh = list(turns[max(last, cursor) + 1 :])
    forked = bool(after) or any(m.id in known for m in fresh)
    left = {e.id for e in after} | {m.id for m in fresh}
    return _Branch([e for e in window if e.id not in left], fresh, forked)


def _common(
    window: Sequence[Entry], turns: Sequence[Message], places: Mapping[str, int], thread: str | None
) -> tuple[int, int]:
    """How far window and list go together: the row after the last turn of both, and that turn's place in the list.

    A turn that the list lacks was cut off to make the list shorter, and is not meant to go. But where the two part later,
    or others stand in its stead, or the next turn differs, this is another branch, and they part before it.
    """
    end, last, missing = 0, -1, False
    parting: tuple[int, int] | None = None
    for row, entry in enumerate(window):
        place = places.get(entry.id)
        if place is None:
            missing = missing or _is_ours(entry, thread)
            continue
        gap = place > last + 1 > 0
        if edited(entry, turns[place]) and (missing or gap):
            missing = True  # the same id in another branch
        elif place <= last or (missing and gap):
            missing = True
            break
        else:
            if gap or (missing and last >= 0):
                parting = parting or (end, last)
            end, last, missing = row + 1, place, False
    return parting if parting and missing else (end, last)


def _is_ours(entry: Entry, thread: str | None) -> bool:
    return thread is not None and entry.metadata.get(THREAD) == thread


def _known(parts: Parts, scope: Scope, turns: Sequence[Message]) -> set[str | None]:
    """The ids of those that the session has, in the window or not."""
    ids = {parts.ledger.key(scope, id=m.id): m.id for m in turns if m.id is not None}
    return {ids[key] for key in parts.ledger.by_keys(scope, list(ids), texts="bare")} if ids else set()


def resent(window: Sequence[Entry], turns: Sequence[Message]) -> int:
    """How many messages at the front of *turns* were said before: they end as the window does, under other ids or none.

    At least the last of a list with ids is new.
    """
    if not window or not turns:
        return 0
    before = max(0, len(turns) - len(window) - _MOST_NEW)
    recent = turns[before:]
    for end in range(len(recent) - (recent[-1].id is not None), 0, -1):
        size = min(end, len(window))
        pairs = zip(window[len(window) - size :], recent[end - size : end], strict=True)
        whole = size in (len(window), before + end)
        if whole and all(says(e, m) or e.metadata.get(_SAID) == _hash(m) for e, m in pairs):
            return before + end
    return 0


def says(entry: Entry, message: Message) -> bool:
    """Whether a turn says what a message says."""
    stored = entry.content if entry.blocks is None else entry.blocks
    return (
        entry.role == message.role
        and stored == message.content
        and entry.name == message.name
        and entry.tool_calls == message.tool_calls
        and entry.tool_call_id == message.tool_call_id
    )


def edited(entry: Entry, message: Message) -> bool:
    """Whether the host's message says something else than when it was written down."""
    return not says(entry, message) and entry.metadata.get(_SAID) not in (None, _hash(message))


def _hash(message: Message) -> str:
    calls = [[c.id, c.name, c.args] for c in message.tool_calls]
    said = [message.role, message.content, message.name, calls, message.tool_call_id]
    return hashlib.blake2b(encodable(dumped(said, what="a message")).encode(), digest_size=8).hexdigest()


def is_recalled(message: Message) -> bool:
    """Whether it quotes the memory: it is shown while it is new, and never kept as if it had been said."""
    return message.metadata.get(INJECTED[0]) == _RECALLED


def _stored(message: Message, thread: str | None) -> Message:
    """*message* as it is written down."""
    metadata: dict[str, Any] = {k: v for k, v in message.metadata.items() if k != INJECTED[0]}
    metadata |= {_SAID: _hash(message)} | ({} if thread is None else {THREAD: thread})
    quoted: dict[str, Any] = {"content": NOT_REPEATED, "payload": None} if is_recalled(message) else {}
    return replace(message, metadata=metadata, **quoted)


__all__ = ["checked_id", "edited", "fold", "is_recalled", "resent", "says", "update"]
