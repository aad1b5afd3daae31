"""What is done to entries that are there: read, list, update, delete, set the window, clear."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice
from typing import Any, Literal

from ..errors import InputError, NotFound, QueryError, brief
from ..protocols import Record, StateRecord, Texts
from ..rules.analysis import recorded, worth
from ..rules.budget import items, units
from ..rules.filters import parse
from ..types import Entry, MemoryType, Message, Scope, microseconds, same_content, utc
from .cached import forget
from .compact import OWN_METADATA
from .ingest import Messages, checked, listed, own_copy, take, to_compact, turn
from .parts import Parts
from .resident import again
from .search import checked_time, checked_types

MERGED = "merged_into"
"""The metadata key of knowledge that was merged into what says the same: the id of that."""
_CHANGEABLE = frozenset(
    {"content", "metadata", "tags", "category", "source", "importance", "expires_at", "valid_from", "valid_to"}
)


def transcript(
    parts: Parts,
    scope: Scope,
    *,
    principal: str | None,
    view: Literal["all", "window"] = "all",
    last: int | None = None,
) -> list[Message]:
    """The session's turns in order: everything ever said, or the verbatim window."""
    parts.authorize(principal, "read", scope)
    if view not in ("all", "window"):
        raise InputError(f"view must be 'all' or 'window', not {brief(view)}")
    if last is not None and (not isinstance(last, int) or last < 0):
        raise InputError(f"last is a number of messages, not {brief(last)}")
    if last == 0:
        return []
    if view == "window":
        resident = parts.resident(scope)
        with resident.lock:
            found = list(parts.window(scope).entries)
        return [own_copy(e.message) for e in (found if last is None else found[-last:])]
    last = None if last is None else min(last, sys.maxsize)
    kinds = [MemoryType.SHORT_TERM]
    chosen = parts.ledger.select(scope, session_only=True, types=kinds, last=last, texts="skip")
    return [e.message for e in chosen]


def read(parts: Parts, scope: Scope, id: str, *, principal: str | None) -> Entry:
    """What `get` finds, for somebody who wants to know what it says: a use of it."""
    found = get(parts, scope, id, principal=principal)
    parts.used([found.number])
    return found


def get(parts: Parts, scope: Scope, id: str, *, principal: str | None, texts: Texts = "read") -> Entry:
    """The entry with this key, or this session's turn or this user's knowledge with this id; `NotFound` if there is none."""
    parts.authorize(principal, "read", scope)
    found = _find(parts, scope, id, texts=texts)
    if found is None:
        raise NotFound(
            f"no entry {brief(id)} in this scope; pass the id of a turn of this session, or an entry's key", id=id
        )
    return found


def _find(parts: Parts, scope: Scope, id: str, *, texts: Texts = "read") -> Entry | None:
    if not isinstance(id, str):
        raise InputError(f"an entry is addressed by its id or key, not {brief(id)}")
    keys = _keys(parts, scope, id)
    found = parts.ledger.by_keys(scope, keys, texts=texts)
    return next((found[k] for k in keys if k in found), None)


def _keys(parts: Parts, scope: Scope, id: str) -> list[str]:
    """The keys that *id* may stand for, the most likely first."""
    keys = [parts.ledger.key(scope, id=id, knowledge=True)]
    if scope.session_id is not None:
        keys.insert(0, parts.ledger.key(scope, id=id))
    if len(id) == len(keys[0]) and set(id) <= set("0123456789abcdef"):
        keys.append(id)
    return keys


def select(
    parts: Parts,
    scope: Scope,
    *,
    principal: str | None,
    within: Literal["user", "session"] = "user",
    filter: Mapping[str, Any] | None = None,
    types: Iterable[MemoryType] | None = None,
    since: datetime | None = None,
    after: str | None = None,
    as_of: datetime | str | None = None,
    limit: int | None = None,
    action: str = "read",
    texts: Texts = "skip",
) -> Iterator[Entry]:
    """Entries of the user (or of the session) that fulfil the conditions, in the order they were written."""
    parts.authorize(principal, action, scope)
    condition = parse(filter)
    if within not in ("user", "session"):
        raise QueryError(f"within must be 'user' or 'session', not {brief(within)}")
    kinds = checked_types(types)
    at = None if as_of is None else checked_time(as_of, "as_of")
    start = get(parts, scope, after, principal=principal, texts="bare").number if after is not None else 0
    if since is not None and not isinstance(since, datetime):
        raise QueryError(f"since must be a datetime, not {brief(since)}")
    found = parts.ledger.select(
        scope,
        session_only=within == "session",
        types=kinds,
        since=None if since is None else microseconds(utc(since)),
        after=start,
        limit=limit if condition is None and at is None else None,
        texts=texts,
    )
    return (e for e in found if (condition is None or condition.matches(e)) and (at is None or e.held(at)))


