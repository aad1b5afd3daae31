"""`compact`: fold the oldest whole items of a window into the session's summary.

Each fold makes a *segment*, a summary of what it folds, and a new *summary* of all segments; both are entries. Nothing
leaves the window before they are stored, and all happens in one transaction; the folded turns stay in the transcript and
in search. The summarizer runs under no lock but the fold's own, and what it wrote counts only if nothing it read has
changed. What the floor had to write is written again once the model is back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from .._failpoints import failpoint
from .._ids import new_id
from ..errors import InputError, brief
from ..protocols import StoredWindow
from ..rules import coverage
from ..rules.analysis import recorded
from ..rules.budget import items, opening, pauses, units
from ..rules.coverage import Fact
from ..rules.lexical import term_ids
from ..types import CompactionReport, Entry, MemoryType, Message, Scope
from .ingest import over_limits
from .parts import Parts
from .search import index_of
from .summarize import Written, plain, summarizer_ready, written

_TRIES = 3  # a fold that was overtaken by a change starts again
_SUMMARY_SHARE = 0.75  # of budget.summary; the rest is for what is pinned beside it
_WRAPPER = 32  # tokens of the headings around summary and pins
_REWRITE_EVERY = 5  # segments that a model works into the summary at once; until then their lines are picked
OWN_METADATA = frozenset(
    {"kind", "covered", "first", "last", "by", "plain", "tries", "fresh", "pins", "facts", "window", "from", "until"}
)
"""What folds read of segments and summaries, and what finds episodes again; it stays, whatever a host writes into their metadata."""
_PINS_HEADING = "Word for word:"
_FATES = ("kept", "pinned", "reachable", "lost")
_ENOUGH = 10  # hits among which a turn counts as reachable


def compact(
    parts: Parts, scope: Scope, *, principal: str | None = None, max_tokens: int | None = None
) -> CompactionReport:
    """Fold if the window is over its limits, or over *max_tokens*; says what was done, which may be nothing."""
    parts.authorize(principal, "write", scope)
    if max_tokens is not None and (not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 0):
        raise InputError(f"max_tokens is a number of tokens or None, not {brief(max_tokens)}")
    lock = parts.folding(scope)
    with lock, parts.exclusive(f"fold-{parts.ledger.session_number(scope) or 0}"):
        report = _fold(parts, scope, max_tokens=max_tokens)
        if parts.breaker.healthy or not report.folded:  # what has just failed is not asked again at once
            _write_again(parts, scope)
    return report


def summary(parts: Parts, scope: Scope, *, principal: str | None) -> str:
    """The session's running summary with what is pinned beside it, empty while nothing was folded."""
    parts.authorize(principal, "read", scope)
    resident = parts.resident(scope)
    with resident.lock:
        found = parts.window(scope).summary
    return shown(found) if found else ""


def shown(summary: Entry) -> str:
    """A summary as it stands in a prompt, with its pins."""
    pins = summary.metadata.get("pins")
    return "\n".join((summary.content, _PINS_HEADING, *pins)) if pins else summary.content


def _fold(parts: Parts, scope: Scope, *, max_tokens: int | None) -> CompactionReport:
    """Fold what is to be folded, some pieces at a time, so that little is done in vain when the process ends."""
    report: CompactionReport | None = None
    going, tries = False, 0
    while True:
        before, over, due, limit = _snapshot(parts, scope)
        most = limit if max_tokens is None else max_tokens
        try:
            step, outcome = _folded_once(parts, scope, before, over=over, going=going, max_tokens=most)
        except BaseException:
            if due or going:
                resident = parts.resident(scope)
                with resident.lock:
                    parts.window(scope).due = True
            raise
        if outcome == "overtaken":
            tries += 1
        else:
            report = step if report is None else _both(report, step)
            going, tries = outcome == "going on", 0
        if outcome == "done" or parts.closing or tries == _TRIES:
            return report or step


