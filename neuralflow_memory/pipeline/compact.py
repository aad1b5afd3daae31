"""`compact`: fold the oldest whole items of a window into the session's summary.

Nothing leaves the window before its summary is stored, and both happen in one transaction; the folded turns stay in the
transcript and in search. The summarizer runs under no lock, and what it wrote counts only if nothing it read has changed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from uuid import uuid4

from .._failpoints import failpoint
from ..errors import InputError
from ..protocols import StoredWindow
from ..rules.budget import items, opening, units
from ..types import CompactionReport, Entry, MemoryType, Message, Scope
from .ingest import over_limits
from .parts import Parts, recorded

PATIENCE = 120.0  # seconds for one answer of the summarizer; then the floor writes the summary
_TRIES = 3  # a fold that was overtaken by a change starts again
_SUMMARY_SHARE = 0.75  # of budget.summary; the rest is for what is pinned beside it


def compact(
    parts: Parts, scope: Scope, *, principal: str | None = None, max_tokens: int | None = None
) -> CompactionReport:
    """Fold if the window is over its limits, or over *max_tokens*; says what was done, which may be nothing."""
    parts.authorize(principal, "write", scope)
    if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 0):
        raise InputError(f"max_tokens is a number of tokens or None, not {max_tokens!r:.80}")
    report = CompactionReport(False, 0, 0)
    for _ in range(_TRIES):
        before = _snapshot(parts, scope)
        tokens = sum(e.tokens for e in before.entries)
        covered = _covered(before.summary)
        messages = [e.message for e in before.entries]
        turns = tokens - sum(e.tokens for e in before.entries[: opening(messages)])
        needed = over_limits(parts, len(items(messages)), turns) or (max_tokens is not None and tokens > max_tokens)
        report = CompactionReport(needed, tokens, tokens, (), covered)
        rows = _foldable(parts, before.entries, messages, max_tokens=max_tokens) if needed else []
        if not rows:
            return report
        folded = [before.entries[row] for row in rows]
        summary = _summary(parts, scope, folded, before.summary)
        failpoint("fold.summarized")
        if _commit(parts, scope, before, folded, summary):
            after = tokens - sum(e.tokens for e in folded)
            return CompactionReport(True, tokens, after, tuple(e.id for e in folded), covered + len(folded))
    return report


def summary(parts: Parts, scope: Scope, *, principal: str | None) -> str:
    """The session's running summary, empty while nothing was folded."""
    parts.authorize(principal, "read", scope)
    resident = parts.resident(scope)
    with resident.lock:
        found = parts.window(scope).summary
    return found.content if found else ""


def _snapshot(parts: Parts, scope: Scope) -> StoredWindow:
    resident = parts.resident(scope)
    with resident.lock:
        w = parts.window(scope)
        return StoredWindow(list(w.entries), w.summary, w.session, w.erase_epoch)


def _foldable(
    parts: Parts, entries: Sequence[Entry], messages: Sequence[Message], *, max_tokens: int | None
) -> list[int]:
    """Rows of the oldest items that leave: what remains fits both limits, and is never less than the newest item."""
    pruning = parts.settings.pruning
    most = pruning.max_context_tokens // 2 if max_tokens is None else max_tokens
    starts = items(messages)
    boundary, held = starts[-1], 0
    ends = [len(entries), *reversed(starts[1:])]
    for kept, (start, end) in enumerate(zip(reversed(starts), ends, strict=True), start=1):
        held += sum(e.tokens for e in entries[max(start, opening(messages)) : end])
        if kept > 1 and (kept > pruning.max_context_items or held > most):
            break
        boundary = start
    # A tool call and its results leave together or stay together.
    for unit in reversed(units(messages)):
        if unit.rows[0] < boundary <= unit.rows[-1]:
            boundary = max(s for s in starts if s <= unit.rows[0])
    return list(range(opening(messages), boundary))  # the host's own instructions are no turns to be folded


