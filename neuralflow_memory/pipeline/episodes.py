"""Episodes: what was said in an hour, on a day, or in a whole session, as one entry that names its turns.

An episode is derived, as a segment of the summary is: when one of its turns is changed or deleted it goes with it, and is made
anew the next time. What has not changed is not written again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from ..errors import ConflictError, InputError, NotFound, brief
from ..rules.analysis import recorded, worth
from ..types import Entry, MemoryType, Scope
from .compact import OWN_METADATA, derived, in_pieces, summary_limit
from .parts import Parts
from .summarize import plain, summarizer_ready, written

By = Literal["hour", "day", "session"]
KIND = "episode"
_LENGTHS = {"hour": timedelta(hours=1), "day": timedelta(days=1)}
_TRIES = 3  # one whose turns were changed meanwhile starts again


def episodes(parts: Parts, scope: Scope, *, by: By, principal: str | None) -> list[Entry]:
    """The session's episodes of one length, in order, after writing those that are missing or have changed."""
    parts.authorize(principal, "write", scope)
    if by not in (*_LENGTHS, "session"):
        raise InputError(f"by is 'hour', 'day' or 'session', not {brief(by)}")
    lock = parts.folding(scope)
    with lock, parts.exclusive(f"fold-{parts.ledger.session_number(scope) or 0}"):
        for left in reversed(range(_TRIES)):
            try:
                return _brought_up_to_date(parts, scope, by)
            except (ConflictError, NotFound):
                if not left:
                    raise
    raise AssertionError


def _brought_up_to_date(parts: Parts, scope: Scope, by: By) -> list[Entry]:
    stored = {
        e.metadata.get("from"): e
        for e in parts.ledger.select(scope, session_only=True, types=[MemoryType.EPISODIC], texts="skip")
        if e.seq < 0 and e.metadata.get("kind") == KIND and e.metadata.get("window") == by
    }
    windows: dict[datetime, list[Entry]] = defaultdict(list)
    # Without their texts: those of cold turns are read only where an episode is to be written.
    for entry in parts.ledger.select(scope, session_only=True, types=[MemoryType.SHORT_TERM], texts="bare"):
        windows[_start(entry.created_at, by)].append(entry)
    found: list[Entry] = []
    for start, turns in sorted(windows.items()):
        first = start if by != "session" else min(e.created_at for e in turns)
        old = stored.get(first.isoformat()) if by != "session" else next(iter(stored.values()), None)
        current = old is not None and old.sources == tuple(e.id for e in turns)
        if old is None or not current or (plain(old) and summarizer_ready(parts)):
            if parts.closing:
                break
            until = first + _LENGTHS[by] if by in _LENGTHS else max(e.created_at for e in turns)
            old = _written(
                parts, scope, turns, old, {"window": by, "from": first.isoformat(), "until": until.isoformat()}
            )
        found.append(old)
    return found


def _start(when: datetime, by: By) -> datetime:
    """When the window begins that a time is in, in UTC; all of a session is in one."""
    if by == "session":
        return datetime.min.replace(tzinfo=UTC)
    return when.replace(hour=when.hour if by == "hour" else 0, minute=0, second=0, microsecond=0)


def _written(parts: Parts, scope: Scope, turns: Sequence[Entry], old: Entry | None, about: Mapping[str, Any]) -> Entry:
    """The episode of *turns*, written down: new, or the next version of *old*."""
    text, rough = "", False
    stored = parts.ledger.by_numbers(scope, [e.number for e in turns])
    turns = [stored[e.number] for e in turns if e.number in stored]
    by = parts.summarizer.name
    session = parts.ledger.session_number(scope) or 0
    for piece in in_pieces(turns, size=parts.settings.context.max_context_length):
        found = written(parts, [e.message for e in piece], previous=text, limit=summary_limit(parts), session=session)
        text, rough, by = found.text, rough or found.plain, found.by
    metadata = {"kind": KIND, **about, "covered": len(turns), "by": by, "plain": rough}
    people = list(dict.fromkeys(e.name for e in turns if e.name))
    if people:
        metadata["participants"] = people
    made = derived(parts, scope, text, turns, metadata=metadata)
    if old is not None:
        kept = {k: v for k, v in old.metadata.items() if k not in OWN_METADATA | {"participants"}}
        made = replace(
            old,
            content=made.content,
            metadata={**kept, **metadata},
            trust=made.trust,
            sources=made.sources,
            tokens=made.tokens,
            created_at=made.created_at,
            updated_at=made.updated_at,
        )
    record = recorded(replace(made, importance=worth(made.content)))
    resident = parts.resident(scope)
    with resident.lock:
        new: dict[str, Any] = {"changed": [record]} if old is not None else {"added": [record]}
        try:
            [(record, number)] = parts.ledger.revise(scope, read=turns, knowledge=False, **new)
            parts.window(scope).summed = True
            resident.put([record.feature(session=number)])
        except BaseException:
            resident.forget()
            raise
    parts.changed()
    return record.entry


__all__ = ["By", "episodes"]