def listing(parts: Parts, scope: Scope, *, principal: str | None, limit: int | None, **conditions: Any) -> list[Entry]:
    if limit is not None and (not isinstance(limit, int) or limit < 0):
        raise QueryError(f"limit is a number of entries or None, not {brief(limit)}")
    limit = None if limit is None else min(limit, sys.maxsize)
    return list(islice(select(parts, scope, principal=principal, limit=limit, **conditions), limit))


def count(
    parts: Parts,
    scope: Scope,
    *,
    principal: str | None,
    filter: Mapping[str, Any] | None,
    within: Literal["user", "session"],
) -> int:
    """How many entries of the session, or of the user, fulfil the filter."""
    if parse(filter) is not None or within not in ("user", "session"):
        return sum(1 for _ in select(parts, scope, principal=principal, within=within, filter=filter))
    parts.authorize(principal, "read", scope)
    return parts.ledger.count(scope, session_only=within == "session")


def update(parts: Parts, scope: Scope, id: str, changes: Mapping[str, Any], *, principal: str | None) -> Entry:
    """Write a new version of an entry; the host's own JSON of a turn goes when its content changes.

    New content is worth anew, unless its importance was set to something else than the old content's own.
    """
    parts.authorize(principal, "write", scope)
    unknown = changes.keys() - _CHANGEABLE
    if unknown or not changes:
        raise InputError(
            f"update() changes {', '.join(sorted(_CHANGEABLE))}; not {', '.join(sorted(unknown)) or 'nothing'}"
        )
    return rewrite(parts, scope, id, lambda before: _changed(parts, before, changes), principal=principal)


def rewrite(parts: Parts, scope: Scope, id: str, change: Callable[[Entry], Record], *, principal: str | None) -> Entry:
    """Write what *change* makes of an entry as its new version; what holds again thereby is told to what superseded it."""
    resident = parts.resident(scope)
    with resident.lock:
        before, written, summed = again(
            resident, lambda: _rewritten(parts, scope, get(parts, scope, id, principal=principal), change)
        )
        try:
            resident.put(record.feature(session=session) for record, session in written)
            if before.scope.session_id is not None:
                resident.forget_window(before.scope.session_id)
        except BaseException:
            resident.forget()
            raise
        if summed:
            resident.forget()
    forget(parts, scope)
    parts.changed()
    if summed:
        parts.full(before.scope)
    return written[0][0].entry if written else before


def _rewritten(
    parts: Parts, scope: Scope, before: Entry, change: Callable[[Entry], Record]
) -> tuple[Entry, list[tuple[Record, int]], bool]:
    """Change an entry in the ledger: as it was, what was written, whether summaries may have gone with it."""
    record = change(before)
    if record.entry == before:
        return before, [], False
    summed = not same_content(before, record.entry) and bool(_summed(parts, [before]))
    others = []
    if before.superseded_by is not None and record.entry.superseded_by is None:
        key = parts.ledger.key(scope, id=before.superseded_by, knowledge=True)
        for other in parts.ledger.by_keys(scope, [key]).values():
            left = tuple(i for i in other.supersedes if i != before.id)
            others.append(recorded(replace(other, supersedes=left, updated_at=parts.clock())))
    return before, parts.ledger.revise(scope, changed=[record, *others]), summed


def _changed(parts: Parts, before: Entry, changes: Mapping[str, Any]) -> Record:
    """An entry with *changes* made."""
    new = checked(changes)
    if new.get("valid_to", before.valid_to) is None and before.superseded_by is not None:
        new["superseded_by"] = None
        about = new.get("metadata", before.metadata)
        new["metadata"] = {name: value for name, value in about.items() if name != MERGED}
    if "content" in new:
        message = own_copy(replace(before.message, content=new["content"], payload=None))
        blocks = None if isinstance(message.content, str) else tuple(message.content)
        new.update(content=message.text, blocks=blocks, payload=None, tokens=parts.count(message))
        if before.importance == worth(before.content, role=before.role, name=before.name):
            new.setdefault("importance", worth(new["content"], role=before.role, name=before.name))
    if before.seq < 0 and "metadata" in new:
        new["metadata"] |= {k: v for k, v in before.metadata.items() if k in OWN_METADATA}
    return recorded(replace(before, **new, updated_at=parts.clock()))


