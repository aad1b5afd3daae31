"""From the dirty set to the vector index: embed, keep the vectors, upsert, clear the mark if the version is unchanged.

A mark names an entry and a version, not an operation: what is done is read from the entry's current state, so that order
never matters and every step can be repeated after a crash.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import groupby
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .._failpoints import failpoint
from ..errors import EmbeddingError, StorageFull
from ..protocols import Asked, Dirty
from ..rules.vectors import unit_rows
from ..types import Entry, Scope, microseconds
from .parts import EmbeddingModel, Parts

Vector = npt.NDArray[np.float32]
T = TypeVar("T")

BATCH = 1024  # marks a pass: the more, the less their texts are padded
_UPSERTED = 256  # entries that go into the vector index together; they are what a crash repeats
_EMBEDDED = 128  # texts a call of the embedder: bounds how long a search waits for its turn
EMBED_NOW = 32  # pending entries of a scope that a search embeds on the spot
MOST_ATTEMPTS = 5  # failures of one entry before it is parked
PARKED = 1 << 62  # the `retry_at` of a parked mark
_FIRST_DELAY = 0.2  # seconds, doubled with each failure
_PROBE = "probe"


def index_batch(parts: Parts) -> int:
    """Bring one batch of marked entries into the vector index; how many marks were looked at.

    When embedder and index work, an entry that fails is postponed, and parked after five failures. When they don't, their
    error is raised: it is nobody's fault among the entries, and they wait.
    """
    # Without an embedder what was deleted still leaves the index; the rest waits.
    marks = parts.ledger.claim(now=_now(), limit=BATCH, gone=parts.embedder is None)
    if not marks:
        return 0
    failpoint("index.claimed")
    try:
        _index(parts, marks)
    except Exception:  # whatever an embedder or Chroma may raise
        if parts.store is not None and parts.store.down is not None:
            raise
        _probe(parts)
        _one_by_one(parts, marks)
    return len(marks)


def _now() -> int:
    """Microseconds of the machine's clock: retries wait for real time, whatever clock dates the entries."""
    return time.time_ns() // 1000


def _probe(parts: Parts) -> None:
    """Index a harmless entry and remove it; raises what the embedder or the index raises."""
    assert parts.store is not None
    if parts.embedder is None:
        parts.store.delete([_PROBE])
        return
    with parts.embedding:
        vectors = unit_rows(parts.embedder.embed_documents([_PROBE]), rows=1)
    assert parts.model_id is not None
    parts.ledger.model(parts.model_id, dimensions=vectors.shape[1])  # raises if the embedder is another than it says
    _fit_store(parts, dimensions=vectors.shape[1])
    parts.store.upsert([_PROBE], vectors, [_PROBE], [{"partition": _PROBE}])
    parts.store.delete([_PROBE])


def _one_by_one(parts: Parts, marks: Sequence[Dirty]) -> None:
    left = {(m.number, m.version) for m in parts.ledger.claim(now=_now(), limit=BATCH, gone=parts.embedder is None)}
    for mark in [m for m in marks if (m.number, m.version) in left]:
        if parts.closing:
            return
        try:
            _index(parts, [mark])
        except StorageFull:
            raise
        except Exception as error:  # this entry's own: it waits, and is parked in the end
            parked = mark.attempts + 1 >= MOST_ATTEMPTS
            parts.ledger.postpone(
                mark,
                retry_at=PARKED if parked else _now() + int(_FIRST_DELAY * 2**mark.attempts * 1_000_000),
                error=f"{type(error).__name__}: {error}",
            )


