"""Knowledge that says the same: find it, and merge it. Nothing is deleted: what is merged stays, and names what it is in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..errors import ConflictError, InputError, NotFound, QueryError, brief
from ..protocols import Record
from ..rules import duplicates
from ..rules.analysis import recorded
from ..rules.duplicates import Said
from ..rules.vectors import unit_rows
from ..types import Entry, Hit, MemoryType, Merged, Scope
from .cached import Holds
from .edit import MERGED, get
from .index import embed_now
from .parts import Parts
from .search import index_of, tolerated


def similar(
    parts: Parts, scope: Scope, text: str | None, *, id: str | None, k: int, principal: str | None
) -> list[Hit]:
    """The *k* pieces of knowledge that are most alike to a text, or to the entry *id*: what it may supersede."""
    parts.authorize(principal, "read", scope)
    if (text is None) == (id is None):
        raise InputError("similar takes a text or the id of an entry: pass one of them")
    if text is not None and (not isinstance(text, str) or not text.strip()):
        raise QueryError(f"the text is empty, or none: {brief(text)}")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise QueryError(f"k is a number of hits, at least 1, not {brief(k)}")
    own = None if id is None else get(parts, scope, id, principal=principal)
    text = own.content if own is not None else text or ""
    others = [e for e in knowledge(parts, scope) if own is None or e.number != own.number]
    return by_likeness(parts, scope, text, others)[:k]


def by_likeness(parts: Parts, scope: Scope, text: str, others: Sequence[Entry]) -> list[Hit]:
    """What of *others* is at all like *text*, best first."""
    given = duplicates.said(text)
    near = _cosines(parts, scope, text, others)
    hits = [_compared(given, e, near.get(e.number)) for e in others]
    return sorted((h for h in hits if h.score > 0), key=lambda h: -h.score)


def _compared(given: Said, entry: Entry, cosine: float | None) -> Hit:
    other = duplicates.said(entry.content)
    signals = {} if cosine is None else {"cosine": round(cosine, 4)}
    signals |= {
        "words": round(duplicates.alike(given, other, None), 4),
        "agree": float(duplicates.agree(given, other)),
    }
    return Hit(entry, duplicates.alike(given, other, cosine), signals)


def consolidate(parts: Parts, scope: Scope, *, dry_run: bool = False, principal: str | None = None) -> list[Merged]:
    """Merge the knowledge of the scope's owner that says the same; what was merged, or with *dry_run* would be, and why.

    Each merge is a transaction of its own, so that this may be interrupted anywhere and done again. What somebody changes
    meanwhile is left for the next time.
    """
    parts.authorize(principal, "read" if dry_run else "write", scope)
    return merge(parts, scope, dry_run=dry_run)


def merge(parts: Parts, scope: Scope, *, dry_run: bool) -> list[Merged]:
    """The same for a sweep, which is nobody's."""
    resident = parts.resident(scope)
    done: list[Merged] = []
    for kept, gone, merged in _planned(parts, scope):
        if not dry_run:
            with resident.lock:
                try:
                    records = _records(parts, kept, gone)
                    written = parts.ledger.revise(scope, changed=records)
                    resident.put(record.feature(session=session) for record, session in written)
                except (ConflictError, NotFound):
                    resident.forget()
                    continue
                except BaseException:
                    resident.forget()
                    raise
            parts.changed()
        done.append(merged)
        if parts.closing:
            break
    return done


def _records(parts: Parts, kept: Entry, gone: Sequence[Entry]) -> list[Record]:
    """New versions of what is kept, strengthened by what goes into it, and of that."""
    now = parts.clock()
    for entry in gone:
        own = {k: v for k, v in entry.metadata.items() if k not in kept.metadata}
        stronger = duplicates.strengthened(kept, replace(entry, category=kept.category or entry.category, metadata=own))
        kept = replace(
            stronger,
            source=kept.source or entry.source,
            supersedes=duplicates.union(kept.supersedes, [entry.id]),
            updated_at=now,
        )
    ended = [
        replace(
            e,
            valid_to=e.valid_from or e.created_at,  # the other speaks for it from its beginning
            superseded_by=kept.id,
            metadata={**e.metadata, MERGED: kept.id},
            updated_at=now,
        )
        for e in gone
    ]
    return [recorded(e) for e in (kept, *ended)]