def _summed(parts: Parts, entries: Iterable[Entry]) -> list[Scope]:
    """The sessions whose summary may speak of *entries*; it is made anew, so RAM is read anew and folding begins."""
    turns = {e.scope.session_id: e.scope for e in entries if e.type is MemoryType.SHORT_TERM or e.seq < 0}
    return [s for s in turns.values() if parts.window(s).summed or parts.extractor is not None]


def delete(
    parts: Parts,
    scope: Scope,
    ids: str | Iterable[str] | None,
    *,
    principal: str | None,
    filter: Mapping[str, Any] | None = None,
    within: Literal["user", "session"] = "session",
) -> int:
    """Delete entries by id or key, or by filter; how many there were. Unknown ids raise `NotFound`, and nothing goes."""
    parts.authorize(principal, "delete", scope)
    if (ids is None) == (filter is None):
        raise InputError("delete takes ids or a filter: pass one of them")
    if ids is not None and not isinstance(ids, Iterable):
        raise InputError(f"delete takes an id or a list of ids, not {brief(ids)}")
    if filter is not None and parse(filter) is None:
        raise InputError("an empty filter would delete everything; call clear() for that")
    resident = parts.resident(scope)
    with resident.lock:
        if ids is None:
            chosen = select(
                parts, scope, principal=principal, within=within, filter=filter, action="delete", texts="read"
            )
            doomed = list(chosen)
        else:
            named = [ids] if isinstance(ids, str) else ids
            doomed = [_doomed(parts, scope, i, principal=principal) for i in named]
        count = _drop(parts, scope, doomed)
    forget(parts, scope)
    return count


def _doomed(parts: Parts, scope: Scope, id: str, *, principal: str | None) -> Entry:
    """What is to be deleted: an entry, or one that retention has deleted and could bring back."""
    try:
        return get(parts, scope, id, principal=principal, texts="bare")
    except NotFound:
        keys = _keys(parts, scope, id)
        kept = parts.ledger.discarded(scope, keys)
        if not kept:
            raise
        return next(kept[key] for key in keys if key in kept)


def _merged(parts: Parts, scope: Scope, doomed: Sequence[Entry]) -> list[Entry]:
    """What was merged into *doomed*, and into that: it says the same, and goes with it."""
    found: dict[int, Entry] = {}
    there, left = {e.number for e in doomed}, list(doomed)
    while left:
        entry = left.pop()
        keys = [parts.ledger.key(scope, id=i, knowledge=True) for i in entry.supersedes]
        others = (
            {**parts.ledger.discarded(scope, keys), **parts.ledger.by_keys(scope, keys, texts="skip")} if keys else {}
        )
        for other in others.values():
            mine = other.superseded_by == entry.id and other.metadata.get(MERGED) == entry.id
            if mine and other.number not in there | found.keys():
                found[other.number] = other
                left.append(other)
    return list(found.values())


def clear(parts: Parts, scope: Scope, *, principal: str | None) -> int:
    """Delete the session's turns, summaries and state; the user's knowledge stays."""
    parts.authorize(principal, "delete", scope)
    now = microseconds(parts.clock())
    state = StateRecord(0, None, "active", now, "clear", principal, scope.agent_id)
    resident = parts.resident(scope)
    with resident.lock:
        doomed = list(parts.ledger.select(scope, session_only=True, texts="bare"))
        count = _drop(parts, scope, [*doomed, *parts.ledger.discarded(scope).values()], cleared=state)
    forget(parts, scope)
    return count


def _drop(parts: Parts, scope: Scope, doomed: Sequence[Entry], *, cleared: StateRecord | None = None) -> int:
    resident = parts.resident(scope)
    summed = _summed(parts, doomed)
    asked = {e.number for e in doomed}
    # Summaries are gone; what was superseded holds again; what was found in turns that retention had deleted is gone.
    more = bool(summed) or any(e.supersedes for e in doomed)
    doomed = [*doomed, *_merged(parts, scope, doomed)]
    try:
        count = parts.ledger.drop(scope, doomed, now=microseconds(parts.clock()), cleared=cleared)
        count += len(asked) - len(doomed)
        for entry in doomed:
            if resident.index is not None:
                more |= resident.index.row(entry.number) < 0
                resident.index.drop(entry.number)
            if entry.scope.session_id is not None:
                resident.forget_window(entry.scope.session_id)
    except BaseException:
        resident.forget()
        raise
    if more:
        resident.forget()
    parts.changed()
    for session in summed:
        parts.full(session)
    return count


