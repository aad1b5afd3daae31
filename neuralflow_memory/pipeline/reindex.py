"""Another embedding model: its vectors are made beside those in use, both are compared, and then it is taken up at once.

Until then the ledger holds vectors of two models, and an entry that changes or goes loses both. So whatever is missing, because
it was written meanwhile, or not done when an earlier run was cut short, is what has no vector of the new model yet.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from .._failpoints import failpoint
from ..errors import ClosedError, ConfigError, ConflictError, EmbeddingError, QueryError, StorageError, brief
from ..rules import ranking
from ..rules.question import understood
from ..rules.traits import QUESTION
from ..rules.vectors import unit_rows
from ..types import TYPE_NUMBER, Entry, MemoryType, ReindexReport, Scope, microseconds
from .cached import Holds
from .export import Progress
from .index import BATCH, EMBED_NOW
from .parts import EmbeddingModel, Parts
from .resident import Resident
from .scope_index import ScopeIndex
from .scoring import SEEDS, compared
from .search import LONGEST_QUERY, outdated, tolerated

Sample = tuple[Scope | None, str]
"""A question, and whose entries it is asked about: None for whoever has the most."""
_PASSES = 8  # over all entries; what is written while the last one is under way is left to the indexer
_AT_ONCE = 64  # texts that are embedded and kept in one step; it may go on for hours beside everything else
_OWNERS = 8  # whose chats samples are taken from
_FIRST = 10  # hits that are compared
_LEAST_WORDS = 4  # of a turn that is taken for a sample
_PROBE = "probe"
_TURN, _EPISODE = TYPE_NUMBER[MemoryType.SHORT_TERM], TYPE_NUMBER[MemoryType.EPISODIC]


def adopted(parts: Parts, using: EmbeddingModel) -> bool:
    """Whether *using* is in use already; if another process has taken it up, so does this one.

    Raises `ConfigError` where there is nothing to change, and `ModelMismatch` where somebody has changed it to something else.
    """
    stored = [name for name, _ in parts.ledger.models()]
    if using.id in stored or (not stored and using.id == parts.model_id):
        if using.id != parts.model_id:
            with parts.embedding:
                _use(parts, using)
            parts.residents.forget()
        return True
    if parts.outdated or (stored and parts.model_id not in (None, stored[0])):
        raise outdated(parts, stored[0] if stored else "another model", parts.model_id)
    if parts.model is None:
        raise ConfigError(
            f"{parts.settings.path} is open without an embedding model, so there is nothing to go on with meanwhile; open it with "
            "the new one: embedder=..., with on_change='reindex' if it was indexed before"
        )
    return False


def built(
    parts: Parts, using: EmbeddingModel, *, progress: Progress | None, samples: int | Sequence[Sample]
) -> ReindexReport:
    """Embed with *using* what it has not embedded yet, and compare it with the model in use."""
    parts.authorize(None, "write", Scope())
    if isinstance(samples, int) and samples < 0:
        raise QueryError(f"samples is a number of questions, or questions, not {brief(samples)}")
    while not parts.ledger.clear_vectors(
        keep=using.id
    ):  # what was begun with a third model, or is left of an earlier one
        _go_on(parts)
    done = _Done()
    for _ in range(_PASSES if parts.ledger.models() else 0):
        if _filled(parts, using, done, progress) <= EMBED_NOW:
            break
    failpoint("reindex.built")
    report = counted(parts, using, previous=parts.model_id, embedded=done.embedded, failed=len(done.failed))
    found = _compared(parts, using, samples, report)
    failpoint("reindex.compared")
    return found


def switched(parts: Parts, using: EmbeddingModel) -> None:
    """Take *using* up, all or nothing; nobody in this process embeds meanwhile."""
    before = parts.model
    assert before is not None
    try:
        # First: a search looks here, and then finds the vectors of either model.
        _use(parts, using)
        parts.ledger.switch_model(before.id, using.id)
    except BaseException:
        if [name for name, _ in parts.ledger.models()] != [using.id]:
            _use(parts, before)
            parts.residents.forget()
        raise


def _use(parts: Parts, using: EmbeddingModel) -> None:
    parts.model, parts.outdated = using, False
    parts.residents.model_id = using.id


def cleared(parts: Parts) -> None:
    """Delete the vectors of the model before, some at a time; cut short, the next call goes on."""
    while not parts.ledger.clear_vectors():
        failpoint("reindex.cleared")
        _go_on(parts)


def counted(
    parts: Parts, using: EmbeddingModel | None, *, previous: str | None = None, embedded: int = 0, failed: int = 0
) -> ReindexReport:
    """How much there is."""
    _, total = parts.ledger.embedded(1)
    return ReindexReport(None if using is None else using.id, previous, total, embedded=embedded, failed=failed)


def _go_on(parts: Parts) -> None:
    if parts.closing:
        raise ClosedError(
            "the memory was closed; open it again with open_memory(...), and call reindex() with the same model to go on"
        )


# -- embedding


@dataclass(slots=True)
class _Done:
    embedded: int = 0
    failed: set[int] = field(default_factory=set)


def _filled(parts: Parts, using: EmbeddingModel, done: _Done, progress: Progress | None) -> int:
    """Embed what is missing, once through; how many entries that were."""
    known = parts.ledger.next_model(using.id)
    # Without a number yet, nothing is there: as with any number that no model has, of the sign that it will have.
    number = _next_number(parts) if known is None else known[0]
    had, total = parts.ledger.embedded(number)
    _told(progress, had, total)
    count = after = 0
    while numbers := parts.ledger.unembedded(number, after=after, limit=BATCH):
        after = numbers[-1]
        entries = _entries(parts, [n for n in numbers if n not in done.failed])
        # Like lengths together, which an embedder pads to one.
        entries.sort(key=lambda e: len(e.content))
        for start in range(0, len(entries), _AT_ONCE):
            _go_on(parts)
            some = entries[start : start + _AT_ONCE]
            _kept(parts, using, some, done)
            count += len(some)
            had += len(some)
            _told(progress, min(had, total), total)
    _told(progress, total, total)
    return count


def _next_number(parts: Parts) -> int:
    (name, _), *_ = parts.ledger.models()
    used = parts.ledger.known_model(name)
    assert used is not None
    return used[0] + 1


def _told(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _entries(parts: Parts, numbers: Sequence[int]) -> list[Entry]:
    found: list[Entry] = []
    for _, group in groupby(numbers, key=lambda n: n >> 32):
        own = list(group)
        scope = parts.ledger.owner_scope(own[0])
        if scope is not None:
            found += parts.ledger.by_numbers(scope, own).values()
    return found


def _kept(parts: Parts, using: EmbeddingModel, entries: Sequence[Entry], done: _Done) -> None:
    """Keep vectors of *entries*. One that fails by itself is left out; if none can be embedded, that is raised."""
    try:
        _embedded(parts, using, entries, done)
    except (StorageError, ConflictError):
        raise
    except Exception:  # whatever an embedder may raise
        probe = unit_rows(using.embedder.embed_documents([_PROBE]), rows=1)
        parts.ledger.next_model(using.id, dimensions=probe.shape[1])  # raises if it is another model than before
        for entry in entries:
            try:
                _embedded(parts, using, [entry], done)
            except (StorageError, ConflictError):
                raise
            except Exception as error:  # this entry's own
                parts.trouble = f"reindexing: {type(error).__name__}: {error}"
                done.failed.add(entry.number)


def _embedded(parts: Parts, using: EmbeddingModel, entries: Sequence[Entry], done: _Done) -> None:
    ledger = parts.ledger
    hashes = [ledger.content_hash(e.scope, text=e.content, model_id=using.id) for e in entries]
    known = ledger.cached_vectors(hashes)
    texts = {h: e.content for h, e in zip(hashes, entries, strict=True) if h not in known}
    if texts:
        vectors = unit_rows(using.embedder.embed_documents(list(texts.values())), rows=len(texts))
        done.embedded += len(texts)
        parts.tally["embedded"] += len(texts)
        known |= zip(texts, (v.tobytes() for v in vectors), strict=True)
    failpoint("reindex.embedded")
    if not known:
        return
    model = ledger.next_model(using.id, dimensions=len(known[hashes[0]]) // 4)
    if model is None:
        raise ConflictError(
            f"{using.id!r} is not the model that is being taken up any more, since a backup was restored meanwhile; call "
            "reindex() again",
            id=using.id,
        )
    rows = [(e.number, e.version, h, known[h]) for e, h in zip(entries, hashes, strict=True)]
    ledger.put_vectors(model[0], rows)
    failpoint("reindex.saved")


# -- comparing


def _compared(
    parts: Parts, using: EmbeddingModel, samples: int | Sequence[Sample], report: ReindexReport
) -> ReindexReport:
    """*report* with what both models find first for samples; without, where the one in use can't be asked any more."""
    before = parts.model
    new = parts.ledger.next_model(using.id)
    old = None if before is None else parts.ledger.known_model(before.id)
    if before is None or old is None or new is None or not samples:
        return report
    found: list[tuple[str, float]] = []
    answered: list[tuple[bool, bool]] = []
    groups = _groups(parts, samples)
    for left, (scope, questions) in zip(range(len(groups), 0, -1), groups.items(), strict=True):
        # Each a share of RAM of its own, for as long as it is compared.
        one, other = (Resident(scope, parts.ledger, max_bytes=sys.maxsize).load(model) for model in (old, new))
        if isinstance(samples, int):
            questions.extend(_taken(parts, scope, other, number=-((len(found) - samples) // left)))
        for question, number, answer in questions:
            after = _first(parts, other, using, question, number)
            hits: list[int] = []
            works = False
            with tolerated(parts, "reindexing without comparing", holds=Holds()):
                hits = _first(parts, one, before, question, number)
                works = True
            if not works:
                return report
            if answer:
                answered.append((answer in hits, answer in after))
            both = len(set(hits) & set(after)) / max(len(hits), len(after), 1)
            found.append((question, both if hits or after else 1.0))
    if not found:
        return report
    return replace(
        report,
        samples=tuple(found),
        overlap=sum(share for _, share in found) / len(found),
        answered_before=sum(b for b, _ in answered) / len(answered) if answered else None,
        answered_after=sum(a for _, a in answered) / len(answered) if answered else None,
    )


_Asked = tuple[str, int, int]
"""A question, and the numbers of the turn that it is and of the next one; 0 for neither."""


def _groups(parts: Parts, samples: int | Sequence[Sample]) -> dict[Scope, list[_Asked]]:
    """Questions by whose entries they are asked about; none yet where they are to be taken from the chats."""
    largest = parts.ledger.largest_owners(_OWNERS)
    groups: dict[Scope, list[_Asked]] = {}
    if isinstance(samples, int):
        return {scope: [] for scope in reversed(largest)}  # the largest makes up for those that have few turns
    for scope, question in samples:
        if scope is not None or largest:
            groups.setdefault(scope or largest[0], []).append((question, 0, 0))
    return groups


def _taken(parts: Parts, scope: Scope, index: ScopeIndex, *, number: int) -> Iterator[_Asked]:
    """So many turns of a scope that another follows: questions, or if there is none, what says something."""
    turns = index.alive & (index.kind == _TURN) & (index.after >= 0) & (index.words >= _LEAST_WORDS)
    asks = turns & (index.traits & QUESTION > 0)
    rows = np.flatnonzero(asks if asks.any() else turns)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(number, len(rows))).astype(np.int64))]
    entries = parts.ledger.by_numbers(scope, index.number[rows].tolist())
    for row in rows.tolist():
        entry = entries.get(int(index.number[row]))
        if entry is not None:
            yield entry.content[:LONGEST_QUERY], entry.number, int(index.number[index.after[row]])