def _both(first: CompactionReport, then: CompactionReport) -> CompactionReport:
    """Two reports as one."""
    facts = {name: getattr(first, name) + getattr(then, name) for name in _FATES}
    return replace(then, needed=True, before=first.before, folded=first.folded + then.folded, **facts)


def _folded_once(
    parts: Parts, scope: Scope, before: StoredWindow, *, over: bool, going: bool, max_tokens: int | None
) -> tuple[CompactionReport, Literal["done", "going on", "overtaken"]]:
    """What was done, and whether more is to be done; or whether a change of what it read made it void."""
    tokens = sum(e.tokens for e in before.entries)
    needed = over or going or (max_tokens is not None and tokens > max_tokens)
    report = CompactionReport(needed, tokens, tokens, (), _covered(before.summary))
    rows = _foldable(parts, before.entries, going=going, max_tokens=max_tokens) if needed else []
    if not rows and not before.unsummed:
        return report, "done"
    folded = [before.entries[row] for row in rows]
    whole = len(folded)
    folded = folded[: _some(folded, size=_piece_size(parts))]
    earlier = (
        parts.ledger.segments(scope) if before.unsummed else []
    )  # before the model is asked, so that a deletion meanwhile is noticed
    shared = _last_covered(parts, scope, before=folded[0]) if folded else []
    segments = list(_segments(parts, scope, folded, before=shared, session=before.session))
    if not folded and not earlier:  # the last ones have gone meanwhile
        return report, "done"
    made, said = _summary(parts, scope, before, segments, earlier=earlier, folded=folded)
    segments = [_with_pins(s, made, said) for s in segments]
    failpoint("fold.summarized")
    if not _commit(parts, scope, before, folded=folded, segments=segments, summary=made, read=[*earlier, *shared]):
        return report, "overtaken"
    parts.tally["folds"] += bool(folded)
    parts.tally.update({f"facts_{name}": n for name, n in made.metadata["facts"].items()})
    report = replace(
        report,
        after=tokens - sum(e.tokens for e in folded),
        folded=tuple(e.id for e in folded),
        covered=_covered(made),
        by=segments[-1].metadata["by"] if segments else "",
        **made.metadata["facts"],
    )
    return report, "done" if len(folded) == whole else "going on"


def _snapshot(parts: Parts, scope: Scope, *, take_due: bool = True) -> tuple[StoredWindow, bool, bool, int | None]:
    """The window as it is, whether it is over its limits, and whether a fold was due anyway; then it is so no longer.

    At last the tokens that it is to have, if prompts have no room for all of it.
    """
    resident = parts.resident(scope)
    with resident.lock:
        w = parts.window(scope)
        unsummed = w.due and w.summary is None
        stored = StoredWindow(list(w.entries), w.summary, w.session, w.erase_epoch, unsummed=unsummed)
        over, due = over_limits(parts, w), w.due
        stays = sum(e.tokens for e in w.entries) - w.tokens
        limit = stays + w.sent.room // 2 if w.cramped else None
        w.due = due and not take_due
    if unsummed:
        stored = replace(stored, unsummed=bool(parts.ledger.segments(scope, last=1)))
    return stored, over, due, limit


def _foldable(parts: Parts, entries: Sequence[Entry], *, going: bool, max_tokens: int | None) -> list[int]:
    """Rows of the oldest items that leave: what remains fits both limits, and is never less than the newest item.

    Of what was said before the session's last long silence, only `context_overlap` tokens remain. Pinned turns and the
    host's own instructions at the front stay. *going*: it was over its limits when this fold began.
    """
    pruning, context = parts.settings.pruning, parts.settings.context
    front = opening([e.message for e in entries])
    whole = units([e.message for e in entries])  # a result that came after the pin stays with its call, too
    pinned = {row for u in whole if any(entries[r].pinned for r in u.rows) for row in u.rows}
    rows = [row for row in range(front, len(entries)) if row not in pinned]
    free = [entries[row] for row in rows]
    if not free:
        return []
    messages = [e.message for e in free]
    starts = items(messages)
    boundary = 0
    turns, tokens = len(starts), sum(e.tokens for e in free)
    over = going or turns >= pruning.summarization_threshold or tokens > pruning.max_context_tokens
    if over or max_tokens is not None:
        most = pruning.max_context_tokens // 2
        if max_tokens is not None:
            most = min(max_tokens - sum(e.tokens for e in entries) + tokens, most if over else max_tokens)
        boundary = _kept_from(free, starts, most_items=pruning.max_context_items, most_tokens=most)
    for pause in pauses(entries, seconds=context.expiry_time)[-1:]:
        past = sum(row < pause for row in rows)
        # A late answer leaves its question where it is.
        boundary = max(boundary, min(starts[-1], _overlap_from(free[:past], tokens=context.context_overlap)))
    return rows[: _before_calls(messages, starts, boundary)]