def _index(parts: Parts, marks: Sequence[Dirty]) -> None:
    """Index what is marked. While some entries are embedded, those before them go into the vector index."""
    assert parts.store is not None
    entries = _warm(parts, marks)
    by_number = {m.number: m for m in marks}
    gone = [m for m in marks if m.number not in entries]
    ready: dict[int, Vector] = {}
    under_way: list[Future[None]] = []

    def delete(gone: Sequence[Dirty]) -> None:
        assert parts.store is not None
        parts.store.delete([m.key for m in gone])
        _cleared(parts, gone)

    def upsert(vectors: Mapping[int, Vector]) -> None:
        assert parts.store is not None
        _fit_store(parts, dimensions=len(next(iter(vectors.values()))))
        live = [entries[number] for number in vectors]
        parts.store.upsert(
            [e.key for e in live],
            np.stack(list(vectors.values())),
            [e.content for e in live],
            [_metadata(parts, e) for e in live],
        )
        _cleared(parts, [by_number[number] for number in vectors])

    with ThreadPoolExecutor(1, "neuralflow-upserting") as beside:
        if gone:  # first: an id that was deleted and used again is in both, under one key
            under_way.append(_submitted(beside, delete, gone))
        for vectors in _embedding(parts, list(entries.values())):
            ready |= vectors
            # What can't be upserted is embedded all the same, for search.
            if len(ready) >= _UPSERTED and all(part.exception() is None for part in under_way):
                under_way.append(_submitted(beside, upsert, ready))
                ready = {}
    for part in under_way:
        part.result()
    if ready:
        upsert(ready)


def _submitted(beside: ThreadPoolExecutor, call: Callable[[T], None], given: T) -> Future[None]:
    """*call* under way with what is *given*; done already where no thread can be had."""
    try:
        return beside.submit(call, given)
    except RuntimeError:  # the interpreter is ending, and starts no thread
        done: Future[None] = Future()
        try:
            call(given)
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)
        return done


def _warm(parts: Parts, marks: Sequence[Dirty]) -> dict[int, Entry]:
    """The marked entries that belong into the index, by number: neither gone nor cold nor without words."""
    found: dict[int, Entry] = {}
    for _, group in groupby(sorted(marks, key=lambda m: m.number), key=lambda m: m.number >> 32):
        own = list(group)
        scope = parts.ledger.owner_scope(own[0].number)
        if scope is not None:
            there = parts.ledger.by_numbers(scope, [m.number for m in own], texts="bare")
            found.update((n, e) for n, e in there.items() if e.tier == "warm" and e.content.strip())
    return found


def _cleared(parts: Parts, marks: Sequence[Dirty]) -> None:
    failpoint("index.upserted")
    parts.ledger.clear_dirty([(m.number, m.version) for m in marks])
    failpoint("index.cleared")


def _fit_store(parts: Parts, *, dimensions: int) -> None:
    """Start the vector index anew when it is empty-handed: a new one, one that lost its files, or one of another model."""
    assert parts.store is not None
    assert parts.model_id is not None
    if parts.store.model_id != parts.model_id:
        # First: a reset that is cut short is seen at the next batch, a lost mark never. Who waits for marks goes by their age.
        parts.ledger.mark_all(again=False)
        parts.store.reset(model_id=parts.model_id, dimensions=dimensions)


def _metadata(parts: Parts, entry: Entry) -> dict[str, str | int | float | bool]:
    """What other clients of the collection can filter by. Times are integers: Chroma does not compare strings."""
    scope = entry.scope
    found: dict[str, str | int | float | bool | None] = {
        "partition": parts.ledger.partition(scope),
        "tenant": scope.tenant,
        "user_id": scope.user_id,
        "session_id": scope.session_id,
        "agent_id": scope.agent_id,
        "type": str(entry.type),
        "role": entry.role,
        "name": entry.name,
        "seq": entry.seq,
        "created_at_ms": microseconds(entry.created_at) // 1000,
        "importance": entry.importance,
        "category": entry.category,
        "version": entry.version,
    }
    return {name: value for name, value in found.items() if value is not None}


def embed_now(parts: Parts, scope: Scope) -> None:
    """Embed what the scope has pending, unless that is much: then it is left to the background."""
    resident = parts.resident(scope)
    with parts.embedding:
        with resident.lock:
            index = resident.index
            pending = [] if index is None else index.number[index.pending].tolist()
        if not 0 < len(pending) <= EMBED_NOW:
            return
        pending_now = parts.ledger.by_numbers(scope, pending, texts="bare").values()
        _embed(parts, [e for e in pending_now if e.tier == "warm"])