def _planned(parts: Parts, scope: Scope) -> list[tuple[Entry, list[Entry], Merged]]:
    """What is to be kept, what is to go into it, and what is said of that; no entry is in two of them."""
    entries = [e for e in knowledge(parts, scope) if e.type is MemoryType.LONG_TERM]
    texts = [duplicates.said(e.content) for e in entries]
    filed = [(e.category, e.scope.agent_id, repr(sorted(e.metadata.items()))) for e in entries]
    found = list(duplicates.pairs(texts, filed))
    numbers = {entries[row].number for pair in found for row in pair}
    vectors = _vectors(parts, scope, numbers, model_id=parts.model_id)
    by: dict[int, tuple[int, float, str]] = {}
    # The pairs that are most alike first: what is merged already is not merged again, nor into what goes itself.
    judged = []
    for one, other in found:
        first, second = entries[one], entries[other]
        near = _cosine(vectors.get(first.number), vectors.get(second.number))
        if duplicates.same(texts[one], texts[other], near) and not duplicates.apart(first, second):
            score = 1.0 if first.content == second.content else duplicates.alike(texts[one], texts[other], near)
            judged.append((score, one, other))
    into: set[int] = set()
    for score, one, other in sorted(judged, key=lambda j: (-j[0], j[1:])):
        keep, go = _order(entries, texts, one, other)
        if go in by or go in into or keep in by or _parted(parts, scope, entries[keep], entries[go]):
            continue
        exactly = entries[keep].content == entries[go].content
        words = texts[keep].order == texts[go].order
        reason = "says the same" if exactly else "the same words" if words else "says that, and more"
        by[go] = (keep, score, reason)
        into.add(keep)
    groups: dict[int, list[int]] = {}
    for go, (keep, _, _) in by.items():
        groups.setdefault(keep, []).append(go)
    return [
        (
            entries[keep],
            [entries[row] for row in rows],
            Merged(
                entries[keep].id,
                tuple(entries[row].id for row in rows),
                min(by[row][1] for row in rows),
                "; ".join(dict.fromkeys(by[row][2] for row in rows)),
            ),
        )
        for keep, rows in groups.items()
    ]


def _order(entries: Sequence[Entry], texts: Sequence[Said], one: int, other: int) -> tuple[int, int]:
    """Which is kept and which goes: what says more is kept, else what was told, else what was first."""

    def rank(row: int) -> tuple[int, bool, int]:
        return (-len(texts[row].order), entries[row].provenance != "told", entries[row].number)

    keep, go = sorted((one, other), key=rank)
    return keep, go


def _parted(parts: Parts, scope: Scope, kept: Entry, gone: Entry) -> bool:
    """Whether the one was merged into the other before, and somebody has taken them apart."""
    return gone.version > 1 and any(e.superseded_by == kept.id for e in parts.ledger.history(scope, gone.number))


def knowledge(parts: Parts, scope: Scope) -> list[Entry]:
    """The owner's knowledge that holds now, without the texts of keyed values and what folds and tasks have made.

    What is in a block that can't be read is left out.
    """
    now = parts.clock()
    found = [
        e
        for e in parts.ledger.select(scope, session_only=False, types=[MemoryType.LONG_TERM], texts="skip")
        if e.held(max(now, e.created_at)) and (e.expires_at is None or e.expires_at > now)
    ]
    values = parts.ledger.values_of(scope, [e.number for e in found])
    return [e for e in found if e.number not in values]


def _cosines(parts: Parts, scope: Scope, text: str, entries: Sequence[Entry]) -> dict[int, float]:
    """Cosines of a text with *entries*, by number; none where they have no vectors, or the embedder fails."""
    using = parts.model
    if using is None or not entries:
        return {}
    resident = parts.resident(scope)
    with resident.lock:
        pending = bool(index_of(parts, resident).pending.any())
    found: dict[int, float] = {}
    with tolerated(parts, "comparing by words alone", holds=Holds()):
        if pending:
            embed_now(parts, scope)
        with parts.embedding:
            own = unit_rows(using.embedder.embed_documents([text]), rows=1)[0]
        vectors = _vectors(parts, scope, {e.number for e in entries}, model_id=using.id)
        found = {number: float(own @ vector) for number, vector in vectors.items() if len(vector) == len(own)}
    return found  # noqa: RET504 - empty where the block above was left by an error


def _vectors(
    parts: Parts, scope: Scope, numbers: Iterable[int], *, model_id: str | None
) -> Mapping[int, npt.NDArray[np.float32]]:
    """The vectors by a model that the ledger has of entries."""
    wanted = sorted(numbers)
    owner = parts.ledger.owner(scope) if wanted else None
    model = None if model_id is None else parts.ledger.known_model(model_id)
    if owner is None or model is None:
        return {}
    return {n: np.frombuffer(v, np.float32) for n, v in parts.ledger.vectors(owner, model[0], wanted)}


def _cosine(one: npt.NDArray[np.float32] | None, other: npt.NDArray[np.float32] | None) -> float | None:
    return None if one is None or other is None else float(one @ other)


__all__ = ["by_likeness", "consolidate", "knowledge", "merge", "similar"]
