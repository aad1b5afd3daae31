"""From folded turns to knowledge: a model looks them through, and what it finds is remembered with the turns that say it.

What was looked through, and what was found, perhaps nothing, is one transaction. A failure is counted and tried again. What was
changed or deleted while the model was reading is not brought back, nor is knowledge that somebody has deleted, changed or
superseded since its turns were said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from .._ids import new_id
from ..errors import ArchiveError, ConfigError, ConflictError, ExtractionError, NotFound, SummarizerError, brief
from ..rules.analysis import recorded, worth
from ..types import Entry, Extraction, Finding, MemoryType, Scope, microseconds
from .ingest import Told, checked, remembered
from .parts import Parts
from .resident import again
from .summarize import answered, may_ask
from .supersede import superseding, unchanged

MOST_ATTEMPTS = 5
"""Failures after which a segment is left alone, until somebody asks for it."""
_TRIES = 3  # of a segment one of whose turns was changed meanwhile


def extract(
    parts: Parts, scope: Scope, *, principal: str | None = None, attempts: int | None = MOST_ATTEMPTS
) -> list[Entry]:
    """Look through the session's folded turns that were not looked through yet; the knowledge that was written.

    Where that is allowed, what it supersedes is asked for as well. If only that fails, the knowledge is written all the same.

    Raises:
        ConfigError: There is no extractor.
        ExtractionError: It failed for some of them; what it found in others is kept.
    """
    parts.authorize(principal, "write", scope)
    if parts.extractor is None:
        raise ConfigError(
            "there is no extractor: open the memory with extractor=..., e.g. a model of yours or 'gemini'"
        )
    scope = replace(scope, agent_id=None)
    found: list[Entry] = []
    failure: Exception | None = None
    unsaid: list[Exception] = []
    lock = parts.folding(scope)
    with lock, parts.exclusive(f"fold-{parts.ledger.session_number(scope) or 0}"):
        for segment in parts.ledger.unextracted(scope, attempts=attempts):
            if parts.closing or not may_ask(parts, parts.extractor.name, parts.extracting):
                break
            try:
                found += _extracted(parts, scope, segment, unsaid)
            except (ArchiveError, ConflictError, NotFound):
                continue  # its turns are being changed, or can't be read; those of a segment that is left come again
            except Exception as error:  # whatever a model or its client raises
                failure = error
                parts.tally["extractor_failures"] += 1
                parts.trouble = f"extracting: {type(error).__name__}: {error}"
                parts.extracting.failed(parts.clock().timestamp())
                parts.ledger.extraction_failed(segment)
    failure = failure or next(iter(unsaid), None)
    if failure is not None:
        raise (
            failure
            if isinstance(failure, ExtractionError)
            else ExtractionError(f"{parts.extractor.name} failed: {type(failure).__name__}: {failure}")
        ) from failure
    return found


def _extracted(parts: Parts, scope: Scope, segment: Entry, unsaid: list[Exception]) -> list[Entry]:
    """What the turns of one segment say; `ConflictError` or `NotFound` where they are changed again and again.

    *unsaid* takes why what it supersedes was not found.
    """
    assert parts.extractor is not None
    extractor = parts.extractor
    session = parts.ledger.session_number(scope) or 0
    for left in reversed(range(_TRIES)):
        ids = segment.sources[-segment.metadata.get("covered", 1) :]
        stored = parts.ledger.by_keys(scope, [parts.ledger.key(scope, id=i) for i in ids])
        turns = sorted(stored.values(), key=lambda e: e.seq)
        parts.tally["extractor_calls"] += 1
        try:
            asked = partial(extractor.extract, [e.message for e in turns])
            given = answered(parts, asked, name=extractor.name, session=session)
        except SummarizerError as error:
            raise ExtractionError(str(error)) from error
        if not isinstance(given, Extraction):
            raise ExtractionError(f"{extractor.name} must return an Extraction, not {brief(given)}")
        found = list(_facts(parts, scope, given.facts, turns))
        parts.extracting.succeeded()
        found, read, trouble = superseding(parts, scope, found, session=session)
        if trouble is not None:
            unsaid.append(trouble)
        try:
            return _kept(parts, scope, segment, turns, found, read=read)
        except (ConflictError, NotFound):
            if not left:
                raise
    raise AssertionError


def _kept(
    parts: Parts,
    scope: Scope,
    segment: Entry,
    turns: Sequence[Entry],
    found: Sequence[tuple[Told, list[int]]],
    *,
    read: Sequence[Entry],
) -> list[Entry]:
    resident = parts.resident(scope)
    with resident.lock:
        _, written = again(
            resident,
            lambda: remembered(
                parts,
                scope,
                unchanged(parts, scope, [t for t, _ in found], read),
                read=turns,
                extracted=segment,
                turns=[rows for _, rows in found],
            ),
        )
        try:
            resident.put(record.feature(session=session) for record, session in written)
        except BaseException:
            resident.forget()
            raise
    known = [record.entry for record, _ in written if record.entry.superseded_by is None]
    if written:
        parts.tally["extracted"] += len(known)
        parts.tally["superseded"] += len(written) - len(known)
        parts.changed()
    return known


def _facts(
    parts: Parts, scope: Scope, facts: Sequence[Finding], turns: Sequence[Entry]
) -> Iterator[tuple[Told, list[int]]]:
    """Facts as knowledge, each with the numbers of its turns; without those that are not to come back."""
    by_id = {e.id: e for e in turns}
    texts = [_encodable(fact.text) for fact in facts]
    known = parts.ledger.known(scope, texts)
    ids = {text: f"fact-{parts.ledger.key(scope, id=f'fact {text}', knowledge=True)[:24]}" for text in texts}
    buried = parts.ledger.buried(scope, list(ids.values()))
    keys = [parts.ledger.key(scope, id=i, knowledge=True) for i in ids.values()]
    there = {e.id: e for e in parts.ledger.by_keys(scope, keys, texts="bare").values()}
    now = parts.clock()
    for fact, text in zip(facts, texts, strict=True):
        sources = [by_id[i] for i in fact.sources or by_id if i in by_id]
        if not sources or not text.strip():
            continue
        own_id, said = ids[text], max(e.written_at for e in sources)
        if text not in known and (own_id in buried or own_id in there):
            gone = buried.get(own_id, -1)
            if microseconds(said) <= (microseconds(there[own_id].updated_at) if own_id in there else gone):
                continue  # since it was said, somebody has deleted, changed or superseded it
            own_id = new_id()
        entry = Entry(
            id=own_id,
            key=parts.ledger.key(scope, id=own_id, knowledge=True),
            type=MemoryType.LONG_TERM,
            content=text,
            scope=scope,
            seq=0,
            created_at=max(e.created_at for e in sources),
            written_at=now,
            updated_at=now,
            source=scope.session_id,
            provenance="derived",
            trust=min(e.trust for e in sources),
            sources=tuple(e.id for e in sources),
            tokens=parts.counter.count(text),
            importance=worth(text),
            **checked({"category": None if fact.category is None else _encodable(fact.category)}),
        )
        yield Told(recorded(entry)), [e.number for e in sources]


def _encodable(text: str) -> str:
    """*text* without halves of surrogate pairs, which can't be stored."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


__all__ = ["MOST_ATTEMPTS", "extract"]