def embed_question(
    parts: Parts, scope: Scope, text: str, *, model: EmbeddingModel | None = None, dimensions: int | None = None
) -> Vector:
    """The unit vector of a question, by *model* or by that in use, whose vectors have so many *dimensions*, as far as is known.

    Of the newest 256 that a user asked it is kept in the ledger, under a hash that is bound to the user and the model: asked
    again, also after a restart, they are not embedded. They are forgotten when anything of that user is changed or deleted.
    """
    model = model or parts.model
    assert model is not None
    digest = parts.ledger.content_hash(scope, text=text, model_id=model.id)
    kept, epoch = parts.ledger.question(scope, digest)
    kept = kept or parts.asked_before(digest, epoch=epoch)
    if kept is not None:
        return np.frombuffer(kept, np.float32)
    vector: Vector = unit_rows([model.embedder.embed_query(text)], rows=1)[0]
    if dimensions is not None:
        if len(vector) != dimensions:
            raise EmbeddingError(f"its vectors have {len(vector)} numbers, and those of this folder {dimensions}")
        parts.asked(Asked(scope, digest, model.id, vector.tobytes(), epoch))
    return vector


def _embedding(parts: Parts, entries: Sequence[Entry]) -> Iterator[dict[int, Vector]]:
    """Unit vectors of *entries*, some at a time, by number: from the ledger where they are known. All, unless the memory is closed."""
    # Like lengths together, which an embedder pads to one.
    sorted_entries = sorted(entries, key=lambda e: len(e.content))
    for start in range(0, len(sorted_entries), _EMBEDDED):
        if parts.closing and start:
            return
        with parts.embedding:
            found = _embed(parts, sorted_entries[start : start + _EMBEDDED])
        yield found


def _embed(parts: Parts, entries: Sequence[Entry]) -> dict[int, Vector]:
    with ExitStack() as held:
        for owner in sorted(
            {e.number >> 32 for e in entries}
        ):  # in this order everywhere, so that nobody waits for ever
            held.enter_context(parts.exclusive(f"embed-{owner}"))
        return _embedded(parts, entries)


def _embedded(parts: Parts, entries: Sequence[Entry]) -> dict[int, Vector]:
    """Vectors of *entries*, kept in the ledger; no other process embeds anything of their owners meanwhile."""
    assert parts.embedder is not None
    assert parts.model_id is not None
    ledger = parts.ledger
    hashes = [ledger.content_hash(e.scope, text=e.content, model_id=parts.model_id) for e in entries]
    known: dict[bytes, Vector] = {
        digest: np.frombuffer(vector, np.float32) for digest, vector in ledger.cached_vectors(hashes).items()
    }
    texts = {digest: e.content for digest, e in zip(hashes, entries, strict=True) if digest not in known}
    if texts:
        vectors = unit_rows(parts.embedder.embed_documents(list(texts.values())), rows=len(texts))
        parts.tally["embedded"] += len(texts)
        ledger.model(parts.model_id, dimensions=vectors.shape[1])  # before they mix with those that are known
        known.update(zip(texts, vectors, strict=True))
    failpoint("index.embedded")
    if not entries:
        return {}
    model = ledger.model(parts.model_id, dimensions=len(known[hashes[0]]))
    rows = [(e.number, e.version, h, known[h].tobytes()) for e, h in zip(entries, hashes, strict=True)]
    by_owner = groupby(sorted(zip(entries, rows, strict=True), key=lambda p: p[0].number), lambda p: p[0].number >> 32)
    for _, group in by_owner:
        pairs = list(group)
        # Also for those who are not in RAM: whoever loads them now waits, and finds the vectors in the ledger.
        resident = parts.residents.unused(pairs[0][0].scope)
        with resident.lock:
            kept = ledger.put_vectors(model, [row for _, row in pairs])
            if resident.index is not None and resident.index.model in (0, model):
                resident.index.model = model
                digests = {row[0]: row[2] for _, row in pairs}
                resident.index.embed((number, known[digests[number]]) for number in kept)
    failpoint("index.saved")
    return {e.number: known[h] for e, h in zip(entries, hashes, strict=True)}


__all__ = ["EMBED_NOW", "PARKED", "embed_now", "embed_question", "index_batch"]