def _first(parts: Parts, index: ScopeIndex, using: EmbeddingModel, question: str, besides: int) -> list[int]:
    """Numbers of the first hits of a search by *using*, whose vectors *index* holds."""
    now = microseconds(parts.clock())
    asked = understood(question, speakers=index.names(), known=index.knows, now=parts.clock())
    vector = unit_rows([using.embedder.embed_query(asked.text)], rows=1)[0]
    if index.vectors.dimensions not in (0, len(vector)):
        raise EmbeddingError(
            f"{using.id!r} gives questions vectors of {len(vector)} numbers, and texts {index.vectors.dimensions}"
        )
    counted = index.alive & ((index.seq > 0) | (index.kind != _EPISODE)) & (index.number != besides)
    found = compared(
        index,
        asked,
        vector,
        None,
        exactly=lambda numbers: parts.ledger.vectors(numbers[0] >> 32, index.model, numbers) if numbers else [],
        counted=counted,
        wanted=counted & (index.expires > now) & (index.valid_from <= now) & (now < index.valid_to),
        weights=parts.settings.ranking,
        now=now,
        seeds=SEEDS,
    )
    hits: list[int] = found.numbers[ranking.best(found.scores, found.allowed, k=_FIRST)].tolist()
    return hits


__all__ = ["Sample", "adopted", "built", "cleared", "counted", "switched"]