def _before_calls(messages: Sequence[Message], starts: Sequence[int], boundary: int) -> int:
    """The last start of an item, at *boundary* or before, that parts no tool call from a result."""
    for unit in reversed(units(messages)):
        if unit.rows[0] < boundary <= unit.rows[-1]:
            boundary = max(s for s in starts if s <= unit.rows[0])
    return boundary


def _some(folded: Sequence[Entry], *, size: int) -> int:
    """How many turns to fold at once: whole items, of so few pieces as a model reworks at a time; all, if they can't be cut."""
    pieces = list(in_pieces(folded, size=size))
    most = sum(map(len, pieces[:_REWRITE_EVERY]))
    messages = [e.message for e in folded]
    starts = items(messages)
    boundary = _before_calls(messages, starts, max((s for s in starts if s <= most), default=0))
    return len(folded) if most == len(folded) else boundary or len(folded)


def _kept_from(entries: Sequence[Entry], starts: Sequence[int], *, most_items: int, most_tokens: int) -> int:
    """Where the newest items begin that fit both limits, at least one."""
    boundary, held = starts[-1], 0
    ends = [len(entries), *reversed(starts[1:])]
    for kept, (start, end) in enumerate(zip(reversed(starts), ends, strict=True), start=1):
        held += sum(e.tokens for e in entries[start:end])
        if kept > 1 and (kept > most_items or held > most_tokens):
            break
        boundary = start
    return boundary


def _overlap_from(entries: Sequence[Entry], *, tokens: int) -> int:
    """Where the newest messages begin that fit *tokens*, at a user turn; the end, if none does."""
    boundary = len(entries)
    for row in reversed(range(len(entries))):
        tokens -= entries[row].tokens
        if tokens < 0:
            break
        if entries[row].role == "user":
            boundary = row
    return boundary


def summary_limit(parts: Parts) -> int:
    """Tokens that a summary may have, without its pins."""
    settings = parts.settings
    return min(settings.pruning.summary_max_tokens, int(settings.budget.summary * _SUMMARY_SHARE))


def _segments(
    parts: Parts, scope: Scope, folded: Sequence[Entry], *, before: Sequence[Entry], session: int
) -> Iterator[Entry]:
    """A segment for each `max_context_length` tokens of *folded*; each reads the end of what came before it, too."""
    context = parts.settings.context
    for piece in in_pieces(folded, size=_piece_size(parts)):
        shared: list[Entry] = []
        room = min(context.context_overlap, context.max_context_length - sum(e.tokens for e in piece))
        for entry in reversed(before):
            room -= entry.tokens
            if room < 0:
                break
            shared.insert(0, entry)
        before = piece
        yield _segment(parts, scope, [*shared, *piece], covered=len(piece), session=session)


def _piece_size(parts: Parts) -> int:
    """Tokens of what one segment covers."""
    context = parts.settings.context
    return context.max_context_length - context.context_overlap


def _last_covered(parts: Parts, scope: Scope, *, before: Entry) -> list[Entry]:
    """The last turns that the segment made last covers, if they come before the entry."""
    for segment in parts.ledger.segments(scope, last=1):
        keys = [parts.ledger.key(scope, id=i) for i in segment.sources[-16:]]
        found = parts.ledger.by_keys(scope, keys, texts="skip")
        return sorted((e for e in found.values() if e.seq < before.seq), key=lambda e: e.seq)
    return []


