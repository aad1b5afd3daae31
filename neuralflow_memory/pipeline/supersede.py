"""Which known facts those that an extractor has found take the place of: a model is asked, where it is allowed to say.

It is given nothing but facts of the owner's that are near a new one, were said before it, and that it may end. An answer that names
anything else is not believed at all; and both facts are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ..errors import ExtractionError, SummarizerError, brief
from ..types import Entry, MemoryType, Scope, Superseding
from .consolidate import by_likeness, knowledge
from .ingest import Told
from .parts import Parts
from .summarize import answered, may_ask

_NEAREST = 5  # known facts that a new one is compared with
_LEAST = 0.2  # how alike they are, at least
_MOST = 40  # known facts in a call


def superseding(
    parts: Parts, scope: Scope, found: Sequence[tuple[Told, list[int]]], *, session: int
) -> tuple[list[tuple[Told, list[int]]], list[Entry], Exception | None]:
    """*found* with what each supersedes; what the model has read of that; and why it could not be asked, if that failed.

    Then, and where it may not be asked, *found* is as it was.
    """
    same, extractor = list(found), parts.extractor
    if parts.settings.knowledge.supersede == "nothing" or extractor is None or not found:
        return same, [], None
    new, known, near = _compared(parts, scope, found)
    if not known or parts.closing or not may_ask(parts, extractor.name, parts.extracting):
        return same, [], None
    parts.tally["extractor_calls"] += 1
    try:
        asked = partial(extractor.supersede, new, known)  # type: ignore[attr-defined]  # settings.py has looked
        given = answered(parts, asked, name=extractor.name, session=session)
        if not isinstance(given, Superseding):
            raise ExtractionError(f"{extractor.name} must return a Superseding, not {brief(given)}")
        by: dict[str, tuple[str, ...]] = {}
        for row, other in given.pairs:
            if not 0 <= row < len(new) or not 0 <= other < len(known):
                raise ExtractionError(f"{extractor.name} names facts that it was not given: {brief(given.pairs)}")
            if known[other].id in near[new[row].id]:
                by[new[row].id] = (*by.get(new[row].id, ()), known[other].id)
        if len({i for ids in by.values() for i in ids}) != sum(map(len, by.values())):
            raise ExtractionError(f"{extractor.name} says that several facts replace one: {brief(given.pairs)}")
    except Exception as error:  # whatever a model or its client raises
        parts.tally["extractor_failures"] += 1
        parts.trouble = f"superseding: {type(error).__name__}: {error}"
        parts.extracting.failed(parts.clock().timestamp())
        return same, [], ExtractionError(str(error)) if isinstance(error, SummarizerError) else error
    parts.extracting.succeeded()
    read = [e for e in known if any(e.id in ids for ids in by.values())]
    return [(replace(t, supersedes=by.get(t.record.entry.id, ())), rows) for t, rows in same], read, None


def unchanged(parts: Parts, scope: Scope, told: Sequence[Told], read: Sequence[Entry]) -> list[Told]:
    """*told*, without what it was to supersede of *read* and somebody has changed meanwhile."""
    if not read:
        return list(told)
    now = parts.ledger.by_numbers(scope, [e.number for e in read])
    same = {e.id for e in read if e.number in now and now[e.number].version == e.version}
    return [replace(t, supersedes=tuple(i for i in t.supersedes if i in same)) for t in told]


def _compared(
    parts: Parts, scope: Scope, found: Sequence[tuple[Told, list[int]]]
) -> tuple[list[Entry], list[Entry], dict[str, set[str]]]:
    """New facts that are near known ones, those, and by the id of a new one the ids of what it may take the place of."""
    facts = {t.record.entry.content: t.record.entry for t, _ in found}
    said = parts.ledger.known(scope, list(facts))
    others = [e for e in knowledge(parts, scope) if e.scope.agent_id == scope.agent_id and _may_end(parts, scope, e)]
    new: list[Entry] = []
    known: dict[str, Entry] = {}
    near: dict[str, set[str]] = {}
    for fact in facts.values():
        before = [e for e in others if (e.valid_from or e.created_at) <= fact.created_at and e.content not in facts]
        if fact.content in said or not before or len(known) >= _MOST:
            continue
        hits = [h.entry for h in by_likeness(parts, scope, fact.content, before)[:_NEAREST] if h.score >= _LEAST]
        if hits:
            new.append(fact)
            known |= {e.id: e for e in hits}
            near[fact.id] = {e.id for e in hits}
    return new, list(known.values()), near


def _may_end(parts: Parts, scope: Scope, entry: Entry) -> bool:
    """Whether a model may say that *entry* does not hold any more: unless somebody has said that it does, or until when."""
    if entry.type is not MemoryType.LONG_TERM or entry.valid_to is not None:
        return False
    if entry.provenance != "derived" and parts.settings.knowledge.supersede != "any":
        return False
    if entry.version == 1:
        return True
    before = parts.ledger.history(scope, entry.number)[:-1]
    restored = any(e.superseded_by is not None for e in before)
    edited = entry.provenance == "derived" and any(e.content != entry.content for e in before)
    return not restored and (not edited or parts.settings.knowledge.supersede == "any")


__all__ = ["superseding", "unchanged"]