def _summary(parts: Parts, scope: Scope, folded: Sequence[Entry], before: Entry | None) -> Entry:
    settings = parts.settings
    limit = min(settings.pruning.summary_max_tokens, int(settings.budget.summary * _SUMMARY_SHARE))
    text = before.content if before else ""
    for segment in _segments(
        folded, size=settings.context.max_context_length, overlap=settings.context.context_overlap
    ):
        text = _summarized(parts, [e.message for e in segment], text, limit)
    now = parts.clock()
    own_id = f"summary-{uuid4().hex}"
    return Entry(
        id=own_id,
        key=parts.ledger.key(scope, id=own_id),
        type=MemoryType.EPISODIC,
        content=text,
        scope=scope,
        seq=0,
        created_at=folded[-1].created_at,
        written_at=now,
        updated_at=now,
        metadata={"kind": "summary", "covered": _covered(before) + len(folded)},
        provenance="derived",
        trust=min([e.trust for e in folded] + ([before.trust] if before else [])),
        sources=(*([before.id] if before else []), *(e.id for e in folded)),
        tokens=parts.counter.count(text),
    )


def _segments(folded: Sequence[Entry], *, size: int, overlap: int) -> Iterator[list[Entry]]:
    """Cut turns into segments of at most *size* tokens (a longer turn is one alone), the last *overlap* repeated."""
    segment: list[Entry] = []
    fresh = 0  # turns of the segment that no earlier segment held
    for entry in folded:
        if segment and fresh and sum(e.tokens for e in segment) + entry.tokens > size:
            yield segment
            shared: list[Entry] = []
            for earlier in reversed(segment):
                if sum(e.tokens for e in shared) + earlier.tokens > min(overlap, size - entry.tokens):
                    break
                shared.insert(0, earlier)
            segment, fresh = shared, 0
        segment.append(entry)
        fresh += 1
    yield segment


def _summarized(parts: Parts, messages: Sequence[Message], previous: str, limit: int) -> str:
    """*previous* with *messages* worked in; by the floor when the summarizer fails or exceeds *limit*."""
    try:
        parts.tally["summarizer_calls"] += 1
        text = _answer(parts, messages, previous, limit)
        if isinstance(text, str) and text.strip() and parts.counter.count(text) <= limit:
            return text
        parts.trouble = f"{parts.summarizer.name}: an empty summary, or one over {limit} tokens"
    except Exception as error:  # whatever a model or its client raises: the turns get a plainer summary
        parts.trouble = f"{parts.summarizer.name}: {type(error).__name__}: {error}"
    if parts.summarizer is not parts.floor:
        parts.tally["summarizer_fallbacks"] += 1
    return parts.floor.summarize(messages, previous=previous, max_tokens=limit)


def _answer(parts: Parts, messages: Sequence[Message], previous: str, limit: int) -> str:
    """What the summarizer writes; `TimeoutError` when it takes longer than `PATIENCE`, and it is left to itself."""
    if parts.summarizer is parts.floor:
        return parts.floor.summarize(messages, previous=previous, max_tokens=limit)
    answer: Future[str] = Future()

    def ask() -> None:
        try:
            answer.set_result(parts.summarizer.summarize(messages, previous=previous, max_tokens=limit))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="neuralflow-summarizer", daemon=True).start()
    return answer.result(PATIENCE)


def _commit(parts: Parts, scope: Scope, before: StoredWindow, folded: Sequence[Entry], summary: Entry) -> bool:
    resident = parts.resident(scope)
    with resident.lock:
        assert scope.session_id is not None
        try:
            record = parts.ledger.fold(scope, folded=folded, before=before, summary=recorded(summary))
        except BaseException:
            resident.forget()
            raise
        if record is None:
            resident.forget_window(scope.session_id)
            return False
        gone = {e.number for e in folded}
        window = parts.window(scope)
        window.take(e for e in list(window.entries) if e.number not in gone)
        window.summary = record.entry
        if resident.index is not None:
            resident.index.put(record.feature(session=window.session))
    parts.tally["folds"] += 1
    parts.changed()
    return True


def _covered(summary: Entry | None) -> int:
    return int(summary.metadata.get("covered", 0)) if summary else 0


__all__ = ["compact", "summary"]