def in_pieces(folded: Sequence[Entry], *, size: int) -> Iterator[list[Entry]]:
    """Cut turns into pieces of at most *size* tokens; a longer turn is one alone."""
    piece: list[Entry] = []
    for entry in folded:
        if piece and sum(e.tokens for e in piece) + entry.tokens > size:
            yield piece
            piece = []
        piece.append(entry)
    if piece:
        yield piece


def _segment(parts: Parts, scope: Scope, turns: Sequence[Entry], *, covered: int, session: int) -> Entry:
    found = _segment_text(parts, turns, session=session)
    metadata = {"kind": "segment", "covered": covered, "first": turns[-covered].seq, **_maker(found)}
    return derived(parts, scope, found.text, turns, metadata=metadata)


def _segment_text(parts: Parts, turns: Sequence[Entry], *, session: int) -> Written:
    return written(parts, [e.message for e in turns], previous="", limit=summary_limit(parts) // 2, session=session)


def _maker(found: Written) -> dict[str, Any]:
    """Who wrote it, and whether the floor did so in a model's place."""
    return {"by": found.by, "plain": found.plain}


def derived(parts: Parts, scope: Scope, text: str, sources: Sequence[Entry], *, metadata: Mapping[str, Any]) -> Entry:
    """A new entry made from others, as little trusted as the least of them."""
    now = parts.clock()
    own_id = f"{metadata['kind']}-{new_id()[:12]}"
    return Entry(
        id=own_id,
        key=parts.ledger.key(scope, id=own_id),
        type=MemoryType.EPISODIC,
        content=text,
        scope=scope,
        seq=0,
        created_at=max(e.created_at for e in sources),
        written_at=now,
        updated_at=now,
        metadata=metadata,
        provenance="derived",
        trust=min(e.trust for e in sources),
        sources=tuple(e.id for e in sources),
        tokens=parts.counter.count(text),
    )


def _summary(
    parts: Parts,
    scope: Scope,
    before: StoredWindow,
    segments: Sequence[Entry],
    *,
    earlier: Sequence[Entry],
    folded: Sequence[Entry],
) -> tuple[Entry, dict[str, str]]:
    """The session's summary with new *segments* of *folded* worked in, and what it misses of them pinned beside it.

    Their lines are picked as they are, and worked in by the model only when there are several, so that one fold costs
    little more than one call. *earlier*: the segments of before, where there is no summary that speaks for them.
    """
    old = before.summary
    limit = summary_limit(parts)
    new = sorted([*earlier, *segments], key=_first)
    waiting = old.metadata.get("fresh", 0) if old else 0
    fresh = waiting + len(new)
    rough = plain(old) or any(plain(s) for s in new)
    told = [*([old.content] if old else []), *(s.content for s in new)]
    text = "\n".join(dict.fromkeys(line for part in told for line in part.splitlines()))
    if fresh >= _REWRITE_EVERY and not rough and summarizer_ready(parts):
        unread = parts.ledger.segments(scope, last=waiting) if waiting else []
        found = _rewritten(parts, old, [*unread, *new], session=before.session)
        rough = found.plain
        if not rough:
            text, fresh = found.text, 0
    if parts.counter.count(text) > limit:
        text = parts.floor.summarize([], previous=text, max_tokens=limit)
    tries = old.metadata.get("tries", 0) if old and rough else 0
    return _version(parts, scope, old, text, new=new, fresh=fresh, rough=rough, folded=folded, tries=tries)


def _rewritten(parts: Parts, old: Entry | None, segments: Sequence[Entry], *, session: int) -> Written:
    """A summary of summaries: what the summary said so far, with *segments* worked in."""
    found = Written(old.content if old else "", parts.summarizer.name, plain=False)
    for piece in in_pieces([s for s in segments if s.content], size=parts.settings.context.max_context_length):
        messages = [e.message for e in piece]
        found = written(parts, messages, previous=found.text, limit=summary_limit(parts), session=session)
        if found.plain:
            break
    return found


def _version(
    parts: Parts,
    scope: Scope,
    old: Entry | None,
    text: str,
    *,
    new: Sequence[Entry],
    fresh: int,
    rough: bool,
    folded: Sequence[Entry],
    tries: int,
) -> tuple[Entry, dict[str, str]]:
    """The summary that says *text*: the next version of *old*, or a new one; and which turn said a pinned line.

    *tries*: how often the model has refused to write it, since it last did.
    """
    before = [old] if old else new  # where there is no summary, segments know what was pinned of their turns
    earlier = [line for entry in before for line in entry.metadata.get("pins", ())]
    pins, fate, said = _checked(parts, scope, text, folded, earlier=earlier)
    last = max((e.seq for e in folded), default=0)
    known = old.metadata.get("last", last) if old else last
    covered = _covered(old) + len(folded) if new else _covered(old)
    if old is None or (new and folded[0].seq <= known):  # some of it may have been covered before
        ids = {i for s in (*parts.ledger.segments(scope), *new) for i in s.sources}
        covered = len(ids)
    metadata = {"kind": "summary", "covered": covered, "last": max(known, last), "fresh": fresh, "plain": rough}
    metadata |= {"pins": pins, "facts": fate} | ({"tries": tries} if tries else {})
    made = derived(parts, scope, text, [*([old] if old else []), *new], metadata=metadata)
    sources = (*(old.sources if old else ()), *(s.id for s in new))
    if old is None:
        return replace(made, sources=sources), said
    same = replace(made, id=old.id, key=old.key, number=old.number, seq=old.seq, version=old.version)
    return replace(same, sources=sources), said


def _with_pins(segment: Entry, summary: Entry, said: Mapping[str, str]) -> Entry:
    """*segment*, knowing what is pinned of its own turns, so that it is pinned again if the summary has to go."""
    own = set(segment.sources)
    pins = [line for line in summary.metadata["pins"] if said.get(line) in own]
    return replace(segment, metadata={**segment.metadata, "pins": pins}) if pins else segment


def _first(segment: Entry) -> int:
    """The seq of the first turn that a segment covers."""
    return int(segment.metadata.get("first", segment.number))


def _checked(
    parts: Parts, scope: Scope, text: str, folded: Sequence[Entry], *, earlier: Sequence[str]
) -> tuple[list[str], dict[str, int], dict[str, str]]:
    """What is pinned beside *text*; what became of the facts of *folded*, how many in each way; who said which line."""
    room = parts.settings.budget.summary - summary_limit(parts) - _WRAPPER
    facts = coverage.facts([e.message for e in folded])
    checked = coverage.check(facts, text)
    pins = coverage.pins(checked.missing, earlier, text, count=parts.counter.count, max_tokens=max(0, room))
    beside = coverage.check(checked.missing, "\n".join(pins))
    found = _reachable(parts, scope, beside.missing, folded)
    counts = (len(checked.kept), len(beside.kept), found, len(beside.missing) - found)
    said = {fact.line: folded[fact.row].id for fact in checked.missing}
    return pins, dict(zip(_FATES, counts, strict=True)), said


def _reachable(parts: Parts, scope: Scope, facts: Sequence[Fact], folded: Sequence[Entry]) -> int:
    """How many of *facts* a search by the other words of their sentence brings back, their turn among ten.

    Only words are tried, since embedding each sentence would cost more than the fold; by meaning, more would be found.
    """
    reached = 0
    resident = parts.resident(scope)
    for fact in facts:
        with resident.lock:  # each by itself, so that nobody waits for all
            index = index_of(parts, resident)
            scores = index.postings.bm25(term_ids(" ".join(sorted(fact.words))), alive=index.alive & (index.seq > 0))
            row = index.row(folded[fact.row].number)
            reached += bool(row >= 0 and scores[row] > 0 and (scores > scores[row]).sum() < _ENOUGH)
    return reached


def _commit(
    parts: Parts,
    scope: Scope,
    before: StoredWindow,
    *,
    folded: Sequence[Entry],
    segments: Sequence[Entry],
    summary: Entry,
    read: Sequence[Entry] = (),
) -> bool:
    resident = parts.resident(scope)
    with resident.lock:
        assert scope.session_id is not None
        try:
            records = parts.ledger.fold(
                scope,
                folded=folded,
                before=before,
                segments=[recorded(s) for s in segments],
                summary=recorded(summary),
                read=read,
            )
        except BaseException:
            resident.forget()
            raise
        if records is None:
            resident.forget_window(scope.session_id)
            return False
        gone = {e.number for e in folded}
        window = parts.window(scope)
        window.take(e for e in list(window.entries) if e.number not in gone)
        window.summary, window.summed = records[-1].entry, True
        resident.put(record.feature(session=window.session) for record in records)
    parts.changed()
    return True


def _write_again(parts: Parts, scope: Scope) -> None:
    """Have the model write what the floor had to write in its place, some segments at a time, from the same turns."""
    while _written_again(parts, scope) and not parts.closing:
        pass


def _written_again(parts: Parts, scope: Scope) -> bool:
    """Whether segments were written again, and others are left."""
    before, *_ = _snapshot(parts, scope, take_due=False)
    old = before.summary
    if old is None or not plain(old) or not summarizer_ready(parts):
        return False
    stored = parts.ledger.segments(scope)
    again: dict[str, Entry] = {}
    turns: list[Entry] = []
    for segment in [s for s in stored if plain(s)][:_REWRITE_EVERY]:
        # What has failed before may have done so for a turn that is only shared with another segment.
        ids = segment.sources[-segment.metadata.get("covered", 1) :] if "tries" in segment.metadata else segment.sources
        read = parts.ledger.by_keys(scope, [parts.ledger.key(scope, id=i) for i in ids])
        theirs = sorted(read.values(), key=lambda e: e.seq)
        healthy = parts.breaker.healthy
        found = _segment_text(parts, theirs, session=before.session)
        if not found.plain:
            turns += theirs
            again[segment.id] = _with_text(parts, segment, found)
        elif healthy:  # it answers others, and not this one
            tries = segment.metadata.get("tries", 1) + 1
            metadata = {**segment.metadata, "tries": tries, "plain": tries < _TRIES}
            again[segment.id] = replace(segment, metadata=metadata, updated_at=parts.clock())
        if not summarizer_ready(parts):
            break
    stored = [again.get(s.id, s) for s in stored]
    text, fresh, rough, tries = old.content, old.metadata.get("fresh", 0), True, old.metadata.get("tries", 0)
    left = any(map(plain, stored))
    if not left:
        newest = sorted(stored, key=lambda e: e.number)[-max(fresh, 1) :]
        waiting = {*again, *(s.id for s in newest)}
        healthy = parts.breaker.healthy
        whole = _rewritten(parts, old, [s for s in stored if s.id in waiting], session=before.session)
        if not whole.plain:
            text, fresh, rough, tries = whole.text, 0, False, 0
        elif healthy:
            tries += 1
            rough = tries < _TRIES  # then the lines that were picked have to do, until there are as many new ones
            fresh = fresh if rough else 0
    if not again and (rough, tries) == (True, old.metadata.get("tries", 0)):
        return False
    made, said = _version(parts, scope, old, text, new=(), fresh=fresh, rough=rough, folded=turns, tries=tries)
    better = [_with_pins(s, made, said) for s in again.values()]
    return _commit(parts, scope, before, folded=(), segments=better, summary=made) and left


def _with_text(parts: Parts, segment: Entry, found: Written) -> Entry:
    return replace(
        segment,
        content=found.text,
        metadata={**segment.metadata, **_maker(found)},
        updated_at=parts.clock(),
        tokens=parts.counter.count(found.text),
    )


def _covered(summary: Entry | None) -> int:
    return int(summary.metadata.get("covered", 0)) if summary else 0


__all__ = ["OWN_METADATA", "compact", "derived", "in_pieces", "shown", "summary", "summary_limit"]