def pin(parts: Parts, scope: Scope, id: str, *, principal: str | None, to: bool) -> None:
    """Pin a turn of this session, with what it can't stand without: its tool call's messages and its user turn."""
    parts.authorize(principal, "write", scope)
    resident = parts.resident(scope)
    with resident.lock:
        entry = get(parts, scope, id, principal=principal)
        if entry.type is not MemoryType.SHORT_TERM or entry.scope.session_id != scope.session_id:
            raise InputError(f"pin() takes the id of a turn of this session, and {brief(id)} is none")
        entries = parts.window(scope).entries
        if entry.position is None:
            kinds = [MemoryType.SHORT_TERM]
            entries = list(parts.ledger.select(scope, session_only=True, types=kinds, texts="skip"))
        messages = [e.message for e in entries]
        row = next(row for row, e in enumerate(entries) if e.number == entry.number)
        whole, starts = units(messages), items(messages)
        unit = next(u for u in whole if row in u.rows)
        start = max(s for s in starts if s <= unit.rows[0])
        end = min((s for s in starts if s > start), default=len(messages))
        others = [u for u in whole if u is not unit and start < u.rows[0] < end]
        needed = to or not any(entries[r].pinned for u in others for r in u.rows)
        rows = {*unit.rows, *([start] if needed and messages[start].role == "user" else [])}
        try:
            parts.ledger.pin(scope, [entries[r] for r in sorted(rows)], to=to)
        finally:
            resident.forget_window(scope.session_id or "")


def set_window(parts: Parts, scope: Scope, messages: Messages, *, principal: str | None) -> None:
    """Make *messages* the window.

    Turns that are matched are kept as they are (or get a new version): by id, or else, up to the first message that is new,
    by being equal and in order. The others leave the window and stay in the transcript and in search.
    """
    parts.authorize(principal, "write", scope)
    now = parts.clock()
    wanted = listed(messages)
    resident = parts.resident(scope)
    with resident.lock:
        written, summed = again(resident, lambda: _arranged(parts, scope, wanted, now=now))
        try:
            resident.forget_window(scope.session_id or "")
            if summed and any(r.entry.version > 1 for r in written):
                resident.forget()  # a summary of what was changed is gone
            session = parts.ledger.session_number(scope)
            assert session is not None
            take(parts, scope, written, session=session)
            window = parts.window(scope)
        except BaseException:
            resident.forget()
            raise
        work = to_compact(parts, window)
    if any(r.entry.version > 1 for r in written):
        forget(parts, scope)
    parts.changed()
    if work:
        parts.full(scope)


def _arranged(parts: Parts, scope: Scope, wanted: Sequence[Message], *, now: datetime) -> tuple[list[Record], bool]:
    """Set the window in the ledger; what was written, and whether summaries may have gone with it."""
    window = parts.window(scope)
    kept = matched(parts, scope, wanted, list(window.entries), now=now)
    return parts.ledger.set_window(scope, kept, now=microseconds(now)), window.summed


def matched(
    parts: Parts, scope: Scope, wanted: Sequence[Message], current: Sequence[Entry], *, now: datetime
) -> list[Entry | Record]:
    """*wanted* as a window: what is there of it as it is, or as a new version; records of what is new."""
    ids = [m.id for m in wanted if m.id is not None]
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise InputError(f"the id {twice!r} stands for two messages; give each its own")
    by_key = parts.ledger.by_keys(scope, [parts.ledger.key(scope, id=i) for i in ids])
    by_id = {e.id: e for e in by_key.values()}
    kept: list[Entry | Record] = []
    left = (e for e in current if e.id not in by_id)
    for message in wanted:
        record = turn(parts, scope, message, now=now)
        if message.id is not None:
            before = by_id.get(message.id)
        else:  # the first that is new leaves none of `left`
            before = next((e for e in left if same_content(e, record.entry)), None)
        if before is None:
            kept.append(record)
        elif same_content(before, record.entry):
            kept.append(before)
        else:
            changed = replace(
                record.entry,
                number=before.number,
                seq=before.seq,
                pinned=before.pinned,
                version=before.version,
                created_at=before.created_at,
                written_at=before.written_at,
            )
            kept.append(replace(record, entry=changed))
    return kept


__all__ = [
    "MERGED",
    "clear",
    "count",
    "delete",
    "get",
    "listing",
    "matched",
    "pin",
    "read",
    "rewrite",
    "select",
    "set_window",
    "transcript",
    "update",
]
